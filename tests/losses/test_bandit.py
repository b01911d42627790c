"""Every loss learns on a bandit whose best policy is known: the losses that have an optimum in
closed form reach it, the others learn to rank by the true reward.

One prompt, a vocabulary of 12, answers of 2 tokens: A = 144 answers, with random rewards r [A]. The
policy is two tables of logits, of the first token [12] and of the second after each first [12, 12].
A label is drawn by Bradley-Terry: p_ij = sigmoid(r_i - r_j). Where a loss has an optimum, it is
given all pairs, each weighted by its probability (both answers drawn from pi_ref, the label by
p_ij), so that nothing is left to chance.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from typing import NamedTuple

import pytest
import torch
from bandit import BETA, REACHED, REFERENCE, REWARDS, VOCABULARY, A
from losses import Responses, compute, knobs_of, losses_of
from torch import Tensor

from plumb.losses.registry import LOSSES, build_loss

PREFERS = torch.sigmoid(REWARDS[:, None] - REWARDS)  # p_ij
# how often an answer wins against one drawn from the reference
WINS = PREFERS @ REFERENCE.exp()


def log_policy(logits: Tensor) -> Tensor:
    """Return log pi [A] of logits [12 + 144]: of the first token, and of the second after each."""
    first, second = logits[:VOCABULARY], logits[VOCABULARY:].view(VOCABULARY, VOCABULARY)
    return (first.log_softmax(0)[:, None] + second.log_softmax(1)).flatten()


class Data(NamedTuple):
    """Examples of k answers each, and how often each example occurs."""

    answers: Tensor  # [n, k] int64
    weight: Tensor  # [n], of sum 1
    desirable: Tensor  # [n] bool


def all_pairs(flipped: float = 0.0) -> Data:
    """Return every ordered pair, as often as it occurs with this share of the labels flipped."""
    i, j = torch.cartesian_prod(torch.arange(A), torch.arange(A)).T
    p = (1 - flipped) * PREFERS[i, j] + flipped * PREFERS[j, i]
    weight = (REFERENCE[i] + REFERENCE[j]).exp() * p
    return Data(torch.stack([i, j], 1), weight / weight.sum(), i >= 0)


def all_lists() -> Data:
    """Return 800 sets of 3 answers in every order, as often as Plackett-Luce gives the order."""
    generator = torch.Generator().manual_seed(2)
    sets = torch.stack([torch.randperm(A, generator=generator)[:3] for _ in range(800)])
    orders = torch.cat([sets[:, list(order)] for order in permutations(range(3))])
    r = REWARDS[orders]
    # each place is a choice among those that are left
    log_p = (r - r.flip(1).logcumsumexp(1).flip(1)).sum(1)
    return Data(orders, log_p.exp() / len(sets), orders[:, 0] >= 0)


def all_answers() -> Data:
    """Return every answer, as often as softmax(r) gives it."""
    return Data(torch.arange(A)[:, None], REWARDS.softmax(0), REWARDS > 0)


def all_chosen() -> Data:
    """Return every answer, as often as it is the better one of a pair."""
    return Data(torch.arange(A)[:, None], 2 * REFERENCE.exp() * WINS, REWARDS == REWARDS)


# ---- which loss has which optimum: log pi, up to a constant ----


class Optimum(NamedTuple):
    """An optimum in closed form."""

    data: Callable[[], Data]
    log_pi: Callable[[], Tensor]  # [A]
    knobs: dict = {}


def gibbs() -> Tensor:
    """pi_ref exp(r / beta): what the KL-regularised reward is maximised by."""
    return REFERENCE + REWARDS / BETA


def without_reference() -> Tensor:
    """exp(r / beta): the same, with a pi_ref that is constant."""
    return REWARDS / BETA


def by_wins() -> Tensor:
    """pi_ref exp(E_j[p_ij] / beta): IPO's, section 5 of arXiv:2310.12036, with Psi the identity."""
    return REFERENCE + WINS / BETA


def by_ratio(u: Callable[[Tensor], Tensor], least: float) -> Tensor:
    """pi_ref u((r - c) / beta), u the inverse of f', with the c above `least` that gives a sum of
    1: f-DPO, arXiv:2309.16240.
    """
    low, high = least, least + 100.0
    for _ in range(200):
        c = (low + high) / 2
        total = (REFERENCE.exp() * u((REWARDS - c) / BETA)).sum()
        low, high = (c, high) if total > 1 else (low, c)
    return REFERENCE + u((REWARDS - high) / BETA).log()


MOST = float(REWARDS.max())
DIVERGENCES = {
    # f'(u) = -1/u
    "forward_kl": lambda: by_ratio(lambda x: -1 / x, MOST),
    # f'(u) = log(2u / (1 + u)), which is below log 2
    "js": lambda: by_ratio(
        lambda x: x.exp() / (2 - x.exp()), MOST - BETA * float(torch.tensor(2.0).log())
    ),
    # f'(u) = -u^-a / a, with a = 0.5
    "alpha": lambda: by_ratio(lambda x: (-0.5 * x) ** (-1 / 0.5), MOST),
}

OPTIMA = {
    "dpo": Optimum(all_pairs, gibbs),
    "dpo, reference_free": Optimum(all_pairs, without_reference, {"reference_free": True}),
    **{
        f"dpo, {name}": Optimum(
            all_pairs, log_pi, {"divergence": name, "alpha": 0.5 if name == "alpha" else None}
        )
        for name, log_pi in DIVERGENCES.items()
    },
    "ipo": Optimum(all_pairs, by_wins),
    # on labels of which 30 % are flipped: dpo's on the true ones
    "robust": Optimum(lambda: all_pairs(0.3), gibbs, {"label_smoothing": 0.3}),
    # all answers have the same length
    "r_dpo": Optimum(all_pairs, gibbs),
    # means over 2 tokens, so that beta is half of the others'
    "simpo": Optimum(all_pairs, without_reference, {"beta": 2 * BETA, "gamma": 0.0}),
    "cpo": Optimum(all_pairs, without_reference, {"nll": 0.0}),
    # pi_ref 2 E_j[p_ij], whose sum is 1 since half of all answers win: with beta = 1
    "nca_pair": Optimum(all_pairs, lambda: REFERENCE + WINS.log(), {"beta": 1.0}),
    "plackett_luce": Optimum(all_lists, gibbs),
    "softmax_dpo": Optimum(all_lists, gibbs),
    # what is imitated: the targets, and the answers that were chosen
    "sft": Optimum(all_answers, lambda: REWARDS),
    # each label has its prefix; behind the prefix of desirable answers, these are imitated
    "csft": Optimum(all_chosen, lambda: REFERENCE + WINS.log()),
    "nll": Optimum(all_pairs, lambda: REFERENCE + WINS.log()),
}


def tables(log_pi: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of the first token [12], and of the second after each [12, 12]."""
    both = log_pi.view(VOCABULARY, VOCABULARY)
    first = both.logsumexp(1)
    return first, both - first[:, None]


def beside(bound, log_pi: Tensor) -> Tensor | None:
    """Return what a loss reads beside log-probabilities: log sum_v p_v^2, or KL(reference ||
    policy), summed over each answer's two tokens.  [A]
    """
    ours, theirs = tables(log_pi), tables(REFERENCE)
    if bound.reads == "logps_and_squares":
        each = [(2 * log_p.detach()).logsumexp(-1) for log_p in ours]
    elif bound.reads == "logps_and_kl":
        each = [(q.exp() * (q - p)).sum(-1) for p, q in zip(ours, theirs, strict=True)]
    else:
        return None
    return (each[0] + each[1]).repeat_interleave(VOCABULARY)


def loss_of(bound, data: Data, log_pi: Tensor) -> Tensor:
    """Return the expected loss of a policy."""
    k = data.answers.shape[1]
    further = beside(bound, log_pi)
    examples = Responses(
        policy=log_pi[data.answers],
        reference=REFERENCE[data.answers],
        tokens=torch.full_like(data.answers, 2),
        margins=(REWARDS[data.answers[:, 0]] - REWARDS[data.answers[:, k - 1]]).abs(),
        desirable=data.desirable,
        further=None if further is None else further[data.answers],
    )
    return (data.weight * compute(bound, examples).losses).sum()


def minimised(bound, data: Data) -> Tensor:
    """Return log pi [A] of the policy that minimises the expected loss."""
    logits = torch.zeros(VOCABULARY + A, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=2000,
        history_size=50,
        tolerance_grad=1e-8,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = loss_of(bound, data, log_policy(logits))
        loss.backward()
        return loss

    optimizer.step(closure)
    return log_policy(logits.detach())


@pytest.mark.parametrize("case", OPTIMA)
def test_a_loss_with_an_optimum_reaches_it(case):
    name = case.partition(",")[0]
    data, log_pi, knobs = OPTIMA[case]
    given = knobs_of(name)
    given |= ({"beta": BETA} if "beta" in given else {}) | knobs
    optimum = log_pi().log_softmax(0)
    kl = lambda log_p: float((log_p.exp() * (log_p - optimum)).sum())
    assert kl(REFERENCE) > 0.05
    assert kl(minimised(build_loss(given), data())) < REACHED


# ---- all others ----


def drawn(group: str, n: int = 2000) -> Data:
    """Return n examples as data have them: answers drawn from the reference, and their labels."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda p, m: torch.multinomial(p, m, replacement=True, generator=generator)
    i, j = draw(REFERENCE.exp(), n), draw(REFERENCE.exp(), n)
    wins = torch.rand(n, generator=generator) < PREFERS[i, j]
    pairs = torch.where(wins[:, None], torch.stack([i, j], 1), torch.stack([j, i], 1))
    if group == "pair":
        answers, desirable = pairs, wins
    else:
        answers = pairs.T.reshape(-1, 1)
        desirable = torch.arange(2 * n) < n
    return Data(answers, torch.full((len(answers),), 1 / len(answers)), desirable)


def accuracy(scores: Tensor) -> float:
    """Return the share of all pairs of answers that are ranked as the true rewards rank them; a tie
    counts half.
    """
    better = REWARDS[:, None] > REWARDS
    right = (scores[:, None] - scores).sign()[better]
    return float((right + 1).mean() / 2)


REACHING = {case.partition(",")[0] for case in OPTIMA}
# With tau = 0.05 discopop rises from a minimum below h = 0 to a maximum above it: it goes the wrong
# way from the reference (see its docstring). With tau = 1 it falls everywhere.
KNOBS = {"discopop": {"tau": 1.0}}


def learned(bound, n_steps: int = 60) -> tuple[float, float]:
    """Return the accuracy of what a loss calls rewards at the reference, and after training on
    drawn labels.
    """
    data = drawn(bound.group)
    if bound.reads == "scores":
        start = torch.zeros(A, dtype=torch.float64)
        weights = start.clone().requires_grad_()
        values = lambda: weights
    else:
        start = REFERENCE
        table = REFERENCE.view(VOCABULARY, VOCABULARY)
        weights = torch.cat([table.logsumexp(1), table.flatten()]).requires_grad_()
        values = lambda: log_policy(weights)
    rewards = lambda: (values().detach() - start).round(decimals=9)
    before = accuracy(rewards())
    optimizer = torch.optim.Adam([weights], lr=0.03)
    for _ in range(n_steps):
        optimizer.zero_grad()
        loss_of(bound, data, values()).backward()
        optimizer.step()
    return before, accuracy(rewards())


# tests/rollouts/test_gibbs.py has those that learn from samples of the policy itself
@pytest.mark.parametrize("name", sorted(set(LOSSES) - REACHING - set(losses_of("rollout"))))
def test_every_other_loss_learns_to_rank(name):
    """From 0.5 at the reference to 0.65 (apo_down) to 0.86 (reward); 2,000 drawn pairs of 144
    answers do not hold the true order.
    """
    before, after = learned(build_loss(knobs_of(name) | KNOBS.get(name, {})))
    assert before == 0.5 and after > 0.63


def test_discopop_goes_the_wrong_way_from_the_reference():
    _, after = learned(build_loss(knobs_of("discopop")))
    assert after < 0.4


def test_a_loss_with_its_sign_turned_is_found():
    """The comparison can fail: dpo of swapped pairs is nowhere near, and ranks worse."""
    turned = lambda pairs: pairs._replace(chosen=pairs.rejected, rejected=pairs.chosen)
    bound = build_loss(knobs_of("dpo") | {"beta": BETA})
    swapped = replace(bound, compute=lambda p, r, c: bound.compute(turned(p), turned(r), c))
    optimum = gibbs().log_softmax(0)
    log_p = minimised(swapped, all_pairs())
    assert float((log_p.exp() * (log_p - optimum)).sum()) > 1
    assert learned(swapped)[1] < 0.4
