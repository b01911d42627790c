"""Attention over trees: a function that transformers' models call in place of their own
(`attn_implementation="tree"`).

Shapes: T tokens in a row, H heads (Hkv of keys and values), D head size, S segments (see
batching.Segments). The rule "same tree, not after, and in the prompt or in one's own response" is S
ordinary attentions: the queries of a segment see the prompt's keys and their own, causal from the
bottom right. Sliding windows come out right by themselves, since a segment's keys stand in the
order of their positions.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from plumb.batching.layout import Segments
from plumb.console import rank0_print

NAME = "tree"
MOST_IN_HEAD = 256  # numbers in a head that flash attention takes, in steps of 8


def no_mask(device: torch.device) -> Tensor:
    """Return a mask of four dimensions, which transformers passes on unchanged, so that no model
    builds one of its own over the row.
    """
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def tree_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    segments: Segments | None = None,
    **options,
) -> tuple[Tensor, None]:
    """Compute attention over trees: query [1, H, T, D], key and value [1, Hkv, T, D] -> [1, T, H,
    D]. Without `segments` (sampling): transformers' SDPA.
    """
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise NotImplementedError("soft-capped scores and attention sinks")
    # which is another one for some layers, where a model is spread over GPUs
    gather = segments.gather.to(key.device)
    # [Hkv, Tk, D], prompts once per response
    keys, values = (x[0].index_select(1, gather) for x in (key, value))
    # rotary embeddings leave autocast's precision
    query = query[0].to(value.dtype)
    keys = keys.to(value.dtype)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    attend = _varlen if has_flash(query) and not refused(query, values) else _loop
    return attend(query, keys, values, segments, scale, sliding_window)[None], None


def has_flash(query: Tensor) -> bool:
    """Return whether flash attention exists for tensors of this kind: on a GPU, in 16 bits."""
    return query.is_cuda and query.dtype.itemsize == 2


def refused(query: Tensor, values: Tensor) -> bool:
    """Return whether flash attention cannot take heads of these sizes, [..., D], on their device.
    The first time it cannot, a line says why.
    """
    size = max(query.shape[-1], values.shape[-1])
    return _refused(query.device, query.dtype, -(-size // 8) * 8)


@torch.compiler.assume_constant_result
def _refused(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    return _tried(device, dtype, size)


@cache
def _tried(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    why = f"it takes heads of up to {MOST_IN_HEAD} numbers, not of {size}"
    if size <= MOST_IN_HEAD:
        why = _error_of_trial(device, dtype, size)
    if why:
        rank0_print(f"attention over trees runs segment by segment, without flash attention: {why}")
    return bool(why)


def _error_of_trial(device: torch.device, dtype: torch.dtype, size: int) -> str:
    """Return the first line of the error that flash attention over segments raises, forward or
    backward, on an older GPU or in a build without it; an empty text if it raises none.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        return ""  # tensors without data
    x = torch.zeros(1, 8, size, device=device, dtype=dtype, requires_grad=True)
    ends = torch.tensor([0, 8], dtype=torch.int32, device=device)
    segments = Segments([8], [8], ends, query_ends=ends, key_ends=ends, longest=8)
    # with hooks of its own, so that those of a checkpointed block don't see it
    as_it_is = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    try:
        with torch.enable_grad(), as_it_is:
            torch.autograd.grad(_varlen(x, x, x, segments, 1.0, None).sum(), x)
    except torch.OutOfMemoryError:
        raise
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        return str(error).splitlines()[0][:150]
    return ""


def _varlen(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: Segments,
    scale: float,
    window: int | None,
) -> Tensor:
    """Compute flash attention over all segments in one call.  -> [T, H, D]

    Zeros are appended to heads of other sizes than it takes: they change no score, and the output
    behind them is cut off.
    """
    from torch.nn.attention.varlen import varlen_attn

    # their window does not count the token itself
    options: dict[str, Any] = {
        "scale": scale,
        "window_size": (window - 1 if window else -1, 0),
    }
    # torch 2.11 accepts fewer key heads without an option
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    n, width = segments.longest, values.shape[-1]
    size = -(-max(query.shape[-1], width) // 8) * 8
    queries, keys, values = (
        (x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1]))).transpose(0, 1)
        for x in (query, keys, values)
    )
    query_ends = segments.query_ends.to(query.device)
    key_ends = segments.key_ends.to(query.device)
    out = cast(Tensor, varlen_attn(queries, keys, values, query_ends, key_ends, n, n, **options))
    return out[..., :width]


@torch.compiler.disable
def _loop(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: Segments,
    scale: float,
    window: int | None,
) -> Tensor:
    """Compute one SDPA call per segment.  -> [T, H, D]"""
    if len(keys) != len(query):
        keys, values = (x.repeat_interleave(len(query) // len(x), 0) for x in (keys, values))
    n_queries, n_keys = segments.query_lengths, segments.key_lengths
    parts = []
    for q, k, v in zip(
        query.split(n_queries, 1), keys.split(n_keys, 1), values.split(n_keys, 1), strict=True
    ):
        mask = segments.mask(q.shape[1], k.shape[1], window, q)
        parts.append(
            F.scaled_dot_product_attention(
                q[None], k[None], v[None], mask, is_causal=mask is None, scale=scale
            )[0]
        )
    return torch.cat(parts, 1).transpose(0, 1)


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # for calls without segments
