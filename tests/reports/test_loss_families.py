"""What the report takes a loss's numbers for, derived from the loss; advice that exists for it."""

import math

import pytest
import torch
from losses import compute, knobs_of, some
from made_up_runs import ALWAYS, falling, run

from plumb.losses.registry import LOSSES, build_loss
from plumb.reports.diagnosis import diagnose, family_of
from plumb.reports.loss_families import Family
from plumb.runs.loss_of_run import loss_of_run

MIX = {
    "name": "mix",
    "terms": {
        "preference": knobs_of("dpo") | {"weight": 0.8},
        "generation": knobs_of("nll") | {"weight": 1.0},
    },
}


def family(name, **knobs):
    return Family(build_loss(knobs_of(name) | knobs))


@pytest.mark.parametrize(
    ("given", "summed", "beta", "own_likelihood"),
    [
        (family("dpo"), True, 0.1, False),
        (family("dpo", normalize="token"), False, None, False),
        (family("dpo", reference_free=True), True, None, True),
        (family("ipo", beta=0.5), True, 0.5, False),
        (family("simpo"), False, None, True),
        (family("orpo"), False, None, True),
        (family("cpo"), True, None, True),
        (family("slic"), True, None, True),
        (family("ld_dpo"), True, None, False),
        (family("tdpo2"), True, 0.1, False),
        (family("aot"), True, 0.1, False),
        (family("reward"), False, None, False),
        (family("kto"), True, 0.1, False),
        (family("bco"), True, 0.1, False),
        (family("plackett_luce"), True, 0.1, False),
        (family("csft"), False, None, False),
        (family("sft"), False, None, False),
        (Family(build_loss(MIX)), True, 0.1, False),
        (Family(None), False, None, False),
    ],
    ids=lambda x: (x.loss.name if x.loss else "unknown") if isinstance(x, Family) else None,
)
def test_what_rewards_are(given, summed, beta, own_likelihood):
    assert given.summed() == summed
    assert given.beta() == (None if beta is None else pytest.approx(beta))
    assert given.own_likelihood() == own_likelihood


def test_what_is_left_of_a_pair_s_pull():
    """dpo: sigmoid(-10) / sigmoid(0). cDPO with e = 0.1 pulls back: (0.1 - sigmoid(-10)) / 0.4.
    ipo with beta 0.1 has its target at h = 5, and a reward margin of 10 is h = 100: 95 / 5. hinge:
    nothing is left beyond a margin of 1. The loss of a single response has no margin.
    """
    pull = lambda name, **knobs: family(name, **knobs).pull(10.0)
    assert pull("dpo") == pytest.approx(2 / (1 + math.exp(10)), rel=1e-3)
    assert pull("dpo", label_smoothing=0.1) == pytest.approx(0.1 / 0.4, rel=1e-3)
    assert pull("ipo") == pytest.approx(19, rel=1e-3)
    assert pull("hinge") == 0
    assert pull("reward") == pytest.approx(pull("dpo"), rel=1e-3)
    assert pull("plackett_luce") == pytest.approx(pull("dpo"), rel=1e-3)
    assert pull("bco_pair") == pytest.approx(2 / (1 + math.exp(5)), rel=1e-3)
    assert pull("kto") is None and Family(None).pull(10.0) is None


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_each_loss_with_rewards_says_what_they_are(name):
    bound = build_loss(knobs_of(name))
    out = compute(bound, some(bound))
    rewarded = out.chosen_rewards is not None or out.rewards is not None
    assert bool(bound.rewards) == rewarded == bool(Family(bound).meanings())
    assert bound.values_of("nosuch") == {} and Family(bound).pull(1e-3) != math.inf


def test_what_a_page_says_of_rewards():
    assert family("simpo").meanings()[0] == "Rewards: beta log pi(y|x) / |y|."
    said = " ".join(family("kto").meanings())
    assert "of the desirable responses (chosen)" in said and "right side of z0" in said
    assert "the best response" in " ".join(family("plackett_luce").meanings())
    assert "no reference" in " ".join(family("cpo").meanings())


# ---- the rules ----


def found(loss, **changed):
    """Return {title: finding} for a run with this loss."""
    return {f.title: f for f in diagnose(run(config={"loss": loss}, **changed))}


FALLS = {"held_out": {"logps_{}/chosen": falling(-59, -95)}}
BY_HEART = {
    "train": {"rewards_{}/accuracies": ALWAYS(1.0)},
    "held_out": {"rewards_{}/accuracies": ALWAYS(0.7)},
}
ADVICE = ("loss.nll=1", "label_smoothing", "larger loss.beta")


@pytest.mark.parametrize(
    ("name", "advised"),
    [
        ("dpo", ADVICE),
        ("ipo", ADVICE),
        ("robust", ADVICE[1:]),
        ("simpo", ("loss.nll=1",)),
        ("orpo", ()),
        ("cpo", ADVICE[:2]),
        ("kto", ("larger loss.beta",)),
        ("bco", ("larger loss.beta",)),
        ("plackett_luce", ("larger loss.beta",)),
        ("reward", ("label_smoothing",)),
        ("of_a_plugin", ()),
    ],
)
def test_advice_is_of_knobs_that_the_loss_has(name, advised):
    loss = knobs_of(name) if name in LOSSES else {"name": name, "beta": 0.1}
    remedies = found(loss, **FALLS)["The chosen answers become less likely"].remedy
    remedies += found(loss, **BY_HEART)["Training pairs are memorized"].remedy
    assert tuple(advice for advice in ADVICE if advice in remedies) == tuple(advised)


def test_a_mixture_is_advised_by_its_terms():
    remedy = found(MIX, **FALLS)["The chosen answers become less likely"].remedy
    assert "a larger loss.terms.preference.beta" in remedy
    assert "loss.terms.preference.nll=1" in remedy


def test_labelled_responses_have_a_margin_too():
    """kto logs no margins: the rewards of desirable and undesirable responses move apart."""
    changed = {"held_out": FALLS["held_out"] | {"rewards_{}/margins": None}}
    evidence = found(knobs_of("kto"), **changed)["The chosen answers become less likely"].evidence
    assert "while the margin went 0 -> 1.1" in evidence


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dpo", "the chosen response wins in 40% of the held-out pairs; below chance"),
        ("kto", "40% of the held-out responses are on their side of the reference point"),
        ("plackett_luce", "the best response wins against the worst in 40% of the held-out lists"),
        ("simpo", "the chosen response wins in 40% of the held-out pairs; below chance"),
        ("cpo", "wins in 40% of the held-out pairs; without a reference, sums of log-prob"),
    ],
)
def test_an_accuracy_at_chance(name, words):
    changed = {"held_out": {"rewards_{}/accuracies": ALWAYS(0.4)}}
    assert words in found(knobs_of(name), **changed)["Held-out accuracy at chance"].evidence


@pytest.mark.parametrize(
    ("loss", "biased", "advice"),
    [
        (knobs_of("dpo"), True, "loss.normalize=token"),
        (knobs_of("kto"), True, "a loss whose rewards are means per token"),
        (knobs_of("dpo") | {"normalize": "token"}, False, ""),
        (knobs_of("simpo"), False, ""),
    ],
)
def test_length_is_blamed_on_summed_rewards_alone(loss, biased, advice):
    texts = ("To {prompt}, be slow.", "To {prompt}, be slow, careful, kind, whoever asks for it.")
    finding = found(loss, texts=texts)["Samples grow longer"]
    assert ("rewards are sums over tokens" in finding.evidence) == biased
    assert ("per token" in finding.remedy or "=token" in finding.remedy) == biased
    assert advice in finding.remedy


def test_margins_explode_where_nothing_is_left_to_learn():
    changed = {"train": {"rewards_{}/margins": falling(0, 36)}}
    assert "label_smoothing" in found(knobs_of("dpo"), **changed)["Margins explode"].remedy
    simpo = found(knobs_of("simpo"), **changed)["Margins explode"]
    assert "label_smoothing" not in simpo.remedy
    # of a margin in nats, whose loss still holds the chosen response
    assert "Margins explode" not in found(knobs_of("slic"), **changed)
    assert "Margins explode" not in found(knobs_of("ipo"), **changed)
    assert "Margins explode" in found({"name": "of_a_plugin"}, **changed)


# ---- the loss of a run ----


def test_an_older_run_has_the_knobs_that_it_did_not_record():
    assert loss_of_run({"loss": {"name": "dpo", "beta": 0.3}}).knobs["divergence"] == "reverse_kl"
    assert family_of(run(config={"loss": {"name": "dpo", "beta": 0.3}})).beta() == pytest.approx(
        0.3
    )
    for config in ({}, {"loss": None}, {"loss": {"name": "../config"}}, {"loss": {"name": "dpo"}}):
        with pytest.raises(ValueError, match="^loss"):
            loss_of_run(config)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_rewards_are_those_of_the_responses_alone(name):
    """Whatever the batch, the labels and the data's margins: score.py asks for those of others."""
    bound = build_loss(knobs_of(name))
    given = some(bound)
    rows = torch.tensor([4, 1])
    changed = given._replace(margins=3 * given.margins, desirable=~given.desirable).take(rows)
    alone, within = compute(bound, changed), compute(bound, given.take(rows), given, rows)
    for field in ("chosen_rewards", "rejected_rewards", "rewards"):
        ours, theirs = getattr(alone, field), getattr(within, field)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)
