"""Compute metrics over the held-out examples, each counted once, on any number of ranks.

Shapes: n examples; see objective.py for those of a microbatch.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from plumb.batching.feed import Feed
from plumb.batching.layout import Batch, by_example
from plumb.console import bar_width, quiet
from plumb.data.examples import Examples
from plumb.data.tokenization import Example, trees_of
from plumb.distributed import sharding
from plumb.losses.contract import Largest, Metric
from plumb.models.logps import read_hidden
from plumb.models.scalar_head import FOLDS
from plumb.scoring.intervals import length_buckets
from plumb.training.metrics import Record, Split, logged_name, metric_values
from plumb.training.objective import Scorer

SHOWN_BY_GROUP = ("loss", "rewards/accuracies", "rewards/margins", "perplexity", "rollout/reward")


@dataclass(frozen=True)
class Evaluation:
    """Hold the results for each of n examples, in order, the same on every rank."""

    kinds: dict[str, type[Metric]]
    columns: dict[str, np.ndarray]  # of each metric, [c, n]
    tokens: np.ndarray  # [n] of the first response
    weights: np.ndarray  # [n] how often each example counts, of mean 1

    def scores(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the reward model's scores of the chosen and the rejected responses, [n] each."""
        return self.columns["rewards/chosen"][0], self.columns["rewards/rejected"][0]

    def of(self, mask: np.ndarray) -> Evaluation:
        """Return the evaluation of some of the examples, `mask` [n]."""
        columns = {name: values[:, mask] for name, values in self.columns.items()}
        return Evaluation(self.kinds, columns, self.tokens[mask], self.weights[mask])

    def values(self) -> Record:
        """Return the metrics over all examples, weighted, and the `perplexity` per token of the
        first responses (SFT targets, chosen).
        """
        weighted = {name: own * self.weights for name, own in self.columns.items()}
        sums = [[float(column.sum()) for column in own] for own in weighted.values()]
        values = metric_values(self.kinds, sums)
        values |= {
            name: float(own.max())
            for name, own in self.columns.items()
            if self.kinds[name] is Largest
        }
        if "logps/chosen" in values:
            logps, weights = weighted["logps/chosen"]
            nats = -logps.sum() / max((self.tokens * weights).sum(), 1)
            values["perplexity"] = float(np.exp(min(nats, 700.0)))
        return values

    def record(self, groups: Mapping[str, np.ndarray], split: Split = "eval") -> Record:
        """Return the metrics as they are logged, and for each group (name -> mask [n]) its loss,
        accuracy, margin and perplexity: `rewards_eval/accuracies/<group>`. {} without examples.
        """
        if not len(self.tokens):
            return {}
        record = {logged_name(name, split): value for name, value in self.values().items()}
        for group, mask in groups.items():
            values = self.of(mask).values()
            record |= {
                f"{logged_name(name, split)}/{group}": values[name]
                for name in SHOWN_BY_GROUP
                if name in values
            }
        return record


@torch.no_grad()
def evaluate(
    scorer: Scorer,
    feed: Feed,
    batch_size: int,
    is_primary_replica: bool = True,
    between: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Score every example once, whatever the batch size and the number of ranks.

    `is_primary_replica` is true on one of the ranks that see the same rows. `between` is called
    before each batch, and may raise.
    """
    was_training = scorer.policy.training
    scorer.policy.eval()
    n = len(feed.examples)
    kinds: dict[str, type[Metric]] = {}
    widths: list[int] = []  # of the metrics' columns
    # over all examples, so that the evaluation does not depend on its batch size
    context = (
        scorer.context(feed.for_context(np.arange(n)), is_primary_replica)
        if n and feed.context
        else None
    )
    table = torch.zeros(0)
    steps = feed.ahead(
        (np.arange(start, min(start + batch_size, n)) for start in range(0, n, batch_size)),
        scorer.device,
    )
    shown = tqdm(
        steps,
        total=-(-n // batch_size),
        desc="evaluating",
        unit="batch",
        leave=False,
        disable=quiet(),
        ncols=bar_width(),
    )
    for i, step in enumerate(shown):
        between()
        for batch, weight, where in step.microbatches:
            examples = i * batch_size + where
            scored = scorer(batch, scorer.loss.context_of(context, examples))
            columns = [metric.columns() for metric in scored.metrics.values()]
            values = torch.cat([*columns, scored.tokens.double()[:, None]], 1)  # [B, M]
            if not kinds:
                kinds = {name: type(metric) for name, metric in scored.metrics.items()}
                widths = [own.shape[1] for own in columns]
                table = values.new_zeros(n, values.shape[1])
            table.index_add_(0, torch.from_numpy(examples).to(table.device), weight * values)
    scorer.policy.train(was_training)
    if not n:
        return Evaluation({}, {}, np.empty(0), np.empty(0))
    rows = sharding.all_reduce_sum(table * is_primary_replica).T.cpu().numpy()  # [M, n]
    of_metrics = np.split(rows[:-1], np.cumsum(widths)[:-1])
    weights = feed.extras.example.get("weights", np.ones(n))
    return Evaluation(kinds, dict(zip(kinds, of_metrics, strict=True)), rows[-1], weights)


class Evaluator:
    """Evaluate a policy on held-out examples. It needs no trainer, optimizer or saver."""

    def __init__(
        self, scorer: Scorer, feed: Feed, batch_size: int, is_primary_replica: bool = True
    ):
        """Take the held-out examples as a feed. `is_primary_replica`: true on one of the ranks that
        see the same rows.
        """
        self.scorer = scorer
        self.feed = feed
        self.batch_size = batch_size
        self.is_primary_replica = is_primary_replica
        self.groups = eval_groups(feed.examples)  # name -> mask [n]

    def __len__(self) -> int:
        return len(self.feed.examples)

    def evaluate(self, between: Callable[[], None] = lambda: None) -> Evaluation:
        """Score every example once, in evaluation mode. `between` is called before each batch, and
        may raise. Every rank must call it.
        """
        return evaluate(self.scorer, self.feed, self.batch_size, self.is_primary_replica, between)

    def record(self, evaluation: Evaluation, split: Split = "eval") -> Record:
        """Return the metrics that are logged, overall and by group."""
        return evaluation.record(self.groups, split)

    def counts(self) -> dict[str, int]:
        """Return the number of examples, overall ("all") and by group."""
        return {"all": len(self)} | {name: int(mask.sum()) for name, mask in self.groups.items()}


def eval_groups(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """Return {name: mask [n]} of the groups that are evaluated separately: the data sets, if there
    are several, and pairs by the number of tokens of their longer response.
    """
    if not isinstance(examples, Examples) or not examples:  # others do not record their data set
        return {}
    data_sets, groups = examples.data_sets(), dict[str, np.ndarray]()
    names = [str(name) for name in np.unique(data_sets)]
    for name in names if len(names) > 1 else ():
        groups[short(name, names)] = data_sets == name
    if examples.k > 1:
        longer = examples.lengths[:, 1:].max(1)
        labels = np.array(length_buckets(longer))
        groups |= {str(labels[i]): labels == labels[i] for i in np.argsort(longer)}
    return groups


def short(path: str, paths: Sequence[str]) -> str:
    """Return as many of the path's last parts as distinguish it from the other paths.

    >>> paths = ["hh/harmless/test.jsonl", "hh/helpful/test.jsonl"]
    >>> short(paths[0], paths), short("a/b", ["a/b", "a/c"])
    ('harmless/test.jsonl', 'b')
    """
    parts = path.split("/")
    ends = ["/".join(parts[-n:]) for n in range(1, len(parts) + 1)]
    return next(
        (end for end in ends if sum(("/" + other).endswith("/" + end) for other in paths) == 1),
        path,
    )


def all_logps(
    scorer: Scorer,
    model: Any,
    feed: Feed,
    indices: np.ndarray,
    is_primary_replica: bool,
    progress: tqdm,
) -> np.ndarray:
    """Return the log-probabilities of these examples' responses under `model`, [n, k] float64; see
    `of_all`.
    """
    logps = lambda batch: scorer.logps(model, batch).sum.double()[:, None]
    return (
        of_all(logps, 1, model, feed, indices, scorer.device, is_primary_replica, progress)
        .cpu()
        .numpy()[..., 0]
    )


def all_hidden(
    scorer: Scorer, feed: Feed, indices: np.ndarray, is_primary_replica: bool, progress: tqdm
) -> Tensor:
    """Return what the policy's scalar head reads at the end of these examples' responses, or, if
    `loss.read` is "mean", the mean over their tokens. [n, k, d] float32, or float64 if the head is;
    see `of_all`.
    """
    weight = scorer.policy.get_output_embeddings().weight

    def hidden(batch: Batch) -> Tensor:
        with scorer.precision():
            return read_hidden(scorer.policy, batch, scorer.forward_path, scorer.loss.read).to(
                weight.dtype
            )

    return of_all(
        hidden,
        weight.shape[1],
        scorer.policy,
        feed,
        indices,
        scorer.device,
        is_primary_replica,
        progress,
    )


def folds_of(examples: Sequence[Example], indices: np.ndarray) -> np.ndarray:
    """Return a fold for each of these examples; those of one prompt share one.

    [n], 0 to FOLDS - 1
    """
    prompts = (trees_of(examples[i])[0][0] for i in indices.tolist())
    return np.array(
        [zlib.crc32(np.asarray(prompt, np.int32).tobytes()) % FOLDS for prompt in prompts]
    )


@torch.no_grad()
def of_all(
    compute: Callable[[Batch], Tensor],
    width: int,
    model: Any,
    feed: Feed,
    indices: np.ndarray,
    device: torch.device,
    is_primary_replica: bool,
    progress: tqdm,
) -> Tensor:
    """Return, for all of these examples, what `compute` returns for the responses of a batch on the
    device, [R, width].  [n, k, width]

    Every rank computes its part and gets all of it; `is_primary_replica` is true on one of the
    ranks that see the same rows.
    """
    was_training, k = model.training, feed.lengths.k
    model.eval()
    places, values = [np.empty(0, np.int64)], [torch.zeros(0, k, width, device=device)]
    starts = range(0, len(indices), 256)
    steps = feed.ahead((indices[start : start + 256] for start in starts), device)
    for start, step in zip(starts, steps, strict=True):
        for batch, weight, where in step.microbatches:
            places.append(start + where)
            of_batch = by_example(compute(batch.to(device)).to(device), batch.n_responses)
            missing = (0, 0, 0, k - of_batch.shape[1])  # no example of this batch has k responses
            values.append(weight * torch.nn.functional.pad(of_batch, missing))
        progress.update(len(step.indices))
    model.train(was_training)
    some = torch.cat([value.to(values[-1].dtype) for value in values])
    table = some.new_zeros(len(indices), k, width)
    table.index_add_(0, torch.from_numpy(np.concatenate(places)).to(device), some)
    return sharding.all_reduce_sum(table * is_primary_replica)
