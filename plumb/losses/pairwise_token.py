"""DPO that looks into the responses: at their ends, at how likely the policy finds each of their
tokens, and at how far it is from the reference along them. Shapes and units: contract.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from plumb.losses.contract import (
    Logps,
    LogpsAndKL,
    LogpsAndSquares,
    LossOutput,
    Mean,
    Pairs,
    TokenLogps,
)
from plumb.losses.ratios import check_not_negative, check_positive, margin, with_rewards
from plumb.losses.registry import loss

USUAL = {"lr": (3e-7, 5e-6), "beta": (0.01, 0.5)}


@loss(group="pair", needs_reference=True, usual={**USUAL, "alpha": (0.1, 1)})
def ld_dpo(
    policy: Pairs[TokenLogps], reference: Pairs[TokenLogps], *, beta: float, alpha: float
) -> LossOutput:
    """-log sigmoid(beta h), with h as in `dpo` of log pi(y|x) = sum_{t <= l} log pi(y_t|x, y_<t) +
    a sum_{t > l} log pi(y_t|x, y_<t), l the length of the shorter response: LD-DPO,
    arXiv:2409.06411, a = `alpha`.

    Tokens of the longer response beyond the shorter one's length count less, for the policy and for
    the reference, so that length alone gives no margin. a = 1 is `dpo`. The reference must be live,
    since a cached one has no values of single tokens.

    Rewards: beta log pi(y|x)/pi_ref(y|x), of these sums.
    """
    check_positive(beta=beta)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: must be in [0, 1]; 1 is dpo")
    ours, theirs = (_weighed_beyond_the_shorter(pairs, alpha) for pairs in (policy, reference))
    losses = -F.logsigmoid(beta * margin(ours, theirs))
    return with_rewards(losses, ours, theirs, beta)


def _weighed_beyond_the_shorter(pairs: Pairs[TokenLogps], weight: float) -> Pairs[Logps]:
    """Return the sums over responses in which tokens beyond the shorter one's length count `weight`
    times.
    """
    lengths = [
        torch.bincount(side.response, minlength=side.n) for side in (pairs.chosen, pairs.rejected)
    ]
    shorter = torch.minimum(*lengths)  # [B]

    def weighed(side: TokenLogps, length: Tensor) -> Logps:
        within = _places(side) < shorter[side.response]  # [N]
        return Logps(side.sum(torch.where(within, side.each, weight * side.each)), length)

    return Pairs(weighed(pairs.chosen, lengths[0]), weighed(pairs.rejected, lengths[1]))


def _places(tokens: TokenLogps) -> Tensor:
    """Return each token's place in its response, from 0.  [N]

    >>> _places(TokenLogps(torch.zeros(5), torch.tensor([1, 0, 1, 1, 0]), 2)).tolist()
    [0, 0, 1, 2, 1]
    """
    order = tokens.response.argsort(stable=True)
    lengths = torch.bincount(tokens.response, minlength=tokens.n)
    first = (lengths.cumsum(0) - lengths)[tokens.response[order]]
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device) - first
    return places


@loss(group="pair", needs_reference=True, usual=USUAL)
def wpo(policy: Pairs[LogpsAndSquares], reference: Pairs, *, beta: float) -> LossOutput:
    """-w(y_w) w(y_l) log sigmoid(beta h), with w(y) = exp(1/|y| sum_t [log pi(y_t|x, y_<t) - log
    sum_v pi(v|x, y_<t)^2]) and h as in `dpo`: Eq. 2 of arXiv:2406.11827, sampled alignment.

    A pair is weighted by how likely the policy itself is to give both responses, so that data from
    other models count less: w is about 1 for a response sampled from the policy. w has no gradient,
    and w(y_w) w(y_l) is at most 1, as in the authors' code.

    Rewards: beta log pi(y|x)/pi_ref(y|x).
    """
    check_positive(beta=beta)
    log_weight = _log_weight(policy.chosen) + _log_weight(policy.rejected)
    weight = log_weight.clamp(max=0).exp()
    losses = -weight * F.logsigmoid(beta * margin(policy, reference))
    out = with_rewards(losses, policy, reference, beta)
    return LossOutput(
        losses, out.chosen_rewards, out.rejected_rewards, {"wpo/weight": Mean(weight)}
    )


def _log_weight(response: LogpsAndSquares) -> Tensor:
    """Return log w(y), detached.  [B]"""
    return (response.sum.detach() - response.squares) / response.tokens.clamp(min=1)


@loss(group="pair", needs_reference=True, usual=USUAL)
def tdpo1(policy: Pairs[LogpsAndKL], reference: Pairs, *, beta: float) -> LossOutput:
    """-log sigmoid(beta h - beta (D_l - D_w)), with D the sum over a response's tokens of KL(pi_ref
    || pi) and h as in `dpo`: arXiv:2404.11999.

    DPO derived token by token: the divergence along both responses is part of the margin. The
    reference must be live, since it gives whole distributions.

    Rewards: beta log pi(y|x)/pi_ref(y|x), without the divergence, which the authors' code adds.
    """
    check_positive(beta=beta)
    further = policy.rejected.kl - policy.chosen.kl
    losses = -F.logsigmoid(beta * (margin(policy, reference) - further))
    return _with_divergences(losses, policy, reference, beta)


@loss(group="pair", needs_reference=True, usual={**USUAL, "alpha": (0.1, 1)})
def tdpo2(policy: Pairs[LogpsAndKL], reference: Pairs, *, beta: float, alpha: float) -> LossOutput:
    """-log sigmoid(beta h - a beta (D_l - D_w)), with D the sum over a response's tokens of
    KL(pi_ref || pi), nothing differentiated through D_w, and h as in `dpo`: arXiv:2404.11999, a =
    `alpha`.

    `tdpo1` also rewards a wider divergence along the chosen response; here its gradient is left
    out, and only the divergence along the rejected one is held down. a = 0 is `dpo`. The reference
    must be live.

    Rewards: beta log pi(y|x)/pi_ref(y|x), without the divergence, which the authors' code adds.
    """
    check_positive(beta=beta)
    check_not_negative(alpha=alpha)
    further = policy.rejected.kl - policy.chosen.kl.detach()
    losses = -F.logsigmoid(beta * (margin(policy, reference) - alpha * further))
    return _with_divergences(losses, policy, reference, beta)


def _with_divergences(
    losses: Tensor, policy: Pairs[LogpsAndKL], reference: Pairs, beta: float
) -> LossOutput:
    """Add the rewards, and the divergences as metrics."""
    out = with_rewards(losses, policy, reference, beta)
    metrics = {
        "kl/chosen": Mean(policy.chosen.kl.detach()),
        "kl/rejected": Mean(policy.rejected.kl.detach()),
    }
    return LossOutput(losses, out.chosen_rewards, out.rejected_rewards, metrics)
