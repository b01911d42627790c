"""Say how a model computes a batch: packed or padded, with its own head or in chunks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from plumb.models import tree_attention

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


class ForwardPath(NamedTuple):
    """Hold how a model's log-probabilities are computed."""

    packed: bool  # trees in one row, or one response to a padded row
    # log-probabilities directly from the head's weight, in chunks, or through the model's own head
    plain_head: bool
    # bytes of float32 logits that such a head computes at once; None: the device's standard
    chunk: int | None = None

    def __str__(self) -> str:
        return (
            f"{'packed trees' if self.packed else 'padded rows'},"
            f" {'head in chunks' if self.plain_head else 'own head'}"
        )


PLAIN_PATH = ForwardPath(packed=False, plain_head=False)


def use_tree_attention(model: Any) -> None:
    """Let `model` take segments (see models/tree_attention.py), if its attention can be
    exchanged.
    """
    if (
        getattr(model, "_supports_attention_backend", False)
        and model.config._attn_implementation == "sdpa"
    ):
        model.set_attn_implementation(tree_attention.NAME)
