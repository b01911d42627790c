"""The feed of a run: steps of microbatches on the device, prepared ahead of the step that needs
them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

from plumb.batching.layout import Batch, pack
from plumb.batching.microbatches import Packing, split_into_microbatches
from plumb.batching.mismatched import mismatched
from plumb.data.examples import Lengths, lengths_of
from plumb.data.extras import Extras
from plumb.data.tokenization import Example


class Microbatch(NamedTuple):
    batch: Batch
    # 0: this rank has no part of it, and computes an example only to make the same calls as the
    # others
    weight: float
    where: np.ndarray  # [B] the examples' places in the batch


class ContextBatch(NamedTuple):
    """Hold what a loss's batch context is computed from: this rank's parts."""

    microbatches: list[Microbatch]
    shape: tuple[int, int]  # examples of all ranks, and the most responses of one


class KnownLogps(NamedTuple):
    """Hold log-probabilities by a digest of prompt and response, in the order of the digests."""

    digests: np.ndarray  # [m] uint64
    logps: np.ndarray  # [m] float64


@dataclass(frozen=True, eq=False)
class Step:
    """Hold a batch, ready: which examples all ranks together see, and this rank's part of each
    microbatch.

    Example: a step of examples 3 and 5: Step(np.array([3, 5]), lengths[[3, 5]], [microbatch]).
    """

    indices: np.ndarray  # [n] of the examples among all
    lengths: Lengths  # of these n, or of those that are left of them
    microbatches: list[Microbatch]
    for_context: ContextBatch | None = None  # for a loss with a batch context
    # what is logged of how the batch was made
    counters: Mapping[str, float] = field(default_factory=dict)


class Feed:
    """Turn indices into steps for one rank. Only the examples of its own parts are made; of the
    others it knows the lengths.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        packing: Packing,
        rank: int,
        reference: np.ndarray | None = None,
        context: str | None = None,
    ):
        """Take `reference` [n, k]: log-probabilities, where they were computed before; `context`:
        the examples of the loss's batch context (see losses/contract.py), if it has one.
        """
        self.examples = examples
        self.packing = packing
        self.rank = rank
        self.reference = reference
        self.context = context
        self.digests: Callable[[Sequence[Example]], np.ndarray] | None = None
        self.known: KnownLogps | None = None  # of mismatched examples, with `reference`
        self.lengths = lengths_of(examples)
        # what the examples carry beside their tokens, less what no example has
        own: Extras = getattr(examples, "extras", Extras)()
        known = lambda columns: {n: x for n, x in columns.items() if not np.isnan(x).all()}
        self.extras = Extras(known(own.example), known(own.response), own.token)
        if "weights" in self.extras.example:
            weights = relative_weights(self.extras.example["weights"])
            self.extras = replace(self.extras, example={**self.extras.example, "weights": weights})

    def step(self, indices: np.ndarray, at_least: int = 1) -> Step:
        """Return the batch of these examples in `at_least` microbatches, or as many more as the
        token budget takes.
        """
        packing = self.packing
        lengths = self.lengths[indices]
        extras = self.extras
        if self.reference is not None:
            extras = replace(extras, response={**extras.response, "reference": self.reference})
        parts = split_into_microbatches(lengths, packing, at_least)
        microbatches = []
        for part in range(self.rank, len(parts), packing.world_size):
            weight = float(len(parts[part]) > 0)
            where = parts[part] if weight else np.array([0])
            batch = pack(
                [self.examples[i] for i in indices[where].tolist()],
                pad_token_id=packing.pad_token_id,
                longest=packing.longest,
                row_length=packing.row_length,
                extras=extras.take(indices[where]),
            )
            microbatches.append(Microbatch(batch, weight, where))
        for_context = None
        if self.context == "own":  # the same microbatches, not made twice
            for_context = ContextBatch(microbatches, lengths.prompts.shape)
        elif self.context == "mismatched":
            for_context = self.mismatched(indices)
        return Step(
            indices=indices, lengths=lengths, microbatches=microbatches, for_context=for_context
        )

    def for_context(self, indices: np.ndarray) -> ContextBatch | None:
        """Return what a loss's batch context of these examples is computed from, and nothing else;
        None for a loss without one.
        """
        return (
            self.mismatched(indices)
            if self.context == "mismatched"
            else self.step(indices).for_context
        )

    def mismatched(self, indices: np.ndarray) -> ContextBatch:
        """Return the mismatched examples of a batch. Every rank looks at all of its examples."""
        examples = self.mismatched_examples(indices)
        if not examples:
            return ContextBatch([], (0, 1))
        reference = None
        if self.known is not None and self.digests is not None:
            at = np.searchsorted(self.known.digests, self.digests(examples))
            reference = self.known.logps[at]
        everything = np.arange(len(examples))
        step = Feed(examples, self.packing, self.rank, reference).step(everything)
        return ContextBatch(step.microbatches, (len(examples), 1))

    def mismatched_examples(self, indices: np.ndarray) -> list[Example]:
        """Return a batch's prompts with responses to other prompts."""
        return mismatched([self.examples[i] for i in indices.tolist()], self.packing.longest)

    def ahead(
        self, batches: Iterable[np.ndarray], device: torch.device, at_least: int = 1
    ) -> Prefetcher:
        """Return the steps of these batches, prepared for `device` in a thread."""
        return Prefetcher((self.step(indices, at_least) for indices in batches), device)


def relative_weights(weights: np.ndarray) -> np.ndarray:
    """Return the weights of n examples divided by their mean, [n] float64. One that has none (NaN)
    counts as one row.

    >>> relative_weights(np.array([4, np.nan, 1])).tolist()
    [2.0, 0.5, 0.5]
    """
    filled = np.where(np.isnan(weights), 1.0, weights.astype(np.float64))
    return filled / filled.mean()


def _take_gpu(device: torch.device) -> None:
    """Let a thread work on this process's GPU: a new one has GPU 0, where each process would open a
    context.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


class Prefetcher(Iterator[Step]):
    """Yield the items of an iterator, each made in a thread while the one before is used.

    For a GPU they lie in page-locked memory. Whoever copies a step to the GPU need not keep it: the
    allocator of that memory gives none of it away before the copies from it are done, and they run
    on the stream that computes.

    `waited_secs`: how long the last was waited for. An error in the thread is raised where its item
    would have come.
    """

    def __init__(self, items: Iterable[Step], device: torch.device):
        self.items = iter(items)
        self.pin = device.type == "cuda"
        self.waited_secs = 0.0
        # the thread ends with the prefetcher, so it may not refer to it
        self.thread = ThreadPoolExecutor(1, initializer=_take_gpu, initargs=(device,))
        self.coming = self.thread.submit(self._make)

    def _make(self) -> Step:
        step = next(self.items)
        return (
            replace(step, microbatches=[m._replace(batch=m.batch.pin()) for m in step.microbatches])
            if self.pin
            else step
        )

    def __next__(self) -> Step:
        start = time.perf_counter()
        step = self.coming.result()
        self.waited_secs = time.perf_counter() - start
        self.coming = self.thread.submit(self._make)
        return step
