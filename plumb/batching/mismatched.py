"""Mismatched examples: a batch's prompts with responses to other prompts of the same batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from plumb.data.tokenization import Example


def mismatched(batch: Sequence[Example], longest: int) -> list[Example]:
    """Return each example's prompt with the first response of the next example that has another
    prompt, in the batch's order, whose end is followed by its beginning. An example without such a
    partner is left out. A response is cut where it would end after `longest` tokens.

    >>> batch = [Example(np.array([i]), (np.array([i, 9]),), "") for i in (1, 1, 2)]
    >>> [(e.prompt.tolist(), e.responses[0].tolist()) for e in mismatched(batch, 8)]
    [([1], [2, 9]), ([1], [2, 9]), ([2], [1, 9])]
    """
    examples = []
    n = len(batch)
    for i, example in enumerate(batch):
        others = (batch[(i + step) % n] for step in range(1, n))
        other = next((e for e in others if not np.array_equal(e.prompt, example.prompt)), None)
        if other is not None:
            response = other.responses[0][: longest - len(example.prompt)]
            examples.append(Example(example.prompt, (response,), other.source))
    return examples
