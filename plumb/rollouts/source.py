"""The source of steps of a run that learns from its own samples: prompts -> responses -> rewards ->
what the loss learns from -> a step of trees.

It offers what batching/feed.Feed offers, so that the trainer does not know which of them it has.
Responses are sampled when the first step on them is asked for, from the weights that the step
before has left.

Shapes: n prompts of a block, k responses to each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from plumb.batching.feed import Feed, Step
from plumb.batching.microbatches import Packing
from plumb.data.examples import lengths_of
from plumb.data.order import Block
from plumb.data.prompts import NumberedPrompt
from plumb.data.token_text import continued, decode
from plumb.data.tokenization import Example, trees_of
from plumb.distributed import collectives
from plumb.rollouts.advantages import has_spread
from plumb.rollouts.answered import Answered
from plumb.rollouts.engine import Engine, Response, Samples
from plumb.rollouts.learning import Learn
from plumb.rollouts.ptx import Ptx
from plumb.rollouts.rewards import Measured, Rewards
from plumb.rollouts.rollout import Lessons, Rollout


@dataclass(frozen=True)
class Sampler:
    """Sample responses to prompts of the data and score them. Every rank must make each call; each
    samples its part, and all get everything.
    """

    examples: Sequence[Example]  # the data: a prompt each, and perhaps a response as target
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    ends: Sequence[int]  # the tokens that end a response
    bos: int | None  # the token that the data's prompts begin with
    n: int  # responses to a prompt
    seed: int
    rewards: Rewards
    policy: Any
    rank: int  # of n_ranks
    n_ranks: int

    def load(self) -> None:
        """Sample from the weights that the policy has now."""
        self.engine.load(self.policy)

    def rollout(self, indices: np.ndarray, number: int, learns: bool = True) -> Rollout:
        """Return the responses to these prompts [n], sampled from the weights loaded last, and
        their rewards. Draws depend on the seed and on `number`. `learns`: whether a running scale
        of the rewards takes these in. A UserError of one rank is raised on all.
        """
        prompts = [self._prompt(i) for i in indices.tolist()]
        # where there are fewer prompts than ranks, some repeat the first, since a model of rewards
        # is loaded by all ranks together
        mine = range(self.rank, len(prompts), self.n_ranks) or range(1)
        own = {i: prompts[i] for i in mine}
        parts: dict[int, _Part] = {}
        secs = 0.0
        for others, their_secs in collectives.on_every_rank(lambda: self._sampled(own, number)):
            parts |= others
            secs = max(secs, their_secs)
        ordered = [parts[i] for i in range(len(prompts))]
        samples = Samples([part.responses for part in ordered], secs)
        everything = [one for part in ordered for one in part.answered]
        of_terms = {
            k: np.concatenate([part.terms[k] for part in ordered]) for k in ordered[0].terms
        }
        return Rollout(
            number=number,
            prompts=indices,
            trees=[
                Example(prompt.ids, tuple(r.ids for r in part.responses), prompt.source)
                for prompt, part in zip(prompts, ordered, strict=True)
            ],
            samples=samples,
            answered=[part.answered for part in ordered],
            measured=self.rewards.combine(of_terms, everything, learns),
        )

    def _sampled(
        self, prompts: Mapping[int, NumberedPrompt], number: int
    ) -> tuple[dict[int, _Part], float]:
        """Return what this rank finds of its prompts, by their places, and the seconds that
        sampling took.
        """
        samples = self.engine.sample([*prompts.values()], self.n, (self.seed, number))
        answered = [
            self._answered(self.examples[prompt.number], group)
            for prompt, group in zip(prompts.values(), samples.responses, strict=True)
        ]
        terms = self.rewards.terms_of([one for group in answered for one in group])
        parts = {}
        for i, (place, group) in enumerate(zip(prompts, samples.responses, strict=True)):
            of_group = slice(i * self.n, (i + 1) * self.n)
            parts[place] = _Part(group, answered[i], {k: x[of_group] for k, x in terms.items()})
        return parts, samples.secs

    def _prompt(self, i: int) -> NumberedPrompt:
        example = self.examples[i]
        ids, _ = trees_of(example)[0]
        return NumberedPrompt(np.asarray(ids, np.int64), i, example.source)

    def _answered(self, example: Example, group: Sequence[Response]) -> list[Answered]:
        """Return the texts of the responses to a prompt."""
        prompt, of_data = trees_of(example)[0]
        ids = np.asarray(prompt).tolist()
        rows = [self._without_end(r.ids) for r in [*group]]
        targets = [self._without_end(of_data[0])] if of_data else []
        texts = continued(ids, [*rows, *targets], self.tokenizer, skip_special=True)
        (text,) = decode([ids[1:] if ids[:1] == [self.bos] else ids], self.tokenizer)
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


class _Part(NamedTuple):
    """Hold what one rank found of one prompt."""

    responses: list[Response]
    answered: list[Answered]
    terms: dict[str, np.ndarray]  # [k] each


class Follower(Protocol):
    """Learn from each step before the policy does."""

    def step(self, step: Step) -> Step:
        """Return what the policy gets of a step."""

    def tensors(self) -> dict[str, Tensor]:
        """Return what a run resumes from, by name."""

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        """Continue from those of a checkpoint that begin with "rollout."."""


class Position(NamedTuple):
    """Hold where the run stands when a step is asked for."""

    n_updates: int
    n_seen: int


@dataclass
class RolloutSource:
    """Turn indices of prompts into steps on the policy's own responses. A block of prompts is
    sampled at once, and its batches are made of what was sampled. Every rank must make each call.
    """

    sampler: Sampler
    learn: Learn
    packing: Packing
    rank: int  # among the packing.world_size that see different rows
    context: str | None  # the examples of the loss's batch context, as in Feed
    position: Callable[[], Position]
    block_at: Callable[[int], Block]  # from the number of training examples seen
    keep: Callable[[list[dict[str, Any]]], None]  # is given the rows of each rollout
    follower: Follower | None = None
    ptx: Ptx | None = None
    first: int = -1  # training examples before the present block; -1: there is none
    lessons: Lessons | None = None

    @property
    def examples(self) -> Sequence[Example]:
        """Return the data."""
        return self.sampler.examples

    def ahead(
        self, batches: Iterable[np.ndarray], device: torch.device, at_least: int = 1
    ) -> RolloutSteps:
        """Return the steps on these prompts. None is made before it is asked for."""
        return RolloutSteps(self.step(indices, at_least) for indices in batches)

    def step(self, indices: np.ndarray, at_least: int = 1) -> Step:
        """Return the step on these prompts, in `at_least` microbatches; without any, where nothing
        can be learned from the responses to them.
        """
        position = self.position()
        block = self.block_at(position.n_seen)
        counters: Mapping[str, float] = {}
        if self.lessons is None or self.first != block.first:
            start = time.perf_counter()
            self.sampler.load()
            rollout = self.sampler.rollout(block.indices, position.n_updates)
            self.keep(rows_of(rollout))
            self.lessons = self.learn(rollout)
            self.first = block.first
            secs = time.perf_counter() - start
            counters = {**counters_of(rollout), **self.lessons.counters, "rollout_train/secs": secs}
        places = self.lessons.of(indices)
        if not len(places):
            none = lengths_of([])
            return Step(indices=indices, lengths=none, microbatches=[], counters=counters)
        feed = Feed(self.lessons, self.packing, self.rank, context=self.context)
        step = replace(feed.step(places, at_least), indices=indices, counters=counters)
        if self.follower is not None:
            step = self.follower.step(step)
        if self.ptx is None or not step.microbatches:
            return step
        return replace(step, counters={**step.counters, **self.ptx.add(position.n_updates)})

    def tensors(self) -> dict[str, Tensor]:
        """Return what a run resumes from, by name: the scale of the rewards, and the present block
        until all its steps are made.
        """
        scale = self.sampler.rewards.scale
        state = {} if scale is None else {"rollout.scale": scale.tensor()}
        if self.follower is not None:
            state |= self.follower.tensors()
        if self.lessons is None or self.first != self.block_at(self.position().n_seen).first:
            return state
        state["rollout.first"] = torch.tensor([self.first])
        return state | {f"rollout.of.{k}": x for k, x in self.lessons.tensors().items()}

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        """Continue from the tensors of a checkpoint."""
        if (scale := self.sampler.rewards.scale) is not None and "rollout.scale" in stored:
            scale.restore(stored["rollout.scale"])
        if self.follower is not None:
            self.follower.restore(stored)
        if "rollout.first" in stored:
            self.first = int(stored["rollout.first"])
            kind = "rollout.of."
            of = {k.removeprefix(kind): x for k, x in stored.items() if k.startswith(kind)}
            self.lessons = Lessons.from_tensors(of, lambda i: self.examples[i].source)


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


def counters_of(rollout: Rollout) -> dict[str, float]:
    """Return what is logged of a rollout."""
    responses = [r for group in rollout.samples.responses for r in group]
    measured = rollout.measured
    final = rollout.rewards
    counters = {
        "rollout_train/reward": float(measured.raw.mean()),
        "rollout_train/reward_final": float(final.mean()),
        "rollout_train/reward_std": float(final.std()),
        "rollout_train/equal_rewards": 1 - float(has_spread(final).mean()),
        "rollout_train/length": rollout.samples.n_tokens / len(responses),
        "rollout_train/shortest": float(min(len(r.ids) for r in responses)),
        "rollout_train/longest": float(max(len(r.ids) for r in responses)),
        "rollout_train/eos": float(np.mean([r.ended == "eos" for r in responses])),
        "rollout_train/sampled_tokens_per_second": rollout.samples.tokens_per_sec,
        "rollout_train/sampling_secs": rollout.samples.secs,
    }
    return counters | _of_terms(measured, "rollout_train")


def _of_terms(measured: Measured, name: str) -> dict[str, float]:
    """Return the mean of each term of the reward, if there are several."""
    terms = measured.terms if len(measured.terms) > 1 else {}
    return {f"{name}/reward/{term}": float(values.mean()) for term, values in terms.items()}


def rows_of(rollout: Rollout) -> list[dict[str, Any]]:
    """Return a rollout as rows of a file of scored answers, which score.py split reads."""
    rewards = rollout.measured.raw.reshape(len(rollout.prompts), -1)
    return [
        {
            "prompt": answered[0].prompt,
            "answers": [one.response for one in answered],
            "scores": scores,
            "ended": [one.ended for one in answered],
            "source": answered[0].source,
            "updates": rollout.number,
        }
        for answered, scores in zip(rollout.answered, rewards.tolist(), strict=True)
    ]
