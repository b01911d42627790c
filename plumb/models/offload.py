"""Keep activations in the host's RAM between the forward and the backward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

LEAST_BYTES = 1 << 20  # smaller tensors stay where they are: copying takes longer than it saves


class OnHost(NamedTuple):
    """Hold a tensor's copy in RAM, and the device that it is wanted on."""

    copy: Tensor
    device: torch.device

    def again(self) -> Tensor:
        """Return the tensor, copied back."""
        return self.copy.to(self.device, non_blocking=True)


class CastWeight(NamedTuple):
    """Hold what autocast has made of a weight, or a view of that, to be made again."""

    weight: nn.Parameter
    dtype: torch.dtype
    view: tuple[Any, ...]  # sizes, strides, offset

    def again(self) -> Tensor:
        """Return the tensor, cast from the weight."""
        return self.weight.to(self.dtype).as_strided(*self.view)


def activations_on_host() -> AbstractContextManager:
    """Return the context of a forward pass in which what autograd saves, but for weights, is copied
    to the host and freed on the device; the backward pass copies it back. Of blocks that are
    recomputed these are the inputs. What autocast makes of trained weights is made again.

    On a GPU the copies go through page-locked memory, on the stream that computes, so nothing is
    read before it is there.
    """

    def pack(x: Tensor) -> Tensor | OnHost | CastWeight:
        if x.nbytes < LEAST_BYTES or is_weight(x):
            return x
        weight = weight_of_cast(x)
        if weight is None:
            return OnHost(to_host(x), x.device)
        return CastWeight(weight, x.dtype, (x.size(), x.stride(), x.storage_offset()))

    def unpack(kept: Tensor | OnHost | CastWeight) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept.again()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def is_weight(x: Tensor) -> bool:
    """Return whether this is a weight or a view of one; FSDP's gathered ones are, too."""
    return isinstance(x if x._base is None else x._base, nn.Parameter)


def weight_of_cast(x: Tensor) -> nn.Parameter | None:
    """Return the trained weight of which this is another type, as autocast makes it, or a view of
    that; None for any other tensor.
    """
    node = (x if x._base is None else x._base).grad_fn
    if node is None or node.name() != "ToCopyBackward0":
        return None
    ((source, _),) = node.next_functions
    weight = getattr(source, "variable", None)  # of a leaf
    return weight if isinstance(weight, nn.Parameter) else None


def to_host(x: Tensor) -> Tensor:
    """Return a copy in RAM, page-locked if it comes from a GPU."""
    copy = torch.empty(x.size(), dtype=x.dtype, pin_memory=x.is_cuda)
    return copy.copy_(x, non_blocking=True)
