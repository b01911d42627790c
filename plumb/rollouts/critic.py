"""The critic of PPO: a model with a scalar head, which tells before each token of a response what
reward to expect. It is trained on the steps that the policy is given, with an optimizer of its own.

Shapes: N response tokens of a batch. Units: those of the reward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plumb.batching.feed import Step
from plumb.batching.layout import Batch
from plumb.distributed import sharding
from plumb.errors import NonFinite
from plumb.models.adapters import own_names
from plumb.models.forward_path import ForwardPath
from plumb.models.logps import response_token_values
from plumb.runs import state_files


@dataclass(frozen=True, eq=False)
class Critic:
    """Estimate values and learn from returns. Every rank has the same critic and its own rows, and
    must make each call.
    """

    model: Any  # with a scalar head, without dropout: old and new values have no noise
    optimizer: torch.optim.Optimizer
    lr: float
    lr_factor: Callable[[], float]  # of the next update, by the schedule of the policy's
    forward_path: ForwardPath
    precision: Callable[[], AbstractContextManager]  # autocast, or nothing
    device: torch.device
    value_clip: float | None
    value_weight: float
    max_grad_norm: float
    n_copies: int  # ranks that see the same rows

    @torch.no_grad()
    def values(self, batch: Batch) -> Tensor:
        """Return the value before each scored token of a batch.  [N]"""
        return self._values(batch.to(self.device))

    def _values(self, batch: Batch) -> Tensor:
        with self.precision():
            return response_token_values(self.model, batch, self.forward_path)

    def update(self, step: Step) -> dict[str, float]:
        """Train on a step whose tokens carry `values`, those at sampling, and `returns`. Return its
        metrics: the loss without its weight, the share of the returns' variance that the values
        explain, both before the update, and the share of tokens beyond the bound.
        """
        n = step.lengths.n_scored()
        sums = torch.zeros(6, dtype=torch.float64, device=self.device)
        for batch, weight, _ in step.microbatches:
            batch = batch.to(self.device)
            values = self._values(batch)
            old, returns = (batch.extras.token[k].to(values) for k in ("values", "returns"))
            losses, beyond = value_losses(values, old, returns, self.value_clip)
            (self.value_weight * weight * losses.sum() / n).backward()
            error = returns - values.detach()
            columns = (losses.detach(), beyond, error, error**2, returns, returns**2)
            sums += weight * torch.stack([x.double().sum() for x in columns])
        means = (sharding.all_reduce_sum(sums) / (n * self.n_copies)).tolist()
        return {**_metrics(means), "critic_train/grad_norm": self._step()}

    def _step(self) -> float:
        """Update the weights by the gradients of all ranks. Return the gradients' norm before they
        are clipped.
        """
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient in gradients:
            sharding.all_reduce_sum(gradient).div_(self.n_copies)
        total = sharding.total_norm(gradients)
        if not math.isfinite(norm := float(total)):
            raise NonFinite(
                f"the critic's gradient has the norm {norm}; try a smaller loss.critic_lr, or"
                " bounded rewards (reward.clip)"
            )
        if norm > self.max_grad_norm:
            sharding.scale(gradients, self.max_grad_norm / (total + 1e-6))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.lr_factor()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """Return what a run resumes from, by name: weights, and the optimizer's state once there
        was an update or `expect_state` was called.
        """
        own = own_names(self.model)
        tensors = state_files.tensors_of(self.model, self.optimizer, own)
        return {f"critic.{name}": tensor for name, tensor in tensors.items()}

    def expect_state(self) -> None:
        """Create the optimizer's state, which a checkpoint is then read into, with the weights: by
        an update with gradients of 0.
        """
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        self.optimizer.step()
        self.optimizer.zero_grad()


def value_losses(
    values: Tensor, old: Tensor, returns: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Return max((V - R)^2, (V' - R)^2) / 2, where V' is V within +-clip of its old value, and
    whether that bound leaves V without a gradient.  [N] each

    As in OpenAI's baselines: a value beyond the bound is still drawn back, since the larger one
    counts.
    """
    losses = (values - returns) ** 2
    if clip is None:
        return losses / 2, torch.zeros_like(losses, dtype=torch.bool)
    bounded = (values.clamp(old - clip, old + clip) - returns) ** 2
    return torch.maximum(losses, bounded) / 2, bounded > losses


def _metrics(means: list[float]) -> dict[str, float]:
    loss, beyond, error, error_squared, returns, returns_squared = means
    variance = returns_squared - returns**2
    left = error_squared - error**2
    return {
        "critic_train/loss": loss,
        "critic_train/clip": beyond,
        "critic_train/explained_variance": 1 - left / variance if variance > 0 else 0.0,
        "critic_train/returns": returns,
        "critic_train/values": returns - error,
    }
