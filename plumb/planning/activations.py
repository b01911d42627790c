"""Count the most memory that a forward and a backward pass hold, on tensors without data: no
weights, no GPU, a second or two.

The model computes on fake tensors, which have a shape, type and device but no data. Each new
storage counts from the operation that creates it until nothing refers to it. The count is thus what
this model's own code and PyTorch's autograd keep, in any precision and with checkpointing. There is
no table of model families.

Shapes: T tokens in a row, H heads (Hkv of keys and values), D head size, d hidden size.
"""

from __future__ import annotations

import copy
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface, AutoModelForCausalLM

from plumb.models.blocks import checkpoint_blocks
from plumb.models.offload import LEAST_BYTES

NAME = "counted"
PATIENCE_SECS = 30  # most models take 1 to 3; those that process a row token by token take minutes


class Held(NamedTuple):
    """Hold bytes. Tensor parallelism splits the tensors inside attention and MLP; those as wide as
    the model are complete on each rank.
    """

    wide: int
    within: int


def count(
    hf_config: Any,
    shape: tuple[int, int],
    n_keys: int | None,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    recompute: bool,
    offload: bool = False,
) -> Held:
    """Return the most bytes that the body's forward and backward passes hold besides weights and
    gradients, which exist since an earlier microbatch. `shape`: rows, and tokens in each; `n_keys`:
    the keys of one row of trees, each prompt's counted once per response, or None for padded rows
    through the model's own attention; `dtype`: the type in which the weights compute;
    `offload`: what autograd saves is elsewhere until the backward pass (see models/offload.py).

    Raises whatever the model's code raises where it reads data, or where its attention cannot be
    exchanged.
    """
    model = blank_model(hf_config, dtype)
    body: Any = model.base_model
    trees: dict[str, Any] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        row = torch.zeros(shape, dtype=torch.int64)
        if n_keys is not None:
            if not getattr(model, "_supports_attention_backend", False):
                raise NotImplementedError("its attention cannot be exchanged")
            model.set_attn_implementation(NAME)
            trees = {
                "position_ids": row,
                "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
                "n_keys": n_keys,
            }
        if recompute:  # dropout is off, so there is no random state to keep, which has no fake
            checkpoint_blocks(model.train(), preserve_rng_state=False)
        for p in body.parameters():
            p.grad = torch.empty_like(p)
        present = [
            *body.parameters(),
            *body.buffers(),
            *(p.grad for p in body.parameters() if p.grad is not None),
            row,
        ]
        with _Counter(present, hf_config.get_text_config().hidden_size) as counter:
            with (
                torch.autocast("cpu", autocast) if autocast else nullcontext(),
                _elsewhere(present) if offload else nullcontext(),
            ):
                hidden = body(input_ids=row, use_cache=False, **trees)[0]
            hidden.backward(torch.empty_like(hidden))
    return counter.most


def blank_model(hf_config: Any, dtype: torch.dtype) -> Any:
    """Return the model with weights that have a shape and no data."""
    # a copy of the config, since a model writes the attention it uses into it
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(hf_config), dtype=dtype)


class _Shape(NamedTuple):
    """Hold what is left of an offloaded tensor on the device."""

    size: torch.Size
    dtype: torch.dtype


def _elsewhere(present: Iterable[Tensor]) -> AbstractContextManager:
    """Return a context in which tensors that autograd saves take no memory, but those of weights
    and small ones.
    """
    weights = {id(x.untyped_storage()) for x in present}

    def pack(x: Tensor) -> Tensor | _Shape:
        if x.nbytes < LEAST_BYTES or id(x.untyped_storage()) in weights:
            return x
        return _Shape(x.size(), x.dtype)

    def unpack(kept: Tensor | _Shape) -> Tensor:
        return kept if isinstance(kept, Tensor) else torch.empty(kept.size, dtype=kept.dtype)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class _Counter(TorchDispatchMode):
    """Add up the storages that operations create, as long as they are alive. `most`: the sums at
    their maximum.
    """

    def __init__(self, present: Iterable[Tensor], width: int):
        super().__init__()
        self.width = width
        self.deadline = time.monotonic() + PATIENCE_SECS
        self.alive = {id(x.untyped_storage()): Held(0, 0) for x in present}
        self.now = self.most = Held(0, 0)

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if time.monotonic() > self.deadline:
            raise TimeoutError(f"counting its operations takes more than {PATIENCE_SECS} s")
        for x in tree_iter(out):
            if isinstance(x, Tensor) and id(x.untyped_storage()) not in self.alive:
                self.add(x.untyped_storage(), x.shape[-1:] == (self.width,))
        return out

    def add(self, storage: torch.UntypedStorage, wide: bool) -> None:
        size, key = storage.nbytes(), id(storage)
        self.alive[key] = Held(size, 0) if wide else Held(0, size)
        self.now = Held(*map(sum, zip(self.now, self.alive[key], strict=True)))
        self.most = max(self.most, self.now, key=sum)
        weakref.finalize(storage, self.drop, key)

    def drop(self, key: int) -> None:
        freed = self.alive.pop(key)
        self.now = Held(self.now.wide - freed.wide, self.now.within - freed.within)


class _Flash(torch.autograd.Function):
    """Imitate what a flash kernel keeps for its backward pass: queries, keys, values, and its
    output.
    """

    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    n_keys: int,
    **options,
):
    """Stand in for models/tree_attention.py's attention: keys and values are gathered as there, [1,
    Hkv, T, D] -> [1, Hkv, n_keys, D].
    """
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise NotImplementedError("soft-capped scores and attention sinks")
    gather = torch.zeros(n_keys, dtype=torch.int64)
    keys, values = (x.index_select(2, gather) for x in (key, value))
    return _Flash.apply(query.to(value.dtype), keys.to(value.dtype), values).transpose(1, 2), None


AttentionInterface.register(NAME, _attention)
