"""A reward model: a causal LM whose vocabulary head is replaced by one row, the score of all that was read up to a token.

Shapes: d hidden size. Everything else (packed trees, sharding, checkpoints) sees a causal LM with a vocabulary of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = ("lm_head", "embed_out")  # what transformers calls a causal LM's head


class ScalarHead(nn.Linear):
    """hidden -> score, without a bias.  [..., d] -> [..., 1]

    Weight, product and score are float32 (or float64), whatever the model computes in.
    """

    computed: Tensor | None = None  # the scores of the forward pass that is running

    def __init__(self, d: int, dtype: torch.dtype = torch.float32, device: Any = None):
        super().__init__(d, 1, bias=False, device=device, dtype=torch.promote_types(dtype, torch.float32))

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            self.computed = F.linear(hidden.to(self.weight.device, self.weight.dtype), self.weight)
        return self.computed


def _scores_as_logits(model: Any, inputs: Any, output: Any) -> Any:
    """After the model's forward pass: its logits are what the scalar head gave, whatever was done to them after the head."""
    head = model.get_output_embeddings()
    output.logits, head.computed = head.computed, None
    return output


def initial_weight(d: int, seed: int) -> Tensor:
    """Normal with variance 1 / (d + 1), so that first scores are of order one (Stiennon et al. 2020, arXiv:2009.01325, C.2).
    -> [1, d] float32"""
    return torch.randn(1, d, generator=torch.Generator().manual_seed(seed)) / (d + 1) ** 0.5


def put_scalar_head(model: Any, seed: int | None = None) -> str:
    """Replace the model's vocabulary head, in place; with a seed the new one has its first values. -> its weight's name

    What the model does to logits afterwards (soft-capping, scaling) no longer matters: its output's `logits` are the head's
    scores. The embedding is no longer tied to the head.
    """
    old = model.get_output_embeddings().weight
    head = ScalarHead(old.shape[1], old.dtype, old.device)
    if seed is not None:
        with torch.no_grad():
            head.weight.copy_(initial_weight(old.shape[1], seed))
    model.set_output_embeddings(head)
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    model.register_forward_hook(_scores_as_logits)  # before FSDP's own, which has to see what the loss is computed from
    return next(f"{name}.weight" for name, module in model.named_modules() if module is head)


def scores(model: Any) -> bool:
    """Is it a reward model with a scalar head?"""
    return isinstance(model.get_output_embeddings(), ScalarHead)


def holds_scores(state: Mapping[str, Tensor]) -> bool:
    """Is it the state dict of one?"""
    return any(state[f"{name}.weight"].shape[0] == 1 for name in HEADS if f"{name}.weight" in state)
