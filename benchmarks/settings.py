"""Define what throughput.py (the parent) and contenders.py (a child per contender) exchange.
Imports no torch.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from typing import IO, Any


@dataclass
class Setting:
    """Hold the work of one contender; it is sent to the contender's process as JSON."""

    label: str  # its name in tables
    contender: str  # plumb, padded, trl
    model: dict[str, Any]  # a transformers config, model_type included
    tokens: str  # a file of make_tokens.py, or "synthetic:SCALE"
    # dpo, sft (the chosen response), reward (backbone and a score at each response's last token)
    objective: str = "dpo"
    device: str = "cpu"
    dtype: str = "float32"  # of all weights, gradients and optimizer moments
    n_pairs: int = 64  # of one optimizer step, over all microbatches
    # pairs that a step actually runs: evenly spread microbatches of the same batch; 0: all
    n_timed: int = 0
    n_steps: int = 8  # maximum number of steps
    n_check: int = 4  # pairs of the check before the first step
    # pairs (padded, trl); 0: the one that was fastest for the same contender in an earlier scenario
    microbatch: int = 2
    budget: int = 0  # tokens of a microbatch (plumb); 0: its own choice, by the free memory
    # "live": forward in the same step; "cached": computed before training (trl); see `then`
    reference: str = "live"
    compile: bool = False
    checkpointing: bool = False  # activations recomputed in the backward pass (trl's default)
    by_length: bool = False  # trl: longest pairs first within each batch
    responses_only: bool = (
        False  # trl on a CPU: its LM head on response rows only, as on a GPU (patched here)
    )
    lr: float = 1e-5
    max_grad_norm: float = 10.0
    n_warm: int = 0  # steps that are not counted
    n_measured: int = 5  # steps that are counted, where contenders run one after the other
    # plumb: changes of these fields, each measured in the same process
    then: list[dict[str, Any]] = field(default_factory=list)
    trace: bool = False  # a profiler table of one more step
    timeout: float = 600.0  # seconds for any one answer

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def starts(self, step: int) -> list[int]:
        """Return where the timed microbatches of a step begin within its batch (padded, trl).

        They are one of each `n_pairs / n_timed` neighbors, counted from the front and from the back
        in turn, so that a batch ordered by length is sampled without a trend; each step makes
        another choice.

        >>> Setting("", "trl", {}, "", n_pairs=16, n_timed=4, microbatch=1).starts(step=0)
        [2, 5, 10, 13]
        >>> Setting("", "trl", {}, "", n_pairs=16, n_timed=4, microbatch=1).starts(step=1)
        [3, 4, 11, 12]
        """
        stride = self.n_pairs // (self.n_timed or self.n_pairs)
        at = (step + stride // 2) % stride
        n_groups = self.n_pairs // (stride * self.microbatch)
        return [
            (i * stride + (stride - 1 - at if i % 2 else at)) * self.microbatch
            for i in range(n_groups)
        ]


class Pipe:
    """Connect a child to its parent. What libraries print goes to standard error instead."""

    def __init__(self) -> None:
        self.out: IO[str] = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def wait(self) -> dict[str, Any] | None:
        """Return the next order: a step, fields of Setting to change, "trace" with a file for a
        profiler table. None: stop.
        """
        line = sys.stdin.readline()
        return json.loads(line) if line.strip() else None

    def send(self, **record: Any) -> None:
        """Send a record to the parent."""
        self.out.write(json.dumps(record) + "\n")
        self.out.flush()
