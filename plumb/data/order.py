"""Order the examples of a run: a function of seed and epoch, without any state."""

from __future__ import annotations

from collections.abc import Iterator

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
