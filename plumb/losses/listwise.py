"""Losses on lists of responses to the same prompt, ranked from best to worst. Shapes and units:
contract.py.
"""

from __future__ import annotations

import torch

from plumb.losses.contract import Lists, LossOutput
from plumb.losses.registry import loss


@loss(group="list", needs_reference=True)
def plackett_luce(policy: Lists, reference: Lists, *, beta: float) -> LossOutput:
    """-sum_i log(exp r_i / sum_{j >= i} exp r_j) over the places i from best to worst, with the
    rewards r = beta log pi(y|x)/pi_ref(y|x): Eq. 20 of arXiv:2305.18290 (appendix A.3).

    Each place is a choice of the best among those that are left, and the last choice is none; for a
    list of two this is `dpo`. Rewards are those of the best response and of the worst.
    """
    if not beta > 0:
        raise ValueError(f"beta={beta}: must be above 0 (0.1 to 0.5 is usual)")
    r = beta * (policy.responses.sum - reference.responses.sum)  # [B, k]
    exists = policy.exists
    place = torch.arange(r.shape[1], device=r.device)
    # [B, k, k]: is response j left when place i is filled? An empty place is left with itself
    # alone, which costs nothing.
    left = (place[None, :] >= place[:, None]) & (
        exists[:, None, :] | torch.eye(len(place), dtype=torch.bool, device=r.device)
    )
    normaliser = r[:, None, :].masked_fill(~left, -torch.inf).logsumexp(2)  # [B, k]
    rewards = r.detach()
    return LossOutput((normaliser - r).sum(1), rewards[:, 0], policy.worst(rewards))
