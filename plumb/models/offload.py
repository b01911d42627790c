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


def activations_on_host() -> AbstractContextManager:
    """Return the context of a forward pass in which what autograd saves, but for weights, is copied
    to the host and freed on the device; the backward pass copies it back. Of blocks that are
    recomputed these are the inputs.

    On a GPU the copies go through page-locked memory, on the stream that computes, so nothing is
    read before it is there.
    """

    def pack(x: Tensor) -> Tensor | OnHost:
        return x if x.nbytes < LEAST_BYTES or is_weight(x) else OnHost(to_host(x), x.device)

    def unpack(kept: Tensor | OnHost) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        return kept.copy.to(kept.device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def is_weight(x: Tensor) -> bool:
    """Return whether this is a weight or a view of one; FSDP's gathered ones are, too."""
    return isinstance(x if x._base is None else x._base, nn.Parameter)


def to_host(x: Tensor) -> Tensor:
    """Return a copy in RAM, page-locked if it comes from a GPU."""
    copy = torch.empty(x.size(), dtype=x.dtype, pin_memory=x.is_cuda)
    return copy.copy_(x, non_blocking=True)
