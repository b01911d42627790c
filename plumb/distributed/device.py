"""The device that one process computes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from omegaconf import DictConfig

from plumb.errors import UserError


def pick_device(config: DictConfig) -> torch.device:
    return torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error means that a GPU has no memory left: for a tensor, or for the
    workspace of a library that reports it in its own words.

    >>> is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling ..."))
    True
    >>> is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    False
    """
    words = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


@contextmanager
def out_of_memory_in_one_line(fix: Callable[[], str]) -> Iterator[None]:
    """Turn the errors of a GPU without memory left into a UserError that names the fix."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of GPU memory: {fix()}") from None
