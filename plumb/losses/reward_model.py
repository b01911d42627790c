"""Losses of reward models, on the scores of both responses of a pair. Shapes and units:
contract.py.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from plumb.losses.contract import LossOutput, ScoredPairs, flip_probability
from plumb.losses.registry import loss


@loss(
    group="pair",
    needs_margins=lambda knobs: knobs["margin"] > 0,
    soft_labels=True,
    read=lambda knobs: "mean" if knobs["read"] == "mean" else "last",
)
def reward(
    policy: ScoredPairs,
    reference: None = None,
    *,
    read: Literal["last", "mean", "tokens"],
    margin: float,
    label_smoothing: float,
    centering: float,
) -> LossOutput:
    """-(1-e) log sigmoid(z) - e log sigmoid(-z) + c (r_w + r_l)^2, with z = r_w - r_l - m times the
    data's own margin. e is `label_smoothing`, or 1 - p_chosen of a pair with a soft label.

    e = m = c = 0: Bradley-Terry, Eq. 2 of arXiv:2305.18290, on the scores at the last tokens; with
    `read=mean` on the mean scores of all tokens of a response. m: Llama 2, arXiv:2307.09288. c
    pulls the sum of a pair's scores to 0 (arXiv:2312.09244), since the scale has no origin
    otherwise.

    `read=tokens` is DeepSpeed-Chat's: the mean of the first two terms over all positions from the
    first token in which the responses differ to the end of the longer one. After the end of the
    shorter one, where DeepSpeed-Chat compares with the scores of padding, its last score is used
    (pinned by test_the_token_wise_loss_by_hand).

    Rewards: the scores at the last tokens, with `read=mean` the mean scores.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing={label_smoothing}: the share of flipped labels must be in [0, 0.5)"
        )
    for knob, value in (("margin", margin), ("centering", centering)):
        if not value >= 0:
            raise ValueError(f"{knob}={value}: must not be negative; 0 leaves it out")
    chosen, rejected = policy.chosen, policy.rejected
    r_w, r_l = chosen.of(read), rejected.of(read)
    z = chosen.each - rejected.each if read == "tokens" else (r_w - r_l)[:, None]  # [B, L or 1]
    if margin and policy.margins is not None:
        z = z - margin * policy.margins[:, None]
    e = flip_probability(policy, label_smoothing)
    e = e[:, None].to(z) if isinstance(e, Tensor) else e
    losses = -F.logsigmoid(z) * (1 - e) - F.logsigmoid(-z) * e
    if read == "tokens":
        longest = torch.maximum(chosen.tokens, rejected.tokens).clamp(min=1)
        first = torch.minimum(policy.shared, longest - 1)  # of two equal responses, the last token
        at = torch.arange(z.shape[1], device=z.device)
        compared = (at >= first[:, None]) & (at < longest[:, None])
        losses = torch.where(compared, losses, 0).sum(1) / compared.sum(1)
    else:
        losses = losses[:, 0]
    losses = losses + centering * (r_w + r_l) ** 2
    return LossOutput(losses, r_w.detach(), r_l.detach())
