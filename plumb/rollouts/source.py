"""The source of steps of a run that learns from its own samples: prompts -> responses -> rewards ->
advantages -> a step of trees, with what the loss reads beside their tokens.

It offers what batching/feed.Feed offers, so that the trainer does not know which of them it has.
Each step is sampled when it is asked for, from the weights that the step before has left.

Shapes: n prompts in a step, k responses to each; N response tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from plumb.batching.feed import Feed, Step
from plumb.batching.layout import Batch
from plumb.batching.microbatches import Packing
from plumb.data.extras import Extras
from plumb.data.prompts import NumberedPrompt
from plumb.data.token_text import continued, decode
from plumb.data.tokenization import Example, trees_of
from plumb.errors import UserError
from plumb.losses.advantage_rules import AdvantageRule
from plumb.rollouts.advantages import Advantages, advantages
from plumb.rollouts.engine import Engine, Response, Samples

# log-probabilities of a batch's scored tokens, without gradients.  -> [N], nats
TokenLogpsOf = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Answered:
    """Hold what the reward of a response is computed from.

    Example: Answered("2 + 2 =", " 4", "4", 2, "eos", "sums.jsonl:1").
    """

    prompt: str  # as the policy read it
    response: str  # without the end token
    target: str  # the data's own response, "" where it has none
    n_tokens: int  # of the response, the end token included
    ended: str  # "eos" or "length"
    source: str  # of the prompt


Reward = Callable[[Sequence[Answered]], np.ndarray]  # -> one number for each, [R]


@dataclass(frozen=True, eq=False)
class Groups(Sequence[Example]):
    """Hold a step's prompts with their responses, and what they carry beside their tokens."""

    trees: list[Example]
    columns: Extras

    def __len__(self) -> int:
        return len(self.trees)

    def __getitem__(self, i: Any) -> Any:
        return self.trees[i]

    def extras(self) -> Extras:
        return self.columns


@dataclass(frozen=True)
class RolloutSource:
    """Turn indices of prompts into steps on the policy's own responses, in one process."""

    examples: Sequence[Example]  # the data: a prompt each, and perhaps a response as target
    packing: Packing
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    ends: Sequence[int]  # the tokens that end a response
    n: int  # responses to a prompt
    seed: int
    reward: Reward
    rule: AdvantageRule
    policy: Any
    # by the training path, at the temperature of sampling
    policy_logps: TokenLogpsOf
    reference_logps: TokenLogpsOf | None  # None: the loss needs no reference
    step_number: Callable[[], int]  # of the step that is to be sampled
    # nats per token: how far the sampler's log-probabilities may be from the trainer's on average
    tolerance: float

    def ahead(
        self, batches: Iterable[np.ndarray], device: torch.device, at_least: int = 1
    ) -> RolloutSteps:
        """Return the steps on these prompts. None is made before it is asked for."""
        return RolloutSteps(self.step(indices, at_least) for indices in batches)

    def step(self, indices: np.ndarray, at_least: int = 1) -> Step:
        """Return the step on these prompts [n], sampled from the policy as it is now, in `at_least`
        microbatches. Its extras are old_logps, and reference where there is one, by token, and
        advantages by response.
        """
        start = time.perf_counter()
        prompts = [self._prompt(int(i)) for i in indices]
        self.engine.load(self.policy)
        samples = self.engine.sample(prompts, self.n, (self.seed, self.step_number()))
        trees = [
            Example(prompt.ids, tuple(r.ids for r in group), prompt.source)
            for prompt, group in zip(prompts, samples.responses, strict=True)
        ]
        rewards = self._rewards(indices, samples)  # [n, k]
        old = self._by_example(trees, self.policy_logps)
        difference = self._difference(samples, old)
        token = {"old_logps": old}
        kl = None
        if self.reference_logps is not None:
            token["reference"] = self._by_example(trees, self.reference_logps)
            kl = _sums(old, trees) - _sums(token["reference"], trees)
        of_step = advantages(rewards, self.rule, kl)
        if not len(of_step.groups):  # all were dropped: a step that teaches nothing
            of_step = Advantages(np.zeros_like(rewards), np.arange(len(trees)), of_step.n_equal)
        kept = of_step.groups
        columns = Extras(
            response={"advantages": of_step.values},
            token={name: _columns([values[i] for i in kept]) for name, values in token.items()},
        )
        feed = Feed(Groups([trees[i] for i in kept], columns), self.packing, rank=0)
        step = feed.step(np.arange(len(kept)), at_least)
        return replace(
            step,
            indices=indices,
            counters={
                **_counters(samples, rewards, of_step.n_equal),
                "rollout/logps_difference": difference,
                "rollout/secs": time.perf_counter() - start,
            },
        )

    def _prompt(self, i: int) -> NumberedPrompt:
        example = self.examples[i]
        ids, _ = trees_of(example)[0]
        return NumberedPrompt(np.asarray(ids, np.int64), i, example.source)

    def _rewards(self, indices: np.ndarray, samples: Samples) -> np.ndarray:
        """Return the rewards of all responses, [n, k]. Raise UserError for one that is no finite
        number.
        """
        answered = [
            one
            for i, group in zip(indices.tolist(), samples.responses, strict=True)
            for one in self._answered(self.examples[i], group)
        ]
        rewards = np.asarray(self.reward(answered), np.float64)
        if rewards.shape != (len(answered),):
            raise UserError(
                f"reward: {len(answered)} responses have rewards of shape {rewards.shape}; give one"
                " number for each"
            )
        if not (finite := np.isfinite(rewards)).all():
            bad = int(finite.argmin())
            raise UserError(
                f"reward: a response to {answered[bad].source} has the reward {rewards[bad]}; it"
                " must be a finite number"
            )
        return rewards.reshape(len(indices), -1)

    def _answered(self, example: Example, group: Sequence[Response]) -> list[Answered]:
        """Return the texts of the responses to a prompt."""
        prompt, of_data = trees_of(example)[0]
        ids = np.asarray(prompt).tolist()
        rows = [self._without_end(r.ids) for r in [*group]]
        targets = [self._without_end(of_data[0])] if of_data else []
        texts = continued(ids, [*rows, *targets], self.tokenizer, skip_special=True)
        (text,) = decode([ids], self.tokenizer)
        return [
            Answered(
                prompt=text,
                response=own,
                target=texts[len(rows)] if targets else "",
                n_tokens=len(response.ids),
                ended=response.ended,
                source=example.source,
            )
            for own, response in zip(texts, group, strict=False)
        ]

    def _without_end(self, ids: np.ndarray) -> list[int]:
        row = np.asarray(ids).tolist()
        return row[:-1] if row and row[-1] in self.ends else row

    def _by_example(self, trees: Sequence[Example], logps_of: TokenLogpsOf) -> list[np.ndarray]:
        """Return the log-probabilities of each example's response tokens, one response after
        another, as the training path computes them.
        """
        values: list[np.ndarray] = [np.empty(0)] * len(trees)
        step = Feed(trees, self.packing, rank=0).step(np.arange(len(trees)))
        for batch, _, where in step.microbatches:
            each = logps_of(batch).double().cpu().numpy()
            sizes = [sum(map(len, trees[i].responses)) for i in where.tolist()]
            # a row has the scored tokens of one example after those of the other
            for i, own in zip(where.tolist(), np.split(each, np.cumsum(sizes)[:-1]), strict=True):
                values[i] = own
        return values

    def _difference(self, samples: Samples, old: Sequence[np.ndarray]) -> float:
        """Return the mean distance per token of the sampler's log-probabilities from those of the
        training path. Raise UserError where it is too large for rounding.
        """
        theirs = np.concatenate([r.logps for group in samples.responses for r in group])
        difference = float(np.abs(theirs - np.concatenate(old)).mean())
        if difference <= self.tolerance:
            return difference
        raise UserError(
            f"rollout: the sampler's log-probabilities are {difference:.2g} nats per token away"
            f" from the trainer's (rollout.tolerance={self.tolerance:g}): the samples are not the"
            " policy's own; this model cannot be trained on them"
        )


class RolloutSteps(Iterator[Step]):
    """Yield steps that are made when they are asked for. `waited_secs`: how long the last took."""

    def __init__(self, steps: Iterator[Step]):
        self.steps = steps
        self.waited_secs = 0.0

    def __next__(self) -> Step:
        start = time.perf_counter()
        step = next(self.steps)
        self.waited_secs = time.perf_counter() - start
        return step


def _columns(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Return arrays of different lengths as one column of arrays.  [n] object"""
    column = np.empty(len(rows), object)
    for i, row in enumerate(rows):
        column[i] = row
    return column


def _sums(values: Sequence[np.ndarray], trees: Sequence[Example]) -> np.ndarray:
    """Return the sums of token values over each response.  [n, k]"""
    return np.array(
        [
            [part.sum() for part in np.split(own, np.cumsum([*map(len, tree.responses)])[:-1])]
            for own, tree in zip(values, trees, strict=True)
        ]
    )


def _counters(samples: Samples, rewards: np.ndarray, n_equal: int) -> dict[str, float]:
    """Return what is logged of a step's samples."""
    responses = [r for group in samples.responses for r in group]
    return {
        "rollout/reward": float(rewards.mean()),
        "rollout/reward_std": float(rewards.std()),
        "rollout/equal_rewards": n_equal / len(rewards),
        "rollout/length": samples.n_tokens / len(responses),
        "rollout/eos": float(np.mean([r.ended == "eos" for r in responses])),
        "rollout/sampled_tokens_per_second": samples.tokens_per_sec,
        "rollout/sampling_secs": samples.secs,
    }
