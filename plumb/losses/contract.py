"""Define what a loss is given, and what it returns.

Shapes: B examples; R responses of a batch, k of one example; N response tokens with a prediction.
Units: nats. Every loss is a *sum* over what it scores; the trainer divides by a global count known
before the forward pass, so microbatches, ranks and padding cannot change the objective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

# What one example holds: an SFT target; a response with a label; a chosen and a rejected response;
# responses from best to worst; the policy's own samples.
Group = Literal["single", "labelled", "pair", "list", "rollout"]


class Logps(NamedTuple):
    """Log-probabilities of responses given their prompts, one number for each response.

    Example: two responses, of 3 and 1 tokens: Logps(sum=[-4.5, -0.7], tokens=[3, 1]).
    """

    sum: Tensor  # [B] sum over the response's tokens of log pi(y_t | x, y_<t), nats
    tokens: Tensor  # [B] number of tokens in that sum; mean = sum / tokens

    def mean(self) -> Tensor:
        """Return the mean log-probability per token, 0 for a response without a token.  [B]"""
        return self.sum / self.tokens.clamp(min=1)


class LogpsAndSquares(NamedTuple):
    """Logps, and about the log-probability that tokens drawn from the policy itself would have.

    Example: two tokens of log-probability -1 and -2; at the first the policy is sure of another
    token, at the second undecided between two: LogpsAndSquares(sum=[-3], tokens=[2],
    squares=[-0.7]).
    """

    sum: Tensor  # [B] as in Logps
    tokens: Tensor  # [B]
    squares: Tensor  # [B] sum over the tokens of log sum_v pi(v | x, y_<t)^2, detached


class LogpsAndKL(NamedTuple):
    """Logps, and the KL divergence from the reference to the policy along the response.

    Example: at the reference itself, LogpsAndKL(sum=[-4.5], tokens=[3], kl=[0]).
    """

    sum: Tensor  # [B] as in Logps
    tokens: Tensor  # [B]
    kl: Tensor  # [B] sum over the tokens of KL(pi_ref(. | x, y_<t) || pi(. | x, y_<t)), nats


class TokenLogps(NamedTuple):
    """Log-probabilities of B responses given their prompts, one number for each token.

    Example: the same two responses: TokenLogps(each=[-1, -2, -1.5, -0.7], response=[0, 0, 0, 1],
    n=2).
    """

    each: Tensor  # [N] log pi(y_t | x, y_<t), nats
    response: Tensor  # [N] int64: the response that the token belongs to, 0 .. n - 1
    n: int  # number of responses
    # [N] entropy of the distribution that the token is drawn from, nats, with a gradient where the
    # loss has a knob `entropy` above 0: of the policy, in a loss on its own samples; None elsewhere
    entropy: Tensor | None = None

    def of(self, responses: Tensor) -> TokenLogps:
        """Return the tokens of these responses ([M] int64), renumbered 0 .. M - 1."""
        number = self.response.new_full((self.n,), -1)
        number[responses] = torch.arange(len(responses), device=number.device)
        mine = number[self.response]  # [N]
        selected = mine >= 0
        entropy = None if self.entropy is None else self.entropy[selected]
        return TokenLogps(self.each[selected], mine[selected], len(responses), entropy)

    def sum(self, values: Tensor | None = None) -> Tensor:
        """Return the sum of `values` [N], or of the log-probabilities, over each response.  [n]

        It adds in a fixed order, and in float64 if the device has it: `index_add` would add in the
        order in which a GPU's threads arrive, so the same batch could give two losses.
        """
        return sum_by(self.response, self.each if values is None else values, self.n)


def sum_by(index: Tensor, values: Tensor, n: int) -> Tensor:
    """Return the sums of the values [N] that have the index 0 .. n - 1, in a fixed order.  [n]"""
    wide = values if values.device.type == "mps" else values.double()
    order = index.argsort(stable=True)
    lengths = torch.bincount(index, minlength=n)
    return torch.segment_reduce(wide[order], "sum", lengths=lengths).to(values.dtype)


def summed(of_model: Logps | LogpsAndSquares | LogpsAndKL | TokenLogps) -> Logps:
    """Return the sums over responses, whatever else was read of the model."""
    if isinstance(of_model, TokenLogps):
        tokens = torch.bincount(of_model.response, minlength=of_model.n)
        return Logps(of_model.sum(), tokens)
    return Logps(of_model.sum, of_model.tokens)


class Scores(NamedTuple):
    """A reward model's scores of B responses."""

    last: Tensor  # [B] the score at each response's last token
    each: Tensor  # [B, L] the scores at all of its tokens; after its end, the last one repeated
    tokens: Tensor  # [B] its number of tokens

    def of(self, read: str) -> Tensor:
        """Return the score of each response: at its last token, or with `read` "mean" the mean over
        its tokens.  [B]
        """
        if read != "mean":
            return self.last
        n = self.tokens.clamp(min=1)[:, None]
        within = torch.arange(self.each.shape[1], device=self.each.device) < n
        return (self.each * within).sum(1) / n[:, 0]


T = TypeVar("T", Logps, LogpsAndSquares, LogpsAndKL, TokenLogps, Scores)


def halves(of_model: Any) -> tuple[Any, Any]:
    """Return the first and the second half of 2 B responses, as of B pairs."""
    if isinstance(of_model, TokenLogps):
        chosen = torch.arange(of_model.n // 2, device=of_model.each.device)
        return of_model.of(chosen), of_model.of(chosen + of_model.n // 2)
    n = len(of_model.tokens) // 2
    kind = type(of_model)
    return kind(*(x[:n] for x in of_model)), kind(*(x[n:] for x in of_model))


class Pairs(NamedTuple, Generic[T]):
    """The input of a loss with group="pair": `Pairs` (of Logps), or `Pairs[TokenLogps]`."""

    chosen: T
    rejected: T
    # [B] soft labels: the probability that chosen is preferred, NaN for a pair without one; None
    # if no pair of the data has one. Only a loss with soft_labels=True gets them
    p_chosen: Tensor | None = None
    # [B] the data's own score of chosen minus that of rejected, NaN where unknown
    margins: Tensor | None = None


class ScoredPairs(NamedTuple):
    """The input of a reward model's loss with group="pair"."""

    chosen: Scores
    rejected: Scores
    shared: Tensor  # [B] number of tokens that both responses begin with
    # [B] the data's own score of chosen minus that of rejected; None if there are none
    margins: Tensor | None
    p_chosen: Tensor | None = None  # [B] as in Pairs


def flip_probability(pairs: Pairs | ScoredPairs, label_smoothing: float) -> Tensor | float:
    """Return the probability that a pair's label is wrong: 1 - p_chosen of a pair with a soft
    label, `label_smoothing` for every other.  [B], or a number if no pair has a soft label
    """
    p = pairs.p_chosen
    return label_smoothing if p is None else torch.where(p.isnan(), label_smoothing, 1 - p)


class Lists(NamedTuple):
    """The input of a loss with group="list": each example's responses from best to worst. k is the
    length of the longest list; the last places of a shorter one are empty.

    Example: lists of 2 and 1: Lists(Logps(sum=[[-3, -5], [-4, 0]], tokens=[[2, 2], [3, 0]]),
    exists=[[True, True], [True, False]]).
    """

    responses: Logps  # of [B, k], 0 at empty places
    exists: Tensor  # [B, k] bool
    # [B, k] 0 for the best, the same number for responses of the same rank; NaN in a list without
    # ties, None if no list has ties
    levels: Tensor | None = None

    def order(self) -> Tensor:
        """Return the levels, or the places in a list without ties.  [B, k]"""
        places = torch.arange(self.exists.shape[1], device=self.exists.device)
        places = places.expand_as(self.exists)
        if self.levels is None:
            return places
        return torch.where(self.levels.isnan(), places.to(self.levels), self.levels)

    def worse(self) -> Tensor:
        """Return whether response j (the last index) ranks below response i.  [B, k, k] bool"""
        order = self.order()
        both = self.exists[:, :, None] & self.exists[:, None, :]
        return (order[:, None, :] > order[:, :, None]) & both

    def worst(self, values: Tensor) -> Tensor:
        """Return the values [B, k] of the last response of each list.  [B]"""
        return values.gather(1, self.exists.sum(1, keepdim=True) - 1)[:, 0]


class Labelled(NamedTuple, Generic[T]):
    """The input of a loss with group="labelled": `Labelled` of Logps, or `Labelled[TokenLogps]`."""

    responses: T
    desirable: Tensor  # [B] bool


@dataclass(frozen=True)
class Rollouts(Generic[T]):
    """What a loss with group="rollout" gets: the policy's own samples, k of each prompt, and how
    good each is, or each of its tokens. B examples are B prompts; k may differ.

    Example: two prompts, of 2 samples and 1: Rollouts(responses, example=[0, 1, 0], n=2, old=...,
    advantages=[0.5, 0, -0.5]).
    """

    responses: T  # of the R samples
    example: Tensor  # [R] int64: the example of each, 0 .. n - 1
    n: int  # number of examples
    # [N] log-probabilities of the tokens by the policy that sampled them, nats
    old: Tensor
    # [R]; 0 where each token has an advantage of its own
    advantages: Tensor
    # [N] where a critic gives one to each token; not told apart from [R] by its length, since
    # responses of one token come in another order than their tokens
    token_advantages: Tensor | None = None

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values` [R] over the samples of each example.  [B]"""
        return sum_by(self.example, values, self.n)

    def n_responses(self) -> Tensor:
        """Return the number of samples of each example.  [B] int64"""
        return torch.bincount(self.example, minlength=self.n)


class BatchContext(NamedTuple):
    """What a loss whose examples depend on each other needs to know about the whole batch, over all
    ranks and microbatches, computed without gradients before the first microbatch.

    In training, this is the step's batch; in an evaluation, all evaluated examples.
    """

    # the examples to compute: the batch's own, or its prompts with responses to other prompts
    # (batching/mismatched.py)
    examples: Literal["own", "mismatched"]
    # (policy, reference or None) -> the loss's third argument; both are Logps of [n, k] in the
    # batch's order, 0 where an example has fewer responses, or, for own labelled responses,
    # Labelled with such Logps
    compute: Callable[..., Tensor]
    # whether the result has a row for each example; a microbatch then gets those of its examples
    by_example: bool = False


class Mean(NamedTuple):
    """A metric that is logged as sum(values) / sum(counts) over all examples of a batch, however it
    is split.

    Example: the mean reward of desirable responses: Mean(rewards * desirable, desirable).
    """

    values: Tensor  # [B]
    counts: Tensor | None = None  # [B]; None: each example counts once

    def columns(self) -> Tensor:
        """Return what is summed over examples: values, counts.  [B, 2] float64"""
        values = self.values.detach().double()
        counts = torch.ones_like(values) if self.counts is None else self.counts.detach().double()
        return torch.stack([values, counts], 1)

    @staticmethod
    def value(sums: Sequence[float]) -> float | None:
        """Return the mean from the sums of the columns; None if nothing was counted."""
        total, count = sums
        return total / count if count else None


class Spread(NamedTuple):
    """A metric that is logged as the standard deviation of all values of a batch."""

    values: Tensor  # [B, m]

    def columns(self) -> Tensor:
        """Return what is summed over examples: values, their squares, their number.  [B, 3]
        float64
        """
        values = self.values.detach().double()
        number = torch.ones_like(values)
        return torch.stack([values.sum(1), (values**2).sum(1), number.sum(1)], 1)

    @staticmethod
    def value(sums: Sequence[float]) -> float | None:
        """Return the deviation from the sums of the columns; None if there are no values."""
        total, squares, number = sums
        return max(0.0, squares / number - (total / number) ** 2) ** 0.5 if number else None


class Largest(NamedTuple):
    """A metric that is logged as the largest value of a batch."""

    values: Tensor  # [B]

    def columns(self) -> Tensor:
        """Return what is compared over examples.  [B, 1] float64"""
        return self.values.detach().double()[:, None]

    @staticmethod
    def value(largest: Sequence[float]) -> float | None:
        """Return the largest value."""
        return largest[0]


Metric = Mean | Spread | Largest


@dataclass(frozen=True)
class LossOutput:
    """The output of a loss.

    Example: LossOutput(losses, chosen.detach(), rejected.detach()) of a loss on pairs.
    """

    losses: Tensor  # [B]
    # [B] what a pair's or a list's responses are worth, detached: scores, or implicit rewards such
    # as beta * log(pi / pi_ref), whatever the batch context; None: the loss has none
    chosen_rewards: Tensor | None = None
    rejected_rewards: Tensor | None = None  # [B]
    # the loss's own metrics; "kl/z0" is logged as kl_train/z0 and kl_eval/z0
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    # [B] of labelled responses, in place of the other two: whatever their labels
    rewards: Tensor | None = None
