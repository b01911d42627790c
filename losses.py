"""Losses as pure functions: log-probabilities or scores in, one loss per example out.

Shapes: B examples (pairs, or single responses for SFT). Units: nats. Every loss is a *sum* over what it scores; the trainer
divides by a global count known before the forward pass, so microbatches, ranks and padding cannot change the objective.

A new loss is one decorated function here (or in a file named by `plugins=[...]`) and one YAML in config/loss with its knobs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor


class Logps(NamedTuple):
    """Log-probabilities of B responses given their prompts."""

    sum: Tensor  # [B] sum over the response's tokens of log pi(y_t | x, y_<t), nats
    tokens: Tensor  # [B] how many tokens that was; mean = sum / tokens


class Pairs(NamedTuple):
    chosen: Logps
    rejected: Logps


class Scores(NamedTuple):
    """What a reward model gives B responses."""

    last: Tensor  # [B] the score at each response's last token
    each: Tensor  # [B, L] the scores at all of its tokens; behind its end, its last one again
    tokens: Tensor  # [B] how many tokens it has

    def of(self, read: str) -> Tensor:
        """The score of each response: at its last token, or with `read` "mean" the mean over its tokens.  [B]"""
        if read != "mean":
            return self.last
        n = self.tokens.clamp(min=1)[:, None]
        within = torch.arange(self.each.shape[1], device=self.each.device) < n
        return (self.each * within).sum(1) / n[:, 0]


class ScoredPairs(NamedTuple):
    chosen: Scores
    rejected: Scores
    shared: Tensor  # [B] tokens that both responses begin with
    margins: Tensor | None  # [B] by how much the data's own scores prefer chosen; None where there are none


class LossOutput(NamedTuple):
    losses: Tensor  # [B]
    chosen_rewards: Tensor | None = None  # [B] detached scores, or implicit rewards beta * log(pi / pi_ref); None: it has none
    rejected_rewards: Tensor | None = None  # [B]


class Loss(NamedTuple):
    """A loss with its knobs bound. The trainer asks it what it needs; nowhere in the code stands a list of loss names."""

    name: str
    data: Literal["responses", "pairs"]  # what one example holds: an SFT target, or a chosen and a rejected response
    needs_reference: bool
    average_over: Literal["examples", "tokens"]  # the global count that the summed losses are divided by
    reads: Literal["logps", "scores"]  # log-probabilities of a policy, or the scores of a model with a scalar head
    needs_margins: bool  # of data whose responses have scores
    read: Literal["last", "mean"]  # which of a response's scores is its own, where it reads scores
    compute: Callable[..., LossOutput]  # (policy, reference) -> LossOutput; reference is None unless needs_reference


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
    data, needs_reference=lambda knobs: False, average_over=lambda knobs: "examples", reads="logps",
    needs_margins=lambda knobs: False, read=lambda knobs: "last",
):  # fmt: skip
    """Register a function under its name. What is given as a function may depend on the loss's knobs."""

    def register(function):
        LOSSES[function.__name__] = _Entry(function, data, needs_reference, average_over, reads, needs_margins, read)
        return function

    return register


def build_loss(config: Mapping[str, Any]) -> Loss:
    """Bind the knobs of `config` ({"name": ..., knob: value}) to the loss of that name.

    Raises ValueError, in one line, for an unknown name and for a knob that is missing, extra, mistyped or out of range:
    a knob that would be ignored is an error.
    """
    knobs = dict(config)
    name = knobs.pop("name")
    if name not in LOSSES:
        raise ValueError(f"loss.name={name}: no such loss; known: {', '.join(sorted(LOSSES))}")
    entry = LOSSES[name]
    expected = [k for k, p in inspect.signature(entry.function).parameters.items() if p.kind is p.KEYWORD_ONLY]
    hints = get_type_hints(entry.function)
    for knob in knobs:
        if knob not in expected:
            raise ValueError(f"loss.{knob}={knobs[knob]}: loss {name} has no such knob; it has: {', '.join(expected) or 'none'}")
    for knob in expected:
        if knob not in knobs:
            raise ValueError(f"loss.{knob}: loss {name} needs it; add loss.{knob}=... or its line to config/loss/{name}.yaml")
        if knob not in hints:
            raise ValueError(f"loss.{knob}: loss {name} must annotate it with a type: {knob}: float")
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
    return {float: "a number", bool: "true or false", int: "a whole number", str: "a word"}.get(hint, str(hint))


def _try_on_zeros(bound: Loss) -> None:
    """Run the loss on one all-zero example, so that a value out of range is refused before any model is loaded."""
    zero: Any = Logps(torch.zeros(1), torch.ones(1))
    example: Any = zero if bound.data == "responses" else Pairs(zero, zero)
    if bound.reads == "scores":
        zero = Scores(torch.zeros(1), torch.zeros(1, 1), torch.ones(1, dtype=torch.int64))
        example = ScoredPairs(zero, zero, torch.zeros(1, dtype=torch.int64), torch.zeros(1))
    try:
        bound.compute(example, example if bound.needs_reference else None)
    except ValueError as error:
        raise ValueError(f"loss.{error}") from None


def _check(beta: float, label_smoothing: float, nll: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta={beta}: must be above 0 (0.1 to 0.5 is usual)")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}: the share of flipped labels must be in [0, 0.5)")
    if not nll >= 0:
        raise ValueError(f"nll={nll}: must not be negative; 0 leaves it out")


def _nll(response: Logps) -> Tensor:
    """Mean negative log-likelihood per token, [B]."""
    return -response.sum / response.tokens.clamp(min=1)


def _margin(policy: Pairs, reference: Pairs | None) -> Tensor:
    """h = log pi(y_w|x)/pi(y_l|x) - log pi_ref(y_w|x)/pi_ref(y_l|x), [B]. Without a reference, pi_ref is constant.

    The policy's ratio is formed first, as in 2023: large log-probabilities cancel before anything is squared.
    """
    h = policy.chosen.sum - policy.rejected.sum
    return h if reference is None else h - (reference.chosen.sum - reference.rejected.sum)


def _with_rewards(losses: Tensor, policy: Pairs, reference: Pairs | None, beta: float) -> LossOutput:
    """Add the implicit rewards beta * log pi(y|x)/pi_ref(y|x), detached."""
    chosen, rejected = policy.chosen.sum.detach(), policy.rejected.sum.detach()
    if reference is not None:
        chosen, rejected = chosen - reference.chosen.sum, rejected - reference.rejected.sum
    return LossOutput(losses, beta * chosen, beta * rejected)


# ----------------------------------------------------------------------------------------------------------- the losses


@loss(data="responses", average_over=lambda knobs: knobs["average_over"])
def sft(policy: Logps, reference: None = None, *, average_over: Literal["examples", "tokens"]) -> LossOutput:
    """-log pi(y | x), summed over the response's tokens.

    `average_over=examples` is the 2023 objective: the mean over examples of that sum, in which long responses weigh more.
    `tokens` divides by the response tokens of the whole batch instead: the usual token-mean cross-entropy.
    """
    return LossOutput(-policy.sum)


@loss(data="pairs", needs_reference=lambda knobs: not knobs["reference_free"])
def dpo(
    policy: Pairs, reference: Pairs | None, *, beta: float, label_smoothing: float, reference_free: bool, nll: float
) -> LossOutput:
    """-(1-e) log sigmoid(beta h) - e log sigmoid(-beta h) - a log pi(y_w | x) / |y_w|, h as in `_margin`.

    e = a = 0: Eq. 7 of arXiv:2305.18290. e > 0: conservative DPO, labels flipped with probability e
    (Eq. 3 of https://ericmitchell.ai/cdpo.pdf). a = `nll` > 0 keeps the chosen responses likely (Eq. 1 of arXiv:2404.19733).
    `reference_free` takes pi_ref as constant: no reference is loaded, and the rewards are beta log pi (the 2023 code still
    ran the reference and reported rewards against it).
    """
    _check(beta, label_smoothing, nll)
    h = _margin(policy, reference)
    losses = -F.logsigmoid(beta * h) * (1 - label_smoothing) - F.logsigmoid(-beta * h) * label_smoothing
    losses = losses + nll * _nll(policy.chosen)
    return _with_rewards(losses, policy, reference, beta)


@loss(data="pairs", needs_reference=lambda knobs: not knobs["reference_free"])
def ipo(
    policy: Pairs, reference: Pairs | None, *, beta: float, label_smoothing: float, reference_free: bool, nll: float
) -> LossOutput:
    """(h - 1/(2 beta))^2, with h as in `dpo`: Eq. 17 of arXiv:2310.12036, beta its tau; log-probabilities are sums, as in 2023.

    label_smoothing e mixes in the loss of the flipped pair, (1-e)(h - 1/(2 beta))^2 + e (h + 1/(2 beta))^2, the same
    reading of label noise as in `dpo` (the 2023 code ignored the knob without a word). `nll`: as in `dpo`.
    """
    _check(beta, label_smoothing, nll)
    h = _margin(policy, reference)
    target = 1 / (2 * beta)
    losses = (1 - label_smoothing) * (h - target) ** 2 + label_smoothing * (h + target) ** 2 + nll * _nll(policy.chosen)
    return _with_rewards(losses, policy, reference, beta)


@loss(
    data="pairs",
    reads="scores",
    needs_margins=lambda knobs: knobs["margin"] > 0,
    read=lambda knobs: "mean" if knobs["read"] == "mean" else "last",
)
def reward(
    policy: ScoredPairs,
    reference: None = None,
    *,
    read: Literal["last", "mean", "tokens"],
    margin: float,
    label_smoothing: float,
    centering: float,
) -> LossOutput:
    """-(1-e) log sigmoid(z) - e log sigmoid(-z) + c (r_w + r_l)^2, with z = r_w - r_l - m times the data's own margin.

    e = m = c = 0: Bradley-Terry, Eq. 2 of arXiv:2305.18290, on the scores at the last tokens; with `read=mean` on the mean scores
    of all tokens of a response. m: Eq. 2 of arXiv:2307.09288
    (Llama 2). c pulls the two scores of a pair to a sum of 0 (arXiv:2312.09244): else the scale has no origin.

    `read=tokens` is DeepSpeed-Chat's: the mean of the first two terms over all positions from the first token in which the
    responses differ to the end of the longer one. Behind the end of the shorter one, where DeepSpeed-Chat compares with the
    scores of padding, its last score stands (pinned by test_the_token_wise_loss_by_hand). Rewards are the last scores, or
    the mean ones with `read=mean`.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}: the share of flipped labels must be in [0, 0.5)")
    for knob, value in (("margin", margin), ("centering", centering)):
        if not value >= 0:
            raise ValueError(f"{knob}={value}: must not be negative; 0 leaves it out")
    chosen, rejected = policy.chosen, policy.rejected
    r_w, r_l = chosen.of(read), rejected.of(read)
    z = chosen.each - rejected.each if read == "tokens" else (r_w - r_l)[:, None]  # [B, L or 1]
    if margin and policy.margins is not None:
        z = z - margin * policy.margins[:, None]
    losses = -F.logsigmoid(z) * (1 - label_smoothing) - F.logsigmoid(-z) * label_smoothing
    if read == "tokens":
        longest = torch.maximum(chosen.tokens, rejected.tokens).clamp(min=1)
        first = torch.minimum(policy.shared, longest - 1)  # of two equal responses, the last token
        at = torch.arange(z.shape[1], device=z.device)
        compared = (at >= first[:, None]) & (at < longest[:, None])
        losses = torch.where(compared, losses, 0).sum(1) / compared.sum(1)
    else:
        losses = losses[:, 0]
    losses = losses + centering * (r_w + r_l) ** 2
    return LossOutput(losses, r_w.detach(), r_l.detach())
