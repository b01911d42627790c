"""Where a run stands, and what it saves to continue from there."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from plumb.console import rank
from plumb.runs import checkpoints, state_files
from plumb.runs.policy_file import as_in_2023


@dataclass
class Position:
    """Where a run stands in its schedule.

    Example, after two steps of 64: `Position(n_updates=2, n_seen=128, order="9f86...")`.
    """

    n_updates: int = 0  # optimizer steps
    n_seen: int = 0  # training examples
    order: str = ""  # a digest of the indices of all examples seen, chained
    evaluation_due: bool = False  # the evaluation that belongs here has not been made
    finished: bool = False

    def advance(self, indices: np.ndarray) -> None:
        """Count one step on the examples `indices`."""
        self.n_updates += 1
        self.n_seen += len(indices)
        chained = bytes.fromhex(self.order) + indices.astype("<i8").tobytes()
        self.order = hashlib.sha256(chained).hexdigest()

    def passed(self, every: int | None, n: int) -> bool:
        """Did the last `n` examples pass a multiple of `every`? None: never.

        >>> Position(n_seen=64).passed(50, 32), Position(n_seen=96).passed(50, 32)
        (True, False)
        """
        return every is not None and every > 0 and self.n_seen // every > (self.n_seen - n) // every


class TrainState:
    """Saves and restores the weights and the optimizer of a run. Every rank must make each call."""

    def __init__(
        self,
        policy: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        saver: checkpoints.Saver,
    ):
        self.policy = policy
        self.optimizer = optimizer
        self.saver = saver
        self.saved = ""  # the name of the last checkpoint
        self.n_bytes = 0  # of a checkpoint
        self.last_save = time.monotonic()

    def save(
        self,
        name: str,
        parts: Mapping[str, Callable[[], Any]],
        manifest: checkpoints.Manifest,
    ) -> None:
        """Save a checkpoint of this moment, unless the last one is of it, too: the run was stopped
        again before its next step.
        """
        if name != self.saved:
            self.saved = name
            state = state_files.tensors_of(self.policy, self.optimizer)
            self.saver.save(name, parts, state, manifest, self.n_bytes)

    def rehearse(
        self,
        parts: Mapping[str, Callable[[], Any]],
        manifest: checkpoints.Manifest,
        n_saves: int,
    ) -> None:
        """Find out what a save takes, and that it works; `n_saves` are to come."""
        state = state_files.tensors_of(self.policy, self.optimizer)
        self.n_bytes = self.saver.rehearse(parts, state, manifest, n_saves)

    def values(self) -> dict[str, Any]:
        """Return those of the optimizer's state that are no tensors."""
        return state_files.values_of(self.policy, self.optimizer)

    def restore(self, checkpoint: checkpoints.Checkpoint) -> Position:
        """Read weights and optimizer, and return where the run stood."""
        manifest = checkpoint.manifest
        state_files.restore(self.policy, self.optimizer, checkpoint.state_files(), manifest.values)
        self.saved = checkpoint.path.name
        self.saver.secs = manifest.save_secs
        self.n_bytes = sum(file.bytes for file in manifest.files.values())
        return Position(
            n_updates=manifest.step,
            n_seen=manifest.examples,
            order=manifest.order,
            evaluation_due=manifest.evaluation_due,
        )


def parts_of_2023(
    policy: PreTrainedModel,
    policy_state: Callable[[], dict[str, torch.Tensor]],
    optimizer_state: Callable[[], dict[str, Any]] | None,
    scheduler: Any,
    policy_format: str,
) -> dict[str, Callable[[], Any]]:
    """Return the files of the original repository's form, each to be made by all ranks, whole on
    rank 0. No optimizer.pt where `optimizer_state` is None.
    """

    def state() -> dict[str, torch.Tensor]:
        whole = policy_state()
        return as_in_2023(policy, whole) if policy_format == "repo2023" and rank() == 0 else whole

    optimizer = {} if optimizer_state is None else {"optimizer": optimizer_state}
    rates = {k: v for k, v in scheduler.state_dict().items() if k != "lr_lambdas"}
    return {"policy": state, **optimizer, "scheduler": lambda: rates}
