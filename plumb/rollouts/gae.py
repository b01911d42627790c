"""Advantages of tokens with the help of a critic: generalised advantage estimation.

Shapes: R responses of [R] lengths, each of a token or more; their N tokens, one response after
another, without padding. Units: rewards and values are those of the reward; logps are nats.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from plumb.losses.advantage_rules import GaeRule, KlOfToken
from plumb.losses.policy_gradient import k1

EPSILON = 1e-8  # added to a variance before it divides, as in the N+ implementation details


class TokenAdvantages(NamedTuple):
    """Hold what the policy and the critic learn from.

    Example: of a response of two tokens with the reward 1 and values of 0, not whitened, gamma =
    gae_lambda = 1: TokenAdvantages(values=[1, 1], returns=[1, 1]).
    """

    values: np.ndarray  # [N] advantages
    returns: np.ndarray  # [N] what the critic's values are trained towards


def advantages_by_token(
    rewards: np.ndarray, kl: np.ndarray, values: np.ndarray, lengths: np.ndarray, rule: GaeRule
) -> TokenAdvantages:
    """Return the advantages of tokens from the rewards of responses [R], what the KL takes off each
    token [N], weight included, and the critic's values [N], each of the state before its token.
    """
    each = token_rewards(rewards, kl, lengths)
    if rule.whiten == "rewards_and_advantages":
        each = whitened(each) + each.mean()
    estimated = gae(each, values, lengths, rule.gamma, rule.gae_lambda)
    returns = estimated + values
    return TokenAdvantages(estimated if rule.whiten == "none" else whitened(estimated), returns)


def token_rewards(rewards: np.ndarray, kl: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the rewards of tokens: less the KL of each, and at a response's last token its own.
    The last token is known from the length; it is the end token, if the response has ended.  [N]

    >>> token_rewards(np.array([5.0, 7.0]), np.array([1.0, 1.0, 2.0]), np.array([2, 1])).tolist()
    [-1.0, 4.0, 5.0]
    """
    each = -kl
    each[lengths.cumsum() - 1] += rewards
    return each


def kl_of_tokens(policy: np.ndarray, reference: np.ndarray, kind: KlOfToken) -> np.ndarray:
    """Return what stands for the KL at each token, from its log-probabilities. It is not k3, which
    rewards a policy for the tokens that it makes less likely than the reference by making them
    unlikelier still.  [N] nats

    >>> kl_of_tokens(np.array([-1.0, -3.0]), np.array([-2.0, -2.0]), "k1_positive").tolist()
    [1.0, 0.0]
    """
    each = k1(torch.from_numpy(policy), torch.from_numpy(reference))
    return (each if kind == "k1" else each.clamp(min=0)).numpy()


def gae(
    rewards: np.ndarray, values: np.ndarray, lengths: np.ndarray, gamma: float, gae_lambda: float
) -> np.ndarray:
    """Return A_t = sum_l (gamma gae_lambda)^l delta_{t+l} with delta_t = r_t + gamma V_{t+1} - V_t
    over the tokens of each response, after which the value is 0 (arXiv:1506.02438, Eq. 16).  [N]

    >>> gae(np.array([0.0, 1.0]), np.array([0.5, 0.25]), np.array([2]), 1.0, 0.5).tolist()
    [0.125, 0.75]
    """
    estimated = np.zeros_like(values)
    ends = lengths.cumsum()
    after, value_after = np.zeros(len(lengths)), np.zeros(len(lengths))
    for back in range(1, int(lengths.max(initial=0)) + 1):
        of = np.flatnonzero(lengths >= back)
        at = ends[of] - back
        delta = rewards[at] + gamma * value_after[of] - values[at]
        after[of] = delta + gamma * gae_lambda * after[of]
        value_after[of] = values[at]
        estimated[at] = after[of]
    return estimated


def whitened(values: np.ndarray) -> np.ndarray:
    """Return values with mean 0 and deviation 1, which is that of a sample, over N - 1.  [N]"""
    if len(values) < 2:
        return values - values.mean()
    return (values - values.mean()) / np.sqrt(values.var(ddof=1) + EPSILON)
