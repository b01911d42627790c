"""Explain what the numbers of a run mean, by its loss: derived from the loss's declaration, and
from its values for responses made for this purpose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from plumb.losses import inputs
from plumb.losses.bound import Loss
from plumb.runs.history import Run
from plumb.runs.loss_of_run import loss_of_run

ACCURACIES = {
    "pair": "the share of pairs whose chosen response has the larger reward; ties do not count",
    "list": "the share of lists whose best response has a larger reward than the worst",
}
COMPARED = {
    "pair": "the chosen response wins in {share} of the held-out pairs",
    "list": "the best response wins against the worst in {share} of the held-out lists",
    "labelled": "{share} of the held-out responses are on their side of the reference point",
}
TOKENS = 20  # of a response with which a loss is tried
FARTHEST = 1e6  # the most nats that a rejected response may lose


@dataclass(frozen=True)
class Family:
    """Answer what the rules of the diagnosis ask about a loss. `loss` is None if it is unknown, as
    for a plugin's.
    """

    loss: Loss | None

    def names(self, knob: str) -> list[str]:
        """Return the full names of a knob such as loss.beta, which a mixture has in its terms; []
        if the loss has no such knob.
        """
        return list(self.loss.values_of(knob.removeprefix("loss."))) if self.loss else []

    def compared(self, share: float) -> str:
        """Return what a reward accuracy means, in words."""
        group = self.loss.group if self.loss else "pair"
        return COMPARED.get(group, COMPARED["pair"]).format(share=f"{share:.0%}")

    def holds_near(self) -> bool:
        """Return whether a larger beta keeps the policy closer to a reference."""
        return self.loss is not None and self.loss.needs_reference and bool(self.names("loss.beta"))

    def summed(self) -> bool:
        """Return whether a longer response with the same gain per token has a larger reward."""
        gains = self._gains()
        return gains is not None and gains[1] > 1.001 * gains[0]

    def beta(self) -> float | None:
        """Return beta if rewards are beta log pi(y|x)/pi_ref(y|x) of the whole response, otherwise
        None.
        """
        gains = self._gains()
        if gains is None or self.loss is None or not self.loss.needs_reference:
            return None
        beta = gains[0] / (TOKENS / 2)  # half a nat for each token
        return beta if math.isclose(gains[1], beta * TOKENS, rel_tol=1e-6) else None

    def own_likelihood(self) -> bool:
        """Return whether rewards are the policy's own log-probabilities, without a reference."""
        loss = self.loss
        return (
            loss is not None
            and not loss.needs_reference
            and loss.reads != "scores"
            and self._gains() is not None
        )

    def pull(self, margin: float) -> float | None:
        """Return the norm of the gradient of a pair with this reward margin, relative to that of a
        pair with equal rewards; None if no pair has that margin.

        The responses have TOKENS tokens, and the rejected one becomes less likely.
        """
        if self.loss is None or self.loss.group not in ("pair", "list"):
            return None
        least, most = 0.0, FARTHEST
        if _at_distance(self.loss, most).margin < margin:
            return None
        while most - least > 1e-6 * most:
            middle = (least + most) / 2
            if _at_distance(self.loss, middle).margin < margin:
                least = middle
            else:
                most = middle
        start = _at_distance(self.loss, 0.0).gradient
        return _at_distance(self.loss, most).gradient / start if start else None

    def meanings(self) -> list[str]:
        """Return sentences on what rewards and accuracy mean, and on length."""
        if self.loss is None or not self.loss.rewards:
            return []
        sentences = [f"Rewards: {self.loss.rewards}"]
        if self.loss.group in ACCURACIES:
            sentences.append(f"Accuracy: {ACCURACIES[self.loss.group]}.")
        if self.own_likelihood() and self.summed():
            sentences.append(
                "There is no reference, and sums of log-probabilities favor short answers."
            )
        if self.summed():
            sentences.append("Rewards are sums over tokens, so a longer answer can gain more.")
        return sentences

    def _gains(self) -> tuple[float, float] | None:
        """Return how much the rewards of two responses, of TOKENS tokens and of twice as many, gain
        from half a nat per token; None if the loss gives log-probabilities no rewards.
        """
        loss = self.loss
        if loss is None or loss.reads == "scores":
            return None
        lengths = [torch.tensor([TOKENS]), torch.tensor([2 * TOKENS])]
        before = [-1.0 * n.double() for n in lengths]
        after = [sums / 2 for sums in before]
        rewards = [
            inputs.rewards(loss, *_inputs_of(loss, x, before, lengths)) for x in (before, after)
        ]
        if rewards[0] is None or rewards[1] is None:
            return None
        short, long = (float(b - a) for a, b in zip(rewards[0], rewards[1], strict=True))
        return short, long


class AtDistance(NamedTuple):
    """Hold the values of a loss for a pair whose rejected response lost some nats."""

    margin: float  # of rewards
    gradient: float  # the norm of the loss's gradient by both log-probabilities


def _at_distance(loss: Loss, nats: float) -> AtDistance:
    start = torch.tensor([0.0 if loss.reads == "scores" else -TOKENS], dtype=torch.float64)
    policy = [start.clone().requires_grad_(), (start - nats).requires_grad_()]
    lengths = [torch.tensor([TOKENS])] * 2
    output = inputs.compute(loss, *_inputs_of(loss, policy, [start, start], lengths))
    if output.chosen_rewards is None or output.rejected_rewards is None:
        return AtDistance(-math.inf, 0.0)
    gradients = torch.autograd.grad(output.losses.sum(), policy, materialize_grads=True)
    margin = float(output.chosen_rewards - output.rejected_rewards)
    return AtDistance(margin, math.hypot(*map(float, gradients)))


def _inputs_of(
    loss: Loss, policy: Sequence[Tensor], reference: Sequence[Tensor], lengths: Sequence[Tensor]
) -> tuple[inputs.Two, inputs.Two | None]:
    """Return two responses as the loss reads them from policy and reference, given their sums."""
    first, second = map(partial(inputs.responses, loss.reads), policy, lengths)
    if not loss.needs_reference:
        return (first, second), None
    read = partial(inputs.responses, loss.reads_of_reference)
    of_first, of_second = map(read, reference, lengths)
    return (first, second), (of_first, of_second)


def family_of(run: Run) -> Family:
    """Return the family of a run's loss."""
    try:
        return Family(loss_of_run(run.config))
    except (ValueError, TypeError, OmegaConfBaseException):
        return Family(None)
