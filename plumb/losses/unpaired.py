"""Losses on single responses that are labelled desirable or undesirable. Shapes and units:
contract.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from plumb.losses.bound import AverageOver
from plumb.losses.contract import (
    BatchContext,
    Labelled,
    Logps,
    LossOutput,
    Mean,
    Metric,
    TokenLogps,
)
from plumb.losses.ratios import check_positive
from plumb.losses.registry import loss


def kl_to_reference(policy: Logps, reference: Logps) -> Tensor:
    """Return z0 of arXiv:2402.01306, section 4.1: the mean of log pi(y'|x)/pi_ref(y'|x) over the
    batch's mismatched pairs ([M, 1]), at least 0; 0 if there are none. It estimates KL(pi ||
    pi_ref), and has no gradient.
    """
    if not len(policy.sum):
        return policy.sum.new_zeros(())
    return (policy.sum - reference.sum).mean().clamp(min=0)


@loss(
    group="labelled",
    needs_reference=True,
    context=BatchContext("mismatched", kl_to_reference),
    label_weights=("undesirable_weight", "desirable_weight"),
    usual={"lr": (5e-7, 5e-6), "beta": (0.01, 0.5)},
)
def kto(
    policy: Labelled,
    reference: Labelled,
    context: Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> LossOutput:
    """w_d (1 - sigmoid(beta (r - z0))) for a desirable response, w_u (1 - sigmoid(beta (z0 - r)))
    for an undesirable one, r = log pi(y|x)/pi_ref(y|x): Eq. 8 of arXiv:2402.01306 (lambda_y - v).

    z0 estimates KL(pi || pi_ref): the mean of r over the batch's prompts with responses to other
    prompts, at least 0. It is that of the whole batch, over all ranks, and has no gradient.

    w_d = `desirable_weight` and w_u = `undesirable_weight` balance the two kinds: w_d n_d / (w_u
    n_u) in [1, 4/3] is usual (section 4), and a run outside prints a note at its start. One of them
    may be `balanced`: the number for which w_d n_d = w_u n_u in the training data.

    Rewards: beta log pi(y|x)/pi_ref(y|x), of the desirable responses (chosen) and the undesirable
    ones (rejected). Accuracy: the share of responses with r on the right side of z0.
    """
    check_positive(
        beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight
    )
    r = policy.responses.sum - reference.responses.sum  # [B]
    z0 = context.to(r)
    weight = torch.where(policy.desirable, desirable_weight, undesirable_weight).to(r)
    losses = weight * (1 - torch.sigmoid(_sign(policy, r) * beta * (r - z0)))
    metrics = {**_accuracies(policy, r, z0), "kl/z0": Mean(z0.expand_as(r))}
    return LossOutput(losses, metrics=metrics, rewards=beta * r.detach())


def reward_shift(policy: Labelled, reference: Labelled) -> Tensor:
    """Return delta / beta of `bco`: the mean of two means, of the log-ratios of the batch's
    desirable responses ([n, 1]) and of its undesirable ones; of one kind if there is no other.
    """
    r = (policy.responses.sum - reference.responses.sum)[:, 0]
    kinds = [r[policy.desirable], r[~policy.desirable]]
    return torch.stack([kind.mean() for kind in kinds if len(kind)]).mean()


@loss(
    group="labelled",
    needs_reference=True,
    context=BatchContext("own", reward_shift),
    usual={"lr": (5e-7, 5e-6), "beta": (0.01, 0.5)},
)
def bco(policy: Labelled, reference: Labelled, context: Tensor, *, beta: float) -> LossOutput:
    """-log sigmoid(beta r - delta) for a desirable response, -log sigmoid(delta - beta r) for an
    undesirable one, with r = log pi(y|x)/pi_ref(y|x): binary classifier optimization,
    arXiv:2404.04656.

    delta, the reward shift, is the mean of the mean rewards of the desirable and of the undesirable
    responses. The authors keep a running mean of it; here it is that of the whole batch, on all
    ranks, without a gradient. So the loss depends only on the weights and the batch, with no
    state to resume, and in an evaluation delta is that of all held-out responses.

    The authors weigh undesirable responses by a density ratio, p(desirable | x) / p(undesirable |
    x) of a classifier of prompts, where the two kinds have other prompts. It is left out: this is
    the loss for labels that do not depend on the prompt. The ratio may be given as a row's
    `weight`.

    Rewards: beta log pi(y|x)/pi_ref(y|x), of the desirable responses (chosen) and the undesirable
    ones (rejected). Accuracy: the share of responses with beta r on the right side of delta.
    """
    check_positive(beta=beta)
    r = policy.responses.sum - reference.responses.sum  # [B]
    shift = context.to(r)
    losses = -F.logsigmoid(_sign(policy, r) * beta * (r - shift))
    metrics = {**_accuracies(policy, r, shift), "rewards/delta": Mean(beta * shift.expand_as(r))}
    return LossOutput(losses, metrics=metrics, rewards=beta * r.detach())


@loss(
    group="labelled",
    average_over=lambda knobs: knobs["average_over"],
    prefixes=lambda knobs: (knobs["undesirable_prefix"], knobs["desirable_prefix"]),
)
def csft(
    policy: Labelled,
    reference: None = None,
    *,
    desirable_prefix: str,
    undesirable_prefix: str,
    average_over: AverageOver,
) -> LossOutput:
    """-log pi(c y | x), summed over the tokens of c and y, where c is the prefix of the response's
    label: conditional SFT, arXiv:2302.08582, as in the experiments of arXiv:2402.01306.

    The policy learns both kinds of responses, each after its prefix. To sample, end the prompts
    with `desirable_prefix`. The prefix is part of the response, so no truncation removes it, and
    the policy also learns how frequent each label is.

    `average_over`: as in `sft`.

    Rewards: none. logps of desirable responses (chosen) and undesirable ones (rejected) both rise.
    """
    if not desirable_prefix or desirable_prefix == undesirable_prefix:
        raise ValueError(
            f"desirable_prefix={desirable_prefix!r}: must be a text, and not that of"
            " undesirable_prefix"
        )
    return LossOutput(-policy.responses.sum)


@loss(group="labelled", average_over=lambda knobs: knobs["average_over"])
def unlikelihood(
    policy: Labelled[TokenLogps],
    reference: None = None,
    *,
    alpha: float,
    average_over: AverageOver,
) -> LossOutput:
    """-sum_t log p_t over the tokens of a desirable response, -alpha sum_t log(1 - p_t) over those
    of an undesirable one, with p_t = pi(y_t | x, y_<t): the unlikelihood loss of arXiv:1908.04319,
    whose negative candidates are the tokens of undesirable responses.

    As in the authors' code, 1 - p_t is at least 1e-5: a nearly certain token has no gradient, where
    that of the formula would be unbounded.

    `average_over`: as in `sft`; the paper's is tokens.

    Rewards: none. logps of the desirable responses (chosen) rise and those of the undesirable ones
    (rejected) fall.
    """
    check_positive(alpha=alpha)
    each = policy.responses.each  # [N]
    unlikely = -alpha * (-torch.expm1(each)).clamp(min=1e-5).log()
    wanted = policy.desirable[policy.responses.response]
    return LossOutput(policy.responses.sum(torch.where(wanted, -each, unlikely)))


def _sign(policy: Labelled, r: Tensor) -> Tensor:
    """Return 1 for a desirable response and -1 for an undesirable one.  [B]"""
    return torch.where(policy.desirable, 1.0, -1.0).to(r)


def _accuracies(policy: Labelled, r: Tensor, threshold: Tensor) -> dict[str, Metric]:
    """Return how often r is on the right side of `threshold`, as a metric."""
    right = _sign(policy, r) * (r.detach() - threshold) > 0
    return {"rewards/accuracies": Mean(right.to(r))}
