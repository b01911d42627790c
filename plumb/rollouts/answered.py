"""Define what a reward is computed from: a response as text, with its prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Answered:
    """Hold what the reward of a response is computed from.

    Example: Answered("2 + 2 =", " 4", "4", 2, "eos", "sums.jsonl:1").
    """

    prompt: str  # as the policy read it, without the BOS token
    response: str  # without the end token
    target: str  # the data's own response, "" where it has none
    n_tokens: int  # of the response, the end token included
    ended: str  # "eos" or "length"
    source: str  # of the prompt


Reward = Callable[[Sequence[Answered]], np.ndarray]  # -> one number for each, [R]
