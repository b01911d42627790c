"""Losses on pairs of responses to the same prompt: DPO, conservative DPO, IPO, SimPO. Shapes and
units: contract.py.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from plumb.losses.contract import Logps, LossOutput, Pairs
from plumb.losses.registry import loss


def _check(beta: float, label_smoothing: float, nll: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta={beta}: must be above 0 (0.1 to 0.5 is usual)")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing={label_smoothing}: the share of flipped labels must be in [0, 0.5)"
        )
    if not nll >= 0:
        raise ValueError(f"nll={nll}: must not be negative; 0 leaves it out")


def _nll(response: Logps) -> Tensor:
    """Return the mean negative log-likelihood per token.  [B]"""
    return -response.mean()


def _margin(policy: Pairs, reference: Pairs | None) -> Tensor:
    """h = log pi(y_w|x)/pi(y_l|x) - log pi_ref(y_w|x)/pi_ref(y_l|x), [B]. Without a reference,
    pi_ref is constant.

    The policy's ratio is formed first, as in 2023: large log-probabilities cancel before anything
    is squared.
    """
    h = policy.chosen.sum - policy.rejected.sum
    return h if reference is None else h - (reference.chosen.sum - reference.rejected.sum)


def _with_rewards(
    losses: Tensor, policy: Pairs, reference: Pairs | None, beta: float
) -> LossOutput:
    """Add the implicit rewards beta * log pi(y|x)/pi_ref(y|x), detached."""
    chosen, rejected = policy.chosen.sum.detach(), policy.rejected.sum.detach()
    if reference is not None:
        chosen, rejected = chosen - reference.chosen.sum, rejected - reference.rejected.sum
    return LossOutput(losses, beta * chosen, beta * rejected)


@loss(group="pair", needs_reference=lambda knobs: not knobs["reference_free"])
def dpo(
    policy: Pairs,
    reference: Pairs | None,
    *,
    beta: float,
    label_smoothing: float,
    reference_free: bool,
    nll: float,
) -> LossOutput:
    """-(1-e) log sigmoid(beta h) - e log sigmoid(-beta h) - a log pi(y_w | x) / |y_w|, h as in
    `_margin`.

    e = a = 0: Eq. 7 of arXiv:2305.18290. e > 0: conservative DPO, labels flipped with probability e
    (Eq. 3 of https://ericmitchell.ai/cdpo.pdf). a = `nll` > 0 keeps the chosen responses likely
    (Eq. 1 of arXiv:2404.19733). `reference_free` takes pi_ref as constant: no reference is loaded,
    and the rewards are beta log pi (the original code still ran the reference and reported rewards
    against it).
    """
    _check(beta, label_smoothing, nll)
    h = _margin(policy, reference)
    losses = (
        -F.logsigmoid(beta * h) * (1 - label_smoothing) - F.logsigmoid(-beta * h) * label_smoothing
    )
    losses = losses + nll * _nll(policy.chosen)
    return _with_rewards(losses, policy, reference, beta)


@loss(group="pair", needs_reference=lambda knobs: not knobs["reference_free"])
def ipo(
    policy: Pairs,
    reference: Pairs | None,
    *,
    beta: float,
    label_smoothing: float,
    reference_free: bool,
    nll: float,
) -> LossOutput:
    """(h - 1/(2 beta))^2, with h as in `dpo`: Eq. 17 of arXiv:2310.12036, beta its tau;
    log-probabilities are sums, as in the original.

    label_smoothing e mixes in the loss of the flipped pair, (1-e)(h - 1/(2 beta))^2 + e (h + 1/(2
    beta))^2, the same reading of label noise as in `dpo` (the 2023 code ignored the knob without a
    word). `nll`: as in `dpo`.
    """
    _check(beta, label_smoothing, nll)
    h = _margin(policy, reference)
    target = 1 / (2 * beta)
    losses = (
        (1 - label_smoothing) * (h - target) ** 2
        + label_smoothing * (h + target) ** 2
        + nll * _nll(policy.chosen)
    )
    return _with_rewards(losses, policy, reference, beta)


@loss(group="pair")
def simpo(policy: Pairs, reference: None = None, *, beta: float, gamma: float) -> LossOutput:
    """-log sigmoid(r_w - r_l - gamma) with the rewards r = beta log pi(y|x) / |y|: Eq. 6 of
    arXiv:2405.14734.

    The mean over a response's tokens takes the place of the reference: long responses gain nothing
    by their length. Rewards are r.
    """
    if not beta > 0:
        raise ValueError(f"beta={beta}: must be above 0 (2 to 10 is usual)")
    if not gamma >= 0:
        raise ValueError(f"gamma={gamma}: must not be negative (0.3 to 0.5 times beta is usual)")
    chosen_rewards = beta * policy.chosen.mean()
    rejected_rewards = beta * policy.rejected.mean()
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards - gamma)
    return LossOutput(losses, chosen_rewards.detach(), rejected_rewards.detach())
