"""Losses on pairs that need no reference: SimPO, AlphaPO, CPO, ORPO, SLiC. Shapes and units:
contract.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from plumb.losses.contract import LossOutput, Pairs, flip_probability
from plumb.losses.divergences import LARGEST_EXPONENT
from plumb.losses.ratios import (
    check_label_smoothing,
    check_not_negative,
    check_positive,
    margin,
    preferred_nll,
    smoothed,
    with_rewards,
)
from plumb.losses.registry import loss


@loss(group="pair", usual={"lr": (3e-7, 1e-6), "beta": (2, 10), "gamma": (0.3, 5)})
def simpo(
    policy: Pairs, reference: None = None, *, beta: float, gamma: float, nll: float
) -> LossOutput:
    """-log sigmoid(r_w - r_l - gamma) - a log pi(y_w | x) / |y_w|, with the rewards r = beta log
    pi(y|x) / |y|: Eq. 6 of arXiv:2405.14734, a = 0.

    The mean over a response's tokens replaces the reference, so length alone gains nothing. a =
    `nll` > 0 keeps the chosen responses likely: CPO-SimPO, the loss that TRL's CPO trainer gives
    with loss_type=simpo.

    Rewards: beta log pi(y|x) / |y|.
    """
    check_positive(beta=beta)
    check_not_negative(gamma=gamma, nll=nll)
    chosen = beta * policy.chosen.mean()
    rejected = beta * policy.rejected.mean()
    losses = -F.logsigmoid(chosen - rejected - gamma) + nll * preferred_nll(policy)
    return LossOutput(losses, chosen.detach(), rejected.detach())


@loss(
    group="pair",
    usual={"lr": (3e-7, 1e-6), "beta": (2, 10), "gamma": (0.05, 5), "alpha": (0.1, 0.5)},
)
def alphapo(
    policy: Pairs, reference: None = None, *, beta: float, gamma: float, alpha: float
) -> LossOutput:
    """-log sigmoid(r_w - r_l - gamma) with the rewards r = beta (1 - p^-alpha) / alpha, where p =
    pi(y|x)^(1/|y|): arXiv:2501.03884.

    alpha = 0 is `simpo`. Above 0, the reward falls faster the less likely a response becomes, and
    rises more slowly the likelier it becomes, so likelihoods change less. `alpha` may be
    negative.

    Rewards: beta (1 - p^-alpha) / alpha.
    """
    check_positive(beta=beta)
    check_not_negative(gamma=gamma)
    chosen = beta * _power_reward(policy.chosen.mean(), alpha)
    rejected = beta * _power_reward(policy.rejected.mean(), alpha)
    losses = -F.logsigmoid(chosen - rejected - gamma)
    return LossOutput(losses, chosen.detach(), rejected.detach())


def _power_reward(log_p: Tensor, alpha: float) -> Tensor:
    """Return (1 - p^-alpha) / alpha, which is log p for alpha = 0.  [B]"""
    if alpha == 0:
        return log_p
    return -torch.expm1((-alpha * log_p).clamp(max=LARGEST_EXPONENT)) / alpha


@loss(
    group="pair", soft_labels=True, usual={"lr": (3e-7, 1e-4), "beta": (0.01, 0.5), "nll": (0.1, 2)}
)
def cpo(
    policy: Pairs, reference: None = None, *, beta: float, label_smoothing: float, nll: float
) -> LossOutput:
    """-(1-e) log sigmoid(beta h) - e log sigmoid(-beta h) - a log pi(y_w | x) / |y_w|, with h = log
    pi(y_w|x) - log pi(y_l|x): arXiv:2401.08417, e = 0 and a = 1.

    DPO with a uniform reference, so that only the likelihood of the chosen responses, a = `nll`,
    constrains the policy (section 3). That term is the mean per token, as in the authors' code. e =
    `label_smoothing` is the assumed fraction of flipped labels; a pair with a soft label has e = 1
    - p_chosen.

    Rewards: beta log pi(y|x).
    """
    check_positive(beta=beta)
    check_label_smoothing(label_smoothing)
    check_not_negative(nll=nll)
    z = beta * margin(policy, None)
    e = flip_probability(policy, label_smoothing)
    losses = smoothed(z, e) + nll * preferred_nll(policy)
    return with_rewards(losses, policy, None, beta)


@loss(group="pair", usual={"lr": (3e-7, 1e-5), "beta": (0.05, 2)})
def orpo(policy: Pairs, reference: None = None, *, beta: float) -> LossOutput:
    """-log pi(y_w|x) / |y_w| - beta log sigmoid(log odds(y_w) - log odds(y_l)), with odds = p / (1
    - p) and p = pi(y|x)^(1/|y|): Eq. 6 and 7 of arXiv:2403.07691, beta its lambda.

    SFT on the chosen responses and a preference in one stage, from a base model. The SFT term
    counts response tokens; the authors' code counts those of the prompt as well, unless it is
    called with --disable_prompt_loss.

    Rewards: beta log pi(y|x) / |y|.
    """
    check_positive(beta=beta)
    chosen, rejected = policy.chosen.mean(), policy.rejected.mean()
    log_odds_ratio = _log_odds(chosen) - _log_odds(rejected)
    losses = -chosen - beta * F.logsigmoid(log_odds_ratio)
    return LossOutput(losses, beta * chosen.detach(), beta * rejected.detach())


def _log_odds(log_p: Tensor) -> Tensor:
    """Return log(p / (1 - p)). p is kept below 1 by one rounding error, since a response without
    tokens would give infinity.  [B]
    """
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    return log_p - torch.log(-torch.expm1(log_p))


@loss(
    group="pair",
    usual={"lr": (3e-7, 1e-4), "delta": (0.5, 10), "regularization": (0.1, 10)},
)
def slic(
    policy: Pairs, reference: None = None, *, delta: float, regularization: float
) -> LossOutput:
    """max(0, delta - log pi(y_w|x) + log pi(y_l|x)) - c log pi(y_w|x): SLiC-HF, Eq. 4 of
    arXiv:2305.10425, with c = `regularization` its lambda and y_w as the SFT target.

    Both terms are sums over tokens. `hinge` is the form with a reference.

    Rewards: log pi(y|x).
    """
    check_positive(delta=delta)
    check_not_negative(regularization=regularization)
    losses = torch.relu(delta - margin(policy, None)) - regularization * policy.chosen.sum
    return with_rewards(losses, policy, None, 1.0)


@loss(group="pair", soft_labels=True, usual={"lr": (3e-7, 1e-4)})
def nll(policy: Pairs, reference: None = None) -> LossOutput:
    """-log pi(y_w|x) / |y_w|: the generation loss of arXiv:2411.10442.

    SFT on the chosen responses, all with the same weight. The rejected ones are scored for the
    metrics only, unless a pair has a soft label: then the loss is the expectation over which of the
    two is preferred, p_chosen times the above and 1 - p_chosen times that of the rejected response.

    Rewards: log pi(y|x) / |y|.
    """
    chosen, rejected = policy.chosen.mean(), policy.rejected.mean()
    return LossOutput(preferred_nll(policy), chosen.detach(), rejected.detach())
