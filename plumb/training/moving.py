"""Weights that follow the policy: its moving average, and a moving reference (TR-DPO)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from plumb.distributed import sharding
from plumb.models.reference_cache import weights_digest
from plumb.training.cached_reference import CachedReference


class PolicyAverage:
    """Keep the exponential moving average of a policy's weights, in float32 or wider. After each
    update: average <- decay * average + (1 - decay) * policy. Every rank must make each call.
    """

    def __init__(self, policy: PreTrainedModel, decay: float):
        sharding.reshard(policy)
        self.policy = policy
        self.decay = decay
        # laid out over the ranks as the policy is
        self.weights = {
            name: p.detach().clone().to(torch.promote_types(p.dtype, torch.float32))
            for name, p in policy.named_parameters()
            if p.requires_grad
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return what a run resumes from, by name."""
        return {f"average.{name}": x for name, x in self.weights.items()}

    @torch.no_grad()
    def start(self) -> None:
        """Set the average to the policy, before the first update."""
        sharding.reshard(self.policy)
        for average, p in self._pairs():
            average.copy_(p)

    @torch.no_grad()
    def update(self) -> None:
        """Include the policy after an update."""
        sharding.reshard(self.policy)
        for average, p in self._pairs():
            average.lerp_(p.to(average.dtype), 1 - self.decay)

    @contextmanager
    def in_place_of_policy(self) -> Iterator[None]:
        """Give the policy the average's weights, rounded to its type, within the context. Nothing
        may be saved there.
        """
        sharding.reshard(self.policy)
        policy_weights = [p.clone() for _, p in self._pairs()]
        for average, p in self._pairs():
            p.copy_(average)
        try:
            yield
        finally:
            sharding.reshard(self.policy)
            for (_, p), own in zip(self._pairs(), policy_weights, strict=True):
                p.copy_(own)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's part of the average and of the policy, for each trained parameter."""
        parameters = dict(self.policy.named_parameters())
        for name in self.weights:
            p = parameters[name]
            yield sharding.local(self.weights[name]), sharding.local(p.detach())


class MovingReference(Protocol):
    """Move a reference towards the policy every few updates. Every rank must make each call."""

    @property
    def every(self) -> int:
        """Return the interval between moves, in optimizer steps."""

    def move(self, batches: Sequence[np.ndarray]) -> None:
        """Move the reference. `batches`: the examples' indices of each step until the next move."""

    def restore(self, decisions: Mapping[str, Any], batches: Sequence[np.ndarray]) -> None:
        """Continue with the reference of a checkpoint, for these steps until the next move."""

    def tensors(self) -> dict[str, Tensor]:
        """Return what a run resumes from, by name."""


@dataclass(frozen=True)
class MovingModel:
    """Move a live reference: reference <- weight * policy + (1 - weight) * reference, the soft
    update of arXiv:2404.09656, and with a weight of 1 its hard update.
    """

    policy: PreTrainedModel
    reference: PreTrainedModel
    every: int
    weight: float  # in (0, 1]

    @torch.no_grad()
    def move(self, batches: Sequence[np.ndarray]) -> None:
        sharding.reshard(self.policy)
        sharding.reshard(self.reference)
        policy = dict(self.policy.named_parameters())
        for name, own in self.reference.named_parameters():
            part = sharding.local(own.detach())
            part.lerp_(sharding.local(policy[name].detach()).to(part.dtype), self.weight)

    def restore(self, decisions: Mapping[str, Any], batches: Sequence[np.ndarray]) -> None:
        """Do nothing: the weights are among the tensors."""

    def tensors(self) -> dict[str, Tensor]:
        sharding.reshard(self.reference)
        return {f"reference.{name}": p for name, p in self.reference.named_parameters()}


@dataclass(frozen=True)
class MovingCache:
    """Move a cached reference by copying the policy: its log-probabilities are computed anew
    for the steps until the next move, and for the held-out examples.
    """

    policy: PreTrainedModel
    cached: CachedReference
    every: int
    record: Callable[[str], None]  # notes the digest of the reference's weights for the checkpoints

    def move(self, batches: Sequence[np.ndarray]) -> None:
        weights = weights_digest(self.policy)
        self.cached.fill(weights, batches, self.policy)
        sharding.reshard(self.policy)
        self.record(weights)

    def restore(self, decisions: Mapping[str, Any], batches: Sequence[np.ndarray]) -> None:
        """Continue with the cached reference of a checkpoint. Raise ResumeMismatch if it is no
        longer in the cache, since its weights are not kept.
        """
        weights = decisions.get("reference_weights")
        if weights is not None:
            self.cached.fill(weights, batches, None)
            self.record(weights)

    def tensors(self) -> dict[str, Tensor]:
        return {}
