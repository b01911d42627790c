"""Order the examples of a run: a function of seed and epoch, without any state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np


class Schedule:
    """Choose which examples each optimizer step sees: a pure function of (seed, epoch), so there is
    no state to save.

    Every epoch is a fresh permutation drawn from (seed, epoch), or the data's own order with
    shuffle=False. Each epoch's last batch may be smaller (the original dropped it). Training ends
    after n_epochs or n_examples, whichever comes first.

    >>> once = dict(n_epochs=1, n_examples=None, shuffle=False, seed=0)
    >>> [list(map(int, b)) for b in Schedule(5, batch_size=2, **once)]
    [[0, 1], [2, 3], [4]]
    >>> some = dict(n_epochs=None, n_examples=8, shuffle=True, seed=0)
    >>> [len(b) for b in Schedule(5, batch_size=2, **some)]
    [2, 2, 1, 2, 1]
    """

    def __init__(
        self,
        n: int,
        *,
        batch_size: int,
        n_epochs: int | None,
        n_examples: int | None,
        shuffle: bool,
        seed: int,
    ):
        self.n = n
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        limits = [n * n_epochs] if n_epochs is not None else []
        self.n_examples = (
            min([*limits, *([n_examples] if n_examples is not None else [])]) if n else 0
        )
        self.n_epochs = -(-self.n_examples // n) if n else 0
        self.n_steps = self.n_steps_after(0)

    def order(self, epoch: int) -> np.ndarray:
        """Return the indices of the epoch's examples in the order they are seen.  [n]"""
        return (
            np.random.default_rng((self.seed, epoch)).permutation(self.n)
            if self.shuffle
            else np.arange(self.n)
        )

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.after(0)

    def after(self, n_seen: int) -> Iterator[np.ndarray]:
        """Yield the batches that remain after the first `n_seen` examples."""
        first, offset = divmod(n_seen, self.n) if self.n else (0, 0)
        for epoch in range(first, self.n_epochs):
            order = self.order(epoch)[: self.n_examples - epoch * self.n]
            for start in range(offset, len(order), self.batch_size):
                yield order[start : start + self.batch_size]
            offset = 0

    def n_steps_after(self, n_seen: int) -> int:
        """Return the number of batches that `after` yields.

        >>> schedule = Schedule(5, batch_size=2, n_epochs=None, n_examples=13, shuffle=True, seed=0)
        >>> seen = 0, 2, 4, 5, 9, 10, 12, 13
        >>> [schedule.n_steps_after(n) == len(list(schedule.after(n))) for n in seen]
        [True, True, True, True, True, True, True, True]
        """
        if n_seen >= self.n_examples:
            return 0
        in_epoch = min(self.n - n_seen % self.n, self.n_examples - n_seen)
        full, rest = divmod(self.n_examples - n_seen - in_epoch, self.n)
        batches = lambda n: -(-n // self.batch_size)
        return batches(in_epoch) + full * batches(self.n) + batches(rest)


class Block(NamedTuple):
    """Hold batches that are sampled together, and then used together, several times in a row.

    Example: of two batches of 2: Block(first=0, indices=[3, 0, 1, 2]).
    """

    first: int  # training examples before it
    indices: np.ndarray  # of its examples, each once


class BlockSchedule(Schedule):
    """Use each block of `batches` batches `uses` times before the next one, in a new order each
    time. Every use counts as a training example; n_epochs and n_examples do not count them. With
    one batch and one use, it is a Schedule.

    >>> once = dict(n_epochs=1, n_examples=None, shuffle=False, seed=0)
    >>> schedule = BlockSchedule(5, batches=1, uses=2, batch_size=3, **once)
    >>> [sorted(map(int, b)) for b in schedule], schedule.n_examples
    ([[0, 1, 2], [0, 1, 2], [3, 4], [3, 4]], 10)
    """

    def __init__(self, n: int, *, batches: int, uses: int, **of_schedule: Any):
        self.batches = batches
        self.uses = uses
        self.once = Schedule(n, **of_schedule)
        super().__init__(n, **of_schedule)
        self.n_examples *= uses
        self.n_steps = self.n_steps_after(0)

    def block_at(self, n_seen: int) -> Block:
        """Return the block of the step that follows the first `n_seen` examples."""
        epoch, within = divmod(n_seen, self.n * self.uses)
        size = self.batches * self.batch_size
        start = within // (size * self.uses) * size
        order = self.order(epoch)[: self.once.n_examples - epoch * self.n]
        first = (epoch * self.n + start) * self.uses
        return Block(first, order[start : start + size])

    def after(self, n_seen: int) -> Iterator[np.ndarray]:
        if self.batches == self.uses == 1:
            yield from self.once.after(n_seen)
            return
        while n_seen < self.n_examples:
            block = self.block_at(n_seen)
            n = len(block.indices)
            use, start = divmod(n_seen - block.first, n)
            order = block.indices
            if use:
                order = order[np.random.default_rng((self.seed, block.first, use)).permutation(n)]
            yield from (order[i : i + self.batch_size] for i in range(start, n, self.batch_size))
            n_seen = block.first + n * (use + 1)

    def n_steps_after(self, n_seen: int) -> int:
        """Return the number of batches that `after` yields.

        >>> some = dict(batch_size=2, n_epochs=None, n_examples=13, shuffle=True, seed=0)
        >>> schedule = BlockSchedule(5, batches=2, uses=3, **some)
        >>> seen = [0, *np.cumsum([len(batch) for batch in schedule]).tolist()]
        >>> [schedule.n_steps_after(n) for n in seen] == [*range(len(seen))][::-1]
        True
        """
        if n_seen >= self.n_examples or self.batches == self.uses == 1:
            return self.once.n_steps_after(n_seen)
        block = self.block_at(n_seen)
        n = len(block.indices)
        batches = lambda n: -(-n // self.batch_size)
        use, start = divmod(n_seen - block.first, n)
        of_block = batches(n - start) + (self.uses - 1 - use) * batches(n)
        return of_block + self.uses * self.once.n_steps_after(block.first // self.uses + n)
