"""Define a loss with its knobs bound, as the trainer uses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from plumb.losses.advantage_rules import Rule
from plumb.losses.contract import BatchContext, Group, LossOutput

AverageOver = Literal["examples", "tokens"]
Reads = Literal["logps", "logps_and_squares", "logps_and_kl", "token_logps", "scores"]
Read = Literal["last", "mean"]
Entropy = Literal["shown", "trained"]  # a metric, or part of the loss
# knob of the loss, or "lr" -> the least and the largest value that its authors or later work used
Usual = Mapping[str, tuple[float, float]]

# the value of one of two label weights with which both kinds of responses count the same in total
BALANCED = "balanced"


class LabelWeights(NamedTuple):
    """Hold the two weights that balance the numbers of undesirable and desirable responses:
    numbers above 0, or one of them BALANCED.

    Example: LabelWeights(("loss.undesirable_weight", "loss.desirable_weight"), (1.0, "balanced")).
    """

    names: tuple[str, str]  # of the knobs, in full; of undesirable responses first
    values: tuple[float | str, float | str]

    @property
    def balanced(self) -> str | None:
        """Return the name of the weight that is not a number yet."""
        return next((n for n, v in zip(*self, strict=True) if v == BALANCED), None)


@dataclass(frozen=True)
class Loss:
    """A loss with its knobs bound. The trainer asks it what it needs; there is no list of loss
    names in the code.
    """

    name: str
    group: Group  # what one example holds
    # log-probabilities by response or by token, or the scores of a model with a scalar head
    reads: Reads
    needs_reference: bool
    reference_by_token: bool  # also gets the reference's log-probabilities by token
    average_over: AverageOver  # the global count by which the summed losses are divided
    needs_margins: bool  # needs data whose responses have scores
    soft_labels: bool  # uses p_chosen; data with soft labels are refused by every other loss
    # of undesirable and desirable responses: the texts with which they are trained to begin
    prefixes: tuple[str, str] | None
    label_weights: tuple[LabelWeights, ...]  # of a mixture, those of all its terms
    read: Read  # which of a response's scores counts, if it reads scores
    context: BatchContext | None  # what it needs to know about the whole batch
    usual: Usual  # where its knobs and the learning rate usually lie
    advantages: Rule | None  # how rewards become advantages, if it learns from samples
    knobs: Mapping[str, Any]
    rewards: str  # what its rewards are, in a sentence; "" where it has none
    # (policy, reference, context) -> LossOutput; reference is None unless needs_reference, context
    # None unless declared
    compute: Callable[..., LossOutput]

    def values_of(self, knob: str) -> dict[str, Any]:
        """Return the value of a knob under its full name, {} where there is no such knob. A mixture
        has one for each term.
        """
        return {f"loss.{knob}": self.knobs[knob]} if knob in self.knobs else {}

    @property
    def reads_entropy(self) -> Entropy | None:
        """Return for what it reads the entropy of the distribution that each token is drawn from,
        if for anything. It is trained where the loss has a knob `entropy` above 0.
        """
        if self.group != "rollout":
            return None
        return "trained" if any(self.values_of("entropy").values()) else "shown"

    @property
    def context_examples(self) -> Literal["own", "mismatched"] | None:
        """Return the examples of the batch context, if there is one."""
        return None if self.context is None else self.context.examples

    @property
    def reads_of_reference(self) -> Reads:
        """Return what it reads of the reference, where it needs one."""
        return "token_logps" if self.reference_by_token else "logps"

    @property
    def live_reference(self) -> bool:
        """Return whether it needs more from the reference than the sum over each response, which is
        all that a cached one has.
        """
        by_token = self.reference_by_token or self.reads == "logps_and_kl"
        return self.needs_reference and by_token

    def context_of(self, context: torch.Tensor | None, examples: Any) -> torch.Tensor | None:
        """Return the part of a batch's context for these of its examples, [B] indices."""
        if context is None or self.context is None or not self.context.by_example:
            return context
        return context[torch.as_tensor(examples, device=context.device)]
