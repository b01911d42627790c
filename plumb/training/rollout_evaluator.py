"""Evaluate a policy by the rewards of its responses to held-out prompts.

It offers what evaluator.Evaluator offers.

Shapes: n held-out prompts, k responses to each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from plumb.batching.feed import Feed
from plumb.losses.contract import Mean
from plumb.rollouts.source import Sampler
from plumb.training.evaluator import Evaluation, eval_groups
from plumb.training.metrics import Record, Split
from plumb.training.objective import Scorer


@dataclass(frozen=True)
class RolloutEvaluator:
    """Sample responses to the held-out prompts, by a sampler with a low temperature, and score
    them. The draws are the same at each evaluation.
    """

    scorer: Scorer
    feed: Feed  # of the held-out examples
    sampler: Sampler
    batch_size: int  # prompts
    is_primary_replica: bool

    def __len__(self) -> int:
        return len(self.feed.examples)

    def evaluate(self, between: Callable[[], None] = lambda: None) -> Evaluation:
        """Return the rewards of the responses to each prompt, and what they are made of. `between`
        is called before each batch, and may raise. Every rank must call it.
        """
        rows: list[dict[str, np.ndarray]] = []
        n = len(self)
        self.sampler.load()
        for start in range(0, n, self.batch_size):
            between()
            indices = np.arange(start, min(start + self.batch_size, n))
            rollout = self.sampler.rollout(indices, 0, learns=False)
            measured = rollout.measured
            responses = [r for group in rollout.samples.responses for r in group]
            columns = {
                "rollout/reward": measured.raw,
                "rollout/length": np.array([len(r.ids) for r in responses], float),
                "rollout/eos": np.array([r.ended == "eos" for r in responses], float),
            }
            if len(measured.terms) > 1:
                columns |= {f"rollout/reward/{name}": x for name, x in measured.terms.items()}
            rows.append({k: x.reshape(len(indices), -1).mean(1) for k, x in columns.items()})
        means = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        return Evaluation(
            kinds=dict.fromkeys(means, Mean),
            columns={name: np.stack([x, np.ones(n)]) for name, x in means.items()},
            tokens=means["rollout/length"],
            weights=np.ones(n),
        )

    def record(self, evaluation: Evaluation, split: Split = "eval") -> Record:
        """Return the metrics that are logged, overall and by data set."""
        return evaluation.record(eval_groups(self.feed.examples), split)

    def counts(self) -> dict[str, int]:
        """Return the number of prompts, overall ("all") and by group."""
        groups = eval_groups(self.feed.examples)
        return {"all": len(self)} | {name: int(mask.sum()) for name, mask in groups.items()}
