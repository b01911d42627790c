"""Decide what depends on memory: live or cached reference, tokens of a microbatch, when gradients
are reduced. One pure function of numbers, for the real card and for the one that plan=true assumes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from plumb.distributed import collectives
from plumb.models.adapters import count_trained, roles_of
from plumb.models.chunked_head import chunk_for, held_bytes
from plumb.models.forward_path import DTYPES
from plumb.training import budget

MB = 1 << 20


@dataclass(frozen=True)
class Numbers:
    """Hold what the decisions depend on; bytes are those of one process.

    Example: a policy of 1 B parameters in float32 on one card of 80 GB has weights of 4e9 bytes,
    as many that are trained, and a reference of as many.
    """

    device: torch.device  # only its type matters
    memory: float  # bytes, before a model is loaded
    weights: float  # bytes of the policy's weights, or of its shard
    trained: float  # bytes of those that are trained
    reference: float  # bytes of a live reference's own weights, or of its shard
    n_weights: float  # whose gradients are kept until they are reduced
    ranks: int  # that have their own part of a batch
    mean_tokens: float  # of an example
    longest: int  # tokens of the longest example, with the responses that are yet to be sampled
    repeats: bool  # examples are used more than once


@dataclass(frozen=True)
class RunPlan:
    """Hold the decisions of one run."""

    reference: str | None  # "live": beside the policy; "cached": once over the data; None: no need
    why: str  # the reason
    budget: int  # tokens of a microbatch, where the head's logits never exist at once
    budget_with_logits: int
    head_chunk_mb: int  # MB of float32 logits that the head computes at once
    reduce_each: bool  # gradients are reduced after each microbatch, not after the step's last

    @property
    def head_chunk(self) -> int:
        """Return the bytes of float32 logits that the head computes at once."""
        return self.head_chunk_mb * MB

    def tokens(self, no_logits: bool) -> int:
        """Return the tokens of a microbatch."""
        return self.budget if no_logits else self.budget_with_logits


def plan_run(
    config: Any,
    model_config: Any,
    needs_reference: bool,
    numbers: Numbers,
    live_only: bool = False,
    beside: float = 0,
) -> RunPlan:
    """Return the decisions of a run, where the config leaves a choice. `live_only`: the loss needs
    what a cached reference has not. `beside`: the bytes of what samples, gives rewards and values,
    in a run on the policy's own responses.

    reference=auto: cached if examples are used more than once, or if a second model would take more
    than a quarter of the memory that the policy's training leaves free; for a moving reference,
    only the latter counts. tokens_per_microbatch=null and head_chunk_mb=null: by the memory that
    weights, gradients, optimizer and a live reference leave free. fsdp_reduce=auto: by the size of
    all gradients.
    """
    weights = numbers.weights
    trained = 3 * numbers.trained  # with gradients, and an optimizer state of two numbers
    tight = budget.short_for_reference(numbers.reference, weights + trained, numbers.memory)
    moves = config.reference_update_every is not None
    pays = _can_be_cached(config) if moves and tight else not moves and (numbers.repeats or tight)
    cached = {"auto": pays and not live_only, "live": False, "cached": True}[config.reference]
    why = "each example is used once"
    if live_only:
        why = "the loss compares token by token, or responses that are yet to be sampled"
    elif config.reference != "auto":
        why = "as set"
    elif moves and not cached:
        why = "it moves"
    elif numbers.repeats and not moves:
        why = "examples are used more than once"
    elif tight:
        why = "memory is short"
    live = needs_reference and not cached
    free = numbers.memory - weights - trained - live * numbers.reference
    free -= beside
    if config.ema_decay is not None:  # in float32 or wider
        itemsize = DTYPES[config.model.policy_dtype].itemsize
        free -= numbers.trained * max(4, itemsize) / itemsize
    chunk_mb = config.head_chunk_mb or chunk_for(free, numbers.device) // MB
    free -= held_bytes(chunk_mb * MB)

    def tokens(no_logits: bool) -> int:
        return budget.token_budget(
            config,
            model_config,
            numbers.device,
            DTYPES[config.model.fsdp_policy_mp or config.model.policy_dtype],
            free,
            no_logits,
            numbers.mean_tokens,
            numbers.longest,
            numbers.ranks,
        )

    return RunPlan(
        reference=("cached" if cached else "live") if needs_reference else None,
        why=why,
        budget=tokens(True),
        budget_with_logits=tokens(False),
        head_chunk_mb=chunk_mb,
        reduce_each=budget.sums_each(config, numbers.n_weights, numbers.memory),
    )


def _can_be_cached(config: Any) -> bool:
    """Return whether a moving reference is always an earlier policy, in the policy's precision."""
    spec = config.model
    return config.reference_update_weight == 1 and spec.reference_dtype in (
        None,
        spec.policy_dtype,
    )


def numbers_at_hand(
    policy: nn.Module,
    device: torch.device,
    layout: Any,
    *,
    mean_tokens: float,
    longest: int,
    repeats: bool,
) -> Numbers:
    """Return the numbers of this run, the same on all ranks: the memory is that of the rank with
    least. `layout`: that of several processes, over which the policy is already laid out; the
    others: see Numbers. Every rank must call it.
    """
    shards = layout.n_shards if layout is not None else 1
    weights = budget.weights_bytes(policy) / shards
    loaded = weights
    if layout is None:
        parameters = [p for p in policy.parameters() if p.device.type == device.type]
        loaded = float(sum(p.numel() * p.element_size() for p in parameters))
    (least,) = collectives.all_reduce_max([-float(budget.memory_at_hand(device))])
    return Numbers(
        device=device,
        memory=loaded - least,
        weights=weights,
        trained=budget.trained_bytes(policy) / shards,
        reference=weights if roles_of(policy) is None else 0.0,
        n_weights=count_trained(policy) / (layout.tp_size if layout else 1),
        ranks=layout.n_rows if layout is not None else 1,
        mean_tokens=mean_tokens,
        longest=longest,
        repeats=repeats,
    )
