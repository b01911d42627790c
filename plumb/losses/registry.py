"""Register losses with `@loss`, and bind them to the knobs of config/loss, none of which may be
missing, unknown or ignored.

A new loss is one decorated function in this package (or in a file named by `plugins=[...]`) and one
YAML in config/loss with its knobs. docs/list_losses.py generates its section of docs/losses.md from
both. The docstring's first paragraph is the loss of one example, then ": " and the source with its
equation. Further paragraphs say what the knobs do, and the last begins with "Rewards".
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

from plumb.losses import inputs
from plumb.losses.advantage_rules import GaeRule, Rule, by_group
from plumb.losses.bound import (
    BALANCED,
    AverageOver,
    LabelWeights,
    Loss,
    Read,
    Reads,
    Usual,
)
from plumb.losses.contract import (
    BatchContext,
    Group,
    Largest,
    LogpsAndKL,
    LogpsAndSquares,
    LossOutput,
    Mean,
    ScoredPairs,
    Scores,
    Spread,
    TokenLogps,
)
from plumb.losses.mixture import build_mixture

V = TypeVar("V")


@dataclass(frozen=True)
class Declaration:
    """A loss as declared; settings that are functions are called with the loss's knobs."""

    function: Callable[..., LossOutput]
    group: Group
    needs_reference: bool | Callable[[Mapping[str, Any]], bool]
    average_over: AverageOver | Callable[[Mapping[str, Any]], AverageOver]
    needs_margins: bool | Callable[[Mapping[str, Any]], bool]
    soft_labels: bool
    prefixes: Callable[[Mapping[str, Any]], tuple[str, str]] | None
    label_weights: tuple[str, str] | None
    read: Read | Callable[[Mapping[str, Any]], Read]
    context: BatchContext | None
    usual: Usual | Callable[[Mapping[str, Any]], Usual]

    def keywords(self) -> dict[str, Any]:
        """Return the types of the function's keywords, None for one without an annotation."""
        hints = get_type_hints(self.function)
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: hints.get(p.name) for p in parameters if p.kind is p.KEYWORD_ONLY}

    def knobs(self) -> dict[str, Any]:
        """Return the types of the knobs. A keyword that is a GaeRule stands for its fields."""
        types: dict[str, Any] = {}
        for keyword, hint in self.keywords().items():
            types |= _fields(GaeRule) if hint is GaeRule else {keyword: hint}
        return types

    def arguments(self, knobs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the function's keyword arguments for these knobs."""
        return {
            keyword: GaeRule(**{field.name: knobs[field.name] for field in fields(GaeRule)})
            if hint is GaeRule
            else knobs[keyword]
            for keyword, hint in self.keywords().items()
        }

    def advantages(self, knobs: Mapping[str, Any]) -> Rule | None:
        """Return how rewards become advantages, None for a loss that has no samples. Raise
        ValueError for a knob that is missing for it.
        """
        if self.group != "rollout":
            return None
        rules = [x for x in self.arguments(knobs).values() if isinstance(x, GaeRule)]
        return rules[0] if rules else by_group(knobs)

    def bind(self, knobs: Mapping[str, Any]) -> Callable[..., LossOutput]:
        """Return (policy, reference, context) -> LossOutput with these knobs."""
        arguments = self.arguments(knobs)

        def compute(policy: Any, reference: Any = None, context: Any = None) -> LossOutput:
            of_batch = () if self.context is None else (context,)
            return self.function(policy, reference, *of_batch, **arguments)

        return compute


LOSSES: dict[str, Declaration] = {}
OLD_SPELLING = {"pairs": "pair", "responses": "single"}


def loss(
    *,
    group: Group | None = None,
    needs_reference: bool | Callable[[Mapping[str, Any]], bool] = False,
    average_over: AverageOver | Callable[[Mapping[str, Any]], AverageOver] = "examples",
    needs_margins: bool | Callable[[Mapping[str, Any]], bool] = False,
    soft_labels: bool = False,
    prefixes: Callable[[Mapping[str, Any]], tuple[str, str]] | None = None,
    label_weights: tuple[str, str] | None = None,
    read: Read | Callable[[Mapping[str, Any]], Read] = "last",
    context: BatchContext | None = None,
    usual: Usual | Callable[[Mapping[str, Any]], Usual] | None = None,
    data: str | None = None,
) -> Callable[[Callable[..., LossOutput]], Callable[..., LossOutput]]:
    """Register a function under its name. A setting that depends on the loss's knobs is a function
    of them: `needs_reference=lambda knobs: not knobs["reference_free"]`. `usual` gives the usual
    range of the knobs and the learning rate; a run far outside prints a note at its start.
    `label_weights` names the knobs that weigh undesirable and desirable responses, of which one may
    be BALANCED: the run counts its data, and the loss gets a number.

    Raises ValueError, in one line, for a group that does not exist, and for the spelling `data`,
    which `group` replaced.
    """
    if data is not None:
        raise ValueError(
            f'@loss(data="{data}"): write group="{OLD_SPELLING.get(data, "pair")}" instead of data='
        )
    if group is None or group not in get_args(Group):
        raise ValueError(f"@loss(group={group!r}): write one of {', '.join(get_args(Group))}")

    def register(function: Callable[..., LossOutput]) -> Callable[..., LossOutput]:
        LOSSES[function.__name__] = Declaration(
            function=function,
            group=group,
            needs_reference=needs_reference,
            average_over=average_over,
            needs_margins=needs_margins,
            soft_labels=soft_labels,
            prefixes=prefixes,
            label_weights=label_weights,
            read=read,
            context=context,
            usual=usual or {},
        )
        return function

    return register


def build_loss(config: Mapping[str, Any]) -> Loss:
    """Bind the knobs of `config` ({"name": ..., knob: value}) to the loss of that name.

    Raises ValueError, in one line, for an unknown name and for a knob that is missing, extra,
    mistyped or out of range: a knob that would be ignored is an error. A config with `terms` is a
    mixture of losses, whatever its name.
    """
    if "terms" in config:
        return build_mixture(config, build_loss)
    knobs = dict(config)
    name = knobs.pop("name")
    if name not in LOSSES:
        raise ValueError(f"loss.name={name}: no such loss; known: {', '.join(sorted(LOSSES))}")
    declared = LOSSES[name]
    hints = get_type_hints(declared.function)
    types = declared.knobs()
    label_weights = _label_weights(declared, knobs)
    # a weight that is not known yet is tried as 1
    numbers = {knob: 1.0 for w in label_weights for knob in knobs if f"loss.{knob}" == w.balanced}
    configured, knobs = knobs, {**knobs, **numbers}
    _check_knobs(name, knobs, types)
    reads = _reads(hints.get("policy"))
    if declared.group == "list" and reads != "logps":
        raise ValueError(f"loss.name={name}: a loss on lists gets Lists of log-probabilities only")
    bound = Loss(
        name=name,
        group=declared.group,
        reads=reads,
        needs_reference=_resolved(declared.needs_reference, knobs),
        reference_by_token=_reads(hints.get("reference")) == "token_logps",
        average_over=_resolved(declared.average_over, knobs),
        needs_margins=_resolved(declared.needs_margins, knobs),
        soft_labels=declared.soft_labels,
        prefixes=declared.prefixes and declared.prefixes(knobs),
        label_weights=label_weights,
        read=_resolved(declared.read, knobs),
        context=declared.context,
        usual=_resolved(declared.usual, knobs),
        advantages=_advantages(declared, knobs),
        knobs=configured,
        rewards=_about_rewards(declared.function),
        compute=declared.bind(knobs),
    )
    _try_on_zeros(bound)
    return bound


def _fields(record: Any) -> dict[str, Any]:
    """Return the types of a dataclass's fields, by name."""
    hints = get_type_hints(record)
    return {field.name: hints[field.name] for field in fields(record)}


def _resolved(setting: V | Callable[[Mapping[str, Any]], V], knobs: Mapping[str, Any]) -> V:
    return setting(knobs) if callable(setting) else setting


def _advantages(declared: Declaration, knobs: Mapping[str, Any]) -> Rule | None:
    try:
        return declared.advantages(knobs)
    except ValueError as error:
        raise ValueError(f"loss.{error}") from None


def _label_weights(declared: Declaration, knobs: Mapping[str, Any]) -> tuple[LabelWeights, ...]:
    """Return the loss's label weights, () where it has none. Raise ValueError where both are
    BALANCED, or one is another word.
    """
    if declared.label_weights is None:
        return ()
    undesirable, desirable = declared.label_weights
    values = (knobs.get(undesirable, 1.0), knobs.get(desirable, 1.0))
    if values == (BALANCED, BALANCED):
        raise ValueError(
            f"loss.{undesirable}={BALANCED} and loss.{desirable}={BALANCED}: one of them follows"
            " from the other; give one as a number"
        )
    names = (f"loss.{undesirable}", f"loss.{desirable}")
    for name, value in zip(names, values, strict=True):
        if isinstance(value, str) and value != BALANCED:
            raise ValueError(f"{name}={value}: expected a number, or {BALANCED}")
    return (LabelWeights(names, values),)


def _reads(hint: Any) -> Reads:
    """Return what a loss reads of a model, by the type of its parameter.

    >>> from plumb.losses.contract import Logps, Pairs
    >>> _reads(Pairs[TokenLogps] | None), _reads(ScoredPairs), _reads(Logps)
    ('token_logps', 'scores', 'logps')
    """
    types = {hint, *get_args(hint), *(inner for one in get_args(hint) for inner in get_args(one))}
    if LogpsAndSquares in types:
        return "logps_and_squares"
    if LogpsAndKL in types:
        return "logps_and_kl"
    if TokenLogps in types:
        return "token_logps"
    return "scores" if types & {Scores, ScoredPairs} else "logps"


def _check_knobs(name: str, knobs: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    """Raise ValueError for a knob that the loss does not have, or has and is not given, or that is
    of another type.
    """
    for knob in knobs:
        if knob not in types:
            raise ValueError(
                f"loss.{knob}={knobs[knob]}: loss {name} has no such knob; it has:"
                f" {', '.join(types) or 'none'}"
            )
    for knob, hint in types.items():
        if knob not in knobs:
            raise ValueError(
                f"loss.{knob}: loss {name} needs it; add loss.{knob}=... or its line to"
                f" config/loss/{name}.yaml"
            )
        if hint is None:
            raise ValueError(
                f"loss.{knob}: loss {name} must annotate it with a type: {knob}: float"
            )
        if not _fits(knobs[knob], hint):
            raise ValueError(f"loss.{knob}={knobs[knob]}: expected {_say(hint)}")


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) in (UnionType, Union):
        return any(_fits(value, one) for one in get_args(hint))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint)


def _say(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (UnionType, Union):
        return " or ".join(_say(one) for one in get_args(hint))
    return {
        float: "a number",
        bool: "true or false",
        int: "a whole number",
        str: "a word",
        type(None): "null",
    }.get(hint, str(hint))


def _about_rewards(function: Callable[..., LossOutput]) -> str:
    """Return the paragraph of the loss's docstring that says what its rewards are, less "Rewards:";
    "" where there is none, or they are "none".
    """
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    about = next((" ".join(p.split()) for p in paragraphs if p.startswith("Rewards:")), "")
    return "" if about.startswith("Rewards: none") else about.removeprefix("Rewards: ")


def _try_on_zeros(bound: Loss) -> None:
    """Run the loss on one all-zero example, so that a value out of range is refused before any
    model is loaded.
    """
    zeros, ones = torch.zeros(1), torch.ones(1, dtype=torch.int64)
    policy = inputs.responses(bound.reads, zeros, ones)
    reference = inputs.responses(bound.reads_of_reference, zeros, ones)
    try:
        output = inputs.compute(
            bound, (policy, policy), (reference, reference) if bound.needs_reference else None
        )
    except ValueError as error:
        raise ValueError(f"loss.{error}") from None
    _check_metrics(bound.name, output)


def _check_metrics(name: str, output: LossOutput) -> None:
    """Raise ValueError for a metric that could not be logged."""
    for metric, value in output.metrics.items():
        if not isinstance(value, (Mean, Spread, Largest)):
            raise ValueError(
                f"loss.name={name}: its metric {metric!r} is a {type(value).__name__}; write"
                " Mean(values, counts)"
            )
        if not re.fullmatch(r"\w+(/\w+)?", metric):
            raise ValueError(
                f"loss.name={name}: its metric {metric!r} must have a name like 'kl' or 'kl/z0',"
                " which is logged as kl_train/z0 and kl_eval/z0"
            )
