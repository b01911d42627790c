"""Several processes: what they agree on, sharding a model over them (FSDP2), gathering it. The only file that knows DTensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from utils import UserError

T = TypeVar("T")
timeout: timedelta | None = None  # how long a rank waits for another; set where the group is made


def same_everywhere(value: T) -> T:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class Talk:
    """What ranks tell one another beside the training: in an order of its own, and waiting for as long as it takes.

    Each rank must make the same calls in the same order, for one Talk in one thread. One process talks to itself.
    """

    def __init__(self):
        self.several = dist.is_initialized()
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if self.several else (0, 1)
        # The default group gives up after timeout_minutes; here a rank may write a large file, or wait for one.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(days=30)) if self.several else None

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        values: list[Any] = [None] * self.ranks
        if not self.several:
            return [value]
        dist.all_gather_object(values, value, group=self.group)
        return values

    def from_rank0(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every rank; its UserError, too."""
        if not self.several:
            return make()
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = make()
            except UserError as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0, group=self.group)
        if box[1] is not None:
            raise box[1]
        return box[0]


def from_rank0(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, on every rank; its UserError, too. It may take as long as it likes."""
    return _talk(dist.group.WORLD if dist.is_initialized() else None).from_rank0(make)


@cache
def _talk(world: dist.ProcessGroup | None) -> Talk:
    return Talk()


def agree(values: list[float]) -> list[float]:
    """The highest of all ranks' values, one by one: what is to be done next, in a few bytes between hosts."""
    if not dist.is_initialized():
        return values
    said = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(said, dist.ReduceOp.MAX, group=_on_the_cpu(dist.group.WORLD))
    return said.tolist()


@cache
def _on_the_cpu(world: dist.ProcessGroup) -> dist.ProcessGroup | None:
    """A group of the same ranks: asking the GPU would mean waiting for it."""
    return dist.new_group(backend="gloo", timeout=timeout)


def settle(model: nn.Module) -> None:
    """Let every parameter be this rank's part of it again; FSDP leaves some gathered after a forward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def meet() -> None:
    """No rank goes on before all are here."""
    if dist.is_initialized():
        dist.barrier()


def shard(model: nn.Module, block: type[nn.Module], compute_dtype: torch.dtype | None) -> None:
    """Shard parameters, gradients and optimizer state over all ranks, block by block (FSDP2). In place.

    Computation is in `compute_dtype` if given; gradients are reduced in float32.
    """
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32 if compute_dtype else None)
    mesh = dist.init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (dist.get_world_size(),))
    for module in model.modules():
        if isinstance(module, block):
            fully_shard(module, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def highest(value: float) -> float:
    """The highest of all ranks' values."""
    if not dist.is_initialized():
        return value
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return max(values)


def total(tensor: Tensor) -> Tensor:
    """The sum over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank. Every rank must call it."""
    if not isinstance(tensor, DTensor):
        return tensor
    kind = tensor.device_mesh.device_type
    return (tensor if tensor.device.type == kind else tensor.to(kind)).full_tensor()  # offloaded: NCCL moves no CPU memory


def local_part(tensor: Tensor) -> tuple[tuple[int, ...], Tensor] | None:
    """The block of a tensor that is this rank's to write: where it begins in the whole, and its values, not copied.

    None where another rank holds the same, or where this one holds nothing; so the parts of all ranks tile the whole exactly
    once. A plain tensor is the same on all ranks, and rank 0's to write.
    """
    if not isinstance(tensor, DTensor):
        return ((0,) * tensor.ndim, tensor.detach()) if not dist.is_initialized() or dist.get_rank() == 0 else None
    start, replica = _offset(tensor)
    local = tensor.detach().to_local()
    return None if replica or not local.numel() else (start, local)


def region(tensor: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """The block of a tensor that this rank holds, be it its to write or not: where it begins in the whole, and its values."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim, tensor.detach()
    return _offset(tensor)[0], tensor.detach().to_local()


def _offset(tensor: DTensor) -> tuple[tuple[int, ...], bool]:
    """Where this rank's block begins in the whole; and is it a copy of another rank's?

    FSDP cuts what tensor parallelism has left to a rank, so its strided placement, which stands first, counts last.
    """
    mesh, at = tensor.device_mesh, cast(list[int], tensor.device_mesh.get_coordinate())
    start, length, replica = [0] * tensor.ndim, list(tensor.shape), False
    for i, placement in sorted(enumerate(tensor.placements), key=lambda x: isinstance(x[1], _StridedShard)):
        if isinstance(placement, Shard | _StridedShard):
            size = -(-length[placement.dim] // mesh.size(i))
            skipped = min(at[i] * size, length[placement.dim])
            start[placement.dim] += skipped
            length[placement.dim] = min(size, length[placement.dim] - skipped)
        else:
            replica = replica or at[i] > 0
    local = tensor.to_local()
    assert tuple(length) == tuple(local.shape) or 0 == local.numel() == math.prod(length), tensor.placements
    return tuple(start), replica


def gathered(items: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor | None]]:
    """(name, the whole tensor in rank 0's RAM; None on the others), one at a time: one is held beside rank 0's copies.

    What stands under two names (tied weights) is gathered once. Every rank must go through all of it.
    """
    seen: dict[int, Tensor | None] = {}
    for name, tensor in items:
        if id(tensor) not in seen:
            full = whole(tensor.detach())
            seen[id(tensor)] = full.cpu() if not dist.is_initialized() or dist.get_rank() == 0 else None
            del full
        yield name, seen[id(tensor)]


def gathered_model_state(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict in rank 0's RAM; empty on the others. Every rank must call it."""
    return {name: full for name, full in gathered(model.state_dict(keep_vars=True).items()) if full is not None}


def gathered_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The whole optimizer state in rank 0's RAM, keyed by parameter name as in 2023. Every rank must call it."""
    names = {p: name for name, p in model.named_parameters()}
    state: dict[str, dict[str, Any]] = {names[p]: dict(of_p) for p, of_p in optimizer.state.items()}
    tensors = ((f"{name} {key}", x) for name, of_p in state.items() for key, x in of_p.items() if isinstance(x, Tensor))
    for both, full in gathered(tensors):
        name, _, key = both.rpartition(" ")
        state[name][key] = full
    groups = [group | {"params": [names[p] for p in group["params"]]} for group in optimizer.param_groups]
    return {"state": state, "param_groups": groups} if dist.get_rank() == 0 else {}
