"""Losses on pairs that compare each pair with the batch of all ranks and microbatches: BCO, AOT,
beta-DPO. Shapes and units: contract.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from plumb.losses.contract import BatchContext, Logps, LossOutput, Pairs
from plumb.losses.ratios import (
    check_label_smoothing,
    check_not_negative,
    check_positive,
    logratios,
    margin,
    smoothed,
    with_rewards,
)
from plumb.losses.registry import loss

# (policy, reference) of [n, 2], float64: the batch's chosen and rejected responses


def mean_logratio(policy: Logps, reference: Logps) -> Tensor:
    """Return the mean of log pi(y|x)/pi_ref(y|x) over the batch's chosen and rejected responses."""
    return (policy.sum - reference.sum).mean()


def mean_margin(policy: Logps, reference: Logps) -> Tensor:
    """Return the mean of h over the batch's pairs."""
    ratios = policy.sum - reference.sum
    return (ratios[:, 0] - ratios[:, 1]).mean()


def matched_margins(policy: Logps, reference: Logps) -> Tensor:
    """Return for each pair the reference's margin of the same rank in the batch as the policy's
    margin of this pair.  [n]
    """
    ours = policy.sum[:, 0] - policy.sum[:, 1]
    theirs = reference.sum[:, 0] - reference.sum[:, 1]
    return _of_the_same_rank(ours, theirs)


def matched_logratios(policy: Logps, reference: Logps) -> Tensor:
    """Return for each pair the log-ratio of the rejected response with the rank of its chosen one,
    and that of the chosen response with the rank of its rejected one.  [n, 2]
    """
    chosen, rejected = (policy.sum - reference.sum).unbind(1)
    of_chosen = _of_the_same_rank(chosen, rejected)
    return torch.stack([of_chosen, _of_the_same_rank(rejected, chosen)], 1)


def _of_the_same_rank(values: Tensor, others: Tensor) -> Tensor:
    """Return for each value the one of the others that has its rank.  [n]

    >>> _of_the_same_rank(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([10.0, 20.0, 30.0])).tolist()
    [30.0, 10.0, 20.0]
    """
    rank = values.argsort(stable=True).argsort(stable=True)
    return others.sort().values[rank]


@loss(
    group="pair",
    needs_reference=True,
    context=BatchContext("own", mean_logratio),
    usual={"lr": (3e-7, 5e-6), "beta": (0.01, 0.5)},
)
def bco_pair(policy: Pairs, reference: Pairs, context: Tensor, *, beta: float) -> LossOutput:
    """-log sigmoid(r_w - d) - log sigmoid(d - r_l), with r = beta log pi(y|x)/pi_ref(y|x) and d the
    batch's mean reward: section 4 of arXiv:2404.04656.

    A binary classifier of responses with the bias d. In the paper, d is a moving average over
    batches; here it is the mean over the batch of all ranks, without a gradient, and no state is
    kept.

    Rewards: beta log pi(y|x)/pi_ref(y|x).
    """
    check_positive(beta=beta)
    chosen, rejected = logratios(policy, reference)
    d = context.to(chosen)
    losses = -F.logsigmoid(beta * (chosen - d)) - F.logsigmoid(beta * (d - rejected))
    return with_rewards(losses, policy, reference, beta)


@loss(
    group="pair",
    needs_reference=True,
    context=BatchContext("own", matched_margins, by_example=True),
    usual={"lr": (3e-7, 5e-6), "beta": (0.01, 0.5)},
)
def aot(
    policy: Pairs, reference: Pairs, context: Tensor, *, beta: float, label_smoothing: float
) -> LossOutput:
    """-(1-e) log sigmoid(z) - e log sigmoid(-z), with z = beta (u_(k) - v_(k)), u = log
    pi(y_w|x)/pi(y_l|x), v = log pi_ref(y_w|x)/pi_ref(y_l|x), both sorted over the batch: paired
    AOT, section 3 of arXiv:2406.05882.

    The policy's margins should be larger as a distribution (first-order stochastic dominance), not
    pair by pair. The batch is that of all ranks, and a larger `batch_size` gives a finer
    comparison. e = `label_smoothing`.

    Rewards: beta log pi(y|x)/pi_ref(y|x).
    """
    check_positive(beta=beta)
    check_label_smoothing(label_smoothing)
    z = beta * (margin(policy, None) - context.to(policy.chosen.sum))
    return with_rewards(smoothed(z, label_smoothing), policy, reference, beta)


@loss(
    group="pair",
    needs_reference=True,
    context=BatchContext("own", matched_logratios, by_example=True),
    usual={"lr": (3e-7, 5e-6), "beta": (0.01, 0.5)},
)
def aot_unpaired(
    policy: Pairs, reference: Pairs, context: Tensor, *, beta: float, label_smoothing: float
) -> LossOutput:
    """-(1-e) log sigmoid(z) - e log sigmoid(-z), with z = beta (c_(k) - r_(k)), c and r the
    log-ratios log pi(y|x)/pi_ref(y|x) of chosen and of rejected responses, both sorted over the
    batch: unpaired AOT, section 3 of arXiv:2406.05882.

    Like `aot`, but it does not matter which response was rejected for which. An example has half
    the loss of its chosen response's rank and half that of its rejected one's, so that the sum over
    examples is the sorted objective; both responses of a rank get its full gradient.

    Rewards: beta log pi(y|x)/pi_ref(y|x).
    """
    check_positive(beta=beta)
    check_label_smoothing(label_smoothing)
    chosen, rejected = logratios(policy, reference)
    other_rejected, other_chosen = context.to(chosen).unbind(1)
    both = smoothed(beta * (chosen - other_rejected), label_smoothing) + smoothed(
        beta * (other_chosen - rejected), label_smoothing
    )
    return with_rewards(both - both.detach() / 2, policy, reference, beta)


@loss(
    group="pair",
    needs_reference=True,
    context=BatchContext("own", mean_margin),
    usual={"lr": (3e-7, 5e-6), "beta": (0.01, 0.5), "alpha": (0.1, 10)},
)
def beta_dpo(
    policy: Pairs,
    reference: Pairs,
    context: Tensor,
    *,
    beta: float,
    alpha: float,
    threshold: float,
    least_beta: float,
) -> LossOutput:
    """-log sigmoid(b h), with b = beta (1 + a (M - M_0)), but at least `least_beta`, M the batch's
    mean of beta h and h as in `dpo`: arXiv:2407.08639, a = `alpha`, M_0 = `threshold`.

    A batch whose pairs are easy to tell apart has a larger beta. b is the same for the batch of all
    ranks, and has no gradient. Far below the threshold it would be negative, which would reverse
    every pair; `least_beta` keeps it above 0.

    M is a difference of rewards. The authors' code takes the mean of h instead, without beta: its a
    of 0.6 with beta = 0.1 is an a of 6 here. In the paper, M_0 is a moving average, and pairs far
    from it are dropped; here M_0 is a number, no state is kept, and no pair is dropped.

    Rewards: beta log pi(y|x)/pi_ref(y|x), with the constant beta.
    """
    check_positive(beta=beta, least_beta=least_beta)
    check_not_negative(alpha=alpha)
    h = margin(policy, reference)
    b = beta * (1 + alpha * (beta * context.to(h) - threshold))
    losses = -F.logsigmoid(b.clamp(min=least_beta) * h)
    return with_rewards(losses, policy, reference, beta)
