"""DPO with an offset for each pair, by the scores of its responses or by their lengths.
Shapes and units: contract.py.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F

from plumb.losses.contract import LossOutput, Pairs
from plumb.losses.ratios import check_not_negative, check_positive, margin, with_rewards
from plumb.losses.registry import loss

# the least margin whose logarithm is taken
LEAST_MARGIN = 1e-6


@loss(
    group="pair",
    needs_reference=True,
    needs_margins=True,
    usual={"lr": (3e-7, 5e-6), "beta": (0.01, 1), "alpha": (0.1, 1)},
)
def odpo(
    policy: Pairs, reference: Pairs, *, beta: float, alpha: float, offset: Literal["log", "linear"]
) -> LossOutput:
    """-log sigmoid(beta h - d), with d = a log m (`offset=log`) or a m (`linear`), m the data's
    margin score(y_w) - score(y_l) and h as in `dpo`: arXiv:2402.10571, a = `alpha`.

    The more the responses of a pair differ, the wider the margin must be. The paper takes the
    logarithm, with which a margin below 1 demands less than `dpo` does, and one of 0 nothing
    (margins are at least 1e-6). a = 0 is `dpo`. The reward model's loss has the same idea in its
    `margin`.

    Rewards: beta log pi(y|x)/pi_ref(y|x), without the offset.
    """
    check_positive(beta=beta)
    check_not_negative(alpha=alpha)
    assert policy.margins is not None
    m = policy.margins.clamp(min=LEAST_MARGIN).log() if offset == "log" else policy.margins
    losses = -F.logsigmoid(beta * margin(policy, reference) - alpha * m)
    return with_rewards(losses, policy, reference, beta)


@loss(
    group="pair",
    needs_reference=True,
    usual={"lr": (3e-7, 5e-6), "beta": (0.01, 0.5), "alpha": (1e-3, 1)},
)
def r_dpo(policy: Pairs, reference: Pairs, *, beta: float, alpha: float) -> LossOutput:
    """-log sigmoid(beta h + a (|y_w| - |y_l|)), with h as in `dpo` and |y| the number of tokens:
    length-regularized DPO, arXiv:2403.19159, a = `alpha`.

    It is the optimum of a reward that charges a nats for each token: where the longer response was
    chosen, its length already explains some of the preference. a = 0 is `dpo`.

    Rewards: beta log pi(y|x)/pi_ref(y|x), without the lengths.
    """
    check_positive(beta=beta)
    check_not_negative(alpha=alpha)
    longer = policy.chosen.tokens - policy.rejected.tokens
    losses = -F.logsigmoid(beta * margin(policy, reference) + alpha * longer)
    return with_rewards(losses, policy, reference, beta)
