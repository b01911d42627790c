"""Mixtures of experts: how evenly the routers use their experts, as a loss that does not depend on
how a batch is cut.

The balancing loss of Fedus et al. (Switch Transformer, arXiv:2101.03961, equations 4 to 6) is
E * sum_i f_i P_i: E experts, f_i the share of tokens that choose expert i, P_i the mean of the
router's probability of it. Over a batch, f would have to be known before the first microbatch is
computed. So f and P are taken over each sequence (a prompt with one response), and the loss is the
mean over the routers and over the sequences of the batch: the same for packed and padded rows, any
microbatches and any number of processes.

Shapes: R responses in a microbatch, A tokens in what the model was given (a row, or padded rows),
E experts, k of them per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from plumb.batching.layout import Batch
from plumb.errors import UserError


class _Router(NamedTuple):
    module: nn.Module
    logits: int  # where they stand in its output


def routers_of(model: nn.Module) -> list[_Router]:
    """Return the modules that transformers treats as routers; [] for a model without experts."""
    by_id: dict[int, _Router] = {}
    for part in model.modules():
        recorders = (getattr(part, "_can_record_outputs", None) or {}).get("router_logits", [])
        for recorder in recorders if isinstance(recorders, list) else [recorders]:
            for name, module in part.named_modules():
                if (
                    isinstance(module, recorder.target_class)
                    and (recorder.layer_name or "") in name
                ):
                    by_id.setdefault(id(module), _Router(module, recorder.index))
    return list(by_id.values())


class Routers:
    """Record the output of a policy's routers in a forward pass, for the balancing loss."""

    def __init__(self, model: Any):
        """Raise UserError for a model without routers, or one for which transformers has no
        balancing loss.
        """
        routers = routers_of(model)
        if not routers:
            raise UserError(
                f"router_aux_loss: {type(model).__name__} has no routers; set router_aux_loss=0"
            )
        if getattr(model, "router_aux_loss_coef", None) is None or not hasattr(
            model, "num_experts_per_tok"
        ):
            raise UserError(
                f"router_aux_loss: {type(model).__name__} has no such loss, its routers are"
                " balanced in another way; set router_aux_loss=0"
            )
        self.top_k = int(model.num_experts_per_tok)
        self.logits: list[Tensor] | None = None  # of each router, while a forward pass is watched
        for router in routers:
            router.module.register_forward_hook(self._keep(router.logits))

    def _keep(self, index: int) -> Any:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if self.logits is not None:  # not while a block is computed again in the backward pass
                self.logits.append(output[index] if isinstance(output, tuple) else output)

        return hook

    @contextmanager
    def watched(self) -> Iterator[list[Tensor]]:
        """Record, within the context, the logits of each router, [A, E]."""
        logits: list[Tensor] = []
        self.logits = logits
        try:
            yield logits
        finally:
            self.logits = None


def balance(logits: list[Tensor], batch: Batch, packed: bool, top_k: int) -> Tensor:
    """Return the balancing loss of each response's sequence: [R] float32, k if all experts are used
    equally, at most E.
    """
    if not logits:
        raise UserError("router_aux_loss: the routers did not run; set router_aux_loss=0")
    length = torch.from_numpy(batch.spans[:, 1] + batch.spans[:, 3])  # [R] tokens of each sequence
    # [R, A], 1 for a sequence's own tokens
    of_rows = _packed_rows(batch) if packed else _padded_rows(batch)
    losses = []
    for each in logits:
        each = each.flatten(0, -2).float()  # [A, E]
        own = of_rows.to(each.device)
        share = 1 / length.clamp(min=1).to(each)[:, None]  # [R, 1]
        probabilities = each.softmax(-1)
        chosen = torch.zeros_like(each).scatter_(1, each.topk(top_k, -1).indices, 1.0)
        # [R, E]; nothing flows back through f
        f = own @ chosen * share
        p = own @ probabilities * share
        losses.append(each.shape[-1] * (f * p).sum(-1).to(logits[0].device))
    return torch.stack(losses).mean(0)


def _packed_rows(batch: Batch) -> Tensor:
    start, n_prompt, own, n = batch.spans.T[:, :, None]  # [R, 1] each
    at = np.arange(batch.input_ids.shape[1])[None]  # [1, T]
    inside = ((at >= start) & (at < start + n_prompt)) | ((at >= own) & (at < own + n))
    return torch.from_numpy(inside.astype(np.float32))


def _padded_rows(batch: Batch) -> Tensor:
    length = batch.spans[:, 1] + batch.spans[:, 3]
    rows = torch.from_numpy(np.arange(length.max()) < length[:, None])  # [R, W]
    return torch.block_diag(*rows.float().split(1))  # [R, R * W]
