"""Losses on pairs: the papers' gradients, limits that join one loss to another, refused knobs."""

import math

import pytest
import torch
from losses import compute, knobs_of, some

from plumb.losses.registry import build_loss


def bound_to(name, **knobs):
    return build_loss(knobs_of(name) | knobs)


def gradients(bound, given):
    """Return the losses' gradients for chosen and rejected log-probabilities, and the output."""
    policy = given.policy.clone().requires_grad_()
    out = compute(bound, given._replace(policy=policy))
    (gradient,) = torch.autograd.grad(out.losses.sum(), policy)
    return gradient[:, 0], gradient[:, 1], out


def losses(bound, given):
    return compute(bound, given).losses


def margins_of(given):
    ratios = given.policy - given.reference
    return ratios[:, 0] - ratios[:, 1]


same = torch.testing.assert_close


# ---- the papers' gradients ----


def test_robust_gradient():
    """-beta zeta (grad log pi(y_w) - grad log pi(y_l)), zeta = ((1-e) sigmoid(-beta h) + e
    sigmoid(beta h)) / (1 - 2e) (section 3.2 of arXiv:2403.00409).
    """
    bound = bound_to("robust", label_smoothing=0.2)
    given = some(bound)
    chosen, rejected, _ = gradients(bound, given)
    z = 0.1 * margins_of(given)
    zeta = (0.8 * torch.sigmoid(-z) + 0.2 * torch.sigmoid(z)) / 0.6
    same(chosen, -0.1 * zeta)
    same(rejected, 0.1 * zeta)


def test_orpo_gradient():
    """Of the odds ratio: -delta h, delta = 1 / (1 + odds_w / odds_l), h_w = 1 / (1 - p_w), both
    times 1 / |y| (the gradient of arXiv:2403.07691).
    """
    bound = bound_to("orpo", beta=0.7)
    given = some(bound)
    chosen, rejected, _ = gradients(bound, given)
    p = (given.policy / given.tokens).exp()
    odds = p / (1 - p)
    delta = 1 / (1 + odds[:, 0] / odds[:, 1])
    each = 1 / (1 - p) / given.tokens
    same(chosen, -1 / given.tokens[:, 0] - 0.7 * delta * each[:, 0])
    same(rejected, 0.7 * delta * each[:, 1])


def test_alphapo_gradient():
    """-beta s (p_w^-a grad log p_w - p_l^-a grad log p_l), s = sigmoid(r_l - r_w + gamma), p the
    mean per token (arXiv:2501.03884).
    """
    bound = bound_to("alphapo", beta=2.0, alpha=0.25)
    given = some(bound)
    chosen, rejected, out = gradients(bound, given)
    s = torch.sigmoid(out.rejected_rewards - out.chosen_rewards + 0.5)
    each = (-0.25 * given.policy / given.tokens).exp() / given.tokens
    same(chosen, -2 * s * each[:, 0])
    same(rejected, 2 * s * each[:, 1])


def test_f_dpo_gradient():
    """d loss / d log pi(y) = -+ beta sigmoid(-z) u f''(u), with u f''(u) = 1/u (forward KL), 1 / (1
    + u) (Jensen-Shannon), u^-a (alpha).
    """
    for divergence, weight, f_prime in (
        ("forward_kl", lambda u: 1 / u, lambda u: -1 / u),
        ("js", lambda u: 1 / (1 + u), lambda u: torch.log(2 * u / (1 + u))),
        ("alpha", lambda u: u**-0.3, lambda u: -(u**-0.3) / 0.3),
    ):
        bound = bound_to("dpo", divergence=divergence, alpha=0.3 if divergence == "alpha" else None)
        given = some(bound)
        chosen, rejected, out = gradients(bound, given)
        u = (given.policy - given.reference).exp()
        z = 0.1 * (f_prime(u[:, 0]) - f_prime(u[:, 1]))
        same(out.losses, torch.log1p(torch.exp(-z)))
        same(chosen, -0.1 * torch.sigmoid(-z) * weight(u[:, 0]))
        same(rejected, 0.1 * torch.sigmoid(-z) * weight(u[:, 1]))


# ---- limits, and what one loss has to do with another ----


@pytest.mark.parametrize(
    "name, limit",
    [
        ("dpo", math.log(2)),
        ("robust", math.log(2)),
        ("hinge", 1),
        ("cpo", math.log(2)),
        ("simpo", math.log(2)),
        ("alphapo", math.log(2)),
        ("discopop", 0.5 * math.log(2) + 0.5),
        ("nca_pair", 2 * math.log(2)),
        ("apo_zero", 1),
        ("apo_down", 1),
        ("dpop", math.log(2)),
        ("bco_pair", 2 * math.log(2)),
        ("aot", math.log(2)),
        ("aot_unpaired", math.log(2)),
    ],
)
def test_beta_to_0_compares_nothing(name, limit):
    """Every pair has the loss of h = 0."""
    at_0 = {"beta": 1e-9, "gamma": 0, "nll": 0.0}
    bound = build_loss({k: at_0.get(k, v) for k, v in knobs_of(name).items()})
    found = losses(bound, some(bound))
    same(found, torch.full_like(found, limit))


def test_alpha_joins_reverse_and_forward_kl():
    given = some(bound_to("dpo"))
    alpha = lambda a: losses(bound_to("dpo", divergence="alpha", alpha=a), given)
    same(alpha(1e-7), losses(bound_to("dpo"), given))
    same(alpha(1 - 1e-9), losses(bound_to("dpo", divergence="forward_kl"), given))
    by_alpha = lambda a: losses(bound_to("alphapo", beta=2.0, alpha=a), given)
    same(by_alpha(1e-8), by_alpha(0))
    same(by_alpha(0), losses(bound_to("simpo", beta=2.0), given))


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_means_of_equal_lengths_are_sums_with_another_beta(name):
    """Of 4 tokens each: h is a quarter, so beta is four times; IPO is then 16 times smaller."""
    given = some(bound_to(name))
    given = given._replace(tokens=torch.full_like(given.tokens, 4))
    by_token = losses(bound_to(name, beta=0.4, normalize="token"), given)
    scale = 16 if name == "ipo" else 1
    same(scale * by_token, losses(bound_to(name, beta=0.1), given))


def test_means_ignore_length():
    """A response that is twice as long at the same mean changes nothing."""
    for name in ("dpo", "ipo"):
        bound = bound_to(name, normalize="token")
        given = some(bound)
        longer = given._replace(
            policy=2 * given.policy, reference=2 * given.reference, tokens=2 * given.tokens
        )
        same(losses(bound, longer), losses(bound, given))


def test_robust_is_unbiased():
    """(1-e) robust(h) + e robust(-h) is dpo(h): what flipped labels give in expectation."""
    bound = bound_to("robust", label_smoothing=0.3)
    given = some(bound)
    flipped = given._replace(policy=given.policy.flip(1), reference=given.reference.flip(1))
    expected = 0.7 * losses(bound, given) + 0.3 * losses(bound, flipped)
    same(expected, losses(bound_to("dpo"), given))


def test_exo_is_least_where_the_policy_prefers_as_the_labels_do():
    """At h = log((1-e) / e) / beta it is 0, with gradient 0."""
    bound = bound_to("exo_pair", label_smoothing=0.1)
    h = math.log(9) / 0.1
    given = some(bound)
    at = given._replace(reference=given.policy - torch.tensor([h, 0.0]))
    chosen, rejected, out = gradients(bound, at)
    for zero in (chosen, rejected, out.losses):
        same(zero, torch.zeros_like(zero), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "name, knobs",
    [
        ("robust", {"label_smoothing": 0}),
        ("dpop", {"penalty": 0}),
        ("odpo", {"alpha": 0}),
        ("r_dpo", {"alpha": 0}),
        ("beta_dpo", {"alpha": 0}),
    ],
)
def test_without_its_knob_a_loss_is_dpo(name, knobs):
    given = some(bound_to("dpo"))
    same(losses(bound_to(name, **knobs), given), losses(bound_to("dpo"), given))


def test_far_below_its_threshold_beta_dpo_has_the_least_beta():
    bound = bound_to("beta_dpo", threshold=1000.0, least_beta=0.02)
    given = some(bound)
    same(losses(bound, given), losses(bound_to("dpo", beta=0.02), given))


def test_equal_lengths_and_margins_of_1_leave_dpo():
    given = some(bound_to("dpo"))
    equal = given._replace(tokens=torch.full_like(given.tokens, 3), margins=given.margins * 0 + 1)
    for name in ("r_dpo", "odpo"):
        same(losses(bound_to(name), equal), losses(bound_to("dpo"), equal))


def test_a_margin_of_0_asks_for_nothing():
    """With the logarithm, its pair costs nothing; all is finite."""
    bound = bound_to("odpo")
    given = some(bound)
    chosen, rejected, out = gradients(bound, given._replace(margins=given.margins * 0))
    for zero in (chosen, rejected, out.losses):
        same(zero, torch.zeros_like(zero), atol=1e-4, rtol=0)


def test_aot_is_the_sorted_objective():
    """The sum over the batch is that of the sorted margins, and its gradient that of sorting."""
    for name in ("aot", "aot_unpaired"):
        bound = bound_to(name, label_smoothing=0.1)
        given = some(bound, n=50)
        policy = given.policy.clone().requires_grad_()
        if name == "aot":
            difference = lambda values: values[:, 0] - values[:, 1]
            upper, lower = difference(policy), difference(given.reference)
        else:
            upper, lower = (policy - given.reference).unbind(1)
        z = 0.1 * (upper.sort().values - lower.sort().values)
        expected = (0.9 * torch.log1p(torch.exp(-z)) + 0.1 * torch.log1p(torch.exp(z))).sum()
        (sorted_gradient,) = torch.autograd.grad(expected, policy)
        chosen, rejected, out = gradients(bound, given)
        same(out.losses.sum(), expected.detach())
        same(torch.stack([chosen, rejected], 1), sorted_gradient)


def test_apo_gradients():
    """Zero: -beta s(r_w) grad log pi(y_w) + beta s(r_l) grad log pi(y_l), s = sigmoid (1 -
    sigmoid). Down: the chosen response is pulled down as well (Table 1 of arXiv:2408.06266).
    """
    s = lambda r: torch.sigmoid(r) * torch.sigmoid(-r)
    for name in ("apo_zero", "apo_down"):
        bound = bound_to(name)
        chosen, rejected, out = gradients(bound, some(bound))
        r_w, r_l = out.chosen_rewards, out.rejected_rewards
        if name == "apo_zero":
            same(chosen, -0.1 * s(r_w))
            same(rejected, 0.1 * s(r_l))
        else:
            same(chosen, 0.1 * s(r_w) - 0.1 * s(r_w - r_l))
            same(rejected, 0.1 * s(r_w - r_l))


def test_nca_gradient():
    """-beta (sigmoid(-r_w) - sigmoid(r_w) / 2) for the chosen response, beta sigmoid(r_l) / 2 for
    the rejected one: the chosen one rises until r_w = log 2.
    """
    bound = bound_to("nca_pair")
    chosen, rejected, out = gradients(bound, some(bound))
    same(
        chosen, -0.1 * (torch.sigmoid(-out.chosen_rewards) - torch.sigmoid(out.chosen_rewards) / 2)
    )
    same(rejected, 0.1 * torch.sigmoid(out.rejected_rewards) / 2)


def test_dpop_gradient():
    """-beta s (1 + c) for a chosen response below the reference, -beta s for one above (section 3
    of arXiv:2402.13228), s = sigmoid(-z).
    """
    bound = bound_to("dpop", penalty=3.0)
    given = some(bound)
    chosen, rejected, out = gradients(bound, given)
    s = 1 - torch.exp(-out.losses)
    below = given.policy[:, 0] < given.reference[:, 0]
    assert 0 < below.sum() < len(below)
    same(chosen, -0.1 * s * torch.where(below, 4.0, 1.0).to(s))
    same(rejected, 0.1 * s)


# ---- refused knobs ----


@pytest.mark.parametrize(
    "name, knobs, line",
    [
        ("dpo", {"alpha": 0.5}, "loss.alpha=0.5: only divergence=alpha uses it"),
        ("dpo", {"divergence": "alpha"}, "loss.alpha=None: divergence=alpha needs a number"),
        ("dpo", {"divergence": "alpha", "alpha": 1}, "loss.alpha=1: divergence=alpha needs"),
        (
            "dpo",
            {"divergence": "js", "normalize": "token"},
            "loss.divergence=js: .*normalize=token",
        ),
        ("dpo", {"divergence": "js", "reference_free": True}, "divergence=js: .*reference_free"),
        ("dpo", {"divergence": "kl"}, "loss.divergence=kl: expected one of reverse_kl, forward"),
        ("dpo", {"alpha": "x"}, "loss.alpha=x: expected a number or null"),
        ("ipo", {"normalize": "mean"}, "loss.normalize=mean: expected one of sum, token"),
        ("robust", {"label_smoothing": 0.5}, "loss.label_smoothing=0.5: "),
        ("exo_pair", {"label_smoothing": 0}, "loss.label_smoothing=0: must be above 0"),
        ("discopop", {"tau": 2}, "loss.tau=2: must be at most 1"),
        ("simpo", {"label_smoothing": 0.1}, "loss.label_smoothing=0.1: loss simpo has no such"),
        ("hinge", {"label_smoothing": 0.1}, "loss.label_smoothing=0.1: loss hinge has no such"),
        ("slic", {"delta": 0}, "loss.delta=0: must be above 0"),
        ("cpo", {"nll": -1}, "loss.nll=-1: must not be negative"),
        ("orpo", {"beta": 0}, "loss.beta=0: must be above 0"),
        ("dpop", {"penalty": -1}, "loss.penalty=-1: must not be negative"),
        ("odpo", {"offset": "square"}, "loss.offset=square: expected one of log, linear"),
        ("beta_dpo", {"alpha": -1}, "loss.alpha=-1: must not be negative"),
        ("beta_dpo", {"least_beta": 0}, "loss.least_beta=0: must be above 0"),
        ("aot", {"label_smoothing": 0.6}, "loss.label_smoothing=0.6: "),
    ],
)
def test_a_knob_out_of_range_or_without_use(name, knobs, line):
    with pytest.raises(ValueError, match=line):
        bound_to(name, **knobs)


# ---- soft labels ----


@pytest.mark.parametrize("name", ["dpo", "ipo", "cpo"])
def test_a_soft_label_is_the_label_smoothing_of_its_pair(name):
    """p_chosen of 0.9 and of 0.2, and a pair without one: e = 0.1, 0.8 and the knob's 0.3. The
    likelihood is that of the preferred response, which the rejected one is with 0.1 and 0.8.
    """
    bound = bound_to(name, label_smoothing=0.3)
    assert bound.soft_labels
    given = some(bound, n=3)
    p = torch.tensor([0.9, 0.2, math.nan], dtype=torch.float64)
    soft = losses(bound, given._replace(p_chosen=p))
    flipped = given._replace(policy=given.policy.flip(1), reference=given.reference.flip(1))
    at_0 = {"label_smoothing": 0, "nll": 0.0}
    right, wrong = (losses(bound_to(name, **at_0), x) for x in (given, flipped))
    e = torch.tensor([0.1, 0.8, 0.3], dtype=torch.float64)
    of_chosen, of_rejected = -(given.policy / given.tokens).T
    flipped_label = torch.tensor([0.1, 0.8, 0.0], dtype=torch.float64)
    likelihood = (1 - flipped_label) * of_chosen + flipped_label * of_rejected
    same(soft, (1 - e) * right + e * wrong + knobs_of(name)["nll"] * likelihood)
