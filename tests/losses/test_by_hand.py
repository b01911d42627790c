"""Derivations by hand of the losses on pairs: inputs chosen so that the arithmetic fits in a line.

The table also tests itself: a loss with its sign, its sides, its models or its denominators changed
must fail it.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from losses import Responses, compute, knobs_of, losses_of

from plumb.losses.contract import LossOutput
from plumb.losses.registry import build_loss

LOG2 = math.log(2)


def softplus(z):
    """Return log(1 + e^z) = -log sigmoid(-z)."""
    return math.log1p(math.exp(z))


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


@dataclass
class Hand:
    """Pairs with what a loss makes of them: log-ratios (chosen, rejected) of each pair to the
    reference, or log-probabilities where the loss has no reference.
    """

    knobs: dict
    pairs: list
    losses: list
    rewards: list  # (chosen, rejected) of each pair
    tokens: list = None  # (chosen, rejected) of each pair; 4 and 4
    margins: list = None
    further: list = None  # squares or divergences of (chosen, rejected) of each pair
    reference: list = None  # log-probabilities of (chosen, rejected) of each pair; -20 each

    def check(self, bound):
        """Fail where the loss does not give these numbers."""
        given = self.given(bound)
        out = compute(bound, given)
        assert out.losses.tolist() == pytest.approx(self.losses)
        rewards = torch.stack([out.chosen_rewards, out.rejected_rewards], 1)
        assert rewards.tolist() == [pytest.approx(both) for both in self.rewards]

    def given(self, bound):
        values = torch.tensor(self.pairs, dtype=torch.float64)
        n = len(values)
        reference = torch.tensor(self.reference or [[-20, -20]] * n, dtype=torch.float64)
        return Responses(
            policy=values + reference if bound.needs_reference else values,
            reference=reference,
            tokens=torch.tensor(self.tokens or [[4, 4]] * n),
            margins=torch.tensor(self.margins or [1.0] * n, dtype=torch.float64),
            desirable=torch.ones(n, dtype=torch.bool),
            further=self.further and torch.tensor(self.further, dtype=torch.float64),
        )


# Two pairs of log-ratios: h = 20 and h = -10; with beta 0.1, beta h = 2 and -1.
AHEAD_AND_BEHIND = [[10, -10], [-5, 5]]
REWARDS = [[1, -1], [-0.5, 0.5]]
# Two pairs of log-probabilities, of 2 and 4 tokens: means -1 and -3, -2 and -1.
FREE = [[-2, -12], [-4, -4]]
FREE_TOKENS = [[2, 4], [2, 4]]

BY_HAND = {
    # log(1 + e^-2), log(1 + e^1)
    "dpo": Hand({}, AHEAD_AND_BEHIND, [softplus(-2), softplus(1)], REWARDS),
    # 1 / (2 beta) = 5: (20 - 5)^2, (-10 - 5)^2
    "ipo": Hand({}, AHEAD_AND_BEHIND, [225, 225], REWARDS),
    # e = 0.25: (0.75 l(z) - 0.25 l(-z)) / 0.5
    "robust": Hand(
        {"label_smoothing": 0.25},
        AHEAD_AND_BEHIND,
        [1.5 * softplus(-2) - 0.5 * softplus(2), 1.5 * softplus(1) - 0.5 * softplus(-1)],
        REWARDS,
    ),
    # max(0, 1 - 2), max(0, 1 + 1)
    "hinge": Hand({}, AHEAD_AND_BEHIND, [0, 2], REWARDS),
    # q = sigmoid(2) and sigmoid(-1) against labels right with 0.75
    "exo_pair": Hand(
        {"label_smoothing": 0.25},
        AHEAD_AND_BEHIND,
        [
            q * math.log(q / 0.75) + (1 - q) * math.log((1 - q) / 0.25)
            for q in (sigmoid(2), sigmoid(-1))
        ],
        REWARDS,
    ),
    # tau = 0.5: m = sigmoid(4) and sigmoid(-2)
    "discopop": Hand(
        {"tau": 0.5},
        AHEAD_AND_BEHIND,
        [
            (1 - sigmoid(4)) * softplus(-2) + sigmoid(4) * math.exp(-2),
            (1 - sigmoid(-2)) * softplus(1) + sigmoid(-2) * math.exp(1),
        ],
        REWARDS,
    ),
    # beta 2, gamma 0.5, rewards -2 and -6, -4 and -2: ahead by 4 - 0.5, by -2 - 0.5
    "simpo": Hand(
        knobs={"beta": 2.0},
        pairs=FREE,
        losses=[softplus(-3.5), softplus(2.5)],
        rewards=[[-2, -6], [-4, -2]],
        tokens=FREE_TOKENS,
    ),
    # alpha 1: p^-1 = e^1 and e^3, e^2 and e^1; rewards 1 - p^-1
    "alphapo": Hand(
        knobs={"beta": 1.0, "alpha": 1.0},
        pairs=FREE,
        losses=[
            softplus(-(math.exp(3) - math.exp(1) - 0.5)),
            softplus(-(math.exp(1) - math.exp(2) - 0.5)),
        ],
        rewards=[[1 - math.exp(1), 1 - math.exp(3)], [1 - math.exp(2), 1 - math.exp(1)]],
        tokens=FREE_TOKENS,
    ),
    # beta 0.1: sums differ by 10 and by 0; means of the chosen 1 and 2
    "cpo": Hand(
        knobs={},
        pairs=FREE,
        losses=[softplus(-1) + 1, LOG2 + 2],
        rewards=[[-0.2, -1.2], [-0.4, -0.4]],
        tokens=FREE_TOKENS,
    ),
    # p = e^-1 and e^-3, e^-2 and e^-1: log odds = -log(e^m - 1) of m = 1, 3, 2, 1
    "orpo": Hand(
        knobs={"beta": 0.5},
        pairs=FREE,
        losses=[
            1 + 0.5 * math.log1p((math.e - 1) / (math.e**3 - 1)),
            2 + 0.5 * math.log1p((math.e**2 - 1) / (math.e - 1)),
        ],
        rewards=[[-0.5, -1.5], [-1, -0.5]],
        tokens=FREE_TOKENS,
    ),
    # means of the chosen
    "nll": Hand(
        knobs={},
        pairs=FREE,
        losses=[1, 2],
        rewards=[[-1, -3], [-2, -1]],
        tokens=FREE_TOKENS,
    ),
    # max(0, 1 - 10) + 0.1 * 2, max(0, 1 - 0) + 0.1 * 4
    "slic": Hand({}, FREE, [0.2, 1.4], FREE),
}
BY_HAND |= {
    # r_w = 1 and -0.5, r_l = -1 and 0.5
    "nca_pair": Hand(
        {},
        AHEAD_AND_BEHIND,
        [
            softplus(-1) + 0.5 * softplus(1) + 0.5 * softplus(-1),
            softplus(0.5) + 0.5 * softplus(-0.5) + 0.5 * softplus(0.5),
        ],
        REWARDS,
    ),
    # 1 / (2 beta) = 5: (10 - 5)^2 + (-10 + 5)^2, (-5 - 5)^2 + (5 + 5)^2
    "sppo_hard": Hand({}, AHEAD_AND_BEHIND, [50, 200], REWARDS),
    "apo_zero": Hand({}, AHEAD_AND_BEHIND, [2 * sigmoid(-1), sigmoid(0.5) + sigmoid(0.5)], REWARDS),
    "apo_down": Hand(
        {}, AHEAD_AND_BEHIND, [sigmoid(1) + sigmoid(-2), sigmoid(-0.5) + sigmoid(1)], REWARDS
    ),
    # the second's chosen response lost 5 nats: h = -10 - 3 * 5
    "dpop": Hand({"penalty": 3.0}, AHEAD_AND_BEHIND, [softplus(-2), softplus(2.5)], REWARDS),
    # offsets 0.5 log m of e^2 and e^-2: 1 and -1
    "odpo": Hand(
        {"alpha": 0.5},
        AHEAD_AND_BEHIND,
        [softplus(-1), softplus(0)],
        REWARDS,
        margins=[math.exp(2), math.exp(-2)],
    ),
    # 0.5 nats for a token: lengths differ by 3 and by -2
    "r_dpo": Hand(
        {"alpha": 0.5},
        AHEAD_AND_BEHIND,
        [softplus(-3.5), softplus(2)],
        REWARDS,
        tokens=[[4, 1], [2, 4]],
    ),
    # rewards 1, 0.2 and -0.5, 0.5: their mean is 0.3
    "bco_pair": Hand(
        {},
        [[10, 2], [-5, 5]],
        [softplus(-0.7) + softplus(-0.1), softplus(0.8) + softplus(0.2)],
        [[1, 0.2], [-0.5, 0.5]],
    ),
    # margins 20 - 3 and -10 + 3 beside the reference's -3 and 3: sorted, 17 is beside 3 and -7
    # beside -3
    "aot": Hand(
        {},
        AHEAD_AND_BEHIND,
        [softplus(-1.4), softplus(0.4)],
        REWARDS,
        reference=[[-20, -17], [-17, -20]],
    ),
    # chosen 10, -5 and rejected -2, 7: 10 is beside 7 and -5 beside -2. The first pair has 10 and
    # -2, the second -5 and 7: half of each place
    "aot_unpaired": Hand(
        {},
        [[10, -2], [-5, 7]],
        [(softplus(-0.3) + softplus(0.3)) / 2] * 2,
        [[1, -0.2], [-0.5, 0.7]],
    ),
    # chosen -12 to -20 of 4 tokens, rejected -6 to -2 of 2. Beyond two tokens half counts: -9 to
    # -15, so the log-ratios are 6 and -4; the second pair has them exchanged
    "ld_dpo": Hand(
        knobs={},
        pairs=[[8, -4], [-4, 8]],
        losses=[softplus(-1), softplus(1)],
        rewards=[[0.6, -0.4], [-0.4, 0.6]],
        tokens=[[4, 2], [2, 4]],
        reference=[[-20, -2], [-2, -20]],
    ),
    # weights e^((-10 + 8) / 2) and e^((-30 + 26) / 4): e^-2; above 1, so 1
    "wpo": Hand(
        knobs={},
        pairs=AHEAD_AND_BEHIND,
        losses=[math.exp(-2) * softplus(-2), softplus(1)],
        rewards=REWARDS,
        tokens=[[2, 4], [2, 4]],
        further=[[-8, -26], [-40, -40]],
    ),
    # divergences further by 5 along the rejected response, by 5 along the chosen one
    "tdpo1": Hand(
        {}, AHEAD_AND_BEHIND, [softplus(-1.5), softplus(0.5)], REWARDS, further=[[1, 6], [7, 2]]
    ),
    "tdpo2": Hand(
        {},
        AHEAD_AND_BEHIND,
        [softplus(-1.75), softplus(0.75)],
        REWARDS,
        further=[[1, 6], [7, 2]],
    ),
    # M = mean of 2 and -1 = 0.5; b = 0.1 (1 + 0.6 (0.5 - 0.25)) = 0.115
    "beta_dpo": Hand(
        {"threshold": 0.25}, AHEAD_AND_BEHIND, [softplus(-2.3), softplus(1.15)], REWARDS
    ),
}
# a reward model's, in tests/training/test_reward.py
ELSEWHERE = {"reward"}

by_hand = pytest.mark.parametrize("name", sorted(BY_HAND))


def test_every_loss_on_pairs_is_derived():
    assert BY_HAND.keys() | ELSEWHERE == set(losses_of("pair"))


@by_hand
def test_by_hand(name):
    hand = BY_HAND[name]
    hand.check(build_loss(knobs_of(name) | hand.knobs))


# ---- a wrong loss fails the table ----


def negated(bound):
    return lambda *given: changed(bound.compute(*given), lambda losses: -losses)


def averaged(bound):
    """Divide by the number of examples, as a loss that takes the mean would."""
    return lambda *given: changed(bound.compute(*given), lambda losses: losses / len(losses))


def sides_swapped(bound):
    def compute(policy, reference, context):
        swap = lambda pairs: pairs and pairs._replace(chosen=pairs.rejected, rejected=pairs.chosen)
        return bound.compute(swap(policy), swap(reference), context)

    return compute


def models_swapped(bound):
    return lambda policy, reference, context: bound.compute(reference, policy, context)


def lengths_doubled(bound):
    def compute(policy, reference, context):
        twice = lambda logps: logps._replace(tokens=2 * logps.tokens)
        double = lambda pairs: (
            pairs and pairs._replace(chosen=twice(pairs.chosen), rejected=twice(pairs.rejected))
        )
        return bound.compute(double(policy), double(reference), context)

    return compute


def changed(out, change):
    return LossOutput(change(out.losses), out.chosen_rewards, out.rejected_rewards)


@by_hand
@pytest.mark.parametrize(
    "mutation", [negated, averaged, sides_swapped, models_swapped, lengths_doubled]
)
def test_a_wrong_loss_fails(name, mutation):
    hand = BY_HAND[name]
    bound = build_loss(knobs_of(name) | hand.knobs)
    if mutation is models_swapped and not bound.needs_reference:
        pytest.skip("has no reference")
    if mutation is lengths_doubled and (hand.tokens is None or bound.reads == "token_logps"):
        pytest.skip("lengths do not enter, or are the tokens themselves")
    if mutation is models_swapped and bound.reads.startswith("logps_and"):
        pytest.skip("the reference has only sums")
    with pytest.raises(AssertionError):
        hand.check(replace(bound, compute=mutation(bound)))
