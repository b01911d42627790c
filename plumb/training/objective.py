"""Compute the loss of each example of a microbatch, with its metrics.

Shapes: B examples in a microbatch, R responses (see batching/layout.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from plumb.batching.feed import ContextBatch
from plumb.batching.layout import Batch, by_example
from plumb.distributed import sharding
from plumb.losses.contract import (
    Labelled,
    Lists,
    Logps,
    LossOutput,
    Mean,
    Metric,
    Pairs,
    Rollouts,
    ScoredPairs,
    Scores,
    Spread,
    TokenLogps,
    halves,
)
from plumb.losses.registry import Loss
from plumb.models.forward_path import ForwardPath
from plumb.models.logps import (
    Outputs,
    read_responses,
    response_logps,
    response_token_logps,
    sums_of,
)
from plumb.models.routers import Routers, balance


@dataclass(frozen=True)
class Scored:
    """Hold the results of a microbatch."""

    output: LossOutput
    metrics: dict[str, Metric]  # by their names in 2023, without train or eval
    # [R] the policy's value of each response: nats per token, or a score; detached
    per_response: Tensor
    tokens: Tensor  # [B] tokens of the first response that are predicted
    balance: Tensor | None  # [B] the routers' balancing loss, if it is part of the loss
    # of the R responses, by policy and reference, if the loss has one; detached
    compared: tuple[Logps, Logps] | None
    context: Tensor | None = None  # the loss's batch context
    weights: Tensor | None = None  # [B] of the examples, of mean 1 over the data; None: all 1

    def weighted_losses(self) -> Tensor:
        """Return each example's loss times its weight.  [B]"""
        losses = self.output.losses
        return losses if self.weights is None else losses * self.weights.to(losses)

    def detached(self) -> Scored:
        """Return the results without the graph of the backward pass."""
        output = replace(self.output, losses=self.output.losses.detach())
        return replace(self, output=output, balance=None)


@dataclass(frozen=True)
class Scorer:
    """Score batches with the models and the loss.

    `reference` is None if the loss needs none, or if batches carry its log-probabilities.
    """

    policy: PreTrainedModel
    reference: PreTrainedModel | None
    loss: Loss
    forward_path: ForwardPath
    precision: Callable[[], AbstractContextManager]  # autocast, or nothing
    device: torch.device
    routers: Routers | None = None  # of the policy, if their balancing loss is part of the loss
    # entered around the policy's forward pass: where its activations are kept
    saving: Callable[[], AbstractContextManager] = nullcontext
    temperature: float = 1.0  # at which responses were sampled; divides log-probabilities by token

    def logps(self, model: PreTrainedModel, batch: Batch) -> Logps:
        """Return the log-probabilities of a batch on the device, [R]."""
        with self.precision(), self.saving():
            return response_logps(model, batch, self.forward_path)

    @torch.no_grad()
    def context(
        self, batch_context: ContextBatch | None, is_primary_replica: bool
    ) -> Tensor | None:
        """Return the loss's batch context, the same on every rank; None if it has none.
        `is_primary_replica` is true on one of the ranks that see the same rows. Every rank must
        call it.
        """
        declared = self.loss.context
        if declared is None or batch_context is None:
            return None
        # policy's sums, tokens, reference's sums, labels
        table = torch.zeros(*batch_context.shape, 4, dtype=torch.float64, device=self.device)
        for batch, weight, where in batch_context.microbatches:
            batch = batch.to(self.device)
            policy = self.logps(self.policy, batch)
            reference = self.reference_logps(batch, policy)
            other = torch.zeros_like(policy.sum) if reference is None else reference.sum
            # one for each response, since an example is one response
            labels = batch.extras.example.get("labels", torch.zeros_like(other))
            columns = torch.stack([x.double() for x in (*policy, other, labels)], 1)  # [R, 4]
            values = by_example(columns, batch.n_responses)  # [B, k, 4]
            rows = torch.from_numpy(where).to(self.device)
            table[:, : values.shape[1]].index_add_(0, rows, weight * values)
        # otherwise FSDP would miss the gradients of what it has left gathered
        sharding.reshard(self.policy)
        sums, tokens, reference_sums, labels = sharding.all_reduce_sum(
            table * is_primary_replica
        ).unbind(2)
        of_models: list[Any] = [Logps(sums, tokens), Logps(reference_sums, tokens)]
        if declared.examples == "own" and self.loss.group == "labelled":
            of_models = [Labelled(of_model, labels[:, 0] > 0) for of_model in of_models]
        policy, of_reference = of_models
        return declared.compute(policy, of_reference if self.loss.needs_reference else None)

    def __call__(self, batch: Batch, context: Tensor | None = None) -> Scored:
        batch = batch.to(self.device)
        watched: AbstractContextManager[list[Tensor]] = (
            self.routers.watched() if self.routers else nullcontext([])
        )
        with watched as logits, self.precision(), self.saving():
            of_policy = read_responses(
                self.loss.reads,
                self.policy,
                batch,
                self.forward_path,
                self.reference,
                self.temperature,
                entropy=self.loss.reads_entropy,
            )
        summed = of_policy if isinstance(of_policy, Scores) else per_response(of_policy, batch)
        reference = self.reference_outputs(batch, summed)
        inputs_of = LOSS_INPUTS[self.loss.group]
        output = self.loss.compute(
            inputs_of(of_policy, batch),
            None if reference is None else inputs_of(reference, batch),
            context,
        )
        metrics = self.metrics(output, summed, batch)
        compared = balanced = None
        if reference is not None:
            own = Logps(summed[0].detach(), summed.tokens)
            compared = own, per_response(reference, batch)
        if self.routers is not None:
            each = balance(logits, batch, self.forward_path.packed, self.routers.top_k)  # [R]
            n = torch.from_numpy(batch.n_responses).to(each.device)
            balanced = by_example(each, batch.n_responses).sum(1) / n
            metrics["router_balance"] = Mean(balanced.detach())
        return Scored(
            output=output,
            metrics=metrics,
            per_response=per_response_value(summed),
            tokens=summed.tokens[: len(output.losses)],
            balance=balanced,
            compared=compared,
            context=context,
            weights=batch.extras.example.get("weights"),
        )

    def metrics(
        self, output: LossOutput, policy: Logps | Scores, batch: Batch
    ) -> dict[str, Metric]:
        """Return the metrics of a microbatch; `policy`: its outputs for the R responses."""
        n_scored = None
        if self.loss.average_over == "tokens":
            n_scored = by_example(policy.tokens, batch.n_responses).sum(1)
        inputs = LOSS_INPUTS[self.loss.group](policy, batch)
        return {
            "loss": Mean(output.losses.detach(), n_scored),
            **_reward_metrics(output, inputs),
            **_logp_metrics(inputs),
            **output.metrics,
        }

    def reference_outputs(self, batch: Batch, like: Logps | Scores) -> Logps | TokenLogps | None:
        """Return the reference's outputs that the loss reads, for the R responses of a batch on the
        device; None if it needs none.
        """
        if not self.loss.needs_reference or not self.loss.reference_by_token:
            return self.reference_logps(batch, like)
        if (stored := batch.extras.token.get("reference")) is not None:
            return TokenLogps(stored.to(like[0]), batch.response, len(batch.spans))
        with torch.no_grad(), self.precision():
            return response_token_logps(self.reference, batch, self.forward_path, self.temperature)

    def reference_logps(self, batch: Batch, like: Logps | Scores) -> Logps | None:
        """Return the reference's log-probabilities of a batch on the device, [R]: those that the
        batch carries, or those of the live reference; None if the loss needs none.
        """
        if not self.loss.needs_reference:
            return None
        if (stored := batch.extras.response.get("reference")) is not None:
            return Logps(stored.to(like[0]), like.tokens)
        if self.reference is None:
            return None
        with torch.no_grad():
            return self.logps(self.reference, batch)


def per_response(of_model: Outputs, batch: Batch) -> Logps:
    """Return the sums over responses, [R]."""
    assert not isinstance(of_model, Scores)
    if isinstance(of_model, TokenLogps):
        return sums_of(of_model.each, batch)
    return Logps(of_model.sum, of_model.tokens)


def per_response_value(of_policy: Logps | Scores) -> Tensor:
    """Return the policy's value of each response: nats per token, or a score.  [R], detached"""
    if isinstance(of_policy, Scores):
        return of_policy.last.detach()
    return of_policy.mean().detach()


def _single(of_model: Any, batch: Batch) -> Any:
    return of_model


def _pairs(of_model: Any, batch: Batch) -> Pairs | ScoredPairs:
    """Return pairs of the first half, the chosen responses, and the second, the rejected ones."""
    p_chosen, margins = (
        None if (column := batch.extras.example.get(name)) is None else column.to(of_model[0])
        for name in ("p_chosen", "margins")
    )
    chosen, rejected = halves(of_model)
    if isinstance(chosen, Scores):
        return ScoredPairs(
            chosen=chosen,
            rejected=rejected,
            shared=shared_tokens(batch),
            margins=margins,
            p_chosen=p_chosen,
        )
    return Pairs(chosen, rejected, p_chosen, margins)


def _lists(of_model: Logps, batch: Batch) -> Lists:
    """Return one row for each list; the responses of an example are sorted from best to worst."""
    n = batch.n_responses
    of_lists = Logps(*(by_example(x, n) for x in of_model))
    exists = by_example(torch.ones_like(of_model.tokens, dtype=torch.bool), n, fill=False)
    levels = batch.extras.response.get("levels")
    return Lists(of_lists, exists, None if levels is None else by_example(levels, n))


def _labelled(of_model: Any, batch: Batch) -> Labelled:
    labels = batch.extras.example["labels"]
    return Labelled(of_model, labels > 0)


def _rollouts(of_model: Any, batch: Batch) -> Rollouts:
    _, examples = (np.arange(batch.n_responses.max())[:, None] < batch.n_responses).nonzero()
    old = batch.extras.token["old_logps"]
    by_token = batch.extras.token.get("advantages")
    by_response = batch.extras.response.get("advantages")
    return Rollouts(
        responses=of_model,
        example=torch.from_numpy(examples).to(batch.response.device),
        n=len(batch.n_responses),
        old=old,
        advantages=old.new_zeros(len(batch.spans)) if by_response is None else by_response,
        token_advantages=by_token,
    )


# group -> the function that returns its losses' inputs, from the values of a batch's R responses
LOSS_INPUTS: dict[str, Callable[[Any, Batch], Any]] = {
    "single": _single,
    "pair": _pairs,
    "list": _lists,
    "labelled": _labelled,
    "rollout": _rollouts,
}


def shared_tokens(batch: Batch) -> Tensor:
    """Return the number of tokens in the common prefix of the two responses of each pair.  [B]"""
    n = len(batch.spans) // 2
    (a, a_length), (b, b_length) = batch.spans[:n, 2:].T, batch.spans[n:, 2:].T
    length = np.minimum(a_length, b_length)  # [B]
    at = np.minimum(np.arange(max(length.max(), 1)), np.maximum(length - 1, 0)[:, None])  # [B, L]
    # a response without tokens may start behind the end
    ids = batch.input_ids[0]
    last = batch.input_ids.shape[1] - 1
    device = ids.device
    first, second = (
        ids[torch.from_numpy(np.minimum(start[:, None] + at, last)).to(device)] for start in (a, b)
    )
    within = torch.from_numpy(np.arange(at.shape[1]) < length[:, None]).to(device)
    return ((first == second) & within).long().cumprod(1).sum(1)


def _reward_metrics(output: LossOutput, policy: Any) -> dict[str, Metric]:
    """Return the metrics of the rewards of pairs and lists, and of labelled responses, whose loss
    says what an accuracy is. That of pairs counts chosen > rejected; ties do not count.
    """
    if output.rewards is not None:
        yes = policy.desirable
        return {
            "rewards/chosen": Mean(output.rewards * yes, yes),
            "rewards/rejected": Mean(output.rewards * ~yes, ~yes),
        }
    chosen, rejected = output.chosen_rewards, output.rejected_rewards
    if chosen is None or rejected is None:
        return {}
    metrics: dict[str, Metric] = {
        "rewards/chosen": Mean(chosen),
        "rewards/rejected": Mean(rejected),
        "rewards/accuracies": Mean((chosen > rejected).float()),
        "rewards/margins": Mean(chosen - rejected),
    }
    if isinstance(policy, ScoredPairs):
        metrics["rewards/spread"] = Spread(torch.stack([chosen, rejected], 1))
    return metrics


def _logp_metrics(policy: Any) -> dict[str, Metric]:
    """Return the metrics of the policy's log-probabilities. In a list, chosen and rejected are the
    best and the worst response; of labelled responses, the desirable and the undesirable ones.
    """
    if isinstance(policy, Logps):
        return {"logps/chosen": Mean(policy.sum.detach())}
    if isinstance(policy, Labelled):
        yes = policy.desirable
        sums = policy.responses.sum.detach()
        return {"logps/chosen": Mean(sums * yes, yes), "logps/rejected": Mean(sums * ~yes, ~yes)}
    if isinstance(policy, (Pairs, Lists)):
        best, worst = (x.detach() for x in _ends(policy))
        return {
            "logps/chosen": Mean(best),
            "logps/rejected": Mean(worst),
            # not in 2023: the policy's own ranking
            "logps/accuracies": Mean((best > worst).float()),
        }
    return {}


def _ends(policy: Pairs | Lists) -> tuple[Tensor, Tensor]:
    """Return the summed log-probabilities of the best and of the worst responses.  [B] each"""
    if isinstance(policy, Pairs):
        return policy.chosen.sum, policy.rejected.sum
    sums = policy.responses.sum
    return sums[:, 0], policy.worst(sums)
