"""Advantages of tokens by hand, and what the weight of the KL becomes."""

import numpy as np
import pytest
from losses import knobs_of

from plumb.losses.registry import build_loss
from plumb.rollouts.gae import (
    EPSILON,
    advantages_by_token,
    gae,
    kl_of_tokens,
    token_rewards,
    whitened,
)
from plumb.rollouts.kl_control import KlControl

# a response of three tokens, then one of one token
LENGTHS = np.array([3, 1])
VALUES = np.array([0.5, 1.0, -1.0, 2.0])


def rule(**knobs):
    return build_loss(knobs_of("ppo") | knobs).advantages


def test_three_tokens_by_hand():
    """The reward 2 lands on the third, the end token. delta: 1 - 0.5, -1 - 1 and 2 + 1, with gamma
    = 1; A: 3, -2 + 3 / 2 and 0.5 - 0.5 / 2, with lambda = 1/2.
    """
    rewards = token_rewards(np.array([2.0, -1.0]), np.zeros(4), LENGTHS)
    assert rewards.tolist() == [0, 0, 2, -1]
    assert gae(rewards, VALUES, LENGTHS, 1.0, 0.5).tolist() == [0.25, -0.5, 3, -3]


def test_a_discount_by_hand():
    """delta: 1 / 2 - 0.5, -1 / 2 - 1 and 2 + 1; each A is its delta and a quarter of the next A."""
    rewards = np.array([0.0, 0, 2, -1])
    assert gae(rewards, VALUES, LENGTHS, 0.5, 0.5).tolist() == [-0.1875, -0.75, 3, -3]


def test_with_lambda_1_the_critic_is_a_baseline_only():
    """A_t is what comes from t on less V_t; with exact values, lambda changes nothing."""
    rewards = np.array([0.1, -0.2, 2.0, -1])
    to_come = np.array([1.9, 1.8, 2.0, -1])
    np.testing.assert_allclose(gae(rewards, VALUES, LENGTHS, 1.0, 1.0), to_come - VALUES)
    for share in (0.1, 0.95, 1.0):
        np.testing.assert_allclose(gae(rewards, to_come, LENGTHS, 1.0, share), 0, atol=1e-12)


def test_each_response_is_on_its_own():
    """In any order, alone or with others: no value or reward passes a response's end."""
    rng = np.random.default_rng(0)
    lengths = np.array([4, 1, 7, 2])
    rewards, values = rng.normal(size=(2, 14))
    ends = lengths.cumsum()[:-1]
    parts = [
        gae(r, v, np.array([len(r)]), 0.9, 0.8)
        for r, v in zip(np.split(rewards, ends), np.split(values, ends), strict=True)
    ]
    np.testing.assert_allclose(gae(rewards, values, lengths, 0.9, 0.8), np.concatenate(parts))


def test_the_kl_of_identical_models_is_0():
    logps = np.array([-1.0, -2, -3])
    for kind in ("k1", "k1_positive"):
        assert not kl_of_tokens(logps, logps, kind).any()


def test_the_kl_of_tokens_by_hand():
    ours, theirs = np.array([-1.0, -3.0]), np.array([-2.0, -2.0])
    assert kl_of_tokens(ours, theirs, "k1").tolist() == [1, -1]
    assert kl_of_tokens(ours, theirs, "k1_positive").tolist() == [1, 0]


def test_its_mean_is_the_exact_kl():
    """On a vocabulary of 3. With k1_positive it is not: what is below 0 is cut off."""
    pi, reference = np.array([0.2, 0.5, 0.3]), np.array([0.6, 0.3, 0.1])
    exact = pi @ np.log(pi / reference)
    mean = lambda kind: pi @ kl_of_tokens(np.log(pi), np.log(reference), kind)
    assert mean("k1") == pytest.approx(exact)
    assert mean("k1_positive") > exact + 0.1


def test_whitening_by_hand():
    """Mean 2, squares 1 + 1 + 4 + 4 over 3."""
    values = np.array([1.0, 3, 0, 4])
    expected = np.array([-1, 1, -2, 2]) / np.sqrt(10 / 3 + EPSILON)
    np.testing.assert_allclose(whitened(values), expected)
    assert not whitened(np.full(3, 7.0)).any() and not whitened(np.array([5.0])).any()


def test_what_is_whitened():
    """The returns are those of the rewards that the critic sees; advantages lose their mean, and
    rewards keep theirs.
    """
    rewards, kl = np.array([2.0, -1.0]), np.array([0.5, 0.0, 0.0, 1.0])
    plain = advantages_by_token(rewards, kl, VALUES, LENGTHS, rule(whiten="none"))
    each = np.array([-0.5, 0, 2, -2])
    np.testing.assert_allclose(plain.values, gae(each, VALUES, LENGTHS, 1.0, 0.95))
    np.testing.assert_allclose(plain.returns, plain.values + VALUES)
    white = advantages_by_token(rewards, kl, VALUES, LENGTHS, rule(whiten="advantages"))
    np.testing.assert_allclose(white.values, whitened(plain.values))
    np.testing.assert_allclose(white.returns, plain.returns)
    both = advantages_by_token(rewards, kl, VALUES, LENGTHS, rule(whiten="rewards_and_advantages"))
    each = whitened(each) - 0.5 / 4
    estimated = gae(each, VALUES, LENGTHS, 1.0, 0.95)
    np.testing.assert_allclose(both.values, whitened(estimated))
    np.testing.assert_allclose(both.returns, estimated + VALUES)


# ---- the weight of the KL ----


def test_a_controlled_weight_by_hand():
    """12 nats are 1 above the target of 6, which counts as 0.2; 6.6 are 0.1; 3 count as -0.2."""
    control = KlControl.of(build_loss(knobs_of("ppo_openai2019")).advantages)
    weight = 0.15
    for kl, error in ((12.0, 0.2), (6.6, 0.1), (6.0, 0.0), (3.0, -0.2)):
        control.update(kl, n=512)
        weight *= 1 + error * 512 / 10_000
        assert control.weight == pytest.approx(weight)
    other = KlControl(0.15, 6.0, 1e4)
    other.load_state_dict(control.state_dict())
    assert other.weight == control.weight


def test_a_fixed_weight_stays():
    control = KlControl.of(rule())
    control.update(1e3, n=512)
    assert control.weight == 0.05
