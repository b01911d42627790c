"""Rewards of the policy's own responses: rules, a plugin's functions, and models, weighed, bounded
and less penalties. A model gets text, which its own tokenizer encodes.

Shapes: R responses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from plumb.data.rows import Row
from plumb.errors import UserError
from plumb.models.find import ModelRef, find_model
from plumb.rollouts import reward_rules
from plumb.rollouts.answered import Answered, Reward
from plumb.scoring.scorers import Scorer, knobs_of, load_scorer

OfOne = Callable[[Answered], float]
REWARDS: dict[str, OfOne] = {}
KINDS = ("rule", "function", "model")
SHOWN = 60  # characters of a text in a message


def reward(function: OfOne) -> OfOne:
    """Register a function of one response under its name: the decorator of plugins.

    Example: `@reward` above `def brief(answered: Answered) -> float: return -answered.n_tokens`.
    """
    REWARDS[function.__name__] = function
    return function


class Term(NamedTuple):
    """A weighted reward.

    Example: Term("brief", 0.1, by_one("brief", lambda answered: -answered.n_tokens)).
    """

    name: str  # its key in reward.terms
    weight: float
    reward: Reward


class Overlong(NamedTuple):
    """Take `penalty` off a response of `most` tokens, nothing up to `free` tokens, and linearly
    more between: the soft overlong punishment of DAPO, Eq. 13 of arXiv:2503.14476.

    >>> Overlong(free=10, most=20, penalty=1.0).of(np.array([5, 15, 20, 30]))
    array([0. , 0.5, 1. , 1. ])
    """

    free: int
    most: int
    penalty: float

    def of(self, n_tokens: np.ndarray) -> np.ndarray:
        """Return what is taken off.  [R]"""
        return self.penalty * ((n_tokens - self.free) / (self.most - self.free)).clip(0, 1)


@dataclass
class RunningScale:
    """Make rewards of mean 0 and deviation 1 over all that were seen so far, these included. A
    checkpoint keeps the state.

    >>> RunningScale()(np.array([1.0, 3.0])).round(3)
    array([-1.,  1.])
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of the squared distances from the mean

    def __call__(self, rewards: np.ndarray) -> np.ndarray:
        """Return the rewards, rescaled.  [R]"""
        if len(rewards):
            # Chan, Golub, LeVeque (1979): squares add up, and the distance of the parts' means
            count = self.count + len(rewards)
            apart = float(rewards.mean()) - self.mean
            self.squares += float(((rewards - rewards.mean()) ** 2).sum())
            self.squares += apart**2 * self.count * len(rewards) / count
            self.mean += apart * len(rewards) / count
            self.count = count
        deviation = (self.squares / max(self.count, 1)) ** 0.5
        return (rewards - self.mean) / (deviation or 1.0)

    def tensor(self) -> Tensor:
        """Return the state, which `restore` takes.  [3] float64"""
        return torch.tensor([self.count, self.mean, self.squares], dtype=torch.float64)

    def restore(self, state: Tensor) -> None:
        """Continue from a state."""
        count, self.mean, self.squares = state.tolist()
        self.count = int(count)


class Measured(NamedTuple):
    """Hold the rewards of R responses, and what they were made of.

    Example: of one response that did not end: Measured(final=[0.5], raw=[1.5], terms={"score":
    [1.5]}).
    """

    final: np.ndarray  # [R] what is learned from
    raw: np.ndarray  # [R] the weighted sum of the terms
    terms: dict[str, np.ndarray]  # [R] each, without its weight


@dataclass(frozen=True)
class Rewards:
    """The weighted sum of terms; rescaled, kept within +-clip, and then less the penalties."""

    terms: Sequence[Term]
    # in place of the sum of a response that did not end by itself; None: the sum counts
    without_eos: float | None = None
    scale: RunningScale | None = None
    clip: float | None = None
    missing_eos: float = 0.0  # taken off a response that did not end by itself
    overlong: Overlong | None = None

    def __call__(self, answered: Sequence[Answered]) -> Measured:
        """Return the rewards and what they are made of; see `terms_of` and `combine`."""
        return self.combine(self.terms_of(answered), answered)

    def terms_of(self, answered: Sequence[Answered]) -> dict[str, np.ndarray]:
        """Return the values of each term, [R]. Raise UserError, in one line that names the reward,
        the prompt and the response, for a reward that is no finite number or cannot be computed.
        """
        return {term.name: _finite(term, answered) for term in self.terms}

    def combine(
        self, terms: dict[str, np.ndarray], answered: Sequence[Answered], learns: bool = True
    ) -> Measured:
        """Return the rewards that the terms [R] make, and what they are made of. `learns`: whether
        the running scale takes these in.
        """
        raw = np.zeros(len(answered))
        for term in self.terms:
            raw = raw + term.weight * terms[term.name]
        open_end = np.array([x.ended != "eos" for x in answered], bool)
        final = raw if self.without_eos is None else np.where(open_end, self.without_eos, raw)
        if self.scale is not None:
            final = (self.scale if learns else replace(self.scale))(final)
        if self.clip is not None:
            final = final.clip(-self.clip, self.clip)
        final = final - self.missing_eos * open_end
        if self.overlong is not None:
            final = final - self.overlong.of(np.array([x.n_tokens for x in answered]))
        return Measured(final, raw, terms)


def build_rewards(
    config: Mapping[str, Any], device: str | None = None, find: bool = True
) -> Rewards:
    """Return the rewards of {"terms": {name: {"weight": w, and "rule", "function" or "model"}},
    "without_eos": s or None, "scale": "running" or None, "clip": c or None, "missing_eos": p,
    "overlong": {"free": n, "most": m, "penalty": p} or None}. A model may be given "reference" and
    "beta", for its implicit reward. A model is found here, or with find=False where it is needed,
    and loaded onto `device` then.

    Raises UserError, in one line, for a knob that is unknown, missing or out of range.
    """
    known = ("terms", "without_eos", "scale", "clip", "missing_eos", "overlong")
    _only("reward.", config, known)
    terms = config.get("terms") or {}
    if not terms:
        raise UserError(
            "reward.terms: no reward is given; add one, such as {short: {rule: shorter}}"
        )
    scale, clip = config.get("scale"), config.get("clip")
    missing_eos = config.get("missing_eos", 0.0)
    if scale not in (None, "running"):
        raise UserError(f"reward.scale={scale}: expected running or null")
    if clip is not None and not clip > 0:
        raise UserError(f"reward.clip={clip}: must be above 0, or null for no bound")
    if not missing_eos >= 0:
        raise UserError(f"reward.missing_eos={missing_eos}: is taken off; must not be negative")
    without_eos = config.get("without_eos")
    if without_eos is not None and missing_eos:
        raise UserError(
            f"reward.without_eos={without_eos}: takes the place of the score of a response that"
            f" does not end, from which reward.missing_eos={missing_eos} would take more; give one"
            " of them"
        )
    return Rewards(
        without_eos=without_eos,
        terms=[_term(name, spec, device, find) for name, spec in terms.items()],
        scale=RunningScale() if scale == "running" else None,
        clip=clip,
        missing_eos=missing_eos,
        overlong=_overlong(config.get("overlong")),
    )


def reward_model_of(reward: Mapping[str, Any]) -> str:
    """Return the reward model among the terms of `reward`. Raise UserError unless there is one.

    >>> reward_model_of({"terms": {"a": {"rule": "shorter"}, "b": {"model": "runs/rm"}}})
    'runs/rm'
    """
    terms = (reward.get("terms") or {}).values()
    models = [
        str(term["model"])
        for term in terms
        if term.get("model") is not None and term.get("beta") is None
    ]
    if len(models) != 1:
        raise UserError(
            f"loss.critic=reward: begins as the reward model, and reward.terms has"
            f" {len(models) or 'none'}; set loss.critic=policy"
        )
    return models[0]


def by_one(name: str, function: OfOne) -> Reward:
    """Return the rewards of a function of one response. Where it raises, so does UserError."""

    def rewards(answered: Sequence[Answered]) -> np.ndarray:
        values = np.empty(len(answered))
        for i, one in enumerate(answered):
            try:
                values[i] = float(function(one))
            except Exception as error:  # whatever a plugin's function raises
                message = str(error).partition("\n")[0]
                raise UserError(
                    f"reward {name}: {type(error).__name__}: {message}, for {described(one)}; fix"
                    " the function"
                ) from None
        return values

    return rewards


def by_scorer(load: Callable[[], Scorer]) -> Reward:
    """Return the scores of a model: of a reward model, a classifier, or an implicit reward. It is
    loaded for the first responses.
    """
    load = cache(load)

    def rewards(answered: Sequence[Answered]) -> np.ndarray:
        if not answered:
            return np.empty(0)
        rows = [
            Row(
                prompt=one.prompt,
                responses=[one.response],
                pairs=[],
                sft_target=one.response,
                source=described(one),
            )
            for one in answered
        ]
        return load().score(rows, "keep_end").scores[:, 0]

    return rewards


def described(answered: Answered) -> str:
    """Return a response and its prompt in a few words, for messages.

    >>> described(Answered("2 + 2 =", " 5", "4", 2, "eos", "sums.jsonl:1"))
    "the response ' 5' to '2 + 2 =' (sums.jsonl:1)"
    """
    return (
        f"the response {_short(answered.response)} to {_short(answered.prompt)} ({answered.source})"
    )


def _short(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f"{text[: SHOWN // 2]}...{text[-SHOWN // 2 :]}")


def _finite(term: Term, answered: Sequence[Answered]) -> np.ndarray:
    values = np.asarray(term.reward(answered), np.float64)
    if values.shape != (len(answered),):
        raise UserError(
            f"reward {term.name}: {len(answered)} responses have rewards of shape {values.shape};"
            " give one number for each"
        )
    bad = ~np.isfinite(values)
    if bad.any():
        first = int(bad.argmax())
        raise UserError(
            f"reward {term.name}: gives {values[first]} for {described(answered[first])}; it must"
            " be a finite number"
        )
    return values


def _term(name: str, spec: Any, device: str | None, find: bool) -> Term:
    where = f"reward.terms.{name}"
    if not isinstance(spec, Mapping):
        raise UserError(f"{where}={spec}: expected one of {', '.join(KINDS)}, and a weight")
    _only(f"{where}.", spec, (*KINDS, "weight", "reference", "beta"))
    kinds = [kind for kind in KINDS if spec.get(kind) is not None]
    if len(kinds) != 1:
        raise UserError(f"{where}: give one of {', '.join(KINDS)}; it has {kinds or 'none'}")
    (kind,) = kinds
    weight = spec.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not np.isfinite(weight):
        raise UserError(f"{where}.weight={weight}: expected a number")
    for option in ("reference", "beta"):
        if kind != "model" and spec.get(option) is not None:
            raise UserError(f"{where}.{option}={spec[option]}: is for a model; leave it out")
    value = spec[kind]
    if not isinstance(value, str):
        raise UserError(f"{where}.{kind}={value}: expected text, such as {{rule: shorter}}")
    if kind == "rule":
        return Term(name, weight, by_one(name, reward_rules.rule(value, f"{where}.rule")))
    if kind == "function":
        if value not in REWARDS:
            raise UserError(
                f"{where}.function={value}: no plugin registers it; known:"
                f" {', '.join(sorted(REWARDS)) or 'none'}; write @reward above it, and name its"
                " file in plugins=[...]"
            )
        return Term(name, weight, by_one(name, REWARDS[value]))
    return Term(name, weight, by_scorer(_loading(spec, where, device, find)))


def _loading(
    spec: Mapping[str, Any], where: str, device: str | None, find: bool
) -> Callable[[], Scorer]:
    """Return the function that loads a model. Raise UserError, here or there, if it cannot be."""

    @contextmanager
    def named() -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise type(error)(f"{where}.model: {error}") from None

    @cache
    def found() -> ModelRef:
        with named():
            return find_model(str(spec["model"]))

    if find:
        found()

    def load() -> Scorer:
        ref = found()
        with named():
            options = spec.get("reference"), spec.get("beta")
            return load_scorer(ref, knobs_of(ref, {}), *options, device=device)

    return load


def _overlong(spec: Mapping[str, Any] | None) -> Overlong | None:
    if spec is None:
        return None
    _only("reward.overlong.", spec, Overlong._fields)
    missing = [name for name in Overlong._fields if spec.get(name) is None]
    if missing:
        raise UserError(f"reward.overlong.{missing[0]}: expected a number; or overlong: null")
    overlong = Overlong(**spec)
    if not 0 <= overlong.free < overlong.most:
        raise UserError(
            f"reward.overlong.free={overlong.free}: must be below most ({overlong.most}), and not"
            " negative"
        )
    if not overlong.penalty > 0:
        raise UserError(f"reward.overlong.penalty={overlong.penalty}: must be above 0")
    return overlong


def _only(where: str, spec: Mapping[str, Any], known: Sequence[str]) -> None:
    for knob in spec:
        if knob not in known:
            raise UserError(f"{where}{knob}={spec[knob]}: no such knob; known: {', '.join(known)}")
