"""Policy gradients on a bandit whose best policy is known: what maximizes E[r] - beta KL(pi ||
pi_ref) is pi_ref exp(r / beta), the Gibbs policy.

One prompt, a vocabulary of 12, answers of 2 tokens: A = 144 answers, with random rewards r [A]. The
policy is two tables of logits, of the first token [12] and of the second after each first [12, 12].
Groups have k = 2 samples, so the expectation over all 144^2 groups is exact: nothing is left to
chance. Steps follow the natural gradient, which changes the way to a fixed point but not the point.
"""

import pytest
import torch
from bandit import (
    BETA,
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
    random,
    samples,
    tables,
    to_learn,
)
from losses import knobs_of
from torch import Tensor

from plumb.losses import policy_gradient
from plumb.losses.registry import build_loss
from plumb.rollouts.advantages import EPSILON, advantages


def expected_advantages(bound, log_pi: Tensor, drawn: Tensor, kl_scale: float) -> Tensor:
    """Return the mean advantage of each answer over what it may be drawn together with.  [A]"""
    i, j = torch.cartesian_prod(torch.arange(A), torch.arange(A)).T
    groups = torch.stack([i, j], 1)
    kl = kl_scale * policy_gradient.k1(log_pi, REFERENCE)
    made = advantages(REWARDS[groups].numpy(), bound.advantages, kl[groups].numpy())
    return torch.from_numpy(made.values)[:, 0].view(A, A) @ drawn.exp()


def learned(name: str, broken: Broken = RIGHT, n_steps: int = 18, **knobs) -> Tensor:
    """Return log pi [A] after the loss's exact gradients of n_steps policies, each of which draws
    its own samples.
    """
    bound = build_loss(knobs_of(name) | knobs)
    first, second = tables(REFERENCE)
    beta = bound.knobs["beta"]
    for _ in range(n_steps):
        first, second = to_learn(first, second)
        log_p = by_token(first.log_softmax(-1), second.log_softmax(-1))
        log_pi = log_p.detach().view(2, A).sum(0)
        drawn = (log_pi / broken.temperature).log_softmax(0)
        a = expected_advantages(bound, log_pi, drawn, broken.kl_scale)
        loss = bound.compute(
            samples(log_p, log_p.detach(), broken.sign * a, broken.mask),
            samples(by_token(*tables(REFERENCE)), log_p.detach(), a, broken.mask),
        )
        (loss.losses * drawn.exp()).sum().backward()
        natural_step((first, second), 0.5 / beta * len(log_p) / A / divisor(bound))
    return log_policy(first.detach(), second.detach())


def divisor(bound) -> float:
    """Return what makes steps of all normalizers as long as those of a sum over tokens."""
    return 2.0 if bound.knobs["normalizer"] == 1 else 1.0


# the KL of the whole answer counts for each of its tokens
WHOLE = {"scale": "none", "ratio": "sequence", "normalizer": 1, "beta": BETA}
BY_TOKEN = {"scale": "none", "beta": BETA}


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("rloo", {"beta": BETA}),
        ("rloo", {"beta": BETA, "baseline": "batch_mean"}),
        ("rloo", {"beta": BETA, "ratio": "token", "normalizer": "sequence"}),
        ("grpo", {**WHOLE, "baseline": "leave_one_out"}),
    ],
)
def test_the_gibbs_policy_is_reached(name, knobs):
    assert distance(REFERENCE, gibbs()) > 2
    assert distance(learned(name, **knobs), gibbs()) < REACHED


def test_a_mean_that_contains_the_sample_itself_doubles_beta():
    """r_i - (r_i + r_j) / 2 is half of what leave-one-out gives, beside the same KL."""
    reached = learned("grpo", **WHOLE)
    assert distance(reached, gibbs(2 * BETA)) < REACHED
    assert distance(reached, gibbs()) == pytest.approx(0.553, abs=0.001)


def test_a_kl_that_counts_token_by_token_has_its_own_fixed_point():
    """The second token is the Gibbs policy's. The first is chosen by the mean reward after it,
    where the Gibbs policy also counts the KL after it.
    """
    reached = learned("grpo", **BY_TOKEN, baseline="leave_one_out")
    _, after = tables(gibbs().log_softmax(0))
    value = (after.exp() * REWARDS.view(VOCABULARY, VOCABULARY)).sum(1)
    first = (tables(REFERENCE)[0] + value / BETA).log_softmax(0)
    assert distance(reached, (first[:, None] + after).flatten()) < REACHED
    assert distance(reached, gibbs()) == pytest.approx(0.040, abs=0.001)


def test_the_groups_deviation_replaces_rewards_by_ranks():
    """With k = 2, (r_i - mean) / deviation = +-1 / sqrt 2: of a reward, only how often it wins
    against the policy's own samples is left, and by how much is lost.
    """
    reached = learned("grpo", **{**WHOLE, "scale": "group"}, n_steps=40)
    gap = REWARDS[:, None] - REWARDS
    wins = gap / 2 / (gap.abs() / 2**0.5 + EPSILON) @ reached.exp()
    assert distance(reached, REFERENCE + wins / BETA) < REACHED
    assert distance(reached, gibbs()) == pytest.approx(0.935, abs=0.001)


# ---- the comparison can fail ----


@pytest.mark.parametrize(
    "broken", [Broken(sign=-1.0), Broken(mask=1), Broken(kl_scale=0.5), Broken(kl_scale=2.0)]
)
def test_what_is_broken_is_found(broken):
    assert distance(learned("rloo", broken, n_steps=8, beta=BETA), gibbs()) > 0.1


def test_a_temperature_of_the_sampling_alone_is_found():
    """With the KL in the loss. With the KL in the reward, r - beta log pi / pi_ref is the same for
    all answers at the Gibbs policy: whatever is sampled, that is where nothing moves.
    """
    broken = Broken(temperature=0.7)
    assert distance(learned("grpo", broken, **WHOLE, baseline="leave_one_out"), gibbs()) > 0.02
    assert distance(learned("rloo", broken, n_steps=25, beta=BETA), gibbs()) < 0.005


def test_a_baseline_that_depends_on_the_sample_is_found(monkeypatch):
    """Half of a sample's own reward, beside the others': the KL weighs twice as much."""
    of_others = "plumb.rollouts.advantages.baselines"
    monkeypatch.setattr(of_others, lambda rewards, baseline: rewards.mean(1, keepdims=True))
    reached = learned("grpo", **WHOLE, baseline="leave_one_out")
    assert distance(reached, gibbs()) > 0.02


@pytest.mark.parametrize("estimator", [policy_gradient.k1, policy_gradient.k3])
def test_an_estimator_without_its_ratio_is_found(monkeypatch, estimator):
    """Without the ratio, k1 has no gradient in expectation, and k3 that of KL(pi_ref || pi)."""

    def without(policy, reference, surrogate):
        tokens = policy.responses
        return tokens.sum(estimator(tokens.each, reference.responses.each))

    monkeypatch.setattr(policy_gradient, "_weighted_k3", without)
    reached = learned("grpo", **WHOLE, baseline="leave_one_out", n_steps=20)
    assert not distance(reached, gibbs()) < 0.02


# ---- samples of an older policy ----


def test_the_ratio_of_the_sequence_corrects_for_an_older_policy():
    """The gradient of sum_y pi(y) A(y), from samples of another policy; a ratio for each token has
    another one, which is the same where the policies are.
    """
    old = by_token(*tables(REFERENCE))
    logits = random(VOCABULARY + A, seed=3).requires_grad_()
    log_p = by_token(
        logits[:VOCABULARY].log_softmax(0),
        logits[VOCABULARY:].view(VOCABULARY, VOCABULARY).log_softmax(1),
    )
    free = {"clip_low": None, "clip_high": None, "kl": "none", "beta": None, "normalizer": 1}

    def gradient(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    exact = gradient(-(log_p.view(2, A).sum(0).exp() * REWARDS).sum())
    off = {}
    for ratio in ("sequence", "token"):
        bound = build_loss(knobs_of("rloo") | free | {"ratio": ratio})
        losses = bound.compute(samples(log_p, old, REWARDS)).losses
        off[ratio] = float((gradient((losses * REFERENCE.exp()).sum()) - exact).abs().max())
    assert off["sequence"] < 1e-12 < 1e-3 < off["token"]
