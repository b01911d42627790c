"""Decide when a run saves, and what."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedModel

from plumb.console import rank, rank0_print
from plumb.losses.registry import Loss
from plumb.models.adapters import stored
from plumb.runs import checkpoints, directory
from plumb.runs.policy_file import as_in_2023
from plumb.training.metrics import Record, TrainingLog
from plumb.training.moving import PolicyAverage
from plumb.training.optimizers import averages
from plumb.training.rollouts import samples_responses
from plumb.training.train_state import TrainState


@dataclass
class RunSaver:
    """Save the checkpoints of a run. Every rank must make each call."""

    run_dir: Path
    state: TrainState
    log: TrainingLog
    saver: checkpoints.Saver
    # the files in the original repository's format; all ranks make each
    parts: Callable[[], Mapping[str, Callable[[], Any]]]
    fingerprint: dict[str, Any]  # what must be the same when the run resumes
    decisions: dict[str, Any]  # made from the memory at the run's first start
    every: int | None  # interval between saves without an evaluation, in examples
    every_minutes: float | None
    writes: bool  # false: the run writes no checkpoints
    policy_pt_is_complete: bool  # it holds all weights, as they are and under their names
    saved: str = ""  # the name of the last checkpoint
    n_bytes: int = 0  # of a checkpoint
    last_save: float = field(default_factory=time.monotonic)
    logs: dict[str, int] = field(default_factory=dict)  # bytes of each log at the last mark

    def wait(self) -> None:
        """Wait until the save in progress is done, and raise its error, if any."""
        self.saver.wait()

    def mark(self) -> None:
        """Record how long the logs are. Resuming from a checkpoint that was saved while an
        evaluation was due removes what was logged since.
        """
        self.logs = self.log.mark()

    def record_reference(self, weights: str) -> None:
        """Record the digest of the weights of a cached reference that moves."""
        self.decisions["reference_weights"] = weights

    def due(self, n: int) -> bool:
        """Return whether to save between evaluations, after a step of `n` examples, by this rank's
        clock.
        """
        minutes = self.every_minutes or math.inf
        return self.state.position.passed(self.every, n) or (
            time.monotonic() - self.last_save > 60 * minutes
        )

    def save(self, record: Record, interim: bool = False) -> None:
        """Save a checkpoint, step-<examples>, or interim-<examples> between evaluations, and point
        LATEST to it. Skip it if the last one has the same name: the run was stopped again before
        its next step.
        """
        self.last_save = time.monotonic()
        if not self.writes:
            rank0_print("debug=true: no checkpoint is written")
            return
        name = f"{'interim' if interim else 'step'}-{self.state.position.n_seen}"
        manifest = self.manifest(record)
        if name != self.saved:
            self.saved = name
            self.saver.save(
                name,
                self.parts(),
                self.state.tensors(),
                manifest,
                self.n_bytes,
                self.in_policy_pt(),
            )
        if rank() == 0:
            directory.write_status(self.run_dir, "running")

    def rehearse(self, n_saves: int) -> None:
        """Measure how much a save takes, and check that it works; `n_saves` will follow."""
        if self.writes:
            self.n_bytes = self.saver.rehearse(
                self.parts(),
                self.state.tensors(),
                self.manifest({}),
                n_saves,
                self.in_policy_pt(),
            )

    def in_policy_pt(self) -> set[str]:
        """Return the names of the state's tensors that policy.pt holds."""
        if not self.policy_pt_is_complete:
            return set()
        return {f"policy.{name}" for name in stored(self.state.policy)}

    def manifest(self, record: Record) -> checkpoints.Manifest:
        """Return the manifest of a checkpoint that is saved now."""
        position = self.state.position
        return checkpoints.Manifest(
            step=position.n_updates,
            examples=position.n_seen,
            finished=position.finished and not position.evaluation_due,
            evaluation_due=position.evaluation_due,
            metrics=record,
            fingerprint=self.fingerprint,
            decisions=self.decisions,
            logs=self.logs if position.evaluation_due else self.log.mark(),
            order=position.order,
            wandb=self.log.wandb_id(),
            checked=position.checked,
            values=self.state.values(),
            save_secs=self.saver.secs,
        )

    def restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Continue from a checkpoint: weights, optimizer and position."""
        self.state.restore(checkpoint)
        manifest = checkpoint.manifest
        self.saved = checkpoint.path.name
        self.saver.secs = manifest.save_secs
        self.n_bytes = sum(file.bytes for file in manifest.files.values())


def best_by(config: DictConfig, loss: Loss) -> str | None:
    """Return the metric that decides which checkpoint is best; None: none does."""
    if config.keep_best != "auto":
        return config.keep_best
    return "rollout_eval/reward" if samples_responses(config, loss) else "loss/eval"


def parts_of_2023(
    policy: PreTrainedModel,
    policy_state: Callable[[], dict[str, Tensor]],
    optimizer_state: Callable[[], dict[str, Any]] | None,
    run: TrainState,
    policy_format: str,
) -> dict[str, Callable[[], Any]]:
    """Return functions for the files in the original repository's format; all ranks must call each,
    and rank 0 gets the full state. Without optimizer.pt if `optimizer_state` is None; with
    policy_ema.pt if there is an average.
    """

    def state() -> dict[str, Tensor]:
        current = policy_state()
        if policy_format == "repo2023" and rank() == 0:
            return as_in_2023(policy, current)
        return current

    def of_policy() -> dict[str, Tensor]:
        if not averages(run.optimizer):
            return state()
        with run.averaged():
            return checkpoints.copied(state())

    rates = {k: v for k, v in run.scheduler.state_dict().items() if k != "lr_lambdas"}
    parts: dict[str, Callable[[], Any]] = {"policy": of_policy}
    if run.average is not None:
        parts["policy_ema"] = partial(_of_average, run.average, state)
    if optimizer_state is not None:
        parts["optimizer"] = optimizer_state
    return parts | {"scheduler": lambda: rates}


def _of_average(average: PolicyAverage, state: Callable[[], Any]) -> Any:
    """Return the state dict of a policy's average, in the policy's type."""
    with average.in_place_of_policy():
        return checkpoints.copied(state())
