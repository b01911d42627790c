"""Losses on single responses that are labelled desirable or undesirable. Shapes and units:
contract.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plumb.losses.contract import BatchContext, Labelled, Logps, LossOutput, Mean
from plumb.losses.registry import loss


def kl_to_reference(policy: Logps, reference: Logps) -> Tensor:
    """Return z0 of Eq. 7 of arXiv:2402.01306: the mean of log pi(y'|x)/pi_ref(y'|x) over the
    batch's mismatched pairs ([M, 1]), at least 0; 0 where there are none. It estimates KL(pi ||
    pi_ref), and nothing is differentiated through it.
    """
    if not len(policy.sum):
        return policy.sum.new_zeros(())
    return (policy.sum - reference.sum).mean().clamp(min=0)


@loss(group="labelled", needs_reference=True, context=BatchContext("mismatched", kl_to_reference))
def kto(
    policy: Labelled,
    reference: Labelled,
    context: Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> LossOutput:
    """w_d (1 - sigmoid(beta (r - z0))) for a desirable response, w_u (1 - sigmoid(beta (z0 - r)))
    for an undesirable one, r = log pi(y|x)/pi_ref(y|x): Eq. 8 of arXiv:2402.01306 (lambda_y - v).

    z0 is the batch context: see `kl_to_reference`. Rewards are beta r.
    """
    if not beta > 0:
        raise ValueError(f"beta={beta}: must be above 0 (0.1 is usual)")
    for knob, value in (
        ("desirable_weight", desirable_weight),
        ("undesirable_weight", undesirable_weight),
    ):
        if not value > 0:
            raise ValueError(f"{knob}={value}: must be above 0; 1 is usual")
    desirable = policy.desirable
    r = policy.responses.sum - reference.responses.sum  # [B]
    z0 = context.to(r)
    sign = torch.where(desirable, 1.0, -1.0).to(r)
    weight = torch.where(desirable, desirable_weight, undesirable_weight).to(r)
    losses = weight * (1 - torch.sigmoid(sign * beta * (r - z0)))
    rewards = beta * r.detach()
    metrics = {
        "rewards/chosen": Mean(rewards * desirable, desirable),
        "rewards/rejected": Mean(rewards * ~desirable, ~desirable),
        "rewards/accuracies": Mean((sign * (r.detach() - z0) > 0).to(r)),
        "kl/z0": Mean(z0.expand_as(r)),
    }
    return LossOutput(losses, metrics=metrics)
