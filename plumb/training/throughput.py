"""Measure how fast a run trains: examples and tokens per second, padding, MFU (docs/metrics.md)."""

from __future__ import annotations

from dataclasses import dataclass

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
