"""Compute what losses share: checks of knobs, and for pairs log-ratios to the reference, margins
and rewards. Shapes and units: contract.py.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from plumb.losses.contract import Logps, LossOutput, Pairs, flip_probability

# of a response: the sum over its tokens, or their mean
Normalize = Literal["sum", "token"]


def check_positive(**knobs: float) -> None:
    """Raise ValueError for a knob that is not above 0."""
    for knob, value in knobs.items():
        if not value > 0:
            raise ValueError(f"{knob}={value}: must be above 0")


def check_not_negative(**knobs: float) -> None:
    """Raise ValueError for a knob below 0."""
    for knob, value in knobs.items():
        if not value >= 0:
            raise ValueError(f"{knob}={value}: must not be negative; 0 leaves it out")


def check_label_smoothing(label_smoothing: float) -> None:
    """Raise ValueError for a share of flipped labels outside [0, 0.5)."""
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing={label_smoothing}: the share of flipped labels must be in [0, 0.5)"
        )


def logp(response: Logps, normalize: Normalize = "sum") -> Tensor:
    """Return log pi(y|x), or its mean over the tokens of y.  [B]"""
    return response.mean() if normalize == "token" else response.sum


def mean_nll(response: Logps) -> Tensor:
    """Return the mean negative log-likelihood per token.  [B]"""
    return -response.mean()


def preferred_nll(policy: Pairs) -> Tensor:
    """Return -log pi(y_w|x) / |y_w|. A pair with a soft label p has what is expected of it, p times
    that and 1 - p times -log pi(y_l|x) / |y_l|: the rejected response is the preferred one as often
    as that.  [B]
    """
    of_chosen = mean_nll(policy.chosen)
    if policy.p_chosen is None:
        return of_chosen
    e = flip_probability(policy, 0.0)
    return (1 - e) * of_chosen + e * mean_nll(policy.rejected)


def logratios(
    policy: Pairs, reference: Pairs | None, normalize: Normalize = "sum"
) -> tuple[Tensor, Tensor]:
    """Return log pi(y|x)/pi_ref(y|x) of the chosen and of the rejected responses, [B] each. Without
    a reference, pi_ref is constant.
    """
    chosen, rejected = logp(policy.chosen, normalize), logp(policy.rejected, normalize)
    if reference is None:
        return chosen, rejected
    return (
        chosen - logp(reference.chosen, normalize),
        rejected - logp(reference.rejected, normalize),
    )


def margin(policy: Pairs, reference: Pairs | None, normalize: Normalize = "sum") -> Tensor:
    """Return h = log pi(y_w|x)/pi(y_l|x) - log pi_ref(y_w|x)/pi_ref(y_l|x), [B]. Without a
    reference, pi_ref is constant.

    The policy's ratio is formed first, as in 2023: large log-probabilities cancel before anything
    is squared.
    """
    h = logp(policy.chosen, normalize) - logp(policy.rejected, normalize)
    if reference is None:
        return h
    return h - (logp(reference.chosen, normalize) - logp(reference.rejected, normalize))


def smoothed(z: Tensor, label_smoothing: float | Tensor) -> Tensor:
    """Return -(1-e) log sigmoid(z) - e log sigmoid(-z): the cross-entropy with labels that are
    flipped with probability e.  [B]
    """
    return -F.logsigmoid(z) * (1 - label_smoothing) - F.logsigmoid(-z) * label_smoothing


def with_rewards(
    losses: Tensor,
    policy: Pairs,
    reference: Pairs | None,
    beta: float | Tensor,
    normalize: Normalize = "sum",
) -> LossOutput:
    """Add the implicit rewards beta * log pi(y|x)/pi_ref(y|x), detached."""
    chosen, rejected = (r.detach() for r in logratios(policy, reference, normalize))
    return LossOutput(losses, beta * chosen, beta * rejected)
