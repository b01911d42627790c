"""A model over several processes: sharding it (FSDP2), gathering it. With
distributed/tensor_parallel.py, which cuts layers, the only file that knows DTensor.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from plumb.distributed.collectives import all_gather_object
from plumb.errors import UserError

# It warns that a parameter cut by FSDP and tensor parallelism is gathered in two steps, which
# this layout intends.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def reshard(model: nn.Module) -> None:
    """Reduce every parameter to this rank's part again; FSDP leaves some gathered after a forward
    pass.
    """
    for module in sharded_modules(model):
        module.reshard()


class Layout:
    """Describe how models lie over the ranks, and which ranks process the same rows.

    A mesh of replicate x shard x tp: parameters, gradients and optimizer state are cut over `shard`
    (FSDP2) and, within a layer, over `tp`; `replicate` holds copies (HSDP). Ranks that differ only
    in `tp` process the same rows. Neighbouring ranks, which share a machine, differ in `tp` first,
    then in `shard`.
    """

    def __init__(
        self,
        shard_size: int | None,
        tp_size: int | None,
        compute_dtype: torch.dtype | None,
        offload: bool,
    ):
        world, rank = dist.get_world_size(), dist.get_rank()
        tp_size = tp_size or world
        if world % tp_size:
            raise UserError(
                f"tp_size={tp_size}: does not divide the {world} processes; give a divisor, or null"
                " for all of them"
            )
        self.tp_size = tp_size
        self.rank = rank // tp_size
        self.n_rows = world // tp_size
        self.shard_size = shard_size or self.n_rows
        if self.n_rows % self.shard_size:
            raise UserError(
                f"fsdp_shard_size={shard_size}: does not divide the {self.n_rows} processes that"
                " see different rows; give a divisor, or null to shard over all of them"
            )
        gpu = torch.cuda.is_available()
        if offload and not gpu:
            raise UserError(
                "fsdp_cpu_offload=true: there is no GPU here to move weights away from; set it to"
                " false"
            )
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        )
        self.offload = offload
        self.first_of_rows = rank % tp_size == 0
        sizes = {
            "replicate": self.n_rows // self.shard_size,
            "shard": self.shard_size,
            "tp": tp_size,
        }
        sizes = {name: n for name, n in sizes.items() if n > 1 or name == "shard"}
        self.mesh = dist.init_device_mesh(
            self.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes)
        )
        self.fsdp_mesh = (
            self.mesh[tuple(name for name in sizes if name != "tp")] if tp_size > 1 else self.mesh
        )
        # Gradients are reduced in float32.
        self.precision = MixedPrecisionPolicy(
            param_dtype=compute_dtype, reduce_dtype=torch.float32 if compute_dtype else None
        )

    @property
    def n_shards(self) -> int:
        """Return the number of ranks over which one copy of a model is sharded."""
        return self.shard_size * self.tp_size

    @property
    def tp_mesh(self) -> DeviceMesh:
        return self.mesh["tp"]

    def shard(
        self,
        model: nn.Module,
        block: type[nn.Module],
        trained: bool,
        apart: Sequence[nn.Module] = (),
    ) -> None:
        """Shard the parameters over the ranks in place, block by block, with everything outside the
        blocks as one more unit.

        Modules in `apart` compute in their own precision.
        """
        offload = CPUOffloadPolicy() if self.offload else OffloadPolicy()
        how: dict[str, Any] = {
            "mesh": self.fsdp_mesh,
            "mp_policy": self.precision,
            "offload_policy": offload,
        }
        for module in [m for m in model.modules() if isinstance(m, block)]:
            fully_shard(module, **how)
        for module in apart:
            fully_shard(module, **how | {"mp_policy": MixedPrecisionPolicy()})
        # What is outside of blocks (embedding, head) stays gathered from forward to backward pass,
        # where there is one.
        fully_shard(model, reshard_after_forward=None if trained else True, **how)
        # ranks' losses are parts of one sum: gradients are summed, not averaged
        for unit in sharded_modules(model):
            unit.set_force_sum_reduction_for_comms(True)
            unit.set_gradient_divide_factor(1.0)

    def materialise(self, model: nn.Module) -> None:
        """Allocate this rank's part of a sharded model on the meta device. Its values are
        undefined.
        """
        allocate(model, torch.device("cpu") if self.offload else self.device)
        model._apply(lambda t: t)  # by which FSDP takes note
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.device)


def allocate(model: nn.Module, device: torch.device) -> None:
    """Allocate the parameters of a model that are on the meta device, with undefined values."""
    made: dict[int, nn.Parameter] = {}  # a tied parameter stays one
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_meta:
                if id(p) not in made:
                    made[id(p)] = nn.Parameter(
                        torch.empty_like(p, device=device), requires_grad=p.requires_grad
                    )
                module._parameters[name] = made[id(p)]


def parts(model: nn.Module) -> Iterator[tuple[str, Tensor, tuple[slice, ...]]]:
    """Yield (name, this rank's writable part, its place in the full tensor) of each parameter and
    persistent buffer.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        start = _offset(tensor)[0] if isinstance(tensor, DTensor) else (0,) * tensor.ndim
        part = local(tensor.detach())
        yield name, part, tuple(slice(a, a + n) for a, n in zip(start, part.shape, strict=True))


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reduce_gradients(model: nn.Module, now: bool, each: bool) -> None:
    """Set, before a backward pass, whether gradients are summed over ranks after it or kept for a
    later pass of the same step.

    With `each`, every pass sums within `shard`, so that no rank keeps full gradients; the sum over
    `replicate` waits anyway.
    """
    root = cast(FSDPModule, model)
    root.set_requires_gradient_sync(now or each)
    root.set_requires_all_reduce(now)
    root.set_is_last_backward(now)


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first floating-point tensor that holds NaN or infinity, on any rank;
    None if all are finite.

    Reads the tensors where they are, and waits for the device once. Every rank must call it.
    """
    mine = [(name, region(tensor)[1]) for name, tensor in tensors if tensor.is_floating_point()]
    mine = [(name, part) for name, part in mine if part.numel()]
    bad = None
    if mine:
        # NaN where there is one
        largest = torch._foreach_norm([part for _, part in mine], torch.inf)
        finite = (
            torch.stack([x.to(largest[0].device, torch.float64) for x in largest])
            .isfinite()
            .tolist()
        )
        bad = next((name for (name, _), fine in zip(mine, finite, strict=True) if not fine), None)
    return next((name for name in all_gather_object(bad) if name is not None), None)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor on every rank. Every rank must call it."""
    if not isinstance(tensor, DTensor):
        return tensor
    kind = tensor.device_mesh.device_type
    # offloaded: NCCL moves no CPU memory
    there = tensor if tensor.device.type == kind else tensor.to(kind)
    return cast(DTensor, there).full_tensor()


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor lies over several ranks."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, without copying."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: Tensor) -> tuple[tuple[int, ...], Tensor] | None:
    """Return the block of a tensor that this rank is to write: its offset in the full tensor, and
    its values, not copied.

    None if another rank holds the same block or this one holds nothing, so that the parts of all
    ranks tile the full tensor exactly once. A plain tensor is the same on all ranks, and rank 0
    writes it.
    """
    if not isinstance(tensor, DTensor):
        return (
            ((0,) * tensor.ndim, tensor.detach())
            if not dist.is_initialized() or dist.get_rank() == 0
            else None
        )
    start, replica = _offset(tensor)
    part = local(tensor.detach())
    return None if replica or not part.numel() else (start, part)


def region(tensor: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """Return the block of a tensor that this rank holds, whether or not it is to write it: its
    offset in the full tensor, and its values.
    """
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim, tensor.detach()
    return _offset(tensor)[0], local(tensor.detach())


def _offset(tensor: DTensor) -> tuple[tuple[int, ...], bool]:
    """Return the offset of this rank's block in the full tensor, and whether it is a copy of
    another rank's.

    FSDP shards what tensor parallelism has left to a rank, so its strided placement, which comes
    first, counts last.
    """
    mesh, at = tensor.device_mesh, cast(list[int], tensor.device_mesh.get_coordinate())
    start = [0] * tensor.ndim
    length = list(tensor.shape)
    replica = False
    for i, placement in sorted(
        enumerate(tensor.placements), key=lambda x: isinstance(x[1], _StridedShard)
    ):
        if isinstance(placement, Shard | _StridedShard):
            size = -(-length[placement.dim] // mesh.size(i))
            skipped = min(at[i] * size, length[placement.dim])
            start[placement.dim] += skipped
            length[placement.dim] = min(size, length[placement.dim] - skipped)
        else:
            replica = replica or at[i] > 0
    part = local(tensor)
    assert tuple(length) == tuple(part.shape) or 0 == part.numel() == math.prod(length), (
        tensor.placements
    )
    return tuple(start), replica


def gathered(items: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor | None]]:
    """Yield (name, the full tensor in rank 0's RAM; None on other ranks), one at a time beside rank
    0's copies.

    A tensor with two names (tied weights) is gathered once. Every rank must iterate to the end.
    """
    seen: dict[int, Tensor | None] = {}
    for name, tensor in items:
        if id(tensor) not in seen:
            full = full_tensor(tensor.detach())
            seen[id(tensor)] = (
                full.cpu() if not dist.is_initialized() or dist.get_rank() == 0 else None
            )
            del full
        yield name, seen[id(tensor)]


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the norm of all tensors as one vector, on whatever mesh they lie: from each rank's own
    parts, then one sum over ranks. Plain tensors alone are the same on all ranks, and need none.

    Summed in float64: over a million numbers, float32 is off by 1e-5, and by a different amount for
    each number of ranks.
    """
    device = tensors[0].device
    kind = next((t.device_mesh.device_type for t in tensors if isinstance(t, DTensor)), None)
    mine = list(tensors)
    if kind is not None:
        mine = [part[1] for part in map(local_part, tensors) if part is not None]
    norms = (
        torch._foreach_norm(mine, 2, dtype=torch.float64)
        if mine
        else [torch.zeros((), dtype=torch.float64, device=device)]
    )
    squares = torch.stack([norm.to(norms[0].device) for norm in norms]).square().sum()
    return (squares if kind is None else all_reduce_sum(squares.to(kind))).sqrt()


def scale(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply the tensors in place."""
    parts = [local(t) for t in tensors]
    torch._foreach_mul_(parts, factor.to(parts[0].device, parts[0].dtype))


def gathered_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the full tensors in rank 0's RAM; empty on other ranks. Every rank must call it."""
    return {name: full for name, full in gathered(state.items()) if full is not None}


def gathered_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the full optimizer state in rank 0's RAM, keyed by parameter name as in the original.
    Every rank must call it.
    """
    reshard(model)
    names = {p: name for name, p in model.named_parameters()}
    state: dict[str, dict[str, Any]] = {
        names[cast(nn.Parameter, p)]: dict(x) for p, x in optimizer.state.items()
    }
    tensors = (
        (f"{name} {key}", x)
        for name, of_p in state.items()
        for key, x in of_p.items()
        if isinstance(x, Tensor)
    )
    for both, full in gathered(tensors):
        name, _, key = both.rpartition(" ")
        state[name][key] = full
    groups = [
        group | {"params": [names[p] for p in group["params"]]} for group in optimizer.param_groups
    ]
    return {"state": state, "param_groups": groups} if dist.get_rank() == 0 else {}
