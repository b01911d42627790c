"""Make every loss with the knobs of its YAML, and examples for it."""

from typing import NamedTuple

import torch
import yaml
from conftest import ROOT
from torch import Tensor

from plumb.losses.contract import (
    Labelled,
    Lists,
    Logps,
    LogpsAndKL,
    LogpsAndSquares,
    Pairs,
    Rollouts,
    ScoredPairs,
    Scores,
    TokenLogps,
)
from plumb.losses.registry import LOSSES

# values of knobs that a YAML requires
GIVEN = {"beta": 0.1, "gamma": 0.5}


def knobs_of(name):
    """Return {"name": name, knob: value} of config/loss."""
    spec = yaml.safe_load((ROOT / f"config/loss/{name}.yaml").read_text(encoding="utf-8"))
    return {k: GIVEN[k] if v == "???" else number(v) for k, v in spec.items()}


def number(value):
    """Return a value as a number, if YAML 1.1 reads it as a string (1e-3).

    >>> number("1e-3"), number("sum"), number(None)
    (0.001, 'sum', None)
    """
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def losses_of(group):
    """Return the names of the losses whose examples are of this group."""
    return sorted(name for name, declared in LOSSES.items() if declared.group == group)


class Responses(NamedTuple):
    """Hold n examples of k responses each."""

    policy: Tensor  # [n, k] summed log-probabilities, or scores
    reference: Tensor  # [n, k]
    tokens: Tensor  # [n, k] int64
    margins: Tensor  # [n] the data's score of chosen minus that of rejected
    desirable: Tensor  # [n] bool
    p_chosen: Tensor | None = None  # [n]
    # [n, k] sums over the tokens: of log sum_v p_v^2, of KL(reference || policy), or of the
    # log-probabilities that samples were drawn with
    further: Tensor | None = None

    def take(self, rows):
        """Return these examples."""
        return Responses(*(x if x is None else x[rows] for x in self))


def some(bound, n=6, seed=0, dtype=torch.float64):
    """Return n random examples for a loss."""
    k = {"pair": 2, "list": 3, "rollout": 3}.get(bound.group, 1)
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 9, (n, k), generator=random)
    policy, shift = (torch.rand(n, k, generator=random, dtype=torch.float64) for _ in range(2))
    policy = (-(0.2 + 2 * policy) * tokens).to(dtype)
    reference = policy + (3 * (shift - 0.5)).to(dtype)
    margins = 0.5 + torch.rand(n, generator=random, dtype=torch.float64).to(dtype)
    further = None
    if bound.reads == "logps_and_squares":
        further = 0.6 * policy
    if bound.reads == "logps_and_kl":
        further = (0.1 * tokens).to(dtype)
    if bound.group == "rollout":
        further = policy + (0.3 * (torch.rand(n, k, generator=random) - 0.5)).to(dtype)
    desirable = torch.arange(n) % 2 == 0
    return Responses(
        policy=policy,
        reference=reference,
        tokens=tokens,
        margins=margins,
        desirable=desirable,
        p_chosen=None,
        further=further,
    )


def compute(bound, some, batch=None, rows=None):
    """Return the loss of these examples, which are the `rows` of a `batch`; without, they are the
    batch themselves.
    """
    batch = some if batch is None else batch
    context = None
    if bound.context is not None:
        of_models = [
            Logps(sums.detach().double(), batch.tokens) for sums in (batch.policy, batch.reference)
        ]
        if bound.context.examples == "own" and bound.group == "labelled":
            of_models = [Labelled(of_model, batch.desirable) for of_model in of_models]
        policy, of_reference = of_models
        context = bound.context.compute(policy, of_reference if bound.needs_reference else None)
        if batch is not some:
            context = bound.context_of(context, rows)
    policy = _inputs(bound, some.policy, some)
    reference = None
    if bound.needs_reference:
        reads = "token_logps" if bound.reference_by_token else "logps"
        reference = _inputs(bound, some.reference, some, reads)
    return bound.compute(policy, reference, context)


def _inputs(bound, values, some, reads=None):
    """Return the inputs of a loss for policy or reference, from [n, k] values."""
    assert some.further is not None or not (reads or bound.reads).startswith("logps_and")
    further = values if some.further is None else some.further
    one = lambda j: _of(reads or bound.reads, values[:, j], some.tokens[:, j], further[:, j])
    if bound.group == "pair":
        if bound.reads == "scores":
            return ScoredPairs(one(0), one(1), torch.zeros(len(values)).long(), some.margins)
        return Pairs(one(0), one(1), some.p_chosen, some.margins)
    if bound.group == "rollout":
        return _rollouts(reads or bound.reads, values, some, further)
    if bound.group == "list":
        return Lists(Logps(values, some.tokens), torch.ones_like(some.tokens, dtype=torch.bool))
    return Labelled(one(0), some.desirable) if bound.group == "labelled" else one(0)


def _rollouts(reads, values, some, old):
    """Return k samples of each of n prompts, all first ones before all second ones, of advantages
    that add up to 0 for each prompt.
    """
    n, k = values.shape
    columns = lambda table: table.T.reshape(-1)
    samples = _of(reads, columns(values), columns(some.tokens), None)
    return Rollouts(
        responses=samples,
        example=torch.arange(n).repeat(k),
        n=n,
        old=_of(reads, columns(old), columns(some.tokens), None).each,
        advantages=columns(some.margins[:, None] * (1 - torch.arange(k))),
    )


def _of(reads, sums, tokens, further):
    """Return n responses with these sums; each token has an equal share."""
    if reads == "scores":
        return Scores(sums, sums[:, None].expand(-1, int(tokens.max())), tokens)
    if reads == "token_logps":
        response = torch.arange(len(sums)).repeat_interleave(tokens)
        return TokenLogps((sums / tokens.clamp(min=1))[response], response, len(sums))
    if reads == "logps_and_squares":
        return LogpsAndSquares(sums, tokens, further)
    if reads == "logps_and_kl":
        return LogpsAndKL(sums, tokens, further)
    return Logps(sums, tokens)
