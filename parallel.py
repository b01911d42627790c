"""Several processes: what they agree on, sharding a model over them (FSDP2), gathering it. The only file that knows DTensor."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from utils import UserError

T = TypeVar("T")
SPEAKING_SECS = 30  # how long the others wait for rank 0 to say its error and end, which ends them too


def same_everywhere(value: T) -> T:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_rank0(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, on every rank; its UserError, too. It may take as long as it likes.

    The others wait in a group of their own: the default group gives up after 10 minutes (NCCL), or 30 (gloo).
    """
    if not dist.is_initialized():
        return make()
    waiting = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = make()
        except UserError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, src=0, group=waiting)
    dist.destroy_process_group(waiting)
    if box[1] is not None:
        if dist.get_rank() != 0:
            time.sleep(SPEAKING_SECS)
        raise UserError(box[1])
    return box[0]


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
