"""Stages take slices of each data set's prompts: disjoint, together all, none empty, and the same
whatever stands around them.
"""

import json
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from plumb.data.prepare import load_examples
from plumb.data.splits import STAGES, permuted, sizes, weights
from plumb.errors import UserError
from plumb.runs import directory
from plumb.runs.lineage import lineage
from plumb.settings import schema, validation

TOKENIZER = tiny_tokenizer()
STRINGS = [
    "5,0,5",
    "2,4,4",
    "1,1,1",
    "0,5,5",
    "0,3,7",
    "10,0,0",
    "0,0,1",
    "98,1,1",
    "1,1,998",
    "0.5,0.25,0.25",
    "3,2,0",
]


@pytest.mark.parametrize("data_split", STRINGS)
def test_slices_cover_and_none_is_empty(data_split):
    """Of every N up to 200: sizes of the stages, to within one of the exact share where no stage
    had to be saved from nothing.
    """
    shares = weights(data_split)
    some = sum(share > 0 for share in shares)
    for n in range(some, 201):
        got = sizes(n, shares)
        assert sum(got) == n and all(
            (size > 0) == (share > 0) for size, share in zip(got, shares, strict=True)
        )
        quotas = [share * n for share in shares]
        if all(quota >= 1 or not quota for quota in quotas):
            assert all(abs(size - quota) < 1 for size, quota in zip(got, quotas, strict=True))
    for n in range(some):
        with pytest.raises(ValueError):
            sizes(n, shares)


def test_the_cases_that_went_wrong_in_the_pipeline():
    """Its boundaries are rounded one by one and then shifted: 0,5,5 of 4 m + 3 gave the last stage
    nothing.
    """
    assert sizes(7, weights("0,5,5")) == [0, 4, 3] and sizes(5, weights("0,5,5")) == [0, 3, 2]


@given(
    seed=st.integers(0, 2**70), digests=st.sets(st.integers(0, 2**64 - 1), min_size=2, max_size=50)
)
def test_a_permutation_of_the_prompts_by_seed(seed, digests):
    values = np.array(sorted(digests), np.uint64)
    assert len({*permuted(values, seed).tolist()}) == len(digests)
    # of each prompt by itself
    assert permuted(values[::-1], seed).tolist() == permuted(values, seed).tolist()[::-1]


def test_another_seed_draws_another_half():
    values = np.random.default_rng(0).integers(0, 2**63, 4000).astype(np.uint64)
    halves = [set(np.argsort(permuted(values, seed))[:2000].tolist()) for seed in range(4)]
    common = [len(a & b) for i, a in enumerate(halves) for b in halves[:i]]
    assert all(900 < n < 1100 for n in common)  # 1000 on average, with a deviation of 16


BAD = [
    "5,0",
    "5,0,5,0",
    "0,0,0",
    "a,b,c",
    "5,-1,5",
    "1e9,0,1",
    "",
    [5, 0],
    {"hh": "5"},
    {},
    5,
    True,
    [True, 0, 1],
    "nan,0,1",
]


@pytest.mark.parametrize("value", BAD)
def test_what_is_no_split_is_refused(compose, value):
    config = compose("exp_name=x", "model=pythia28", "stage=sft")
    config.data_split = value
    with pytest.raises(
        UserError,
        match=r"^data_split=.*: expected three numbers, of which one is above 0, such as 5,0,5",
    ):
        validation.validate(config)


ACROSS = [
    (["stage=sft"], "stage=sft: chooses a part of data_split"),
    (["data_split=5,0,5"], r"data_split=5,0,5: needs a stage; add stage=sft, reward, policy"),
    (["data_split=5,0,5", "stage=reward"], "data_split=5,0,5: gives stage=reward nothing"),
    (["data_split={shp: [1,0,1]}", "stage=sft"], "shp is not among datasets="),
    (["data_split=5,0,5", "stage=dpo"], "stage=dpo: expected one of sft, reward, policy"),
]


@pytest.mark.parametrize(("overrides", "message"), ACROSS)
def test_a_split_needs_a_stage_and_gives_it_something(compose, overrides, message):
    with pytest.raises(UserError, match=message):
        validation.validate(compose("exp_name=x", "model=pythia28", *overrides))


@pytest.mark.parametrize(
    "value", ["5,0,5", "[5,0,5]", "{hh: '5,0,5'}", "{Anthropic/none: [1,0,1], hh: [1,0,1]}"]
)
def test_ways_to_say_it(compose, value):
    config = compose(
        "exp_name=x",
        "model=pythia28",
        f"data_split={value}",
        "stage=policy",
        "datasets=[hh,Anthropic/none]",
    )
    validation.validate(config)
    assert weights("5,0,5") == (Fraction(1, 2), 0, Fraction(1, 2))


# ---- of real stores ----


@pytest.fixture
def own(tmp_path):
    """60 prompts: two pairs each, and every fifth with an SFT target only."""
    path = tmp_path / "own.jsonl"
    rows = [
        {
            "prompt": f"Name {i % 60}:",
            "responses": [f" yes {i}", " no"],
            "scores": [1, int(i % 5 == 0)],
        }
        for i in range(120)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def load(compose, tmp_path, capsys):
    def run(*overrides, group="pair"):
        config = compose(
            "exp_name=x", f"local_dirs=[{tmp_path}/runs]", "n_eval_examples=null", *overrides
        )
        return *load_examples(config, TOKENIZER, group), capsys.readouterr().out

    return run


def prompts(examples):
    return {TOKENIZER.decode(e.prompt) for e in examples}


def test_no_prompt_is_in_two_stages(load, own):
    """Nor held out in one and trained on in another; pairs in one, SFT targets in the next; from
    one copy of the tokens.
    """
    both = [f"datasets=[{own}]", "eval_share=0.2"]
    train, held, _ = load(*both, group="single")
    assert len(prompts(train)) == 48 and len(prompts(held)) == 12
    parts = {}
    for stage, group in zip(STAGES, ("single", "pair", "pair"), strict=True):
        *parts[stage], out = load(*both, "data_split=2,4,4", f"stage={stage}", group=group)
        assert out.count("from the cache") == 2
        assert "of all stages'" in out and "data_split=2,4,4 stage=" + stage in out
    seen = [prompts(part) for pair in parts.values() for part in pair]
    assert sum(map(len, seen)) == len(set().union(*seen)) and set().union(*seen) <= prompts(
        train
    ) | prompts(held)
    assert len(seen[0]) == 10 and len(seen[1]) == 2  # SFT has a target for every prompt
    assert (
        load(*both, "data_split=2,4,4", "stage=reward", "seed=7")[0].items.tolist()
        == parts["reward"][0].items.tolist()
    )
    other = load(*both, "data_split=2,4,4", "stage=reward", "split_seed=7")[0]
    assert prompts(other) != seen[2]
    assert [
        len(prompts(p)) for p in load(*both, "data_split=2,4,4", "stage=reward", group="single")[:2]
    ] == [19, 5]


def test_each_set_its_own_split(load, own, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(own.read_text().replace("Name", "Tell"))
    sets = f"datasets=[{own},{other}]"
    train, _, out = load(sets, f"data_split={{{own}: [0,0,1]}}", "stage=sft", group="single")
    assert all(prompt.startswith("Tell") for prompt in prompts(train)) and len(prompts(train)) == 54
    train, _, _ = load(
        sets, f"data_split={{{own}: [0,0,1], {other}: '1,0,1'}}", "stage=policy", group="single"
    )
    assert sorted(
        map(len, ({p for p in prompts(train) if p.startswith(name)} for name in ("Name", "Tell")))
    ) == [27, 54]


def test_too_few_prompts(load, tmp_path):
    path = tmp_path / "two.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": f"{i}", "chosen": "a", "rejected": "b"}) + "\n" for i in range(2)
        )
    )
    with pytest.raises(
        UserError,
        match=(
            r"data_split=1,1,1: .*two.jsonl \(train\) has fewer prompts \(1\) than there are stages"
        ),
    ):
        load(f"datasets=[{path}]", "data_split=1,1,1", "stage=sft")
    train, evaluation, _ = load(
        f"datasets=[{path}]", "data_split=1,1,0", "stage=sft", "eval_share=0"
    )
    assert len(train) == 1 and len(evaluation) == 0


# ---- the run before ----

BEFORE = ["datasets=[hh,shp]", "data_split=5,0,5", "stage=sft"]
NEXT = ["data_split=5,0,5", "stage=policy"]
SAID = {  # what the run of model.archive had, what this one has, what is said; None: nothing
    "the next stage": (BEFORE, NEXT, None),
    "the same in other numbers": (BEFORE, ["data_split=[1,0,1]", "stage=policy"], None),
    "no split in either": (["datasets=[hh]"], [], None),
    "other sets": (["datasets=[shp]", *BEFORE[1:]], [], None),
    "another string": (
        BEFORE,
        ["data_split=2,4,4", "stage=policy"],
        "data_split '5,0,5', .* has data_split '2,4,4'",
    ),
    "another seed": (
        BEFORE,
        [*NEXT, "split_seed=1"],
        "split_seed 0, .* split_seed 1.* of hh may overlap",
    ),
    "another share": (BEFORE, [*NEXT, "eval_share=0.2"], "eval_share 0.1, .* eval_share 0.2"),
    "none there": (
        ["datasets=[hh]"],
        BEFORE[1:],
        "had data_split None, stage None, and this run has data_split '5,0,5'",
    ),
    "none here": (
        BEFORE,
        [],
        "had data_split '5,0,5', stage 'sft', and this run has data_split None",
    ),
    "the same stage": (BEFORE, BEFORE[1:], "was stage=sft too: both take the same slice of hh"),
}


@pytest.mark.parametrize("case", SAID)
def test_a_stage_is_compared_with_the_run_it_starts_from(compose, tmp_path, case):
    before, now, said = SAID[case]
    directory.record(
        compose("exp_name=a", "model=pythia28", f"local_run_dir={tmp_path}", *before),
        tmp_path,
        None,
        [],
        "{}",
    )
    (tmp_path / "step-8").mkdir()
    (tmp_path / "step-8/policy.pt").touch()
    for archive in (tmp_path, tmp_path / "step-8/policy.pt"):
        note = lineage(
            compose(
                "exp_name=b", "model=pythia28", "datasets=[hh]", f"model.archive={archive}", *now
            ),
            schema.deciding_slices(),
        )
        if said is None:
            assert note is None
        else:
            assert note and re.search(
                f"^note: {tmp_path}, where model.archive comes from, .*{said}", note
            )


ODD = [
    "",
    "[",
    "7",
    "datasets: 7",
    "datasets: [[hh]]",
    "datasets: [hh]\ndata_split: x",
    "a: &a [1]\nb: *a",
    "datasets: [hh, ~nobody/x]\ndata_split: {hh: 3}",
]


@pytest.mark.parametrize("content", ODD)
def test_a_config_from_anywhere_harms_nothing(compose, tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    (tmp_path / "policy.pt").touch()
    config = compose(
        "exp_name=b", "model=pythia28", "datasets=[hh]", f"model.archive={tmp_path}", *NEXT
    )
    assert lineage(config, schema.deciding_slices()) is None
