"""Evaluate within a run: metrics, samples and plots, into its logs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plumb.console import on_terminal, rank, rank0_print
from plumb.data.token_text import decode
from plumb.data.tokenization import Example
from plumb.rollouts.hf_engine import sample
from plumb.training.evaluator import Evaluator
from plumb.training.metrics import Record, TrainingLog
from plumb.training.moving import PolicyAverage
from plumb.training.rollout_evaluator import RolloutEvaluator


@dataclass(frozen=True)
class EvalSampler:
    """Sample responses to the first prompts of the held-out examples."""

    tokenizer: PreTrainedTokenizerBase
    n: int  # prompts
    batch_size: int
    max_length: int
    max_new_tokens: int
    temperature: float
    seed: int
    prefix: str = ""  # added to each prompt: what the responses that the loss prefers begin with

    def rows(
        self,
        model: PreTrainedModel,
        examples: Sequence[Example],
        n_seen: int,
        between: Callable[[], None],
    ) -> list[tuple[int, str, str]]:
        """Return (n_seen, prompt, sample) of each prompt, which ends with the prefix; `between` is
        called between batches.
        """
        ids = self.tokenizer(self.prefix, add_special_tokens=False)["input_ids"]
        ending = np.array(ids, np.int32)
        room = max(1, self.max_length - 1 - len(ending))
        prompts = [
            np.concatenate([examples[i].prompt[-room:], ending])
            for i in range(min(self.n, len(examples)))
        ]
        texts = sample(
            model,
            self.tokenizer,
            prompts,
            batch_size=self.batch_size,
            max_length=self.max_length,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed + n_seen,
            between=between,
        )
        decoded = decode([p.tolist() for p in prompts], self.tokenizer, skip_special=True)
        return [(n_seen, prompt, text) for prompt, text in zip(decoded, texts, strict=True)]


@dataclass(frozen=True)
class RunEvaluator:
    """Evaluate the policy of a run. Every rank must make each call."""

    evaluator: Evaluator | RolloutEvaluator
    sampler: EvalSampler | None  # None: no samples are drawn
    average: PolicyAverage | None  # evaluated beside the policy
    log: TrainingLog
    run_dir: Path
    check: Callable[[Record], None]  # called with the metrics, before they are logged
    # draws the scores of a reward model, (chosen [n], rejected [n], run_dir, n_seen)
    draw_scores: Callable[[np.ndarray, np.ndarray, Path, int], None]

    def evaluate(self, n_seen: int, between: Callable[[], None]) -> Record:
        """Log the metrics over the held-out examples, and samples, after `n_seen` training
        examples. Return the metrics; {} without examples.

        `between` is called between batches, and may raise.
        """
        evaluator = self.evaluator
        if not len(evaluator):
            return {}
        if not on_terminal():  # where a bar says so
            rank0_print(
                f"evaluating {len(evaluator):,} examples after {n_seen:,} training examples"
            )
        evaluation = evaluator.evaluate(between)
        record = evaluator.record(evaluation)
        if self.average is not None:
            # a stop saves the policy, so it waits until the policy has its own weights again
            with self.average.in_place_of_policy():
                record |= evaluator.record(evaluator.evaluate(), "eval_ema")
            between()
        self.check(record)
        self.log.evaluation(record, n_seen)
        if evaluator.scorer.loss.reads == "scores":
            if rank() == 0:
                self.draw_scores(*evaluation.scores(), self.run_dir, n_seen)
        elif self.sampler is not None:
            self.log_samples(self.sampler, n_seen, between)
        return record

    def log_samples(self, sampler: EvalSampler, n_seen: int, between: Callable[[], None]) -> None:
        """Log samples of the policy, and of its reference if there is one."""
        scorer = self.evaluator.scorer
        examples = self.evaluator.feed.examples
        rows = sampler.rows(scorer.policy, examples, n_seen, between)
        self.log.samples("policy_samples", rows, n_seen)
        if scorer.reference is not None:
            rows = sampler.rows(scorer.reference, examples, n_seen, between)
            self.log.samples("reference_samples", rows, n_seen)
        elif scorer.loss.needs_reference and n_seen == 0:
            # a cached reference is the policy before its first step
            self.log.samples("reference_samples", rows, n_seen)
