"""Sample from a policy that is sharded over several processes.

A sharded policy cannot be sampled from rank by rank, since each of its forward passes needs all
ranks, and responses have different lengths. So every rank holds a copy of the policy in one piece,
of the precision in which it computes, and samples from that. A policy with adapters has them in the
copy, too: merged into weights of 16 bits, small ones would be rounded away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from plumb.data.prompts import NumberedPrompt
from plumb.distributed import sharding
from plumb.models.forward_path import use_tree_attention
from plumb.models.weight_sources import frozen_skeleton
from plumb.rollouts.engine import Engine, Samples


@dataclass
class UnshardedCopy:
    """Hold a sharded policy in one piece. Several engines may share it."""

    device: torch.device
    dtype: torch.dtype | None  # of its weights; None: those that the policy's have
    model: Any = None  # made when it is needed

    @torch.no_grad()
    def updated(self, policy: Any) -> Any:
        """Return the copy with the weights and buffers that the policy has now. They are gathered
        one by one, so that there is never a second full model; those that are not trained, such as
        the base of adapters, only once. Every rank must call it.
        """
        # FSDP leaves some parameters gathered after a forward pass
        sharding.reshard(policy)
        first = self.model is None
        if first:
            self.model = frozen_skeleton(policy, self.dtype)
            use_tree_attention(self.model)
            sharding.allocate(self.model, self.device)
        weights = dict(policy.named_parameters(remove_duplicate=False))
        for name, p in self.model.named_parameters():
            if first or weights[name].requires_grad:
                p.copy_(sharding.full_tensor(weights[name].detach()))
        buffers = dict(policy.named_buffers())
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])
        return self.model


@dataclass(frozen=True)
class GatheredEngine:
    """Sample by another engine from a copy of the policy in one piece."""

    engine: Engine
    copied: UnshardedCopy

    def load(self, policy: Any) -> None:
        """Gather the policy's weights into the copy. Every rank must call it."""
        self.engine.load(self.copied.updated(policy))

    def sample(self, prompts: Sequence[NumberedPrompt], n: int, seed: Sequence[int]) -> Samples:
        """Return n responses to each prompt; see engine.Engine. A rank may call it alone."""
        return self.engine.sample(prompts, n, seed)
