"""Hold the state of a run: weights, optimizer, learning rate and position."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedModel

from plumb.data.order import BlockSchedule
from plumb.distributed.progress import run_progress
from plumb.models.adapters import own_names
from plumb.rollouts.source import RolloutSource
from plumb.runs import state_files
from plumb.runs.checkpoints import Checkpoint
from plumb.training.moving import MovingReference, PolicyAverage
from plumb.training.optimizers import averaged_weights, make_scheduler


@dataclass
class Position:
    """Hold the position of a run in its schedule.

    Example, after two steps of 64: `Position(n_updates=2, n_seen=128, order="9f86...")`.
    """

    n_updates: int = 0  # optimizer steps
    n_seen: int = 0  # training examples
    order: str = ""  # a chained digest of the indices of all examples seen
    evaluation_due: bool = False  # the evaluation at this position has not been done
    finished: bool = False
    # whether the first step that trained the policy has been, and passed its checks; those before
    # it may have trained a critic only
    checked: bool = False

    def advance(self, indices: np.ndarray) -> None:
        """Count one step on the examples `indices`."""
        self.n_updates += 1
        self.n_seen += len(indices)
        chained = bytes.fromhex(self.order) + indices.astype("<i8").tobytes()
        self.order = hashlib.sha256(chained).hexdigest()

    def passed(self, every: int | None, n: int) -> bool:
        """Return whether the last `n` examples passed a multiple of `every`. None: never.

        >>> Position(n_seen=64).passed(50, 32), Position(n_seen=96).passed(50, 32)
        (True, False)
        """
        return every is not None and every > 0 and self.n_seen // every > (self.n_seen - n) // every


class TrainState:
    """Hold what the steps of a run change, and from which it resumes."""

    def __init__(
        self,
        config: DictConfig,
        policy: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        schedule: BlockSchedule,
    ):
        """Take the learning rate's schedule and the average's decay from `config`."""
        self.config = config
        self.policy = policy
        self.optimizer = optimizer
        self.schedule = schedule
        self.scheduler = make_scheduler(config, optimizer, schedule.n_steps)
        self.position = Position()
        self.n_steps = schedule.n_steps
        self.average: PolicyAverage | None = None
        if config.ema_decay is not None:
            self.average = PolicyAverage(policy, config.ema_decay)
        self.reference: MovingReference | None = None
        self.rollouts: RolloutSource | None = None  # where the policy samples what it learns from

    def update(self, indices: np.ndarray, trained: bool = True) -> None:
        """Update the weights by the gradients of a step on the examples `indices`, and then their
        average. `trained`: whether there are gradients; without any, both stay as they are.
        """
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        if self.average is not None and trained:
            self.average.update()
        self.position.advance(indices)
        run_progress.report(self.position.n_updates, self.position.n_seen)

    def n_steps_left(self) -> int:
        """Return the number of updates to come."""
        return self.n_steps - self.position.n_updates

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors that a run resumes from, by name."""
        own = state_files.tensors_of(self.policy, self.optimizer, own_names(self.policy))
        return own | self.followers()

    def followers(self) -> dict[str, Tensor]:
        """Return the tensors of the policy's average, of a reference that moves, and of the
        present rollout.
        """
        return {
            name: x
            for follower in (self.average, self.reference, self.rollouts)
            if follower is not None
            for name, x in follower.tensors().items()
        }

    def coming(self) -> Iterator[np.ndarray]:
        """Yield the batches that remain: all of them, or those until the reference moves."""
        n = None
        if self.reference is not None:
            n = self.reference.every - self.position.n_updates % self.reference.every
        return islice(self.schedule.after(self.position.n_seen), n)

    def reference_moves(self) -> bool:
        """Return whether the reference moves before the next step."""
        n = self.position.n_updates
        return self.reference is not None and n > 0 and n % self.reference.every == 0

    def averaged(self) -> AbstractContextManager[None]:
        """Give the policy the weights that it is evaluated and saved with, within the context; see
        `averaged_weights`. Every rank must enter it.
        """
        return averaged_weights(self.policy, self.optimizer)

    def values(self) -> dict[str, Any]:
        """Return the numbers of the optimizer's state that are not tensors."""
        return state_files.values_of(self.policy, self.optimizer)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint. Every rank must call it."""
        manifest = checkpoint.manifest
        files = checkpoint.state_files()
        self.position = Position(
            n_updates=manifest.step,
            n_seen=manifest.examples,
            order=manifest.order,
            evaluation_due=manifest.evaluation_due,
            checked=manifest.checked,
        )
        if self.rollouts is not None:  # it gets the shapes of the others from the files
            self.rollouts.restore(state_files.stored(files, "rollout."))
        state_files.restore(
            self.policy,
            self.optimizer,
            own_names(self.policy),
            files,
            manifest.values,
            self.followers(),
        )
        self.n_steps = manifest.step + self.schedule.n_steps_after(manifest.examples)
        self.scheduler = make_scheduler(self.config, self.optimizer, self.n_steps, manifest.step)
        run_progress.report(manifest.step, manifest.examples)
        if self.reference is not None:
            batches = [] if self.reference_moves() else list(self.coming())
            self.reference.restore(manifest.decisions, batches)
