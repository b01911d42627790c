"""Losses on lists of responses to the same prompt, ranked from best to worst. Shapes and units:
contract.py.

Responses of the same rank carry no preference: they do not compete with each other, and each is
compared with the responses ranked below.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plumb.losses.contract import Lists, LossOutput
from plumb.losses.ratios import check_positive
from plumb.losses.registry import loss


@loss(group="list", needs_reference=True, usual={"lr": (3e-7, 5e-6), "beta": (0.01, 0.5)})
def plackett_luce(policy: Lists, reference: Lists, *, beta: float) -> LossOutput:
    """-sum_i log(exp r_i / (exp r_i + sum_j exp r_j)) over the responses i, where j runs over the
    responses that rank below i, with r = beta log pi(y|x)/pi_ref(y|x): Eq. 20 of arXiv:2305.18290
    (appendix A.3).

    Each place is a choice of the best among the remaining responses, and the last is no choice; for
    a list of two this is `dpo`. Responses of the same rank do not compete: the term of each is that
    of a list without the others of its rank.

    Rewards: beta log pi(y|x)/pi_ref(y|x), of the best response and of the worst.
    """
    check_positive(beta=beta)
    r = beta * (policy.responses.sum - reference.responses.sum)  # [B, k]
    rewards = r.detach()
    return LossOutput(choices(policy, r).sum(1), rewards[:, 0], policy.worst(rewards))


@loss(group="list", needs_reference=True, usual={"lr": (3e-7, 1e-5), "beta": (0.01, 1)})
def softmax_dpo(policy: Lists, reference: Lists, *, beta: float) -> LossOutput:
    """-log(exp r_1 / sum_j exp r_j) over all responses j of the list, with r = beta log
    pi(y|x)/pi_ref(y|x) and 1 the best: the loss of S-DPO (arXiv:2406.09215), which is the first
    factor of `plackett_luce`.

    The best response is compared with the rest, whose order does not matter; for a list of two this
    is `dpo`. If several responses tie for best, the loss is the mean over them, each compared with
    the responses below them only.

    Rewards: beta log pi(y|x)/pi_ref(y|x), of the best response and of the worst.
    """
    check_positive(beta=beta)
    r = beta * (policy.responses.sum - reference.responses.sum)  # [B, k]
    best = ((policy.order() == 0) & policy.exists).to(r)
    losses = (choices(policy, r) * best).sum(1) / best.sum(1)
    rewards = r.detach()
    return LossOutput(losses, rewards[:, 0], policy.worst(rewards))


def choices(policy: Lists, r: Tensor) -> Tensor:
    """Return, for rewards r [B, k], -log of the probability that each response is chosen among
    itself and those ranked below it; 0 at empty places.  [B, k]
    """
    # an empty place competes only with itself, which costs nothing
    remaining = policy.worse() | torch.eye(r.shape[1], dtype=torch.bool, device=r.device)
    return r[:, None, :].masked_fill(~remaining, -torch.inf).logsumexp(2) - r
