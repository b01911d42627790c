"""Make inputs of a loss from numbers, outside a training batch: to try its knobs, to get the
rewards of given responses, to see how it behaves. Shapes and units: contract.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from plumb.losses.bound import Loss, Reads
from plumb.losses.contract import (
    Labelled,
    Lists,
    Logps,
    LogpsAndKL,
    LogpsAndSquares,
    LossOutput,
    Pairs,
    Rollouts,
    ScoredPairs,
    Scores,
    TokenLogps,
    summed,
)

# two responses to each of B prompts, as a loss reads them of a model
Two = tuple[Any, Any]


def responses(reads: Reads, sums: Tensor, tokens: Tensor) -> Any:
    """Return B responses as a loss reads them, from their summed log-probabilities, or scores, [B]
    and their lengths [B] int64. Each token has an equal share; the divergence from the reference is
    0, and the policy finds each token as likely as one that it would draw, which is its entropy.
    """
    if reads == "scores":
        return Scores(sums, sums[:, None].expand(-1, int(tokens.max())), tokens)
    if reads == "token_logps":
        response = torch.arange(len(sums), device=sums.device).repeat_interleave(tokens)
        each = (sums / tokens.clamp(min=1))[response]
        return TokenLogps(each, response, len(sums), -each)
    if reads == "logps_and_squares":
        return LogpsAndSquares(sums, tokens, sums.detach())
    if reads == "logps_and_kl":
        return LogpsAndKL(sums, tokens, torch.zeros_like(sums))
    return Logps(sums, tokens)


def compute(loss: Loss, policy: Two, reference: Two | None) -> LossOutput:
    """Return the loss of pairs or lists of two responses, of which the first is preferred, or of
    the first response alone, which a loss on samples takes for one of advantage 1 that the policy
    itself has drawn. The B examples are the whole batch, and the data's margins are 1.
    """
    return loss.compute(
        _example(loss, policy),
        None if reference is None else _example(loss, reference),
        _context(loss, policy, reference),
    )


def rewards(loss: Loss, policy: Two, reference: Two | None) -> tuple[Tensor, Tensor] | None:
    """Return the rewards of the first and of the second responses, [B] each; None for a loss that
    has none. `reference` is None for a loss that needs none.
    """
    if loss.group in ("pair", "list"):
        output = compute(loss, policy, reference)
        chosen, rejected = output.chosen_rewards, output.rejected_rewards
        return None if chosen is None or rejected is None else (chosen, rejected)
    theirs: Sequence[Any] = (None, None) if reference is None else reference
    first, second = (
        compute(loss, (one, one), None if other is None else (other, other)).rewards
        for one, other in zip(policy, theirs, strict=True)
    )
    return None if first is None or second is None else (first, second)


def _example(loss: Loss, two: Two) -> Any:
    """Return an example as the input of a loss of this group."""
    first, second = two
    if isinstance(first, Scores):
        shared, margins = torch.zeros_like(first.tokens), torch.ones_like(first.last)
        return ScoredPairs(first, second, shared, margins)
    if loss.group == "pair":
        return Pairs(first, second, margins=torch.ones_like(summed(first).sum))
    if loss.group == "list":
        both = _table(two)
        return Lists(both, torch.ones_like(both.sum, dtype=torch.bool))
    if loss.group == "rollout":
        n = first.n
        example = torch.arange(n, device=first.each.device)
        return Rollouts(
            responses=first,
            example=example,
            n=n,
            old=first.each.detach(),
            advantages=torch.ones_like(first.sum()),
        )
    if loss.group == "labelled":
        return Labelled(first, torch.ones_like(summed(first).sum, dtype=torch.bool))
    return first


def _context(loss: Loss, policy: Two, reference: Two | None) -> Any:
    """Return the loss's batch context if these examples are the batch."""
    declared = loss.context
    if declared is None:
        return None
    of_models: list[Any] = []
    for two in (policy, reference):
        if two is None:
            of_models.append(None)
            continue
        own = declared.examples == "own"
        table = _table(two if own and loss.group in ("pair", "list") else two[:1])
        desirable = torch.ones_like(table.sum[:, 0], dtype=torch.bool)
        labelled = own and loss.group == "labelled"
        of_models.append(Labelled(table, desirable) if labelled else table)
    return declared.compute(*of_models)


def _table(some: Sequence[Any]) -> Logps:
    """Return the detached sums of k responses to each prompt: Logps of [B, k]."""
    columns = [summed(one) for one in some]
    sums = torch.stack([column.sum for column in columns], 1)
    return Logps(sums, torch.stack([column.tokens for column in columns], 1))
