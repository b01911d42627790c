"""Sample from the model that is trained, in the process that trains it.

A prompt is computed once for its n responses, prompts of similar lengths go together, and a
response that has ended leaves the batch. Which responses share a batch changes no token,
except where rounding decides (see engine.uniforms).

Shapes: B prompts of up to P tokens, padded on the left; R running responses of up to L tokens.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from plumb.data.prompts import NumberedPrompt
from plumb.errors import UserError
from plumb.models.blocks import uncompiled
from plumb.models.logps import lm_head_at_positions
from plumb.rollouts.decoding import Decoding
from plumb.rollouts.engine import (
    NOT_FINITE,
    Response,
    Samples,
    check_lengths,
    check_untruncated,
    draw,
    uniforms,
    widest,
)
from plumb.rollouts.hf_engine import padded


@dataclass
class PolicyEngine:
    """Sample from a policy by its own forward pass, with a cache of keys and values."""

    decoding: Decoding
    ends: Sequence[int]  # the tokens that end a response
    pad_token_id: int
    longest: int  # tokens of a prompt and its response
    batch_size: int  # responses that run at the same time, or n of one prompt if that is more
    precision: Callable[[], AbstractContextManager]  # autocast, or nothing
    policy: Any = None

    def __post_init__(self) -> None:
        check_untruncated(self.decoding)

    def load(self, policy: Any) -> None:
        """Sample from this model from now on. Its weights are not copied. Raise UserError for a
        model that takes no cache (some state-space models have another kind).
        """
        if "past_key_values" not in inspect.signature(policy.forward).parameters:
            raise UserError(
                f"{type(policy).__name__} takes no cache of keys and values, which sampling needs;"
                " train another model on its own responses"
            )
        self.policy = policy

    @torch.no_grad()
    def sample(self, prompts: Sequence[NumberedPrompt], n: int, seed: Sequence[int]) -> Samples:
        """Return n responses to each prompt; see engine.Engine. Raise UserError for prompts that do
        not fit, and for probabilities that are not finite.
        """
        start = time.perf_counter()
        check_lengths(prompts, self.max_new_tokens, self.longest)
        was_training = self.policy.training
        self.policy.eval()
        try:
            with uncompiled():
                responses = self._responses(prompts, n, seed)
        finally:
            self.policy.train(was_training)
        return Samples(responses, time.perf_counter() - start)

    @property
    def max_new_tokens(self) -> int:
        return int(self.decoding.max_new_tokens or 0)

    def _responses(
        self, prompts: Sequence[NumberedPrompt], n: int, seed: Sequence[int]
    ) -> list[list[Response]]:
        """Return n responses to each prompt, in order; prompts of similar lengths run together, the
        longest first.
        """
        at_once = max(1, self.batch_size // n)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids))
        responses: list[list[Response]] = [[] for _ in prompts]
        for first in range(0, len(order), at_once):
            group = order[first : first + at_once]
            for i, of_prompt in zip(
                group, self._batch([prompts[i] for i in group], n, seed), strict=True
            ):
                responses[i] = of_prompt
        return responses

    def _batch(
        self, prompts: Sequence[NumberedPrompt], n: int, seed: Sequence[int]
    ) -> list[list[Response]]:
        """Return n responses to each of B prompts that run together."""
        device = next(self.policy.parameters()).device
        draws = torch.from_numpy(uniforms(seed, prompts, n, self.max_new_tokens))
        draws = draws.flatten(0, 1).to(device, widest(device))  # [B * n, L]
        ends = torch.tensor([*self.ends], device=device)
        running = _Running(self.policy, self.precision)

        logits = running.start(*padded([p.ids for p in prompts], self.pad_token_id))  # [B, V]
        logits = logits[running.repeat(n)]
        tokens = torch.full(draws.shape, self.pad_token_id, device=device)
        logps = torch.zeros_like(draws)
        rows = torch.arange(len(draws), device=device)  # [R] which response each running one is
        lengths = torch.full_like(rows, self.max_new_tokens)
        ended = torch.zeros_like(rows, dtype=torch.bool)
        for place in range(self.max_new_tokens):
            new, new_logps = draw(logits, float(self.decoding.temperature or 1), draws[rows, place])
            tokens[rows, place] = new
            logps[rows, place] = new_logps.to(logps)
            ends_here = torch.isin(new, ends)
            lengths[rows[ends_here]] = place + 1
            ended[rows[ends_here]] = True
            if place + 1 == self.max_new_tokens:
                break
            if ends_here.any():
                (kept,) = (~ends_here).nonzero(as_tuple=True)
                if not len(kept):
                    break
                running.keep(kept)
                rows, new = rows[kept], new[kept]
            logits = running.step(new)
        if not logps.isfinite().all():
            raise UserError(NOT_FINITE)
        table = zip(
            tokens.cpu().numpy(), logps.cpu().numpy(), lengths.tolist(), ended.tolist(), strict=True
        )
        flat = [
            Response(ids[:m].copy(), values[:m].astype(np.float64), "eos" if by_end else "length")
            for ids, values, m, by_end in table
        ]
        return [flat[i : i + n] for i in range(0, len(flat), n)]


class _Running:
    """Run a model over responses that grow by one token at a time."""

    def __init__(self, model: Any, precision: Callable[[], AbstractContextManager]):
        self.model = model
        self.precision = precision
        self.cache = DynamicCache(config=model.config)
        self.mask: Tensor | None = None  # [R, T] 0 where a prompt is padded; None: nowhere
        self.positions = torch.empty(0)  # [R] of the last token

    def start(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Compute the prompts [B, P], and return the logits that follow them.  [B, V]"""
        device = next(self.model.parameters()).device
        ids, mask = ids.to(device), mask.to(device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        self.positions = positions[:, -1]
        self.mask = None if mask.all() else mask
        return self._forward(ids, positions)

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to every response, and return the logits that follow.  [R] -> [R, V]"""
        self.positions = self.positions + 1
        if self.mask is not None:
            self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        return self._forward(tokens[:, None], self.positions[:, None])

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        last = torch.arange(1, len(ids) + 1, device=ids.device) * ids.shape[1] - 1
        with lm_head_at_positions(self.model, last, None), self.precision():
            out = self.model(
                input_ids=ids,
                attention_mask=self.mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
            )
        return out.logits[0]

    def repeat(self, n: int) -> Tensor:
        """Continue with n responses to each prompt, which share its keys and values. Return the
        index of each response's prompt.  [B * n]
        """
        rows = torch.arange(len(self.positions), device=self.positions.device)
        rows = rows.repeat_interleave(n)
        self.keep(rows)
        return rows

    def keep(self, rows: Tensor) -> None:
        """Continue with these responses only.  [R'] indices into the present R"""
        self.cache.reorder_cache(cast(torch.LongTensor, rows))
        self.positions = self.positions[rows]
        if self.mask is not None:
            self.mask = self.mask[rows]
