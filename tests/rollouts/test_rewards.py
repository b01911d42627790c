"""Rewards: rules by hand, weights and penalties, a plugin's functions, models, and what is said of
bad ones.
"""

import json

import numpy as np
import pytest
import torch
from runs import run_of
from tiny import save_tiny_llama
from transformers import AutoModelForCausalLM

from plumb.data.rows import Row
from plumb.errors import UserError
from plumb.models.find import find_model
from plumb.rollouts import rewards
from plumb.rollouts.answered import Answered
from plumb.rollouts.reward_rules import rule
from plumb.rollouts.rewards import RunningScale, build_rewards
from plumb.scoring.scorers import knobs_of, load_scorer


def answered(response, target="", n_tokens=4, ended="eos", prompt="2 + 2 =", source="sums.jsonl:1"):
    return Answered(
        prompt=prompt,
        response=response,
        target=target,
        n_tokens=n_tokens,
        ended=ended,
        source=source,
    )


# ---- rules ----


@pytest.mark.parametrize(
    ("spec", "given", "expected"),
    [
        ("length=8", answered("", n_tokens=8), 0),
        ("length=8", answered("", n_tokens=6), -0.25),
        ("length:8", answered("", n_tokens=6), -0.25),
        ("contains:a=b:c", answered("so a=b:c."), 1),
        ("length=8", answered("", n_tokens=40), -1),
        (r"regex=^\s*\d+$", answered(" 12"), 1),
        (r"regex=^\s*\d+$", answered("twelve"), 0),
        ("exact", answered(" a  b\n", target="a b"), 1),
        ("exact", answered("a c", target="a b"), 0),
        ("number", answered("so 3 + 4 = 1,007.", target="#### 1007"), 1),
        ("number", answered("7 it is, not 8", target="7"), 0),
        ("number", answered("-1.5e-3", target="-0.0015"), 1),
        ("number", answered("none", target="none"), 0),
        ("json", answered('{"a": [1]}'), 1),
        ("json", answered('```json\n{"a": 1}\n```'), 1),
        ("json", answered('{"a": '), 0),
        ("rule:contains=Thank", answered("I thank you"), 1),
        ("shorter", answered("1234"), -4),
    ],
)
def test_rules_by_hand(spec, given, expected):
    assert rule(spec, "rule")(given) == expected


SCHEMA = {
    "type": "object",
    "required": ["name"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]+$", "maxLength": 5},
        "age": {"type": ["integer", "null"], "minimum": 0},
        "kind": {"enum": ["cat", "dog"]},
        "toys": {"type": "array", "items": {"type": "number"}, "maxItems": 2},
    },
}


@pytest.mark.parametrize(
    ("value", "fits"),
    [
        ({"name": "tom", "age": 3, "kind": "cat", "toys": [1, 2.5]}, True),
        ({"name": "tom", "age": None}, True),
        ({"age": 3}, False),
        ({"name": "Tom"}, False),
        ({"name": "thomas"}, False),
        ({"name": "tom", "age": -1}, False),
        ({"name": "tom", "age": True}, False),
        ({"name": "tom", "kind": "cow"}, False),
        ({"name": "tom", "toys": ["ball"]}, False),
        ({"name": "tom", "toys": [1, 2, 3]}, False),
        ({"name": "tom", "tail": 1}, False),
        (["tom"], False),
    ],
)
def test_a_schema(tmp_path, value, fits):
    file = tmp_path / "cat.json"
    file.write_text(json.dumps(SCHEMA))
    assert rule(f"json={file}", "rule")(answered(json.dumps(value))) == fits


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("polite", "r.rule=polite: no such rule; give one of length=TOKENS, regex=PATTERN"),
        ("exact=4", "r.rule=exact=4: no such rule"),
        ("length=0", "r.rule=length=0: expected a number of tokens"),
        ("regex=(", r"r.rule=regex=\(: not a regular expression"),
        ("json=nosuch.json", "r.rule=json=nosuch.json: cannot be read"),
    ],
)
def test_a_rule_that_is_refused(spec, line):
    with pytest.raises(UserError, match=f"^{line}"):
        rule(spec, "r.rule")


@pytest.mark.parametrize(
    ("schema", "line"),
    [
        ({"properties": {"a": {"oneOf": []}}}, "its keyword 'oneOf' is not supported"),
        ({"type": "text"}, "type 'text' is none of object, array"),
        ([], "a schema is a JSON object"),
        ({"additionalProperties": {}}, "additionalProperties must be true or false"),
    ],
)
def test_a_schema_that_would_be_ignored_is_refused(tmp_path, schema, line):
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(schema))
    with pytest.raises(UserError, match=line):
        rule(f"json={file}", "rule")


# ---- terms, bounds, penalties ----

TWO = {"right": {"rule": "exact", "weight": 3}, "brief": {"rule": "length=4", "weight": 0.5}}


def test_terms_are_weighed_bounded_and_less_the_penalties():
    """3 * 1 + 0.5 * 0 = 3, within 2; 0 + 0.5 * -1, which did not end; 3 - 0.25 and 2, less half."""
    made = build_rewards(
        {
            "terms": TWO,
            "clip": 2.0,
            "missing_eos": 1.0,
            "overlong": {"free": 4, "most": 8, "penalty": 1.0},
        }
    )
    given = [
        answered("4", "4"),
        answered("5", "4", n_tokens=8, ended="length"),
        answered("4", "4", n_tokens=6),
    ]
    measured = made(given)
    assert measured.raw.tolist() == [3, -0.5, 2.75]
    assert measured.final.tolist() == [2, -0.5 - 1 - 1, 2 - 0.5]
    assert measured.terms["right"].tolist() == [1, 0, 1]
    assert made([]).final.shape == (0,)


def test_a_score_without_the_end_takes_the_place_of_the_sum():
    """Before the bound and the scale; what was scored is kept."""
    given = [answered("4", "4"), answered("4", "4", n_tokens=8, ended="length")]
    measured = build_rewards({"terms": TWO, "without_eos": -1.0})(given)
    assert measured.raw.tolist() == [3, 2.5] and measured.final.tolist() == [3, -1]
    bounded = build_rewards({"terms": TWO, "without_eos": -1.0, "clip": 0.5})(given)
    assert bounded.final.tolist() == [0.5, -0.5]
    scaled = build_rewards({"terms": TWO, "without_eos": -1.0, "scale": "running"})(given)
    assert scaled.final.tolist() == [1, -1]


def test_a_running_scale_is_that_of_all_rewards_so_far():
    """In three parts, with the state kept between them; equal rewards become 0."""
    values = np.random.default_rng(0).normal(3.0, 2.0, 30)
    scale = RunningScale()
    for part in np.split(values, [1, 12]):
        kept = scale.tensor()
        scale = RunningScale()
        scale.restore(kept)
        last = scale(part)
    np.testing.assert_allclose(last, (values[12:] - values.mean()) / values.std())
    assert RunningScale()(np.ones(3)).tolist() == [0, 0, 0]
    made = build_rewards({"terms": TWO, "scale": "running"})
    assert made([answered("4", "4")] * 2).final.tolist() == [0, 0]
    terms = {"right": np.array([1.0]), "brief": np.array([0.0])}
    for learns, count in ((False, 2), (True, 3)):
        made.combine(terms, [answered("4", "4")], learns)
        assert made.scale.count == count


# ---- a plugin's functions ----


@pytest.fixture
def plugin(monkeypatch):
    monkeypatch.setattr(rewards, "REWARDS", {})

    @rewards.reward
    def digits(one):
        return sum(c.isdigit() for c in one.response) / (0 if "0" in one.response else 1)

    @rewards.reward
    def nothing(one):
        return float("nan")

    return lambda name: build_rewards({"terms": {"mine": {"function": name}}})


def test_a_function_of_a_plugin(plugin):
    assert plugin("digits")([answered("a1b2"), answered("no")]).final.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("digits", "reward mine: ZeroDivisionError: .*, for the response '10' to '2 . 2 ='"),
        ("nothing", "reward mine: gives nan for the response 'fine' to '2 . 2 =' .sums.jsonl:1."),
        ("nosuch", "reward.terms.mine.function=nosuch: no plugin registers it; known: digits, no"),
    ],
)
def test_a_function_that_fails_names_reward_prompt_and_response(plugin, name, line):
    with pytest.raises(UserError, match=line) as error:
        plugin(name)([answered("fine"), answered("10")])
    assert "\n" not in str(error.value)


def test_a_long_text_is_short_in_a_message():
    assert len(rewards.described(answered("x" * 5000, prompt="y\n" * 5000))) < 220


# ---- models ----


def test_models_score_text(tmp_path):
    """A run's reward model, and the implicit reward of a policy beside its reference: what score.py
    gives the same text.
    """
    base = save_tiny_llama(tmp_path / "base")
    torch.manual_seed(1)
    state = {
        name: x + 0.05 * torch.randn_like(x)
        for name, x in AutoModelForCausalLM.from_pretrained(base).state_dict().items()
    }
    model = run_of(tmp_path, base, state | {"lm_head.weight": torch.randn(1, 32)}, "reward")
    policy = run_of(tmp_path, base, state, "policy")
    for run in (model, policy):
        knobs = "max_length: 64\nmax_prompt_length: 32\nadd_bos: true\n"
        (run / "config.yaml").write_text((run / "config.yaml").read_text() + knobs)
    terms = {
        "model": {"model": str(model)},
        "implicit": {"model": str(policy), "reference": str(base), "beta": 0.5, "weight": 2.0},
    }
    made = build_rewards({"terms": terms}, device="cpu")
    given = [answered(" it is 4."), answered(" perhaps"), answered("")]
    measured = made(given)
    rows = [
        Row(
            prompt=one.prompt,
            responses=[one.response],
            pairs=[],
            sft_target=one.response,
            source=one.source,
        )
        for one in given
    ]
    ref = find_model(str(policy))
    scorer = load_scorer(ref, knobs_of(ref, {}), str(base), 0.5, device="cpu")
    expected = scorer.score(rows, "keep_end").scores[:, 0]
    np.testing.assert_allclose(measured.terms["implicit"], expected)
    assert len(set(expected)) == len(set(measured.terms["model"])) == 3
    assert measured.raw == pytest.approx(measured.terms["model"] + 2 * measured.terms["implicit"])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"terms": {}}, "reward.terms: no reward is given"),
        ({"scale": "batch"}, "reward.scale=batch: expected running or null"),
        ({"clip": 0}, "reward.clip=0: must be above 0"),
        ({"missing_eos": -1}, "reward.missing_eos=-1: is taken off"),
        ({"missing_eos": 1, "without_eos": -1}, "reward.without_eos=-1: takes the place"),
        ({"nosuch": 1}, "reward.nosuch=1: no such knob"),
        (
            {"terms": {"r": {"rule": {"regex": "a"}}}},
            "reward.terms.r.rule={'regex': 'a'}: expected text",
        ),
        (
            {"overlong": {"free": 8, "most": 8, "penalty": 1}},
            "reward.overlong.free=8: must be below",
        ),
        ({"overlong": {"free": 8}}, "reward.overlong.most: expected a number"),
        ({"terms": {"a": {"rule": "exact", "model": "x"}}}, "reward.terms.a: give one of rule"),
        ({"terms": {"a": {"weight": 1}}}, "reward.terms.a: give one of rule, function, model; it"),
        ({"terms": {"a": {"rule": "exact", "beta": 1}}}, "reward.terms.a.beta=1: is for a model"),
        ({"terms": {"a": {"rule": "exact", "weight": "x"}}}, "reward.terms.a.weight=x: expected"),
        ({"terms": {"a": {"model": "./nosuch.pt"}}}, "reward.terms.a.model: "),
    ],
)
def test_knobs_that_are_refused(change, line):
    with pytest.raises(UserError) as error:
        build_rewards({"terms": TWO} | change)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)
