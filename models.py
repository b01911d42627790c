"""Models: turn a Batch into log-probabilities, in the fastest way that is this model's own.

Shapes: R rows of T tokens, N scored positions (those that predict a response token), d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import attention
import parallel
from batching import Batch, unfold
from head import linear_logps, token_logps
from losses import Logps
from utils import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def block_class(model: nn.Module, block_name: str | None) -> type[nn.Module]:
    """The class of the transformer block: by `model.block_name`, or else as the model itself declares it.

    Raises UserError when no module of that name exists, with the names that do.
    """
    wanted = {block_name} if block_name else set(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        for kind in type(module).__mro__:  # FSDP puts a class of its own before the model's
            if kind.__name__ in wanted:
                return kind
    kinds = sorted({type(m).__name__ for m in model.modules() if "Layer" in type(m).__name__ or "Block" in type(m).__name__})
    raise UserError(f"model.block_name={block_name}: {type(model).__name__} has no such module; it has: {', '.join(kinds)}")


class Way(NamedTuple):
    """How a model's log-probabilities are computed."""

    packed: bool  # trees in one row, or one response to a padded row
    plain_head: bool  # log-probabilities straight from the head's weight, in chunks, or through the model's own head

    def __str__(self) -> str:
        return f"{'packed trees' if self.packed else 'padded rows'}, {'head in chunks' if self.plain_head else 'own head'}"


ORACLE = Way(packed=False, plain_head=False)


def response_logps(model: Any, batch: Batch, way: Way) -> Logps:
    """Sum of log pi(y_t | x, y_<t) over each response's tokens.  -> Logps of [R]

    The head runs on the N scored positions only, so that no [T, V] tensor exists.
    """
    if way.packed:
        inputs = {
            "input_ids": batch.input_ids, "position_ids": batch.position_ids, "segments": batch.segments,
            "attention_mask": attention.no_mask(batch.input_ids.device),
        }  # fmt: skip
        scored = batch.scored
    else:
        input_ids, mask, scored = unfold(batch, 0)
        inputs = {"input_ids": input_ids, "attention_mask": mask}
    with head_on(model, scored, batch.targets if way.plain_head else None):
        output = model(**inputs, use_cache=False).logits  # [1, N, V], or [1, N, 1]
    logps = output[0, :, 0] if way.plain_head else token_logps(output[0], batch.targets)  # [N]
    response = batch.response.to(logps.device)
    total, count = (torch.zeros(len(batch.spans), device=logps.device, dtype=x) for x in (logps.dtype, torch.int64))
    return Logps(total.index_add(0, response, logps), count.index_add(0, response, torch.ones_like(response)))


@contextmanager
def head_on(model: Any, positions: Tensor, targets: Tensor | None) -> Iterator[None]:
    """Within, the LM head of `model` sees only the hidden states at `positions`, [N] of the R * W tokens.

    With `targets` it gives their log-probabilities in place of logits, [1, N, 1]; without, all their logits, [1, N, V].
    In the head, not after it: there FSDP has gathered its weight; and what the model does to logits afterwards (soft-capping,
    scaling) stays as it is.
    """
    head = model.get_output_embeddings()

    def gather(_, inputs):
        (hidden,) = inputs  # [R, W, d]
        return (hidden.flatten(0, 1).index_select(0, positions.to(hidden.device)).unsqueeze(0),)  # [1, N, d]

    def logps(hidden):  # [1, N, d] -> [1, N, 1]; a copy, since FSDP wants no view
        device = head.weight.device
        return linear_logps(hidden[0].to(device), head.weight, head.bias, targets.to(device))[None, :, None].clone()

    handle, own = head.register_forward_pre_hook(gather), vars(head).get("forward")  # accelerate's, where it spreads a model
    if targets is not None:
        head.forward = logps
    try:
        yield
    finally:
        handle.remove()
        vars(head).pop("forward", None)
        if own is not None:
            head.forward = own


def compile_blocks(model: nn.Module, block: type[nn.Module], recompute: bool | float) -> None:
    """Compile each block in place: one graph serves all, since they differ in weights only.

    `recompute` between 0 and 1: the share of activations that is kept for the backward pass, the cheapest being recomputed.
    In place, for a wrapper would hide the module from FSDP. On a CPU the attention stays as it is, between two graphs.
    """
    if not isinstance(recompute, bool):
        torch._functorch.config.activation_memory_budget = recompute
    for module in model.modules():
        if isinstance(module, block):
            module.compile()


def allow_trees(model: Any) -> None:
    """Let `model` take segments (see attention.py), if its attention is one that can be exchanged for ours."""
    if getattr(model, "_supports_attention_backend", False) and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(attention.NAME)


def choose_way(model: Any, batch: Batch, exact: bool) -> tuple[Way, str]:
    """The fastest way that gives this model's own log-probabilities on `batch`, found by trying; and a line that says so.

    The oracle is the plain computation: padded rows through the model's own attention and head. Trees are not for models
    with a state or a bias that runs along the row (state-space layers, ALiBi), nor a plain head for those that change the logits
    afterwards (soft-capping). `exact`: float32 or better, where 1e-3 nats per token are asked. In 16 bits, where rounding may
    be more than that, trees must come four times nearer than what they would give if a token saw the whole row before it.
    Every rank must call it with the same batch; all choose the same.
    """
    why, tolerance = "", 1e-3
    with torch.no_grad():
        expected = response_logps(model, batch, ORACLE)

        def off_by(way: Way, batch: Batch) -> float:
            difference = (response_logps(model, batch, way).sum - expected.sum).abs() / expected.tokens.clamp(min=1)
            return max(parallel.from_all(float(difference.max().nan_to_num(nan=torch.inf))))

        for way in (Way(True, True), Way(True, False), Way(False, True)):
            try:
                if way.packed and model.config._attn_implementation != attention.NAME:
                    raise NotImplementedError("its attention cannot be exchanged")
                if way.plain_head and not isinstance(model.get_output_embeddings(), nn.Linear):
                    raise NotImplementedError("its head is not a matrix")
                if not exact:
                    tolerance = max(1e-3, off_by(way, batch.unforked()) / 4) if way.packed else 0.1
                worst = off_by(way, batch)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a model of transformers does with an argument that it does not know
                why = why or f" (not {Way(True, True)}: {str(error).splitlines()[0][:100]})"
                continue
            if worst <= tolerance:
                return way, f"batches: {way}; equal to the padded computation to {worst:.0e} nats per token{why}"
            why = why or f" ({Way(True, True)} would be off by {worst:.1g})"
    return ORACLE, f"batches: {ORACLE}{why}"
