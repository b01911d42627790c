"""A prompt with 144 answers of two tokens each, their rewards and a reference, all known: small
enough for the policy that maximizes E[r] - beta KL(pi || pi_ref), pi_ref exp(r / beta), to be
written down.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from plumb.losses.contract import Rollouts, TokenLogps

VOCABULARY = 12
A = VOCABULARY**2
BETA = 0.5
# KL from a policy to where it must arrive, in nats, that counts as reached; the reference is 0.07
# nats and more away from any of these places
REACHED = 1e-8


def random(*shape, seed):
    """Return normal draws in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


REWARDS = random(A, seed=0)
REFERENCE = (0.5 * random(A, seed=1)).log_softmax(0)
# of every answer, its two tokens, all first ones before all second ones
FIRST, SECOND = torch.arange(A) // VOCABULARY, torch.arange(A) % VOCABULARY
RESPONSE = torch.arange(A).repeat(2)


def tables(log_pi: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of the first token [12], and of the second after each [12, 12]."""
    both = log_pi.view(VOCABULARY, VOCABULARY)
    first = both.logsumexp(1)
    return first, both - first[:, None]


def by_token(first: Tensor, second: Tensor) -> Tensor:
    """Return the log-probability of each token of each answer.  [2 A]"""
    return torch.cat([first[FIRST], second[FIRST, SECOND]])


def distance(log_pi: Tensor, other: Tensor) -> float:
    """Return KL(pi || other), nats; `other` up to a constant."""
    return float((log_pi.exp() * (log_pi - other.log_softmax(0))).sum())


def gibbs(beta: float = BETA) -> Tensor:
    """Return the logarithm of the best policy, up to a constant.  [A]"""
    return REFERENCE + REWARDS / beta


class Broken(NamedTuple):
    """Hold what a test breaks on purpose.

    Example: advantages, or labels, with the wrong sign: Broken(sign=-1.0).
    """

    sign: float = 1.0
    mask: int = 2  # number of tokens of an answer that are trained
    temperature: float = 1.0  # of the sampling, not of the log-probabilities
    kl_scale: float = 1.0  # of what is taken off the reward
    critic: str = "learns"  # or "fixed", or "late": it has seen the token that it is to judge


RIGHT = Broken()


def samples(each: Tensor, old: Tensor, advantages: Tensor, mask: int = 2) -> Rollouts:
    """Return every answer as one sample of a prompt of its own. `advantages`: of answers, [A], or
    of their tokens, [2 A]; `mask`: how many tokens of each are there.
    """
    n = mask * A
    by_token = len(advantages) == 2 * A
    return Rollouts(
        responses=TokenLogps(each[:n], RESPONSE[:n], A),
        example=torch.arange(A),
        n=A,
        old=old[:n],
        advantages=torch.zeros(A) if by_token else advantages,
        token_advantages=advantages[:n] if by_token else None,
    )


def to_learn(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two tables, normalised, as leaves that get gradients."""
    first, second = (x.detach().log_softmax(-1).requires_grad_() for x in (first, second))
    return first, second


@torch.no_grad()
def natural_step(both: tuple[Tensor, Tensor], rate: float) -> None:
    """Move two normalised tables along their natural gradient, which is the gradient over the
    probabilities with which the policy draws.
    """
    first, second = both
    p_first, p_second = first.exp(), second.exp()
    first -= rate * first.grad / p_first
    second -= rate * second.grad / (p_first[:, None] * p_second)


def log_policy(first: Tensor, second: Tensor) -> Tensor:
    """Return log pi of the tables, normalised.  [A]"""
    return by_token(first.log_softmax(-1), second.log_softmax(-1)).view(2, A).sum(0)
