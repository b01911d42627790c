"""Order and batches: which examples each step sees, how they are cut into microbatches, and how those are padded.

Shapes: B examples in a microbatch, k responses each (1 for SFT, 2 for pairs), R = k * B rows, T tokens in the longest row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenization import Example

IGNORE = -100  # the label of a token that is not trained


class Batch(NamedTuple):
    """A padded microbatch: the B first responses, then the B second ones, each after its prompt."""

    input_ids: Tensor  # [R, T] int64, padded on the right
    attention_mask: Tensor  # [R, T] int64, 0 on padding
    labels: Tensor  # [R, T] int64, IGNORE except on response tokens
    k: int

    def to(self, device) -> Batch:
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device), self.k)


class Schedule:
    """Which examples each optimizer step sees: a pure function of (seed, epoch), so nothing has to be remembered.

    Every epoch is a fresh permutation drawn from (seed, epoch), or the data's own order with shuffle=False. Each epoch's
    last batch may be smaller (the 2023 code dropped it). Training ends after n_epochs or n_examples, whichever comes first.

    >>> [list(map(int, b)) for b in Schedule(5, batch_size=2, n_epochs=1, n_examples=None, shuffle=False, seed=0)]
    [[0, 1], [2, 3], [4]]
    >>> [len(b) for b in Schedule(5, batch_size=2, n_epochs=None, n_examples=8, shuffle=True, seed=0)]
    [2, 2, 1, 2, 1]
    """

    def __init__(self, n: int, *, batch_size: int, n_epochs: int | None, n_examples: int | None, shuffle: bool, seed: int):
        self.n, self.batch_size, self.shuffle, self.seed = n, batch_size, shuffle, seed
        limits = [n * n_epochs] if n_epochs is not None else []
        self.n_examples = min([*limits, *([n_examples] if n_examples is not None else [])]) if n else 0
        self.n_epochs = -(-self.n_examples // n) if n else 0
        full, rest = divmod(self.n_examples, n) if n else (0, 0)
        self.n_steps = full * -(-n // batch_size) + -(-rest // batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """Indices of the epoch's examples, in the order in which they are seen.  [n]"""
        return np.random.default_rng((self.seed, epoch)).permutation(self.n) if self.shuffle else np.arange(self.n)

    def __iter__(self) -> Iterator[np.ndarray]:
        left = self.n_examples
        for epoch in range(self.n_epochs):
            order = self.order(epoch)[:left]
            left -= len(order)
            for start in range(0, len(order), self.batch_size):
                yield order[start : start + self.batch_size]


def by_length(examples: Sequence[Example]) -> list[Example]:
    """Longest first: neighbours then need little padding, and what does not fit in memory shows at once."""
    return sorted(examples, key=lambda e: len(e.prompt) + max(map(len, e.responses)), reverse=True)


def microbatches(examples: Sequence[Example], n: int) -> list[list[Example]]:
    """Split a batch into at most n parts of like lengths, sizes differing by at most one; nothing is lost (2023 dropped the
    remainder, and padded every part to the longest row of the whole batch)."""
    ordered = by_length(examples)
    return [[ordered[i] for i in part] for part in np.array_split(np.arange(len(ordered)), min(n, len(ordered)))]


def collate(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Pad to the longest row of this microbatch, on the right.

    >>> a = Example(np.array([1, 2]), (np.array([3, 0]), np.array([4, 5, 0])), "")
    >>> collate([a], pad_token_id=9).input_ids
    tensor([[1, 2, 3, 0, 9],
            [1, 2, 4, 5, 0]])
    >>> collate([a], pad_token_id=9).labels
    tensor([[-100, -100,    3,    0, -100],
            [-100, -100,    4,    5,    0]])
    """
    k = len(examples[0].responses)
    rows = [(e.prompt, e.responses[i]) for i in range(k) for e in examples]
    width = max(len(p) + len(r) for p, r in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)  # [R, T]
    labels = torch.full((len(rows), width), IGNORE)  # [R, T]
    attention_mask = torch.zeros((len(rows), width), dtype=torch.int64)  # [R, T]
    for i, (prompt, response) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(response)
        input_ids[i, :start] = torch.from_numpy(prompt)
        input_ids[i, start:end] = labels[i, start:end] = torch.from_numpy(response)
        attention_mask[i, :end] = 1
    return Batch(input_ids, attention_mask, labels, k)
