"""Advantages by hand: baselines and scales of groups, also of different sizes."""

import numpy as np
import pytest

from plumb.losses.advantage_rules import AdvantageRule
from plumb.rollouts.advantages import EPSILON, advantages, has_spread, scaled

NAN = np.nan
# three rewards, two, and one
RAGGED = np.array([[1.0, 2.0, 6.0], [4.0, 0.0, NAN], [5.0, NAN, NAN]])
# their mean is 3, the squares of what is left 4 + 1 + 9 + 1 + 9 + 4 = 28
BATCH = np.sqrt(28 / 5) + EPSILON


@pytest.mark.parametrize(
    ("baseline", "scale", "expected"),
    [
        # the others of 1 are 2 and 6, of 2 are 1 and 6, of 6 are 1 and 2
        ("leave_one_out", "none", [[-3, -1.5, 4.5], [4, -4, NAN], [0, NAN, NAN]]),
        # means 3, 2 and 5
        ("group_mean", "none", [[-2, -1, 3], [2, -2, NAN], [0, NAN, NAN]]),
        ("batch_mean", "none", [[-2, -1, 3], [1, -3, NAN], [2, NAN, NAN]]),
        # deviations: (4 + 1 + 9) / 2 = 7, (4 + 4) / 1 = 8, and none
        (
            "group_mean",
            "group",
            [
                [-2 / (7**0.5 + EPSILON), -1 / (7**0.5 + EPSILON), 3 / (7**0.5 + EPSILON)],
                [2 / (8**0.5 + EPSILON), -2 / (8**0.5 + EPSILON), NAN],
                [0, NAN, NAN],
            ],
        ),
        (
            "group_mean",
            "batch",
            [[-2 / BATCH, -1 / BATCH, 3 / BATCH], [2 / BATCH, -2 / BATCH, NAN], [0, NAN, NAN]],
        ),
        (
            "batch_mean",
            "batch",
            [
                [-2 / BATCH, -1 / BATCH, 3 / BATCH],
                [1 / BATCH, -3 / BATCH, NAN],
                [2 / BATCH, NAN, NAN],
            ],
        ),
    ],
)
def test_by_hand(baseline, scale, expected):
    np.testing.assert_allclose(scaled(RAGGED, baseline, scale), expected, rtol=1e-12)


def test_leave_one_out_is_a_multiple_of_the_groups_mean():
    """r_i - mean of the others = k / (k - 1) (r_i - mean): the same direction, another length."""
    rewards = np.random.default_rng(0).normal(size=(5, 4))
    ours, mean = scaled(rewards, "leave_one_out", "none"), scaled(rewards, "group_mean", "none")
    np.testing.assert_allclose(ours, 4 / 3 * mean)
    np.testing.assert_allclose(ours.sum(1), 0, atol=1e-12)


def test_whitened_rewards_have_mean_0_and_deviation_1():
    white = scaled(RAGGED, "batch_mean", "batch")
    assert np.nanmean(white) == pytest.approx(0, abs=1e-12)
    assert np.nanstd(white, ddof=1) == pytest.approx(1, rel=1e-3)


def test_equal_rewards_are_counted_and_dropped():
    """The middle group's differ by rounding alone. A group that is dropped is not part of the
    batch's deviation either.
    """
    rewards = np.array([[1.0, 3.0], [7.0, 7.0 + 1e-7], [0.0, 2.0]])
    rule = AdvantageRule("leave_one_out", "none", kl_weight=0.0, equal_rewards="drop")
    assert has_spread(rewards).tolist() == [True, False, True]
    dropped = advantages(rewards, rule)
    assert dropped.groups.tolist() == [0, 2] and dropped.n_equal == 1
    assert dropped.values.tolist() == [[-2, 2], [-2, 2]]
    kept = advantages(rewards, rule._replace(equal_rewards="keep"))
    assert kept.groups.tolist() == [0, 1, 2] and kept.n_equal == 1
    np.testing.assert_allclose(kept.values[1], 0, atol=1e-6)
    by_batch = advantages(rewards, rule._replace(baseline="group_mean", scale="batch"))
    # of 1, 3, 0 and 2
    np.testing.assert_allclose(by_batch.values[0], np.array([-1, 1]) / (np.sqrt(5 / 3) + EPSILON))


def test_all_groups_may_be_dropped():
    for baseline in ("leave_one_out", "group_mean"):
        rule = AdvantageRule(baseline, "batch", kl_weight=0.0, equal_rewards="drop")
        none = advantages(np.ones((2, 3)), rule)
        assert none.values.shape == (0, 3) and none.n_equal == 2


def test_the_kl_comes_off_the_reward():
    """Rewards 1 and 3, KL 2 and -2, weight 0.25: 0.5 and 3.5. The rewards of the second group are
    equal, whatever its KL.
    """
    rule = AdvantageRule("leave_one_out", "none", kl_weight=0.25, equal_rewards="keep")
    rewards, kl = np.array([[1.0, 3.0], [1.0, 1.0]]), np.array([[2.0, -2.0], [4.0, 0.0]])
    out = advantages(rewards, rule, kl)
    assert out.values.tolist() == [[-3, 3], [-1, 1]] and out.n_equal == 1
