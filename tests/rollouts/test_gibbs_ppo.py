"""PPO with a critic on the bandit of test_gibbs.py: it must arrive at pi_ref exp(r / beta) too.

The critic has one value before the first token and one after each first token. All 144 answers are
seen in every step, each with its probability under the policy that draws, so nothing is left to
chance; the policy's steps follow the natural gradient, the critic's are half the way to what is
returned on average. Both learn at once: at the end of the steps both are exact.
"""

import numpy as np
import pytest
import torch
from bandit import (
    BETA,
    FIRST,
    REACHED,
    REFERENCE,
    REWARDS,
    RIGHT,
    VOCABULARY,
    A,
    Broken,
    by_token,
    distance,
    gibbs,
    log_policy,
    natural_step,
    samples,
    tables,
    to_learn,
)
from losses import knobs_of
from torch import Tensor

from plumb.losses.policy_gradient import k3
from plumb.losses.registry import build_loss
from plumb.rollouts import gae
from plumb.rollouts.critic import value_losses

LENGTHS = np.full(A, 2)


def interleaved(of_tokens: Tensor) -> np.ndarray:
    """Return the numbers of all first and then all second tokens [2 A], answer by answer."""
    return of_tokens.view(2, A).T.reshape(-1).numpy()


def learned(broken: Broken = RIGHT, n_steps: int = 40, **knobs) -> Tensor:
    """Return log pi [A] after n_steps policies, each of which draws its own samples."""
    bound = build_loss(knobs_of("ppo") | {"beta": BETA, "whiten": "none"} | knobs)
    rule = bound.advantages
    first, second = tables(REFERENCE)
    reference = by_token(first, second)
    values = torch.zeros(1 + VOCABULARY, dtype=torch.float64)
    for _ in range(n_steps):
        first, second = to_learn(first, second)
        log_p = by_token(first.log_softmax(-1), second.log_softmax(-1))
        old = log_p.detach()
        drawn = old.view(2, A).sum(0).exp()
        kl = gae.kl_of_tokens(interleaved(old), interleaved(reference), rule.kl_token)
        kl = broken.kl_scale * rule.kl_weight * kl
        before = torch.cat([values[:1].expand(A), values[1:][FIRST]])  # [2 A]
        if broken.critic == "late":
            before = torch.cat([values[1:][FIRST], REWARDS])
        made = gae.advantages_by_token(REWARDS.numpy(), kl, interleaved(before), LENGTHS, rule)
        advantages, returns = (torch.from_numpy(x).view(A, 2).T.reshape(-1) for x in made)

        loss = bound.compute(
            samples(log_p, old, broken.sign * advantages, broken.mask),
            samples(reference, old, advantages, broken.mask),
        )
        (loss.losses * drawn).sum().backward()
        p_first = first.detach().exp()
        natural_step((first, second), 0.5 / BETA)
        if broken.critic != "fixed":
            values = regressed(values, returns, drawn, p_first)
    return log_policy(first.detach(), second.detach())


def regressed(values: Tensor, returns: Tensor, drawn: Tensor, p_first: Tensor) -> Tensor:
    """Return the critic's values half way to the mean of their returns."""
    values = values.clone().requires_grad_()
    of_tokens = torch.cat([values[:1].expand(A), values[1:][FIRST]])
    losses, _ = value_losses(of_tokens, of_tokens.detach(), returns, 0.2)
    (losses * drawn.repeat(2)).sum().backward()
    often = torch.cat([torch.ones(1), p_first])
    return (values - 0.5 * values.grad / often).detach()


@pytest.mark.parametrize("knobs", [{}, {"gae_lambda": 1.0}, {"gae_lambda": 0.5}])
def test_the_gibbs_policy_is_reached(knobs):
    assert distance(REFERENCE, gibbs()) > 2
    assert distance(learned(**knobs), gibbs()) < REACHED


def test_with_lambda_1_the_critic_is_a_baseline_only():
    """Even one that never learns changes nothing; with less, its error stays in the policy."""
    never = Broken(critic="fixed")
    assert distance(learned(never, gae_lambda=1.0), gibbs()) < REACHED
    assert distance(learned(never), gibbs()) > 1e-3


def test_a_kl_that_is_never_negative_has_its_own_fixed_point():
    """Tokens that become less likely than under the reference are not paid for it."""
    reached = learned(kl_token="k1_positive", n_steps=80)
    assert distance(reached, gibbs()) == pytest.approx(0.431, abs=0.001)


# ---- the comparison can fail ----


@pytest.mark.parametrize(
    "broken",
    [
        Broken(sign=-1.0),
        Broken(mask=1),
        Broken(kl_scale=0.5),
        Broken(kl_scale=2.0),
        Broken(critic="late"),
    ],
)
def test_what_is_broken_is_found(broken):
    assert distance(learned(broken, n_steps=10), gibbs()) > 0.1


def test_k3_in_the_reward_is_found(monkeypatch):
    """It has the mean of k1 and no end: a token below the reference costs the more the less likely
    it is, so it becomes unlikelier still. In the loss (grpo) its gradient is another one.
    """
    k3_of = lambda policy, reference, kind: k3(*map(torch.from_numpy, (policy, reference))).numpy()
    monkeypatch.setattr(gae, "kl_of_tokens", k3_of)
    assert not distance(learned(n_steps=20), gibbs()) < 1


def test_a_reward_on_another_token_is_found(monkeypatch):
    """On the first in place of the last: the second is chosen before anything depends on it."""

    def misplaced(rewards, kl, lengths):
        each = -kl
        each[lengths.cumsum() - lengths] += rewards
        return each

    monkeypatch.setattr(gae, "token_rewards", misplaced)
    assert distance(learned(), gibbs()) > 0.1


def test_values_of_the_next_answer_are_found(monkeypatch):
    """What follows the last token is not worth 0: the next answer's first value is taken."""

    def unbounded(rewards, values, lengths, gamma, gae_lambda):
        return right(rewards, values, np.array([lengths.sum()]), gamma, gae_lambda)

    right = gae.gae
    monkeypatch.setattr(gae, "gae", unbounded)
    assert not distance(learned(n_steps=10), gibbs()) < 0.1
