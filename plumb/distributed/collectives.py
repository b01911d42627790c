"""Communicate between processes: barriers, sums, and objects that every rank gets."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from plumb.console import under_torchrun
from plumb.errors import UserError

T = TypeVar("T")
timeout: timedelta | None = None  # how long a rank waits for another; set where the group is made


def broadcast_object(value: T) -> T:
    """Return rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class ObjectGroup:
    """Exchange objects between ranks beside the training, in an order of its own and without a time
    limit.

    Each rank must make the same calls in the same order, with one ObjectGroup per thread. A single
    process exchanges with itself alone.
    """

    def __init__(self):
        self.several = dist.is_initialized()
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if self.several else (0, 1)
        # The default group gives up after timeout_minutes; here a rank may write a large file, or
        # wait for one. Our own launcher sees by itself that a process hangs; torchrun does not.
        patience = timedelta(hours=3) if under_torchrun() else timedelta(days=30)
        self.group = dist.new_group(backend="gloo", timeout=patience) if self.several else None

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, on every rank."""
        values: list[Any] = [None] * self.ranks
        if not self.several:
            return [value]
        dist.all_gather_object(values, value, group=self.group)
        return values

    def from_rank0(self, make: Callable[[], T]) -> T:
        """Return on every rank what `make` returns on rank 0; also pass on its UserError."""
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
    """Return on every rank what `make` returns on rank 0; also pass on its UserError. It may take
    as long as it likes.
    """
    return _object_group(dist.group.WORLD if dist.is_initialized() else None).from_rank0(make)


@cache
def _object_group(world: dist.ProcessGroup | None) -> ObjectGroup:
    return ObjectGroup()


def all_reduce_max(values: list[float]) -> list[float]:
    """Return the elementwise maximum over all ranks: a few bytes that decide what to do next."""
    if not dist.is_initialized():
        return values
    maxima = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(maxima, dist.ReduceOp.MAX, group=_on_the_cpu(dist.group.WORLD))
    return maxima.tolist()


@cache
def _on_the_cpu(world: dist.ProcessGroup) -> dist.ProcessGroup | None:
    """Return a CPU group of the same ranks, since asking the GPU would mean waiting for it."""
    return dist.new_group(backend="gloo", timeout=timeout)


def barrier() -> None:
    """Wait until all ranks are here."""
    if dist.is_initialized():
        dist.barrier()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather_object(value: T) -> list[T]:
    """Return every rank's value, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_every_rank(make: Callable[[], T]) -> list[T]:
    """Return what `make` returns on each rank, on every rank. If it raises UserError on some ranks,
    that of the lowest one is raised on all, so that none waits for another.
    """
    made: Any = None
    error: UserError | None = None
    try:
        made = make()
    except UserError as raised:
        error = raised
    results = all_gather_object((made, error))
    for _, raised_there in results:
        if raised_there is not None:
            raise raised_there
    return [made for made, _ in results]
