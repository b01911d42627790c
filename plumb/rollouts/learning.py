"""Turn a rollout into what steps are made of: advantages of its responses, or preferences among
them.

Shapes: n prompts, k responses to each; m trees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np

from plumb.data.extras import Extras
from plumb.data.tokenization import Example
from plumb.errors import UserError
from plumb.losses.advantage_rules import AdvantageRule
from plumb.rollouts.advantages import advantages, has_spread
from plumb.rollouts.rollout import Lessons, Rollout, column_of
from plumb.rollouts.token_reader import ReadTokens, TokenReader

Learn = Callable[[Rollout], Lessons]
PairRule = Literal["best-worst", "margin", "bradley-terry"]


class TokenLogps(NamedTuple):
    """Hold the log-probabilities of a rollout's tokens.

    Example: of one response of two tokens, without a reference: TokenLogps(old=[[-1.2, -0.3]],
    reference=None, counters={"rollout_train/logps_difference": 1e-7}).
    """

    old: list[np.ndarray]  # [n] of each tree's tokens, under the policy that sampled them
    reference: list[np.ndarray] | None
    counters: dict[str, float]

    def columns(self) -> dict[str, np.ndarray]:
        """Return what a loss on samples reads of them, as columns of [n] arrays."""
        columns = {"old_logps": column_of(self.old)}
        if self.reference is not None:
            columns["reference"] = column_of(self.reference)
        return columns


@dataclass(frozen=True)
class SampledLogps:
    """Read the log-probabilities of a rollout's tokens by the training path, at the temperature of
    sampling.
    """

    read: TokenReader
    policy: ReadTokens
    reference: ReadTokens | None  # None: the loss needs no reference
    # nats per token: how far the sampler's log-probabilities may be from the trainer's on average
    tolerance: float

    def __call__(self, rollout: Rollout) -> TokenLogps:
        """Return them. Raise UserError where the sampler's are other ones."""
        trees = rollout.trees
        old = self.read(trees, self.policy)
        counters = {"rollout_train/logps_difference": self._difference(rollout, old)}
        reference = None if self.reference is None else self.read(trees, self.reference)
        return TokenLogps(old, reference, counters)

    def _difference(self, rollout: Rollout, old: list[np.ndarray]) -> float:
        """Return the mean distance per token of the sampler's log-probabilities from those of the
        training path. Raise UserError where it is too large for rounding.
        """
        theirs = np.concatenate([r.logps for group in rollout.samples.responses for r in group])
        difference = float(np.abs(theirs - np.concatenate(old)).mean())
        if difference <= self.tolerance:
            return difference
        raise UserError(
            f"rollout: the sampler's log-probabilities are {difference:.2g} nats per token away"
            f" from the trainer's (rollout.tolerance={self.tolerance:g}): the samples are not the"
            " policy's own; this model cannot be trained on them"
        )


@dataclass(frozen=True)
class ByAdvantage:
    """Give each response its advantage, and each of its tokens the log-probabilities under the
    policy that sampled it and under the reference.
    """

    rule: AdvantageRule
    logps: SampledLogps

    def __call__(self, rollout: Rollout) -> Lessons:
        """Return one tree for each prompt, less those that the rule drops. The extras are
        old_logps, and reference where there is one, by token, and advantages by response.
        """
        trees = rollout.trees
        logps = self.logps(rollout)
        kl = None
        if logps.reference is not None:
            kl = _sums(logps.old, trees) - _sums(logps.reference, trees)
        of_rollout = advantages(rollout.rewards, self.rule, kl)
        kept = of_rollout.groups
        return Lessons(
            prompts=rollout.prompts[kept],
            trees=[trees[i] for i in kept],
            columns=Extras(
                response={"advantages": of_rollout.values},
                token={name: column[kept] for name, column in logps.columns().items()},
            ),
            counters=logps.counters,
        )


@dataclass(frozen=True)
class ByPairs:
    """Make preference pairs of the responses to a prompt:

    - best-worst: the response of the highest reward and that of the lowest
    - margin: any two whose rewards differ by `margin` or more
    - bradley-terry: the first and the second response, the third and the fourth, and so on; the
      first of two is preferred with probability sigmoid(its reward - the other's), drawn from
      (seed, the rollout's number, the prompt)
    """

    rule: PairRule
    margin: float
    seed: int

    def __call__(self, rollout: Rollout) -> Lessons:
        """Return one tree for each pair, the chosen response first. Equal responses form none.
        The extras are margins by example: the rewards' difference.
        """
        prompts, trees, margins = [], [], []
        for i, (prompt, tree) in enumerate(zip(rollout.prompts, rollout.trees, strict=True)):
            rewards = rollout.rewards[i]
            for better, worse in self._pairs(rewards, (self.seed, rollout.number, int(prompt))):
                chosen, rejected = tree.responses[better], tree.responses[worse]
                if not np.array_equal(chosen, rejected):
                    prompts.append(prompt)
                    trees.append(tree._replace(responses=(chosen, rejected)))
                    margins.append(rewards[better] - rewards[worse])
        return Lessons(
            prompts=np.array(prompts, np.int64),
            trees=trees,
            columns=Extras(example={"margins": np.array(margins)}),
            counters={"rollout_train/pairs": len(trees)},
        )

    def _pairs(self, rewards: np.ndarray, key: tuple[int, ...]) -> Iterator[tuple[int, int]]:
        """Yield (better, worse) of the responses with these rewards [k]."""
        if self.rule == "best-worst":
            if has_spread(rewards[None])[0]:
                yield int(rewards.argmax()), int(rewards.argmin())
        elif self.rule == "margin":
            for i, j in combinations(range(len(rewards)), 2):
                better, worse = (i, j) if rewards[i] > rewards[j] else (j, i)
                difference = rewards[better] - rewards[worse]
                if difference > 0 and difference >= self.margin:
                    yield better, worse
        else:
            draws = np.random.default_rng(key).random(len(rewards) // 2)
            for i, draw in zip(range(0, len(rewards) - 1, 2), draws, strict=True):
                first = draw < 1 / (1 + np.exp(rewards[i + 1] - rewards[i]))
                yield (i, i + 1) if first else (i + 1, i)


def by_lists(rollout: Rollout) -> Lessons:
    """Return one tree for each prompt, its responses from best to worst; a prompt whose rewards are
    all equal has none. The extras are levels by response: 0 for the best, the same number for equal
    rewards.
    """
    (kept,) = has_spread(rollout.rewards).nonzero()
    trees, levels = [], []
    for i in kept:
        rewards = rollout.rewards[i]
        order = np.argsort(-rewards, kind="stable")
        tree = rollout.trees[i]
        trees.append(tree._replace(responses=tuple(tree.responses[j] for j in order)))
        levels.append(np.unique(-rewards[order], return_inverse=True)[1].astype(float))
    return Lessons(
        prompts=rollout.prompts[kept],
        trees=trees,
        columns=Extras(response={"levels": np.array(levels)} if trees else {}),
        counters={"rollout_train/lists": len(trees)},
    )


def _sums(values: list[np.ndarray], trees: list[Example]) -> np.ndarray:
    """Return the sums of token values over each response.  [n, k]"""
    return np.array(
        [
            [part.sum() for part in np.split(own, np.cumsum([*map(len, tree.responses)])[:-1])]
            for own, tree in zip(values, trees, strict=True)
        ]
    )
