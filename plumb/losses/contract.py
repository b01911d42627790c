"""What a loss is given, and what it returns.

Shapes: B examples (pairs, or single responses for SFT). Units: nats. Every loss is a *sum* over
what it scores; the trainer divides by a global count known before the forward pass, so
microbatches, ranks and padding cannot change the objective.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Logps(NamedTuple):
    """Log-probabilities of B responses given their prompts."""

    sum: Tensor  # [B] sum over the response's tokens of log pi(y_t | x, y_<t), nats
    tokens: Tensor  # [B] how many tokens that was; mean = sum / tokens


class Pairs(NamedTuple):
    chosen: Logps
    rejected: Logps


class Scores(NamedTuple):
    """What a reward model gives B responses."""

    last: Tensor  # [B] the score at each response's last token
    each: Tensor  # [B, L] the scores at all of its tokens; behind its end, its last one again
    tokens: Tensor  # [B] how many tokens it has

    def of(self, read: str) -> Tensor:
        """The score of each response: at its last token, or with `read` "mean" the mean over its
        tokens.  [B]
        """
        if read != "mean":
            return self.last
        n = self.tokens.clamp(min=1)[:, None]
        within = torch.arange(self.each.shape[1], device=self.each.device) < n
        return (self.each * within).sum(1) / n[:, 0]


class ScoredPairs(NamedTuple):
    chosen: Scores
    rejected: Scores
    shared: Tensor  # [B] tokens that both responses begin with
    # [B] by how much the data's own scores prefer chosen; None where there are none
    margins: Tensor | None


class LossOutput(NamedTuple):
    losses: Tensor  # [B]
    chosen_rewards: Tensor | None = (
        None  # [B] detached scores, or implicit rewards beta * log(pi / pi_ref); None: it has none
    )
    rejected_rewards: Tensor | None = None  # [B]
