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
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from plumb.batching.layout import Segments

NAME = "tree"


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
    attend = _varlen if query.is_cuda and query.dtype.itemsize == 2 else _loop
    return attend(query, keys, values, segments, scale, sliding_window)[None], None


def _varlen(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: Segments,
    scale: float,
    window: int | None,
) -> Tensor:
    """Compute flash attention over all segments in one call.  -> [T, H, D]"""
    from torch.nn.attention.varlen import varlen_attn

    # their window does not count the token itself
    options: dict[str, Any] = {
        "scale": scale,
        "window_size": (window - 1 if window else -1, 0),
    }
    # torch 2.11 accepts fewer key heads without an option
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    queries, keys, values = (x.transpose(0, 1) for x in (query, keys, values))
    n = segments.longest
    query_ends = segments.query_ends.to(query.device)
    key_ends = segments.key_ends.to(query.device)
    return cast(Tensor, varlen_attn(queries, keys, values, query_ends, key_ends, n, n, **options))


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
