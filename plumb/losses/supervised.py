"""Losses on single responses: SFT. Shapes and units: contract.py."""

from __future__ import annotations

from typing import Literal

from plumb.losses.contract import Logps, LossOutput
from plumb.losses.registry import loss


@loss(group="single", average_over=lambda knobs: knobs["average_over"])
def sft(
    policy: Logps, reference: None = None, *, average_over: Literal["examples", "tokens"]
) -> LossOutput:
    """-log pi(y | x), summed over the response's tokens.

    `average_over=examples` is the 2023 objective: the mean over examples of that sum, in which long
    responses weigh more. `tokens` divides by the response tokens of the whole batch instead: the
    usual token-mean cross-entropy.
    """
    return LossOutput(-policy.sum)
