"""A prompt with 144 answers of two tokens each, their rewards and a reference, all known: small
enough for the policy that maximizes E[r] - beta KL(pi || pi_ref), pi_ref exp(r / beta), to be
written down.
"""

import torch
from torch import Tensor

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
