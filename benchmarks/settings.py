"""What throughput.py (the parent) and contenders.py (a child per contender) say to each other.
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
    """What one contender is to do; travels to its process as JSON."""

    label: str  # how tables call it
    contender: str  # plumb, padded, trl
    model: dict[str, Any]  # a transformers config, model_type included
    tokens: str  # a file of make_tokens.py, or "synthetic:SCALE"
    # dpo, sft (the chosen response), reward (backbone and a score at each response's last token)
    objective: str = "dpo"
    device: str = "cpu"
    dtype: str = "float32"  # of all weights, gradients and optimizer moments
    n_pairs: int = 64  # of one optimizer step, over all microbatches
    # pairs of it that a step really runs, evenly spread microbatches of the same batch; 0: all
    n_timed: int = 0
    n_steps: int = 8  # the most that will be asked for
    n_check: int = 4  # pairs of the check before the first step
    # pairs (padded, trl); 0: the one that was fastest for the same contender in an earlier scenario
    microbatch: int = 2
    budget: int = 0  # tokens of a microbatch (plumb); 0: its own choice, by the memory at hand
    # "live": forward in the same step; "cached": computed before training (trl); see `then`
    reference: str = "live"
    compile: bool = False
    checkpointing: bool = False  # activations recomputed in the backward pass (trl's default)
    by_length: bool = False  # trl: longest pairs first within each batch
    responses_only: bool = (
        False  # trl on a CPU: its LM head on response rows only, as on a GPU (a patch of ours)
    )
    lr: float = 1e-5
    max_grad_norm: float = 10.0
    n_warm: int = 0  # steps that are not counted
    n_measured: int = 5  # steps that are, where contenders run one after the other
    # plumb: changes of these fields, each measured in the same process
    then: list[dict[str, Any]] = field(default_factory=list)
    trace: bool = False  # a profiler table of one more step
    timeout: float = 600.0  # seconds for any one answer

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def starts(self, step: int) -> list[int]:
        """Where the timed microbatches of a step begin within its batch (padded, trl).

        One of each `n_pairs / n_timed` neighbours, counted from the front and from the back by
        turns, so that a batch ordered by length is sampled without a trend; another choice each
        step.

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
    """A child's line to its parent. Whatever libraries print goes to standard error instead."""

    def __init__(self) -> None:
        self.out: IO[str] = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def wait(self) -> dict[str, Any] | None:
        """The next order: a step, fields of Setting to change, "trace" with a file for a profiler
        table. None: stop.
        """
        line = sys.stdin.readline()
        return json.loads(line) if line.strip() else None

    def tell(self, **record: Any) -> None:
        self.out.write(json.dumps(record) + "\n")
        self.out.flush()
