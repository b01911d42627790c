"""Losses on pairs with a target for the reward of each response, not only for the difference: NCA,
SPPO, APO, DPOP. Shapes and units: contract.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from plumb.losses.contract import LossOutput, Pairs
from plumb.losses.ratios import (
    check_not_negative,
    check_positive,
    logratios,
    margin,
    with_rewards,
)
from plumb.losses.registry import loss


@loss(group="pair", needs_reference=True, usual={"lr": (3e-7, 5e-6), "beta": (0.01, 0.5)})
def nca_pair(policy: Pairs, reference: Pairs, *, beta: float) -> LossOutput:
    """-log sigmoid(r_w) - 1/2 log sigmoid(-r_w) - 1/2 log sigmoid(-r_l), with r = beta log
    pi(y|x)/pi_ref(y|x): section 4.1 of arXiv:2402.05369.

    Noise contrastive estimation. The second term keeps the likelihood of the chosen response near
    the reference's: the first two terms have their minimum at r_w = log 2.

    Rewards: beta log pi(y|x)/pi_ref(y|x).
    """
    check_positive(beta=beta)
    chosen, rejected = logratios(policy, reference)
    r_w, r_l = beta * chosen, beta * rejected
    losses = -F.logsigmoid(r_w) - 0.5 * F.logsigmoid(-r_w) - 0.5 * F.logsigmoid(-r_l)
    return with_rewards(losses, policy, reference, beta)


@loss(group="pair", needs_reference=True, usual={"lr": (1e-7, 5e-6), "beta": (1e-4, 0.1)})
def sppo_hard(policy: Pairs, reference: Pairs, *, beta: float) -> LossOutput:
    """(log pi(y_w|x)/pi_ref(y_w|x) - 1/(2 beta))^2 + (log pi(y_l|x)/pi_ref(y_l|x) + 1/(2 beta))^2:
    SPPO, Eq. 4.7 of arXiv:2405.00675, beta its 1/eta, with win probabilities of 1 and 0.

    Each response has its own target, where `ipo` has one for their difference. The paper renews the
    reference in each round, and estimates win probabilities; here labels are hard. The authors'
    code has half of this sum.

    Rewards: beta log pi(y|x)/pi_ref(y|x).
    """
    check_positive(beta=beta)
    chosen, rejected = logratios(policy, reference)
    target = 1 / (2 * beta)
    losses = (chosen - target) ** 2 + (rejected + target) ** 2
    return with_rewards(losses, policy, reference, beta)


@loss(group="pair", needs_reference=True, usual={"lr": (1e-7, 5e-6), "beta": (0.01, 0.5)})
def apo_zero(policy: Pairs, reference: Pairs, *, beta: float) -> LossOutput:
    """1 - sigmoid(r_w) + sigmoid(r_l), with r = beta log pi(y|x)/pi_ref(y|x): Eq. 7 of
    arXiv:2408.06266.

    The chosen response becomes likelier and the rejected one less likely, independently of each
    other: for pairs whose chosen response is better than the model's own responses.

    Rewards: beta log pi(y|x)/pi_ref(y|x).
    """
    check_positive(beta=beta)
    chosen, rejected = logratios(policy, reference)
    losses = torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)
    return with_rewards(losses, policy, reference, beta)


@loss(group="pair", needs_reference=True, usual={"lr": (1e-7, 5e-6), "beta": (0.01, 0.5)})
def apo_down(policy: Pairs, reference: Pairs, *, beta: float) -> LossOutput:
    """sigmoid(r_w) + 1 - sigmoid(r_w - r_l), with r = beta log pi(y|x)/pi_ref(y|x): Eq. 8 of
    arXiv:2408.06266.

    Both responses become less likely, the rejected one more so: for pairs whose chosen response is
    worse than the model's own responses.

    Rewards: beta log pi(y|x)/pi_ref(y|x).
    """
    check_positive(beta=beta)
    chosen, rejected = logratios(policy, reference)
    losses = torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))
    return with_rewards(losses, policy, reference, beta)


@loss(
    group="pair",
    needs_reference=True,
    usual={"lr": (3e-7, 5e-6), "beta": (0.01, 1), "penalty": (5, 500)},
)
def dpop(policy: Pairs, reference: Pairs, *, beta: float, penalty: float) -> LossOutput:
    """-log sigmoid(beta (h - c max(0, log pi_ref(y_w|x)/pi(y_w|x)))), with h as in `dpo`:
    DPO-Positive, Eq. 3 of arXiv:2402.13228, c = `penalty` its lambda.

    A chosen response that becomes less likely than under the reference is penalized c times as much
    as its part in h. c = 0 is `dpo`. In the paper's first version a bracket is misplaced,
    so that beta does not multiply the penalty; its second version has this form.

    Rewards: beta log pi(y|x)/pi_ref(y|x), without the penalty.
    """
    check_positive(beta=beta)
    check_not_negative(penalty=penalty)
    chosen, _ = logratios(policy, reference)
    h = margin(policy, reference) - penalty * torch.relu(-chosen)
    return with_rewards(-F.logsigmoid(beta * h), policy, reference, beta)
