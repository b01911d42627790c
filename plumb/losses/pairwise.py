"""Losses on pairs that are functions of the margin h against a reference: DPO with its divergences,
conservative and robust DPO, IPO, hinge, EXO, DiscoPOP. Shapes and units: contract.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from plumb.losses.contract import LossOutput, Pairs, flip_probability
from plumb.losses.divergences import Divergence, check_divergence, derivative
from plumb.losses.ratios import (
    Normalize,
    check_label_smoothing,
    check_not_negative,
    check_positive,
    logratios,
    margin,
    preferred_nll,
    smoothed,
    with_rewards,
)
from plumb.losses.registry import loss


def unless_free(knobs: Mapping[str, Any]) -> bool:
    """Return whether a loss with the knob `reference_free` needs a reference."""
    return not knobs["reference_free"]


@loss(
    group="pair",
    needs_reference=unless_free,
    soft_labels=True,
    usual=lambda knobs: {
        "lr": (3e-7, 5e-6),
        "beta": (2, 10) if knobs["normalize"] == "token" else (0.01, 0.5),
    },
)
def dpo(
    policy: Pairs,
    reference: Pairs | None,
    *,
    beta: float,
    label_smoothing: float,
    divergence: Divergence,
    alpha: float | None,
    normalize: Normalize,
    reference_free: bool,
    nll: float,
) -> LossOutput:
    """-(1-e) log sigmoid(beta h) - e log sigmoid(-beta h) - a log pi(y_w | x) / |y_w|, with h = log
    pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x): Eq. 7 of arXiv:2305.18290, e = a = 0.

    e = `label_smoothing` > 0: conservative DPO, labels flipped with probability e (Eq. 3 of
    https://ericmitchell.ai/cdpo.pdf); a pair with a soft label has e = 1 - p_chosen. a = `nll` > 0
    keeps the chosen responses likely (Eq. 1 of arXiv:2404.19733); of a pair with a soft label it is
    p_chosen of that and 1 - p_chosen of the rejected response's. `reference_free` treats pi_ref as
    constant: no reference is loaded, and the rewards are beta log pi (the original code still ran
    the reference and reported rewards against it).

    `divergence` replaces log u, u = pi/pi_ref, in h by the derivative f'(u) of another divergence:
    -1/u (forward_kl), log(2u / (1+u)) (js), -u^-a / a with a = `alpha` (alpha), which lies between
    reverse_kl (a = 0) and forward_kl (a = 1): f-DPO, arXiv:2309.16240.

    `normalize=sum` is that of the paper, with a beta of 0.1 to 0.5. `token` divides each log pi and
    log pi_ref by the length: the length-normalized DPO of Tulu 3 (arXiv:2411.15124), with a beta of
    5.

    Rewards: beta log pi(y|x)/pi_ref(y|x), per token with `normalize=token`.
    """
    check_positive(beta=beta)
    check_label_smoothing(label_smoothing)
    check_not_negative(nll=nll)
    check_divergence(divergence, alpha, normalize, reference_free)
    if divergence == "reverse_kl":
        h = margin(policy, reference, normalize)
    else:
        chosen, rejected = logratios(policy, reference)
        h = derivative(chosen, divergence, alpha) - derivative(rejected, divergence, alpha)
    e = flip_probability(policy, label_smoothing)
    losses = smoothed(beta * h, e) + nll * preferred_nll(policy)
    return with_rewards(losses, policy, reference, beta, normalize)


@loss(
    group="pair",
    needs_reference=unless_free,
    soft_labels=True,
    usual={"lr": (3e-7, 5e-6), "beta": (0.01, 1)},
)
def ipo(
    policy: Pairs,
    reference: Pairs | None,
    *,
    beta: float,
    label_smoothing: float,
    normalize: Normalize,
    reference_free: bool,
    nll: float,
) -> LossOutput:
    """(h - 1/(2 beta))^2, with h as in `dpo`: Eq. 17 of arXiv:2310.12036, beta its tau.

    `normalize=sum` takes log-probabilities of whole responses, as the 2023 code and OpenRLHF do.
    `token` takes means per token, as TRL, HALOs and LLaMA-Factory do, and as the paper's authors
    have confirmed. The paper's own experiments are bandits, where the two are the same. The target
    1/(2 beta) is that of a sum or of a mean, so a beta for one form does not suit the other.

    e = label_smoothing (or 1 - p_chosen of a pair with a soft label) mixes in the loss of the
    flipped pair, (1-e)(h - 1/(2 beta))^2 + e (h + 1/(2 beta))^2, the same treatment of label noise
    as in `dpo` (the 2023 code silently ignored the knob). `nll`, `reference_free`: as in `dpo`.

    Rewards: beta log pi(y|x)/pi_ref(y|x), per token with `normalize=token`.
    """
    check_positive(beta=beta)
    check_label_smoothing(label_smoothing)
    check_not_negative(nll=nll)
    h = margin(policy, reference, normalize)
    target = 1 / (2 * beta)
    e = flip_probability(policy, label_smoothing)
    losses = (1 - e) * (h - target) ** 2 + e * (h + target) ** 2 + nll * preferred_nll(policy)
    return with_rewards(losses, policy, reference, beta, normalize)


@loss(
    group="pair",
    needs_reference=True,
    usual={"lr": (3e-7, 5e-6), "beta": (0.01, 0.5), "label_smoothing": (0.01, 0.4)},
)
def robust(policy: Pairs, reference: Pairs, *, beta: float, label_smoothing: float) -> LossOutput:
    """(-(1-e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2e), with h as in `dpo`:
    section 3.1 of arXiv:2403.00409.

    If a share e = `label_smoothing` of the labels is flipped, its expectation is the `dpo` loss on
    the true labels. `dpo` with label_smoothing mixes the two losses instead, and is biased. The
    loss is not bounded below: a wider margin always lowers it.

    Rewards: beta log pi(y|x)/pi_ref(y|x).
    """
    check_positive(beta=beta)
    check_label_smoothing(label_smoothing)
    z = beta * margin(policy, reference)
    of_true, of_flipped = -F.logsigmoid(z), -F.logsigmoid(-z)
    losses = ((1 - label_smoothing) * of_true - label_smoothing * of_flipped) / (
        1 - 2 * label_smoothing
    )
    return with_rewards(losses, policy, reference, beta)


@loss(
    group="pair",
    needs_reference=unless_free,
    usual={"lr": (3e-7, 5e-6), "beta": (0.01, 1)},
)
def hinge(
    policy: Pairs, reference: Pairs | None, *, beta: float, reference_free: bool
) -> LossOutput:
    """max(0, 1 - beta h), with h as in `dpo`: the normalized hinge of RSO, arXiv:2309.06657, beta
    its gamma.

    The hinge of SLiC on log-probabilities normalized by the reference. A pair with a margin of 1 /
    beta nats has no gradient. `slic` is the form without a reference.

    Rewards: beta log pi(y|x)/pi_ref(y|x).
    """
    check_positive(beta=beta)
    losses = torch.relu(1 - beta * margin(policy, reference))
    return with_rewards(losses, policy, reference, beta)


@loss(
    group="pair",
    needs_reference=True,
    usual={"lr": (3e-7, 5e-6), "beta": (0.01, 0.5), "label_smoothing": (4e-5, 0.1)},
)
def exo_pair(policy: Pairs, reference: Pairs, *, beta: float, label_smoothing: float) -> LossOutput:
    """q log(q / (1-e)) + (1-q) log((1-q) / e), with q = sigmoid(beta h) and h as in `dpo`: Eq. 16
    of arXiv:2402.00856.

    The reverse KL from the policy's preference to the labels, which are right with probability 1 -
    e, e = `label_smoothing`; `dpo` takes the forward KL. e must be above 0, otherwise a wrong label
    would have an infinite loss. The optimum is h = log((1-e) / e) / beta.

    Rewards: beta log pi(y|x)/pi_ref(y|x).
    """
    check_positive(beta=beta, label_smoothing=label_smoothing)
    check_label_smoothing(label_smoothing)
    z = beta * margin(policy, reference)
    losses = torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-label_smoothing)) + torch.sigmoid(
        -z
    ) * (F.logsigmoid(-z) - math.log(label_smoothing))
    return with_rewards(losses, policy, reference, beta)


@loss(
    group="pair",
    needs_reference=True,
    usual={"lr": (3e-7, 5e-6), "beta": (0.01, 0.5), "tau": (0.01, 1)},
)
def discopop(policy: Pairs, reference: Pairs, *, beta: float, tau: float) -> LossOutput:
    """-(1 - m) log sigmoid(z) + m exp(-z), with z = beta h, m = sigmoid(z / tau) and h as in `dpo`:
    the log-ratio modulated loss, Eq. 5 of arXiv:2406.08414.

    A language model proposed it: the logistic loss where the policy is wrong, the exponential one
    where it is right. It is not convex: with the paper's tau of 0.05 it rises from a local minimum
    at z = -0.12 through z = 0 and falls from z = 0.07 on. A run that starts from the reference
    starts at z = 0, so with that tau it learns to prefer the rejected responses; with tau = 1 the
    loss falls everywhere. tau must be at most 1, otherwise m exp(-z) grows without bound as z
    falls.

    Rewards: beta log pi(y|x)/pi_ref(y|x).
    """
    check_positive(beta=beta, tau=tau)
    if tau > 1:
        raise ValueError(f"tau={tau}: must be at most 1; 0.05 is the paper's")
    z = beta * margin(policy, reference)
    # m exp(-z), as one exponential: exp(-z) alone overflows
    exponential = (F.logsigmoid(z / tau) - z).exp()
    losses = exponential - torch.sigmoid(-z / tau) * F.logsigmoid(z)
    return with_rewards(losses, policy, reference, beta)
