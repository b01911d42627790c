"""DPO on the bandit of test_gibbs.py, on pairs with Bradley-Terry labels: of answers to the
reference, which stay (offline), or to the policy as it is, drawn anew for each step (online). Both
arrive at pi_ref exp(r / beta).

All 144^2 pairs are in every step, each as often as it occurs, so that nothing is left to chance.
"""

import pytest
import torch
from bandit import (
    BETA,
    REACHED,
    REFERENCE,
    REWARDS,
    RIGHT,
    A,
    Broken,
    by_token,
    distance,
    gibbs,
    log_policy,
    natural_step,
    tables,
    to_learn,
)
from losses import knobs_of
from torch import Tensor

from plumb.losses.contract import Logps, Pairs
from plumb.losses.registry import build_loss

FIRST, SECOND = torch.cartesian_prod(torch.arange(A), torch.arange(A)).T
BRADLEY_TERRY = torch.sigmoid(REWARDS[FIRST] - REWARDS[SECOND])


def expected_loss(
    both: tuple[Tensor, Tensor], drawn: Tensor, broken: Broken, labels: Tensor, reference: Tensor
) -> Tensor:
    """Return the mean loss of the policy in two tables, over pairs of answers that are drawn with
    log-probabilities `drawn` [A]. `labels`: the probability that the first of two is preferred.
    """
    bound = build_loss(knobs_of("dpo") | {"beta": BETA})
    log_p = by_token(*(x.log_softmax(-1) for x in both))
    pairs = [
        pairs_of(of_model.view(2, A)[: broken.mask].sum(0), broken.sign)
        for of_model in (log_p, by_token(*tables(reference)))
    ]
    weights = (drawn[FIRST] + drawn[SECOND]).exp() * labels
    return (bound.compute(*pairs).losses * weights).sum()


def learned(
    online: bool,
    broken: Broken = RIGHT,
    labels: Tensor = BRADLEY_TERRY,
    reference: Tensor = REFERENCE,
    n_steps: int = 160,
) -> Tensor:
    """Return log pi [A]: online after n_steps policies, each of which draws its own pairs; offline
    after as many steps of L-BFGS at most, on pairs that the reference draws.
    """
    both = to_learn(*tables(REFERENCE))
    if not online:
        optimizer = torch.optim.LBFGS(
            both,
            max_iter=n_steps,
            tolerance_grad=1e-9,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = expected_loss(both, REFERENCE, broken, labels, reference)
            loss.backward()
            return loss

        optimizer.step(closure)
        return log_policy(*(x.detach() for x in both))
    for _ in range(n_steps):
        both = to_learn(*both)
        drawn = log_policy(*(x.detach() for x in both))
        expected_loss(both, drawn, broken, labels, reference).backward()
        # the Hessian of a pair is beta^2 p (1 - p), and p (1 - p) is 1/4 at most
        natural_step(both, 2 / BETA**2)
    return log_policy(*(x.detach() for x in both))


def pairs_of(log_pi: Tensor, sign: float) -> Pairs:
    """Return all pairs; with sign -1, each with its label turned round."""
    chosen, rejected = (FIRST, SECOND) if sign > 0 else (SECOND, FIRST)
    tokens = torch.full((len(FIRST),), 2)
    return Pairs(Logps(log_pi[chosen], tokens), Logps(log_pi[rejected], tokens))


EACH = pytest.mark.parametrize("online", [False, True])


@EACH
def test_the_gibbs_policy_is_reached(online):
    assert distance(REFERENCE, gibbs()) > 2
    assert distance(learned(online), gibbs()) < 10 * REACHED


@EACH
@pytest.mark.parametrize("broken", [Broken(sign=-1.0), Broken(mask=1)])
def test_what_is_broken_is_found(online, broken):
    assert not distance(learned(online, broken, n_steps=20), gibbs()) < 0.1


@EACH
def test_a_reference_at_another_temperature_is_found(online):
    """As if its log-probabilities had been divided, and the policy's not."""
    warm = (REFERENCE / 0.7).log_softmax(0)
    reached = learned(online, reference=warm)
    assert distance(reached, gibbs()) > 0.02
    assert distance(reached, warm + REWARDS / BETA) < 10 * REACHED


def test_best_against_worst_has_no_optimum():
    """The better answer is preferred with certainty, by however little, so no margin is enough:
    the policy goes on moving away from the reference.
    """
    certain = (REWARDS[FIRST] > REWARDS[SECOND]).double() + 0.5 * (FIRST == SECOND)
    early, late = (learned(True, labels=certain, n_steps=n) for n in (20, 60))
    assert distance(early, gibbs()) > 0.7
    assert distance(late, REFERENCE) > distance(early, REFERENCE) + 0.05
