"""Several processes: what they agree on, sharding a model over them (FSDP2), gathering it. The only file that knows DTensor."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

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


def region(tensor: Tensor) -> tuple[list[int], Tensor]:
    """Where this rank's part of a tensor begins in the whole, and the part."""
    if not isinstance(tensor, DTensor):
        return [0] * tensor.dim(), tensor
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return list(offset), tensor.to_local()


def local_part(tensor: Tensor) -> tuple[list[int], Tensor] | None:
    """`region`, on one of the ranks that hold it; None on the others."""
    if isinstance(tensor, DTensor) or not dist.is_initialized() or dist.get_rank() == 0:
        return region(tensor)
    return None


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
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


GATHER = StateDictOptions(full_state_dict=True, cpu_offload=True)


def gathered_model_state(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict on rank 0's CPU; empty on the others. Every rank must call it."""
    return cast(dict[str, Tensor], get_model_state_dict(model, options=GATHER))


def gathered_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The whole optimizer state on rank 0's CPU, keyed by parameter name. Every rank must call it."""
    return get_optimizer_state_dict(model, optimizer, options=GATHER)
