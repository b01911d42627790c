"""Advantages of the policy's own samples by the rewards of their group, without a critic.

Shapes: n prompts, each with its group of at most k responses. A group may be smaller: NaN stands
where it has no response, in rewards and in advantages.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from plumb.losses.advantage_rules import AdvantageRule, Baseline, Scale

# added to a deviation before it divides, as in TRL's GRPO, so that advantages are bounded
EPSILON = 1e-4
# rewards of a group that differ by less, relative to the largest, differ by rounding only
ROUNDING = 1e-6


class Advantages(NamedTuple):
    """Hold the advantages of a step's groups.

    Example: of two groups, of which the second is dropped: Advantages(values=[[0.5, -0.5]],
    groups=[0], n_equal=1).
    """

    values: np.ndarray  # [m, k] of the kept groups
    groups: np.ndarray  # [m] int64: their indices among the n
    n_equal: int  # number of the n groups whose rewards are all equal


def advantages(
    rewards: np.ndarray, rule: AdvantageRule, kl: np.ndarray | None = None
) -> Advantages:
    """Return the advantages of rewards [n, k] by a loss's rule. `kl` [n, k]: log pi(y|x) -
    log pi_ref(y|x) of each response under the policy that sampled it, if the rule subtracts it from
    the rewards. Whether the rewards of a group are equal is decided before that.

    >>> rule = AdvantageRule("leave_one_out", "none", kl_weight=0.0, equal_rewards="drop")
    >>> advantages(np.array([[1.0, 3.0], [2.0, 2.0]]), rule)
    Advantages(values=array([[-2.,  2.]]), groups=array([0]), n_equal=1)
    """
    spread = has_spread(rewards)
    groups = np.flatnonzero(spread | (rule.equal_rewards == "keep"))
    final = rewards
    if rule.kl_weight:
        assert kl is not None, "the rule subtracts the KL from the rewards"
        final = rewards - rule.kl_weight * kl
    values = scaled(final[groups], rule.baseline, rule.scale)
    return Advantages(values, groups, int((~spread).sum()))


def has_spread(rewards: np.ndarray) -> np.ndarray:
    """Return which groups have rewards [n, k] that differ; those of one do not.  [n] bool

    >>> has_spread(np.array([[1.0, 1.0, 2.0], [3.0, 3.0, np.nan], [0.0, np.nan, np.nan]]))
    array([ True, False, False])
    """
    size = np.maximum(1, np.nanmax(np.abs(rewards), axis=1))
    return np.nanmax(rewards, axis=1) - np.nanmin(rewards, axis=1) > ROUNDING * size


def scaled(rewards: np.ndarray, baseline: Baseline, scale: Scale) -> np.ndarray:
    """Return rewards [n, k] minus their baseline, divided by their scale.  [n, k]

    Leave-one-out is RLOO's (arXiv:2402.14740, Eq. 6), the group's mean and deviation GRPO's
    (arXiv:2402.03300, section 4.1.2), the batch's mean with the batch's deviation REINFORCE++'s
    (arXiv:2501.03262). A group of one has the advantage 0 unless the baseline is the batch's.

    >>> scaled(np.array([[1.0, 2.0, 6.0]]), "leave_one_out", "none")
    array([[-3. , -1.5,  4.5]])
    """
    centered = rewards - baselines(rewards, baseline)
    if scale == "group":
        return centered / (deviation(rewards, axis=1) + EPSILON)
    if scale == "batch":
        return centered / (deviation(rewards, axis=None) + EPSILON)
    return centered


def baselines(rewards: np.ndarray, baseline: Baseline) -> np.ndarray:
    """Return what is taken off each reward: the mean of the *other* rewards of its group, the mean
    of its group, or that of the batch.  [n, k], [n, 1] or [1, 1]
    """
    if baseline == "batch_mean":
        return np.nanmean(rewards, keepdims=True) if rewards.size else np.zeros((1, 1))
    if baseline == "group_mean":
        return _mean(rewards)
    size = (~np.isnan(rewards)).sum(1, keepdims=True)
    others = (np.nansum(rewards, axis=1, keepdims=True) - rewards) / np.maximum(size - 1, 1)
    return np.where(size > 1, others, rewards)


def deviation(rewards: np.ndarray, axis: int | None) -> np.ndarray:
    """Return the sample deviation (over m - 1) of each group, or with axis=None of the batch; 0 of
    a single reward.  [n, 1] or [1, 1]
    """
    size = (~np.isnan(rewards)).sum(axis, keepdims=True)
    mean = np.nansum(rewards, axis=axis, keepdims=True) / np.maximum(size, 1)
    squares = np.nansum((rewards - mean) ** 2, axis=axis, keepdims=True)
    return np.sqrt(squares / np.maximum(size - 1, 1))


def _mean(rewards: np.ndarray) -> np.ndarray:
    size = (~np.isnan(rewards)).sum(1, keepdims=True)
    return np.nansum(rewards, axis=1, keepdims=True) / np.maximum(size, 1)
