"""Registered losses: `@loss`, and binding a loss to the knobs of config/loss, none of which may be
missing, unknown or ignored.

A new loss is one decorated function in this package (or in a file named by `plugins=[...]`) and one
YAML in config/loss with its knobs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch

from plumb.losses.contract import Logps, LossOutput, Pairs, ScoredPairs, Scores


class Loss(NamedTuple):
    """A loss with its knobs bound. The trainer asks it what it needs; nowhere in the code stands a
    list of loss names.
    """

    name: str
    # what one example holds: an SFT target, or a chosen and a rejected response
    data: Literal["responses", "pairs"]
    needs_reference: bool
    # the global count that the summed losses are divided by
    average_over: Literal["examples", "tokens"]
    # log-probabilities of a policy, or the scores of a model with a scalar head
    reads: Literal["logps", "scores"]
    needs_margins: bool  # of data whose responses have scores
    read: Literal["last", "mean"]  # which of a response's scores is its own, where it reads scores
    # (policy, reference) -> LossOutput; reference is None unless needs_reference
    compute: Callable[..., LossOutput]


class _Entry(NamedTuple):
    function: Callable[..., LossOutput]
    data: Literal["responses", "pairs"]
    needs_reference: Callable[[Mapping[str, Any]], bool]
    average_over: Callable[[Mapping[str, Any]], Literal["examples", "tokens"]]
    reads: Literal["logps", "scores"]
    needs_margins: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Any]], Literal["last", "mean"]]


LOSSES: dict[str, _Entry] = {}


def loss(
    data,
    needs_reference=lambda knobs: False,
    average_over=lambda knobs: "examples",
    reads="logps",
    needs_margins=lambda knobs: False,
    read=lambda knobs: "last",
):
    """Register a function under its name. What is given as a function may depend on the loss's
    knobs.
    """

    def register(function):
        LOSSES[function.__name__] = _Entry(
            function, data, needs_reference, average_over, reads, needs_margins, read
        )
        return function

    return register


def build_loss(config: Mapping[str, Any]) -> Loss:
    """Bind the knobs of `config` ({"name": ..., knob: value}) to the loss of that name.

    Raises ValueError, in one line, for an unknown name and for a knob that is missing, extra,
    mistyped or out of range: a knob that would be ignored is an error.
    """
    knobs = dict(config)
    name = knobs.pop("name")
    if name not in LOSSES:
        raise ValueError(f"loss.name={name}: no such loss; known: {', '.join(sorted(LOSSES))}")
    entry = LOSSES[name]
    expected = [
        k
        for k, p in inspect.signature(entry.function).parameters.items()
        if p.kind is p.KEYWORD_ONLY
    ]
    hints = get_type_hints(entry.function)
    for knob in knobs:
        if knob not in expected:
            raise ValueError(
                f"loss.{knob}={knobs[knob]}: loss {name} has no such knob; it has:"
                f" {', '.join(expected) or 'none'}"
            )
    for knob in expected:
        if knob not in knobs:
            raise ValueError(
                f"loss.{knob}: loss {name} needs it; add loss.{knob}=... or its line to"
                f" config/loss/{name}.yaml"
            )
        if knob not in hints:
            raise ValueError(
                f"loss.{knob}: loss {name} must annotate it with a type: {knob}: float"
            )
        if not _fits(knobs[knob], hints[knob]):
            raise ValueError(f"loss.{knob}={knobs[knob]}: expected {_say(hints[knob])}")
    bound = Loss(
        name,
        entry.data,
        entry.needs_reference(knobs),
        entry.average_over(knobs),
        entry.reads,
        entry.needs_margins(knobs),
        entry.read(knobs),
        lambda policy, reference=None: entry.function(policy, reference, **knobs),
    )
    _try_on_zeros(bound)
    return bound


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint)


def _say(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    return {float: "a number", bool: "true or false", int: "a whole number", str: "a word"}.get(
        hint, str(hint)
    )


def _try_on_zeros(bound: Loss) -> None:
    """Run the loss on one all-zero example, so that a value out of range is refused before any
    model is loaded.
    """
    zero: Any = Logps(torch.zeros(1), torch.ones(1))
    example: Any = zero if bound.data == "responses" else Pairs(zero, zero)
    if bound.reads == "scores":
        zero = Scores(torch.zeros(1), torch.zeros(1, 1), torch.ones(1, dtype=torch.int64))
        example = ScoredPairs(zero, zero, torch.zeros(1, dtype=torch.int64), torch.zeros(1))
    try:
        bound.compute(example, example if bound.needs_reference else None)
    except ValueError as error:
        raise ValueError(f"loss.{error}") from None
