"""Keep activations in the host's RAM between the forward and the backward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

LEAST_BYTES = 1 << 20  # smaller tensors stay where they are: copying takes longer than it saves


class OnHost(NamedTuple):
    """Hold a tensor's copy in RAM, and the device that it is wanted on."""

    copy: Tensor
    device: torch.device


def activations_on_host(model: nn.Module) -> AbstractContextManager:
    """Return the context of a forward pass in which what autograd saves, less the model's weights,
    is copied to the host and freed on the device; the backward pass copies it back.

    On a GPU the copies go through page-locked memory, on the stream that computes, so nothing is
    read before it is there.
    """
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x: Tensor) -> Tensor | OnHost:
        if x.nbytes < LEAST_BYTES or x.untyped_storage().data_ptr() in weights:
            return x
        return OnHost(to_host(x), x.device)

    def unpack(kept: Tensor | OnHost) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        return kept.copy.to(kept.device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def to_host(x: Tensor) -> Tensor:
    """Return a copy in RAM, page-locked if it comes from a GPU."""
    copy = torch.empty(x.size(), dtype=x.dtype, pin_memory=x.is_cuda)
    return copy.copy_(x, non_blocking=True)
