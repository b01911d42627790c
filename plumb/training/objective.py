"""A microbatch -> the loss of each example, with its metrics.

Shapes: B examples in a microbatch, R = k * B responses (see batching/layout.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from plumb.batching.layout import Batch
from plumb.losses.contract import Logps, LossOutput, Pairs, ScoredPairs, Scores
from plumb.losses.registry import Loss
from plumb.models.forward_path import ForwardPath
from plumb.models.logps import response_logps, response_scores
from plumb.models.routers import Routers, balance
from plumb.training.metrics import SQUARES


class Scored(NamedTuple):
    """What came out for a microbatch."""

    output: LossOutput
    metrics: dict[str, Tensor]  # the 2023 names, `{}` standing for train or eval, each [B]
    counts: dict[str, float]  # what a metric is averaged over, where that is not the B examples
    # [R] what the policy gave each response: nats per token, or a score; detached
    per_response: Tensor
    tokens: Tensor  # [B] the first response's, which have a prediction
    balance: Tensor | None  # [B] the routers' balancing loss, where it is trained on
    # the R responses' of policy and reference, where the loss has one; detached
    compared: tuple[Logps, Logps] | None


class Scorer(NamedTuple):
    """What it takes to score a batch: the models, the loss, and how both models compute.

    `reference` is None where the loss needs none, or where batches carry its log-probabilities.
    """

    policy: PreTrainedModel
    reference: PreTrainedModel | None
    loss: Loss
    forward_path: ForwardPath
    precision: Callable[[], AbstractContextManager]  # autocast, or nothing
    device: torch.device
    routers: Routers | None = None  # of the policy, where their balancing loss is trained on

    def logps(self, model: PreTrainedModel, batch: Batch) -> Logps:
        """Of a batch on the device, [R]."""
        with self.precision():
            return response_logps(model, batch, self.forward_path)

    def policy_outputs(self, batch: Batch) -> Logps | Scores:
        """What the loss reads of the policy, of a batch on the device, [R]."""
        if self.loss.reads == "logps":
            return self.logps(self.policy, batch)
        with self.precision():
            return response_scores(self.policy, batch, self.forward_path)

    def __call__(self, batch: Batch) -> Scored:
        batch = batch.to(self.device)
        watched: AbstractContextManager[list[Tensor]] = (
            self.routers.watched() if self.routers else nullcontext([])
        )
        with watched as logits:
            of_policy = self.policy_outputs(batch)
        of_reference = None
        if self.loss.needs_reference:
            if batch.reference is not None:
                logps = batch.reference.to(of_policy[0])
                of_reference = Logps(logps, of_policy.tokens)
            elif self.reference is not None:
                with torch.no_grad():
                    of_reference = self.logps(self.reference, batch)
        policy = to_loss_inputs(of_policy, batch)
        output = self.loss.compute(
            policy, None if of_reference is None else to_loss_inputs(of_reference, batch)
        )
        counts: dict[str, float] = (
            {"loss/{}": batch.n_scored} if self.loss.average_over == "tokens" else {}
        )
        tokens = of_policy.tokens[: len(output.losses)]
        compared = (
            None
            if of_reference is None
            else (Logps(*(x.detach() for x in of_policy)), of_reference)
        )
        metrics, balanced = _metrics(output, policy), None
        if self.routers is not None:
            each = balance(logits, batch, self.forward_path.packed, self.routers.top_k)  # [R]
            balanced = each.view(batch.k, -1).mean(0)
            metrics["router_balance/{}"] = balanced.detach()
        return Scored(
            output, metrics, counts, per_response_value(of_policy), tokens, balanced, compared
        )


def per_response_value(of_policy: Logps | Scores) -> Tensor:
    """What it gave each response: nats per token, or a score.  -> [R], detached"""
    if isinstance(of_policy, Scores):
        return of_policy.last.detach()
    return of_policy.sum.detach() / of_policy.tokens.clamp(min=1)


def to_loss_inputs(of_model: Logps | Scores, batch: Batch) -> Logps | Pairs | ScoredPairs:
    """R responses -> what the loss takes: as they are (k = 1), or chosen and rejected halves (k =
    2).
    """
    if batch.k == 1:
        return cast(Logps, of_model)
    n = len(of_model.tokens) // 2
    chosen, rejected = (
        type(of_model)(*(x[part] for x in of_model)) for part in (slice(n), slice(n, None))
    )
    if isinstance(chosen, Scores):
        return ScoredPairs(chosen, cast(Scores, rejected), shared_tokens(batch), batch.margins)
    return Pairs(cast(Logps, chosen), cast(Logps, rejected))


def shared_tokens(batch: Batch) -> Tensor:
    """How many tokens the two responses of each pair begin with in common.  [B]"""
    n = len(batch.spans) // 2
    (a, a_length), (b, b_length) = batch.spans[:n, 2:].T, batch.spans[n:, 2:].T
    length = np.minimum(a_length, b_length)  # [B]
    at = np.minimum(np.arange(max(length.max(), 1)), np.maximum(length - 1, 0)[:, None])  # [B, L]
    # a response without a token may stand behind the end
    ids = batch.input_ids[0]
    last = batch.input_ids.shape[1] - 1
    device = ids.device
    first, second = (
        ids[torch.from_numpy(np.minimum(start[:, None] + at, last)).to(device)] for start in (a, b)
    )
    within = torch.from_numpy(np.arange(at.shape[1]) < length[:, None]).to(device)
    return ((first == second) & within).long().cumprod(1).sum(1)


def _metrics(output: LossOutput, policy: Logps | Pairs | ScoredPairs) -> dict[str, Tensor]:
    """The 2023 metrics, `{}` standing for train or eval. An accuracy counts chosen > rejected; ties
    do not count.
    """
    metrics = {"loss/{}": output.losses}
    chosen, rejected = output.chosen_rewards, output.rejected_rewards
    if chosen is not None and rejected is not None:
        metrics |= {
            "rewards_{}/chosen": chosen,
            "rewards_{}/rejected": rejected,
            "rewards_{}/accuracies": (chosen > rejected).float(),
            "rewards_{}/margins": chosen - rejected,
        }
    if isinstance(policy, ScoredPairs):
        assert chosen is not None and rejected is not None
        metrics[SQUARES] = (chosen**2 + rejected**2) / 2
    elif isinstance(policy, Pairs):
        metrics |= {
            "logps_{}/chosen": policy.chosen.sum,
            "logps_{}/rejected": policy.rejected.sum,
            "logps_{}/accuracies": (
                (policy.chosen.sum > policy.rejected.sum).float()
            ),  # ours: the policy's own ranking
        }
    else:
        metrics["logps_{}/chosen"] = policy.sum
    return {name: value.detach() for name, value in metrics.items()}
