"""Measure how fast a run trains: examples and tokens per second, padding, MFU (docs/metrics.md),
and how long the rest of it takes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from plumb.batching.feed import Step
from plumb.distributed import collectives
from plumb.training.budget import Cost
from plumb.training.metrics import Record


@dataclass(frozen=True)
class Throughput:
    """Compute the speed of a step."""

    cost: Cost  # operations of the policy
    peak_flops: float | None  # of one process; None on a CPU
    packed: bool  # trees in a row, not padded rows

    def of(self, step: Step, secs: float, waited_secs: float, live_reference: bool) -> Record:
        """Return the speed of a step that took `secs`; padding is that of this rank, the rest that
        of all ranks.
        """
        batches = [m.batch for m in step.microbatches]
        processed = sum(b.n_processed(self.packed) for b in batches)
        record: Record = {
            "examples_per_second": len(step.indices) / secs,
            "tokens_per_second": float(step.lengths.tokens().sum()) / secs,
            "padding": 1 - sum(b.n_tokens for b in batches) / processed if processed else 0.0,
            "data_wait_secs": waited_secs,
        }
        if self.peak_flops is not None:
            # forward, backward (twice as much), the live reference's forward
            passes = 4 if live_reference else 3
            operations = passes * self.cost.forward(step.lengths)
            record["mfu"] = operations / secs / (collectives.world_size() * self.peak_flops)
        return record


@dataclass
class Pace:
    """Estimate how long the rest of a run takes, from its recent steps and its last evaluation.
    What happens once (loading, the first step's checks) is no part of it.

    >>> pace = Pace(evaluation_secs=60)
    >>> for secs in (30, 2, 4):  # the first step takes longer than any other
    ...     pace.step(secs)
    >>> pace.seconds_left(n_steps=100, n_evaluations=2)
    420.0
    """

    evaluation_secs: float = 0.0  # with its samples and its checkpoint
    first_secs: float | None = None  # of the first step
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=100))

    def step(self, secs: float) -> None:
        """Count a step that took `secs`."""
        if self.first_secs is None:
            self.first_secs = secs
        else:
            self.recent.append(secs)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Measure an evaluation."""
        start = time.monotonic()
        yield
        self.evaluation_secs = time.monotonic() - start

    def seconds_left(self, n_steps: int, n_evaluations: int) -> float:
        """Return the estimated time of the steps and evaluations that are left, after at least one
        step.
        """
        known = self.recent or [self.first_secs or 0.0]
        return n_steps * sum(known) / len(known) + n_evaluations * self.evaluation_secs
