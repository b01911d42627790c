"""Build weighted sums of losses on the same batch. Shapes and units: contract.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from plumb.losses.bound import LabelWeights, Loss, Reads, Usual
from plumb.losses.contract import (
    BatchContext,
    Labelled,
    Lists,
    LossOutput,
    Mean,
    Metric,
    Pairs,
    summed,
)

# what all terms of a mixture must have in common, since they see the same responses
COMMON = {
    "group": "what an example holds",
    "average_over": "what its sum is divided by",
    "read": "which of a response's scores it reads",
    "prefixes": "what responses begin with",
    "advantages": "how rewards become advantages",
}


class Term(NamedTuple):
    """A weighted loss.

    Example: Term("dpo", 0.8, build_loss({"name": "dpo", ...})).
    """

    label: str  # its key in loss.terms
    weight: float
    loss: Loss


@dataclass(frozen=True)
class Mixture(Loss):
    """A weighted sum of losses; its batch context is {label: context} of the terms with one."""

    terms: tuple[Term, ...] = ()

    def values_of(self, knob: str) -> dict[str, Any]:
        """Return the values of a knob of the terms under their full names."""
        return {
            _of_term(term, name): value
            for term in self.terms
            for name, value in term.loss.values_of(knob).items()
        }

    def context_of(self, context: Any, examples: Any) -> Any:
        """Return the part of each term's context for these examples of a batch, [B] indices."""
        if context is None:
            return None
        return {
            term.label: term.loss.context_of(context[term.label], examples)
            for term in self.terms
            if term.label in context
        }


def build_mixture(config: Mapping[str, Any], build: Callable[[Mapping[str, Any]], Loss]) -> Mixture:
    """Bind the terms of `config`, {"name": ..., "terms": {label: {"name": loss, "weight": w, knob:
    value}}}, to their weighted sum. `build` binds the knobs of one.

    Raises ValueError, in one line, for a knob that a term's loss refuses, and for terms that cannot
    share a batch.
    """
    for knob in config:
        if knob not in ("name", "terms"):
            raise ValueError(
                f"loss.{knob}={config[knob]}: {config['name']} is a mixture of losses, whose only"
                " knob is terms; write loss.terms.<term>.<knob>"
            )
    if not isinstance(config["terms"], Mapping) or not config["terms"]:
        raise ValueError(f"loss.terms={config['terms']}: expected a mapping of at least one term")
    terms = [_term(label, knobs, build) for label, knobs in config["terms"].items()]
    first = terms[0]
    for term in terms[1:]:
        for field, meaning in COMMON.items():
            ours, theirs = getattr(first.loss, field), getattr(term.loss, field)
            if ours != theirs:
                raise ValueError(
                    f"loss.terms.{term.label}: {meaning} is {theirs!r}, but {ours!r} for"
                    f" loss.terms.{first.label}; the terms of a mixture share their batch"
                )
    return Mixture(
        name=config["name"],
        group=first.loss.group,
        reads=_reads(terms),
        reference_by_token=any(term.loss.reference_by_token for term in terms),
        average_over=first.loss.average_over,
        read=first.loss.read,
        prefixes=first.loss.prefixes,
        label_weights=_label_weights(terms),
        needs_reference=any(term.loss.needs_reference for term in terms),
        needs_margins=any(term.loss.needs_margins for term in terms),
        soft_labels=all(term.loss.soft_labels for term in terms),
        context=_context(terms),
        usual=_usual(terms),
        advantages=first.loss.advantages,
        knobs={},
        rewards=next((t.loss.rewards for t in terms if t.loss.rewards), ""),
        compute=_sum_of(terms),
        terms=tuple(terms),
    )


def _label_weights(terms: Sequence[Term]) -> tuple[LabelWeights, ...]:
    """Return the label weights of all terms under their full names."""
    weights = []
    for term in terms:
        for (undesirable, desirable), values in term.loss.label_weights:
            names = (_of_term(term, undesirable), _of_term(term, desirable))
            weights.append(LabelWeights(names, values))
    return tuple(weights)


def _of_term(term: Term, name: str) -> str:
    """Return the full name of a term's knob: loss.beta is loss.terms.LABEL.beta."""
    return f"loss.terms.{term.label}.{name.removeprefix('loss.')}"


def _term(label: str, knobs: Any, build: Callable[[Mapping[str, Any]], Loss]) -> Term:
    """Return a term with its knobs bound. An error names loss.terms.<label>.<knob>."""
    where = f"loss.terms.{label}"
    if not re.fullmatch(r"\w+", str(label)):
        raise ValueError(f"{where}: a term's name may have letters, digits and _ only")
    if not isinstance(knobs, Mapping) or "name" not in knobs:
        raise ValueError(f"{where}={knobs}: expected a loss's knobs, name and weight")
    own = dict(knobs)
    weight = own.pop("weight", None)
    if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not weight > 0:
        raise ValueError(f"{where}.weight={weight}: expected a number above 0, or no such term")
    try:
        return Term(label, weight, build(own))
    except ValueError as error:
        raise ValueError(re.sub(r"\bloss\.", f"{where}.", str(error))) from None


def _reads(terms: Sequence[Term]) -> Reads:
    """Return what a mixture reads from the model. The sums over responses that some terms read can
    be derived from what others read; raise ValueError for two terms where neither can.
    """
    most = terms[0]
    for term in terms[1:]:
        ours, theirs = most.loss.reads, term.loss.reads
        if ours != theirs and ("scores" in (ours, theirs) or "logps" not in (ours, theirs)):
            raise ValueError(
                f"loss.terms.{term.label}: what it reads from the model is {theirs!r}, but {ours!r}"
                f" for loss.terms.{most.label}; the terms of a mixture share their batch"
            )
        if ours == "logps":
            most = term
    return most.loss.reads


def _view(example: Any, reads: Reads) -> Any:
    """Return the part of a mixture's example that a term reads."""
    if reads != "logps":
        return example
    if isinstance(example, Pairs):
        return example._replace(chosen=summed(example.chosen), rejected=summed(example.rejected))
    if isinstance(example, Labelled):
        return example._replace(responses=summed(example.responses))
    return example if isinstance(example, Lists) else summed(example)


def _usual(terms: Sequence[Term]) -> Usual:
    """Return where the terms' knobs usually lie, by their names in the mixture, and the learning
    rates that are usual for all of them.
    """
    usual = {
        f"terms.{term.label}.{knob}": where
        for term in terms
        for knob, where in term.loss.usual.items()
        if knob != "lr"
    }
    rates = [term.loss.usual["lr"] for term in terms if "lr" in term.loss.usual]
    least, largest = max((r[0] for r in rates), default=1), min((r[1] for r in rates), default=0)
    return {**usual, "lr": (least, largest)} if least <= largest else usual


def _context(terms: Sequence[Term]) -> BatchContext | None:
    """Return the batch context of which each term gets its own part, by its label."""
    declared = {
        term.label: (term.loss, term.loss.context)
        for term in terms
        if term.loss.context is not None
    }
    if not declared:
        return None
    kinds = {context.examples for _, context in declared.values() if context}
    if len(kinds) > 1:
        raise ValueError(
            f"loss.terms={', '.join(declared)}: they compare different examples of the batch"
            f" ({', '.join(sorted(kinds))}); train on one of them at a time"
        )

    def compute(policy: Any, reference: Any) -> Any:
        return {
            label: context.compute(policy, reference if loss.needs_reference else None)
            for label, (loss, context) in declared.items()
            if context
        }

    return BatchContext(kinds.pop(), compute)


def _sum_of(terms: Sequence[Term]) -> Any:
    """Return the function (policy, reference, context) -> the weighted sum. Each term's loss is
    logged as terms/<label>, without its weight. Rewards are those of the first term that has some.
    A metric is logged under its own name, or below the label if an earlier term has the name.
    """

    def compute(policy: Any, reference: Any = None, context: Any = None) -> LossOutput:
        metrics: dict[str, Metric] = {}
        outputs = []
        for term in terms:
            own = None
            if term.loss.needs_reference:
                own = _view(reference, term.loss.reads_of_reference)
            own_context = (context or {}).get(term.label)
            output = term.loss.compute(_view(policy, term.loss.reads), own, own_context)
            outputs.append(output)
            metrics[f"terms/{term.label}"] = Mean(output.losses.detach())
            for name, metric in output.metrics.items():
                exists = name in metrics
                metrics[f"{term.label}/{name.replace('/', '_')}" if exists else name] = metric
        rewarded = next((x for x in outputs if _has_rewards(x)), outputs[0])
        weighted = [
            term.weight * output.losses for term, output in zip(terms, outputs, strict=True)
        ]
        return LossOutput(
            losses=torch.stack(weighted).sum(0),
            chosen_rewards=rewarded.chosen_rewards,
            rejected_rewards=rewarded.rejected_rewards,
            metrics=metrics,
            rewards=rewarded.rewards,
        )

    return compute


def _has_rewards(output: LossOutput) -> bool:
    return output.chosen_rewards is not None or output.rewards is not None
