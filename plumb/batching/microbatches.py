"""Split a step's batch into microbatches with similar numbers of tokens, over ranks."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from plumb.data.examples import Lengths


@dataclass(frozen=True)
class Packing:
    """Hold how batches are split and laid out: the same for all steps of a run."""

    # trees in a row; False: the model is given padded rows, so examples of like lengths go together
    packed: bool
    budget: int  # tokens in a microbatch, more only where one example has more
    world_size: int
    pad_token_id: int
    longest: int  # max_length
    row_length: int | None = None  # a fixed length of every row, or what its trees have


class Parts:
    """Hold n examples in P parts: a sequence of the indices of each part's examples."""

    def __init__(self, order: np.ndarray, counts: np.ndarray):
        """Store `order` [n], the examples' indices, part by part, and `counts` [P], the number of
        examples of each part.
        """
        self.order = order
        self.counts = counts
        self.ends = counts.cumsum()

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.order[self.ends[i] - self.counts[i] : self.ends[i]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    def reduce(self, reduction: np.ufunc, values: np.ndarray) -> np.ndarray:
        """Return the sum (np.add) or maximum of the values [n] of each part's examples; 0 for an
        empty part.  [P]
        """
        reduced, filled = np.zeros(len(self), np.int64), self.counts > 0
        reduced[filled] = reduction.reduceat(values[self.order], (self.ends - self.counts)[filled])
        return reduced


def split_into_microbatches(lengths: Lengths, packing: Packing, at_least: int) -> Parts:
    """Split a batch into microbatches, and each into one part per rank. Return indices into the
    batch, each index once.

    With W ranks, rank r's part of microbatch m is part m * W + r. There are as few microbatches as
    keep every part within the budget, but at least `at_least`. A pure function of the batch's
    lengths, so every rank makes the same split; a part may be empty only if no part has more than
    one example.
    """
    n, world = len(lengths), packing.world_size
    sizes = lengths.tokens() if packing.packed else lengths.longest()
    longest_first = np.argsort(-sizes, kind="stable")
    sizes = sizes[longest_first]
    n_rows = lengths.counts[longest_first]
    most = -(-n // world)  # more would leave nothing to most parts
    n_micro = min(
        most, max(1, min(at_least, n // world), -(-int(sizes.sum()) // (packing.budget * world)))
    )
    while True:
        if packing.packed:
            parts = by_tokens(sizes, n_micro * world)
            costs = parts.reduce(np.add, sizes)
        else:
            parts = by_count(n, n_micro * world)
            rows = parts.reduce(np.add, n_rows)  # one for each response
            costs = rows * parts.reduce(np.maximum, sizes)
        if n_micro == most or ((costs <= packing.budget) | (parts.counts == 1)).all():
            return Parts(longest_first[parts.order], parts.counts)
        n_micro += 1


def by_tokens(sizes: np.ndarray, n_parts: int) -> Parts:
    """Return parts with similar sums: starting with the largest, each size goes into the part with
    the fewest tokens so far, the first of equals (LPT; Graham 1969).

    The fullest part comes first, so that parts that run at the same time are most alike.

    >>> [part.tolist() for part in by_tokens(np.array([7, 5, 4, 3]), 2)]
    [[0, 3], [1, 2]]
    """
    # load * n_parts + part: one number, which orders by load and then by part
    heap = list(range(n_parts))
    chosen = []
    for more in (sizes.astype(np.int64) * n_parts).tolist():
        emptiest = heap[0]
        chosen.append(emptiest % n_parts)
        heapq.heapreplace(heap, emptiest + more)
    loads, part = np.divmod(np.array(heap), n_parts)
    place = np.empty(n_parts, np.int64)  # of each part, when the fullest stands first
    place[part[np.lexsort((part, -loads))]] = np.arange(n_parts)
    place_of = place[chosen]
    return Parts(np.argsort(place_of, kind="stable"), np.bincount(place_of, minlength=n_parts))


def by_count(n: int, n_parts: int) -> Parts:
    """Return neighbours together, in parts that differ by at most one example, the larger ones
    first; examples sorted by length then need little padding.

    >>> [part.tolist() for part in by_count(5, 3)]
    [[0, 1], [2, 3], [4]]
    """
    each, rest = divmod(n, n_parts)
    return Parts(np.arange(n), each + (np.arange(n_parts) < rest))
