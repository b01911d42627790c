"""Find a model's transformer blocks, and compile them."""

from __future__ import annotations

import torch
from torch import nn

from plumb.errors import UserError


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
    """Compile each block in place: one graph serves all, since they differ in weights only.

    `recompute` between 0 and 1: the share of activations that is kept for the backward pass, the
    cheapest being recomputed. In place, for a wrapper would hide the module from FSDP. On a CPU the
    attention stays as it is, between two graphs.
    """
    if not isinstance(recompute, bool):
        torch._functorch.config.activation_memory_budget = recompute
    for module in model.modules():
        if isinstance(module, block):
            module.compile()
