"""Mixtures of losses: the sum by hand, what a mixture needs, and which terms are refused."""

import math

import pytest
import torch
from losses import compute, knobs_of, some
from runs import FAST, records

from plumb.losses.contract import BatchContext, LossOutput, Mean
from plumb.losses.registry import LOSSES, build_loss, loss
from plumb.settings.validation import unusual_values


def term(name, weight=1.0, **knobs):
    return knobs_of(name) | {"weight": weight} | knobs


def mixed(**terms):
    return build_loss({"name": "mix", "terms": terms})


def test_a_mixture_by_hand():
    """Of dpo with beta 0.1 at the reference, log 2 each, and of -log pi(y_w|x) / |y_w|; weights 0.8
    and 0.5. Rewards are those of the first term.
    """
    bound = mixed(preference=term("dpo", 0.8), generation=term("nll", 0.5))
    examples = some(bound)
    examples = examples._replace(reference=examples.policy)
    out = compute(bound, examples)
    generation = -examples.policy[:, 0] / examples.tokens[:, 0]
    torch.testing.assert_close(out.losses, 0.8 * math.log(2) + 0.5 * generation)
    assert out.chosen_rewards.tolist() == out.rejected_rewards.tolist() == [0] * 6
    preference, other = (out.metrics[f"terms/{name}"] for name in ("preference", "generation"))
    torch.testing.assert_close(preference.values, torch.full((6,), math.log(2)).double())
    torch.testing.assert_close(other.values, generation)


def test_a_mixture_needs_what_one_of_its_terms_needs():
    assert mixed(a=term("nll"), b=term("dpo")).needs_reference
    assert not mixed(a=term("nll"), b=term("simpo")).needs_reference
    assert mixed(a=term("kto"), b=term("kto", 2.0)).context_examples == "mismatched"
    assert mixed(a=term("nll"), b=term("dpo")).context is None


@pytest.mark.parametrize(
    "names",
    [
        ("dpo", "ld_dpo"),
        ("ld_dpo", "nll", "simpo"),
        ("wpo", "dpo"),
        ("nll", "tdpo2", "aot"),
        ("unlikelihood", "kto"),
    ],
)
def test_sums_derive_from_what_another_term_reads(names):
    """Of single tokens, of squares, or of the divergence: each term has the loss that it has by
    itself, and the same rewards.
    """
    of = lambda name: term(name, average_over="examples") if name == "unlikelihood" else term(name)
    bound = mixed(**{name: of(name) for name in names})
    given = some(bound)
    alone = [
        compute(build_loss({k: v for k, v in of(name).items() if k != "weight"}), given)
        for name in names
    ]
    out = compute(bound, given)
    torch.testing.assert_close(out.losses, sum(one.losses for one in alone))
    assert bound.live_reference == any(build_loss(knobs_of(n)).live_reference for n in names)
    first = next(one for one in alone if one.chosen_rewards is not None or one.rewards is not None)
    for field in ("chosen_rewards", "rejected_rewards", "rewards"):
        if (expected := getattr(first, field)) is not None:
            torch.testing.assert_close(getattr(out, field), expected)


def test_soft_labels_of_a_mixture():
    """A pair with p = 0.7 at the reference: log 2 of the preference, and 0.7 of the chosen
    response's mean negative log-likelihood with 0.3 of the rejected one's. One without a soft label
    has the chosen one's. dpo's own nll is the same.
    """
    bound = mixed(preference=term("dpo"), generation=term("nll", 2.0))
    assert bound.soft_labels and not mixed(a=term("nll"), b=term("bco_pair")).soft_labels
    given = some(bound, n=2)
    p_chosen = torch.tensor([0.7, math.nan], dtype=torch.float64)
    given = given._replace(reference=given.policy, p_chosen=p_chosen)
    chosen, rejected = (-given.policy / given.tokens).T
    nll = torch.stack([0.7 * chosen[0] + 0.3 * rejected[0], chosen[1]])
    torch.testing.assert_close(compute(bound, given).losses, math.log(2) + 2 * nll)
    for name in ("dpo", "ipo", "cpo"):
        with_nll, without = (
            compute(build_loss(knobs_of(name) | {"nll": x}), given).losses for x in (2.0, 0.0)
        )
        torch.testing.assert_close(with_nll - without, 2 * nll)


def test_what_is_usual_for_a_mixture():
    """By term; a learning rate that is usual for all terms, if there is one."""
    bound = mixed(a=term("dpo"), b=term("nll"))
    assert bound.usual == {"terms.a.beta": (0.01, 0.5), "lr": (3e-7, 5e-6)}
    assert mixed(a=mixed_term()).usual["terms.a.terms.b.beta"] == (0.01, 0.5)
    values = {"terms.a.beta": 20, "lr": 1e-6}
    assert "loss.terms.a.beta=20 (0.01 to 0.5)" in unusual_values(bound, values)
    assert unusual_values(bound, {"terms.a.beta": 0.1, "lr": 1e-6}) == ""


def mixed_term():
    """A mixture as a term."""
    return {"name": "mix", "weight": 1.0, "terms": {"b": term("dpo")}}


def test_a_mixture_of_one_is_its_term():
    for name in ("dpo", "kto", "plackett_luce"):
        alone, bound = build_loss(knobs_of(name)), mixed(it=term(name, 2.0))
        examples = some(alone)
        torch.testing.assert_close(
            compute(bound, examples).losses, 2 * compute(alone, examples).losses
        )


def test_each_term_gets_its_own_context_and_keeps_its_metrics(monkeypatch):
    """Two losses that center the policy's sums by the batch's mean, times 1 and times 10."""
    monkeypatch.setattr("plumb.losses.registry.LOSSES", LOSSES.copy())

    def centred(times):
        def f(policy, reference=None, context=None):
            h = policy.chosen.sum - policy.rejected.sum - context
            return LossOutput(h, metrics={"mean/h": Mean(context.expand_as(h))})

        mean = lambda policy, reference: times * (policy.sum[:, 0] - policy.sum[:, 1]).mean()
        f.__name__ = f"centred{times}"
        loss(group="pair", context=BatchContext("own", mean))(f)

    centred(1)
    centred(10)
    first, second = {"name": "centred1", "weight": 1}, {"name": "centred10", "weight": 1}
    bound = mixed(one=first, ten=second, no=term("nll"))
    examples = some(bound)
    h = examples.policy[:, 0] - examples.policy[:, 1]
    expected = 2 * h - 11 * h.mean() - examples.policy[:, 0] / examples.tokens[:, 0]
    out = compute(bound, examples)
    torch.testing.assert_close(out.losses, expected)
    torch.testing.assert_close(out.metrics["mean/h"].values[0], h.mean())
    torch.testing.assert_close(out.metrics["ten/mean_h"].values[0], 10 * h.mean())


def test_a_context_by_example_is_split_with_the_batch():
    """aot's has a value for each pair, bco_pair's one for the batch."""
    bound = mixed(sorted=term("aot"), quality=term("bco_pair"))
    examples = some(bound)
    rows = torch.tensor([4, 1])
    whole = compute(bound, examples).losses
    torch.testing.assert_close(
        compute(bound, examples.take(rows), examples, rows).losses, whole[rows]
    )


@pytest.mark.parametrize(
    "terms, line",
    [
        ({}, "loss.terms={}: expected a mapping of at least one term"),
        ({"a": 3}, "loss.terms.a=3: expected a loss's knobs, name and weight"),
        ({"a": term("nll", 0)}, "loss.terms.a.weight=0: expected a number above 0"),
        ({"a": term("nll", True)}, "loss.terms.a.weight=True: expected a number above 0"),
        ({"a": term("nll", beta=1)}, "loss.terms.a.beta=1: loss nll has no such knob"),
        ({"a": term("dpo", beta=0)}, "loss.terms.a.beta=0: must be above 0"),
        ({"a": term("nll") | {"name": "no"}}, "loss.terms.a.name=no: no such loss; known: "),
        ({"a-b": term("nll")}, "loss.terms.a-b: a term's name may have letters"),
        (
            {"a": term("dpo"), "b": term("sft")},
            "loss.terms.b: what an example holds is 'single', but 'pair' for loss.terms.a",
        ),
        (
            {"a": term("dpo"), "b": term("reward")},
            "loss.terms.b: what it reads from the model is 'scores', but 'logps' for loss.terms.a",
        ),
        (
            {"a": term("ld_dpo"), "b": term("nll"), "c": term("wpo")},
            "loss.terms.c: what it reads from the model is 'logps_and_squares', but 'token_logps'",
        ),
    ],
)
def test_a_term_that_cannot_be_served_is_refused(terms, line):
    with pytest.raises(ValueError) as error:
        mixed(**terms)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_a_knob_of_a_term_belongs_to_the_term():
    missing = term("dpo")
    del missing["beta"]
    with pytest.raises(ValueError, match=r"^loss.terms.a.beta: loss dpo needs it; add loss.terms"):
        mixed(a=missing)
    with pytest.raises(ValueError, match="loss.beta=1: mix is a mixture of losses"):
        build_loss({"name": "mix", "beta": 1, "terms": {"a": term("nll")}})


def test_each_term_is_logged(train, data):
    """The loss is the weighted sum of what is logged of the terms, in training and evaluation; one
    of them reads single tokens.
    """
    tokenwise = ["+loss@loss.terms.length=ld_dpo", "loss.terms.length.beta=0.1"]
    run = train(
        "run",
        f"datasets=[{data}]",
        *FAST,
        "loss=mix",
        *tokenwise,
        "+loss.terms.length.weight=0.5",
        "loss.terms.generation.weight=2",
        "lr=1e-3",
        "reference=live",
    )
    weights = {"preference": 0.8, "quality": 0.2, "generation": 2, "length": 0.5}
    for part in ("train", "eval"):
        for row in records(run, part):
            weighted = (weight * row[f"terms_{part}/{name}"] for name, weight in weights.items())
            assert row[f"loss/{part}"] == pytest.approx(sum(weighted), rel=1e-5)
