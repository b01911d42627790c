"""Scoring batches with a loss, evaluating a policy on held-out examples, and sample tables.

Shapes: B examples in a microbatch, R = k * B rows (see batching.Batch).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

import parallel
from batching import Batch, Feed
from losses import Logps, Loss, LossOutput, Pairs
from metrics import Means, Record
from models import Way, response_logps
from utils import quiet


class Scored(NamedTuple):
    output: LossOutput
    metrics: dict[str, Tensor]  # the 2023 names, `{}` standing for train or eval, each [B]
    counts: dict[str, float]  # what a metric is averaged over, where that is not the B examples


class Scorer(NamedTuple):
    """What it takes to score a batch: the models, the loss, and how both models compute.

    `reference` is None where the loss needs none, or where batches carry its log-probabilities.
    """

    policy: PreTrainedModel
    reference: PreTrainedModel | None
    loss: Loss
    way: Way
    precision: Callable[[], AbstractContextManager]  # autocast, or nothing
    device: torch.device

    def logps(self, model: PreTrainedModel, batch: Batch) -> Logps:
        """Of a batch on the device, [R]."""
        with self.precision():
            return response_logps(model, batch, self.way)

    def __call__(self, batch: Batch) -> Scored:
        batch = batch.to(self.device)
        logps = self.logps(self.policy, batch)
        reference = None
        if self.loss.needs_reference:
            if batch.reference is not None:
                reference = Logps(batch.reference.to(logps.sum), logps.tokens)
            elif self.reference is not None:
                with torch.no_grad():
                    reference = self.logps(self.reference, batch)
        policy = as_data(logps, batch.k)
        output = self.loss.compute(policy, None if reference is None else as_data(reference, batch.k))
        counts: dict[str, float] = {"loss/{}": batch.n_scored} if self.loss.average_over == "tokens" else {}
        return Scored(output, _metrics(output, policy), counts)


def as_data(logps: Logps, k: int) -> Logps | Pairs:
    """R responses -> what the loss takes: as they are (k = 1), or chosen and rejected halves (k = 2)."""
    if k == 1:
        return logps
    n = len(logps.sum) // 2
    return Pairs(*(Logps(logps.sum[part], logps.tokens[part]) for part in (slice(n), slice(n, None))))


def _metrics(output: LossOutput, policy: Logps | Pairs) -> dict[str, Tensor]:
    """The 2023 metrics, `{}` standing for train or eval. An accuracy counts chosen > rejected; ties do not count."""
    metrics = {"loss/{}": output.losses}
    if isinstance(policy, Pairs):
        chosen, rejected = output.chosen_rewards, output.rejected_rewards
        if chosen is not None and rejected is not None:
            metrics |= {
                "rewards_{}/chosen": chosen,
                "rewards_{}/rejected": rejected,
                "rewards_{}/accuracies": (chosen > rejected).float(),
                "rewards_{}/margins": chosen - rejected,
            }
        metrics |= {
            "logps_{}/chosen": policy.chosen.sum,
            "logps_{}/rejected": policy.rejected.sum,
            "logps_{}/accuracies": (policy.chosen.sum > policy.rejected.sum).float(),  # ours: the policy's own ranking
        }
    else:
        metrics["logps_{}/chosen"] = policy.sum
    return {name: value.detach() for name, value in metrics.items()}


@torch.no_grad()
def evaluate(scorer: Scorer, feed: Feed, batch_size: int, between: Callable[[], None] = lambda: None) -> Record:
    """Means of the 2023 metrics over every example, each counted once, whatever the batch size and the number of ranks.

    loss/eval is per token if the loss averages over tokens. `between` is called before each batch, and may raise.
    """
    was_training = scorer.policy.training
    scorer.policy.eval()
    means, n = Means(), len(feed.examples)
    steps = feed.ahead((np.arange(start, min(start + batch_size, n)) for start in range(0, n, batch_size)), scorer.device)
    for step in tqdm(steps, total=-(-n // batch_size), desc="evaluating", unit="batch", leave=False, disable=quiet()):
        between()
        for batch, weight, _ in step.microbatches:
            scored = scorer(batch)
            means.add(scored.metrics, weight, scored.counts)
    scorer.policy.train(was_training)
    return {name.format("eval"): value for name, value in means.reduce().items()}


@torch.no_grad()
def all_logps(scorer: Scorer, model: Any, feed: Feed, indices: np.ndarray, counts: bool, progress: tqdm) -> np.ndarray:
    """Log-probabilities of these examples' responses under `model`, [n, k] float64. Every rank computes its part, and gets all;
    `counts` is true on one of the ranks that see the same rows."""
    was_training, k = model.training, len(feed.examples[0].responses)
    model.eval()
    logps = torch.zeros(len(indices), k, dtype=torch.float64, device=scorer.device)
    places, values = [np.empty(0, np.int64)], [logps[:0]]
    starts = range(0, len(indices), 256)
    steps = feed.ahead((indices[start : start + 256] for start in starts), scorer.device)
    for start, step in zip(starts, steps, strict=True):
        for batch, weight, where in step.microbatches:
            places.append(start + where)
            values.append(weight * scorer.logps(model, batch.to(scorer.device)).sum.view(k, -1).T.double())
        progress.update(len(step.examples))
    model.train(was_training)
    logps.index_add_(0, torch.from_numpy(np.concatenate(places)).to(scorer.device), torch.cat(values))
    return parallel.total(logps * counts).cpu().numpy()
