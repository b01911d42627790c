"""Read numbers of response tokens, such as log-probabilities, by the training path: packed trees
in microbatches, divided among the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from plumb.batching.feed import Feed
from plumb.batching.layout import Batch
from plumb.batching.microbatches import Packing
from plumb.data.tokenization import Example
from plumb.distributed import collectives

# the numbers of a batch's scored tokens, such as log-probabilities, without gradients.  -> [N]
ReadTokens = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class TokenReader:
    """Read the response tokens of trees. Every rank must make each call."""

    packing: Packing
    rank: int  # of packing.world_size, among those that see different rows

    def __call__(self, trees: Sequence[Example], read: ReadTokens) -> list[np.ndarray]:
        """Return the numbers of each tree's response tokens, one response after another, float64,
        on every rank.
        """
        values: dict[int, np.ndarray] = {}
        step = Feed(trees, self.packing, self.rank).step(np.arange(len(trees)))
        for batch, weight, where in step.microbatches:
            each = read(batch).double().cpu().numpy()
            sizes = [sum(map(len, trees[i].responses)) for i in where.tolist()]
            if weight:
                # a row has the scored tokens of one example after those of the other
                parts = np.split(each, np.cumsum(sizes)[:-1])
                values |= dict(zip(where.tolist(), parts, strict=True))
        for others in collectives.all_gather_object(values):
            values |= others
        return [values[i] for i in range(len(trees))]
