"""Find a model's transformer blocks, compile them, and recompute them in the backward pass."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from plumb.errors import UserError

GRAPHS = 64  # more of one function would not be compiled


def block_class(model: nn.Module, block_name: str | None) -> type[nn.Module]:
    """Return the class of the transformer block: `model.block_name`, or the one that the model
    declares.

    Raises UserError if no module of that name exists, with the names that do.
    """
    wanted = {block_name} if block_name else set(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        for kind in type(module).__mro__:  # FSDP puts a class of its own before the model's
            if kind.__name__ in wanted:
                return kind
    kinds = sorted(
        {
            type(m).__name__
            for m in model.modules()
            if "Layer" in type(m).__name__ or "Block" in type(m).__name__
        }
    )
    raise UserError(
        f"model.block_name={block_name}: {type(model).__name__} has no such module; it has:"
        f" {', '.join(kinds)}"
    )


def compile_blocks(model: nn.Module, block: type[nn.Module], recompute: bool | float) -> None:
    """Compile each block in place: one graph serves all, since they differ in weights only. There
    is one for each way to compute, of which torch would compile 8: with and without gradients,
    adapters or an input that has a gradient, of policy, reference and critic.

    `recompute` between 0 and 1: the share of activations that is kept for the backward pass, the
    cheapest being recomputed. In place, for a wrapper would hide the module from FSDP. On a CPU the
    attention stays as it is, between two graphs.
    """
    torch._dynamo.config.recompile_limit = GRAPHS
    if not isinstance(recompute, bool):
        torch._functorch.config.activation_memory_budget = recompute
    for module in model.modules():
        if isinstance(module, block):
            module.compile()


def uncompiled() -> AbstractContextManager[Any]:
    """Let compiled blocks compute as they are within the context. For sampling, whose rows grow by
    a token at a time: each shape would be compiled anew, until the compiler gave the blocks up, in
    training, too.
    """
    return torch.compiler.set_stance("force_eager")


def checkpoint_blocks(model: Any, **options: Any) -> None:
    """Let the model compute the activations of all its blocks again in the backward pass, without
    reentrant autograd. `options`: further arguments of torch.utils.checkpoint.

    transformers 5.23 has another name for it than 5.17.
    """
    options |= {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def recompute_blocks(model: Any, kept: float) -> None:
    """Let the model compute the activations of its blocks again in the backward pass, but those of
    a share `kept` of the blocks, in [0, 1), evenly spread.

    Raises UserError if there is a share, and the model's blocks cannot be told apart or are too few
    for it.
    """
    checkpoint_blocks(model)
    blocks = [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]
    if kept and not blocks:
        raise UserError(
            f"activation_checkpointing={kept}: the blocks of {type(model).__name__} are recomputed"
            " all or none; set true or false"
        )
    if blocks:
        share_of_blocks(len(blocks), kept)
    for i, block in enumerate(blocks):
        if int((i + 1) * kept) > int(i * kept):
            block.gradient_checkpointing = False


def share_of_blocks(n: int, kept: float) -> float:
    """Return the share of n blocks that is kept where `kept` is asked for, which is in whole
    blocks. Raise UserError if these are none, and a share is asked for.
    """
    if kept and not int(n * kept):
        least = math.ceil(1000 / n) / 1000
        raise UserError(
            f"activation_checkpointing={kept}: keeps none of the {n} blocks; give {least:g} or more"
            f" (1/{n}), or true to recompute all"
        )
    return int(n * kept) / n


def recomputes_blocks(recompute: bool | float, compiled: bool) -> bool:
    """Return whether activation_checkpointing means whole blocks: of compiled ones, a share is
    chosen within each (see compile_blocks).
    """
    return recompute is True or (bool(recompute) and not compiled)
