"""The loaders by their contract, the registry, the split, and HH against the golden file of the
2023 code.
"""

import gzip
import hashlib
import json
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

import preference_datasets
from plumb.data import registry
from plumb.data.files import held_out
from plumb.data.registry import LOADERS, dataset, dataset_names
from plumb.data.rows import Row, skipped
from plumb.errors import UserError
from preference_datasets import get_hh

FIXTURES = Path(__file__).parent / "fixtures"
SHARED = Path(__file__).parents[2] / "shared"
HH = SHARED / "data/hh/harmless-base/test.jsonl.gz"
needs_shared = pytest.mark.skipif(not HH.is_file(), reason=f"the real data of {SHARED} isn't here")


def get_dataset(*arguments, **options):
    """preference_datasets.get_dataset with all its rows drawn; a tenth is held out, unless the test
    says otherwise.
    """
    data = registry.get_dataset(*arguments, **({"eval_share": 0.1} | options))
    rows = list(data.rows)
    return replace(data, rows=rows)


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """No test meets the hub's sets of another."""
    monkeypatch.setattr(registry, "_hub_sets", {})


def copy(tmp_path, name, both=True):
    """A local copy of a set, with the fixture as its train and, if both, as its test split."""
    source = FIXTURES / name
    for split in ("train", "test") if both else ("train",):
        (tmp_path / f"{split}{source.suffix}").write_bytes(source.read_bytes())
    return str(tmp_path)


@pytest.fixture
def register():
    """`dataset`, for loaders that vanish after the test."""
    before = dict(LOADERS)
    yield dataset
    LOADERS.clear()
    LOADERS.update(before)


# ---- the contract, for every loader ----

FIXTURE_OF = {
    "hh": "hh.jsonl",
    "helpful": "hh.jsonl",
    "harmless": "hh.jsonl",
    "shp": "shp.jsonl",
    "se": "se.jsonl",
    "saferlhf": "saferlhf_old.json",
}


def test_every_loader_is_tested():
    assert set(FIXTURE_OF) == {
        name for name in dataset_names() if LOADERS[name].load.__module__ == "preference_datasets"
    }


@pytest.mark.parametrize("name", FIXTURE_OF)
def test_contract(name, tmp_path):
    path = copy(tmp_path, FIXTURE_OF[name])
    data = LOADERS[name].load("train", silent=True, path=path)
    if name == "se":  # too large for a dict
        data = {row.pop("prompt"): row for row in data}
    assert data
    for prompt, entry in data.items():
        assert prompt.startswith("\n\nHuman:") and prompt.endswith("\n\nAssistant:")
        assert set(entry) - {"scores"} == {"responses", "pairs", "sft_target"}
        assert len(entry.get("scores", entry["responses"])) == len(entry["responses"])
        assert all(response == "" or response.startswith(" ") for response in entry["responses"])
        assert all(
            0 <= i < len(entry["responses"]) and i != j
            for pair in entry["pairs"]
            for i, j in (pair, pair[::-1])
        )
        assert entry["sft_target"] in entry["responses"]
    loaded = get_dataset(name, "train", path=path)
    assert loaded.name == name
    assert loaded.truncation == (
        "keep_end" if name in ("hh", "helpful", "harmless") else "keep_start"
    )
    assert [row.prompt for row in loaded.rows] == list(data)
    assert loaded.rows[0].source == f"{name}:1"
    assert "\n" not in loaded.form and str(path) in loaded.form


def rows_of(name, tmp_path, fixture=None):
    loaded = get_dataset(name, "train", path=copy(tmp_path, fixture or FIXTURE_OF[name]))
    return {row.prompt: row for row in loaded.rows}, loaded.skipped


def test_hh(tmp_path):
    rows, counts = rows_of("hh", tmp_path)
    egg = rows["\n\nHuman: How do I boil an egg?\n\nAssistant:"]
    assert egg.pairs == [(0, 1), (2, 3)]
    assert egg.sft_target == " Ten minutes for a firm yolk."
    assert rows["\n\nHuman: Say nothing.\n\nAssistant:"].responses == ["", " Something."]
    assert counts == {"prompts of the pair differ": 1} and len(rows) == 4


def test_shp(tmp_path):
    rows, counts = rows_of("shp", tmp_path)
    (row,) = rows.values()
    assert row.prompt == "\n\nHuman: When to plant garlic?\n\nAssistant:"
    assert row.responses == [" In autumn.", " In spring.", " At full moon.", " In October."]
    assert row.pairs == [(0, 1), (3, 2)] and row.sft_target == " In October."
    assert [row.scores[i] - row.scores[j] for i, j in row.pairs] == [20, 80]
    assert counts == {"score ratio below 2": 1, "score below 1": 2}


def test_se_keeps_nested_text_and_code(tmp_path):
    whole = {**rows_of("se", tmp_path)[0]}
    row = whole[
        "\n\nHuman: How do I reverse a list in Python?\n\n<code>a = [1, 2]\n</code>\n\nAssistant:"
    ]
    assert (
        row.responses[1]
        == " Use <code>a[::-1]</code>, it is short & clear:\n\n<code>b = a[::-1]\n</code>"
    )
    assert row.responses[2] == " Quote\n\none\n\ntwo"
    assert row.sft_target == row.responses[1]


def test_se_equal_scores(tmp_path):
    rows, counts = rows_of("se", tmp_path)
    assert rows["\n\nHuman: Tea or coffee?\n\nAssistant:"].pairs == []
    assert next(iter(rows.values())).pairs == [(1, 0), (1, 2)]
    assert counts == {"equal scores": 2, "question without answers": 1}


def test_se_holds_out_one_percent(tmp_path):
    answers = [{"text": "<p>yes</p>", "pm_score": 2}, {"text": "<p>no</p>", "pm_score": 1}]
    lines = [json.dumps({"question": f"<p>{n}</p>", "answers": answers}) for n in range(300)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    sizes = [
        len(get_dataset("se", split, path=str(tmp_path), eval_share=0.5).rows)
        for split in ("train", "test")
    ]
    assert sizes == [297, 3]


@pytest.mark.parametrize(
    "fixture, prompt, chosen",
    [
        ("saferlhf_old.json", "How do I light a fire?", " In a stove, with kindling."),
        ("saferlhf_new.jsonl", "May I swim here?", " Yes, between the flags."),
    ],
)
def test_saferlhf_both_schemas(tmp_path, fixture, prompt, chosen):
    rows, counts = rows_of("saferlhf", tmp_path, fixture)
    row = rows[f"\n\nHuman: {prompt}\n\nAssistant:"]
    preferred, dispreferred = row.pairs[0]
    assert row.responses[preferred] == row.sft_target == chosen and dispreferred == 1 - preferred
    assert counts == (
        {"both responses safe": 1, "both responses unsafe": 1} if "old" in fixture else {}
    )


@pytest.mark.parametrize(
    "name, fixture, field, value, message",
    [
        ("hh", "hh.jsonl", "rejected", None, "field 'rejected' is null, not a string"),
        ("hh", "hh.jsonl", "chosen", "no marker", r"'chosen' holds no '\n\nAssistant:'"),
        ("shp", "shp.jsonl", "labels", 3, "field 'labels' is a number (3)"),
        ("shp", "shp.jsonl", "score_A", "40", "field 'score_A, score_B[0]' is a string ('40')"),
        ("se", "se.jsonl", "answers", "x", "field 'answers' is a string ('x')"),
        (
            "saferlhf",
            "saferlhf_new.jsonl",
            "is_response_0_safe",
            "True",
            "is_response_0_safe' is a string ('True')",
        ),
    ],
)
def test_loader_names_row_and_field(tmp_path, name, fixture, field, value, message):
    row = json.loads((FIXTURES / fixture).read_text().splitlines()[0]) | {field: value}
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n" + json.dumps(row))
    with pytest.raises(UserError) as caught:
        get_dataset(name, "train", path=str(tmp_path))
    assert message in str(caught.value) and f"{tmp_path}/train.jsonl, line 2: " in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- a user's own loader, in the 2023 form ----

ENTRY = {"responses": [" yes", " no"], "pairs": [(0, 1)], "sft_target": " yes"}


def test_2023_loader_drops_in(register):
    @register()
    def get_own(split, silent, cache_dir):
        data = defaultdict(lambda: defaultdict(list))
        data["q"]["responses"].extend([" yes", " no"])
        data["q"]["pairs"].append((0, 1))
        data["q"]["sft_target"] = " yes"
        return data

    loaded = get_dataset("own", "train")
    assert loaded.rows == [
        Row(
            prompt="q",
            responses=[" yes", " no"],
            pairs=[(0, 1)],
            sft_target=" yes",
            source="own:1",
        )
    ]
    assert loaded.truncation == "keep_start" and loaded.skipped == {}
    with pytest.raises(UserError, match=r"dataset_paths\.own=/x: get_own takes no 'path'"):
        get_dataset("own", "train", path="/x")


@pytest.mark.parametrize("arrow", [False, True])
def test_loader_may_return_rows(register, arrow):
    rows = [{"prompt": "q", "responses": [" yes", " no"], "pairs": [[1, 0]], "sft_target": " no"}]
    if arrow:
        rows = pytest.importorskip("datasets").Dataset.from_list(rows)
    register()(named("get_rows", rows))
    assert get_dataset("rows", "test").rows == [
        Row(
            prompt="q",
            responses=[" yes", " no"],
            pairs=[(1, 0)],
            sft_target=" no",
            source="rows:1",
        )
    ]


def test_loader_counts_what_it_skips(register):
    @register()
    def get_own(split, silent=False, cache_dir=None):
        skipped("too odd")
        skipped("too even", 2)
        return {"q": ENTRY}

    get_own("train")  # called directly, nobody counts
    assert get_dataset("own", "train").skipped == {"too odd": 1, "too even": 2}


def named(name, returned):
    def load(split, silent=False, cache_dir=None):
        return returned

    load.__name__ = name
    return load


@pytest.mark.parametrize(
    "returned, message",
    [
        (None, "get_bad returned null"),
        ({"q": 7}, "get_bad, prompt 'q', number 1: it has a number (7)"),
        (
            {"q": {"responses": [" a", " b"], "pairs": [(0, 1)]}},
            "prompt 'q', number 1: no field 'sft_target'",
        ),
        (
            {"q": ENTRY, "r": ENTRY | {"pairs": [(0, 2)]}},
            "prompt 'r', number 2: field 'pairs[0]' is tuple ((0, 2))",
        ),
        ({"q": ENTRY | {"pairs": [(-1, 0)]}}, "'pairs[0]'"),
        ({"q": ENTRY | {"pairs": [(1, 1)]}}, "'pairs[0]'"),
        ({"q": ENTRY | {"pairs": [(0, "1")]}}, "'pairs[0]'"),
        ({"q": ENTRY | {"pairs": None}}, "'pairs' is null"),
        ({"q": ENTRY | {"responses": " a"}}, "'responses' is a string (' a'), not a list"),
        ({"q": ENTRY | {"responses": [" a", 3]}}, "'responses[1]' is a number (3)"),
        ({"q": ENTRY | {"sft_target": []}}, "'sft_target' is a list ([])"),
        ({"q": ENTRY | {"scores": [1.0]}}, "'scores' is a list ([1.0]), not a list of 2 numbers"),
        (
            {"q": ENTRY | {"scores": [1.0, float("inf")]}},
            "'scores[1]' is a number (inf), not a finite number",
        ),
        ({7: ENTRY}, "'prompt' is a number (7)"),
        ([{"responses": []}], "'prompt' is null"),
    ],
)
def test_what_a_loader_returns_is_checked(register, returned, message):
    register()(named("get_bad", returned))
    with pytest.raises(UserError) as caught:
        get_dataset("bad", "train")
    assert message in str(caught.value) and "get_bad" in str(caught.value)


def test_decorator_refuses_what_it_would_misread(register):
    with pytest.raises(UserError, match="keep_middle"):
        register(truncation="keep_middle")
    with pytest.raises(UserError, match="must be called get_"):
        register()(named("load_own", {}))


# ---- names, the hub, the split ----


@pytest.mark.parametrize(
    "name, message",
    [
        ("harmles", "unknown data set 'harmles'; did you mean 'harmless'? known: "),
        ("zzzz", "unknown data set 'zzzz'; known:"),
        ("none.jsonl", "none.jsonl: no such file"),
        ("./none", "./none: no such file"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(UserError) as caught:
        get_dataset(name, "train")
    assert message in str(caught.value)


def test_knobs_that_would_be_ignored(tmp_path):
    with pytest.raises(UserError, match="hh has its own schema"):
        get_dataset("hh", "train", path=copy(tmp_path, "hh.jsonl"), field_map={"prompt": "q"})
    with pytest.raises(UserError, match=r"eval_share=1\.5"):
        get_dataset("hh", "train", eval_share=1.5)
    with pytest.raises(UserError, match="split 'dev'"):
        get_dataset("hh", "dev", path=str(tmp_path))


def test_hub_failure_names_the_knob(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def refuse(*args, **options):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=r"dataset_paths\.shp=/path/to/local/copy") as caught:
        get_dataset("shp", "train")
    assert "stanfordnlp/SHP" in str(caught.value) and "no route" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, asked",
    [
        ("helpful", {"split": "test", "data_dir": "helpful-base"}),
        ("hh", {"split": "test", "data_dir": None}),
        ("se", {"split": "train", "data_dir": None}),
    ],
)
def test_hub_and_local_share_their_code(monkeypatch, tmp_path, name, asked):
    datasets = pytest.importorskip("datasets")
    raw = [json.loads(line) for line in (FIXTURES / FIXTURE_OF[name]).read_text().splitlines()]
    calls = []

    def load_dataset(hub_id, **options):
        calls.append(options)
        return raw

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    local = get_dataset(
        name, "test", path=copy(tmp_path, FIXTURE_OF[name], both=name != "se"), cache_dir="c"
    )
    hub = get_dataset(name, "test", cache_dir="c")
    assert hub.rows == local.rows and hub.skipped == local.skipped
    assert calls == [asked | {"cache_dir": "c"}]


def test_split_of_one_file_is_by_prompt_alone(tmp_path):
    """The same prompts are held out whatever the order of the file, so that stages and files agree;
    a larger share adds some.
    """
    rows = [{"prompt": f"p{n % 50}", "chosen": f" {n}", "rejected": " no"} for n in range(100)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "turned.jsonl").write_text("\n".join(map(json.dumps, reversed(rows))))
    read = lambda split, share=0.2, name="own": (
        get_dataset(str(tmp_path / f"{name}.jsonl"), split, eval_share=share).rows
    )
    train, test = read("train"), read("test")
    assert len(test) == 20 and len(train) == 80
    held_out = {row.prompt for row in test}
    assert not {row.prompt for row in train} & held_out
    numbers = [int(row.source.rpartition(":")[2]) for row in train]
    assert numbers == sorted(numbers)
    assert {row.prompt for row in read("test", name="turned")} == held_out
    assert {row.prompt for row in read("test", share=0.4)} > held_out


def test_split_of_a_named_set_is_by_prompt(tmp_path):
    path = copy(tmp_path, "hh.jsonl", both=False)
    parts = [get_dataset("hh", split, path=path, eval_share=0.5) for split in ("train", "test")]
    prompts = [{row.prompt for row in part.rows} for part in parts]
    assert not prompts[0] & prompts[1] and len(prompts[0] | prompts[1]) == 4
    assert sum(part.skipped.get("prompts of the pair differ", 0) for part in parts) == 1
    # called directly, too
    assert len(get_hh("train", path=path)) + len(get_hh("test", path=path)) == 4


def test_held_out_edges():
    mask = lambda prompts, share: held_out(prompts, share).tolist()
    assert mask([], 0.1) == []
    assert mask(["a"], 0.1) == [False]
    assert mask(["a", "b"], 0.0) == [False, False]
    assert mask(["a", "b"], 1.0) == [True, True]
    assert mask(["a"], 1.0) == [True]
    assert sum(mask(["a", "b"], 0.99)) == 1


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_the_held_out_prompts_are_those_of_ever(share):
    """Whoever trained before on the same file held out the same prompts: the rule in plain
    Python.
    """
    prompts = [f"ä{n % 70}" for n in range(100)]
    keys = [hashlib.blake2b(prompt.encode(), digest_size=8).digest() for prompt in prompts]
    test = set(sorted(set(keys))[: round(share * 70)])
    assert held_out(prompts, share).tolist() == [key in test for key in keys]


def test_named_schema_is_recognised_by_path():
    loaded = get_dataset(str(FIXTURES / "saferlhf_old.json"), "train", eval_share=0)
    assert loaded.name.endswith("saferlhf_old.json") and loaded.form.startswith(
        "saferlhf: 1 prompts"
    )
    assert loaded.skipped == {"both responses safe": 1, "both responses unsafe": 1}


def test_imports_no_torch_and_no_library_before_it_is_needed():
    heavy = {"torch", "datasets", "transformers", "pyarrow"}
    check = f"import sys, preference_datasets; assert not {heavy} & set(sys.modules)"
    root = Path(preference_datasets.__file__).parent
    subprocess.run([sys.executable, "-c", check], cwd=root, check=True)


# ---- HH, the official file ----


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def as_2023(rows):
    """What get_hh of 2023 makes of the rows: the rejected text is cut at the chosen prompt's
    length.
    """
    data = {}
    for chosen, rejected in rows:
        n = chosen.rindex("\n\nAssistant:") + len("\n\nAssistant:")
        entry = data.setdefault(chosen[:n], {"responses": [], "pairs": [], "sft_target": ""})
        entry["pairs"].append((len(entry["responses"]), len(entry["responses"]) + 1))
        entry["responses"] += [chosen[n:], rejected[n:]]
        entry["sft_target"] = chosen[n:]
    return data


@needs_shared
def test_hh_differs_from_2023_only_in_the_skipped_rows():
    golden = json.loads((SHARED / "golden/hh_structure_and_order.json").read_text())["structure"]
    lines = gzip.decompress(HH.read_bytes()).splitlines()
    rows = [(row["chosen"], row["rejected"]) for row in map(json.loads, lines)]
    old = as_2023(rows)
    responses = [response for entry in old.values() for response in entry["responses"]]
    assert digest("\0".join(old)) == golden["all_keys_sha256"]
    assert digest("\0".join(responses)) == golden["responses_sha256"]
    assert (
        digest("\0".join(entry["sft_target"] for entry in old.values()))
        == golden["sft_targets_sha256"]
    )

    loaded = get_dataset("harmless", "train", path=str(HH), eval_share=0)
    assert loaded.skipped == {"prompts of the pair differ": 5}
    differ = {1254, 1688, 1950, 1952, 2036}  # 2,310 prompts and 2,312 pairs in 2023, less these
    assert len(loaded.rows) == golden["unique_prompts"] - 5 == 2305
    assert sum(len(row.pairs) for row in loaded.rows) == golden["pairs"] - 5 == 2307
    expected = as_2023(row for n, row in enumerate(rows) if n not in differ)
    assert [tuple(row)[:4] for row in loaded.rows] == [
        (prompt, *entry.values()) for prompt, entry in expected.items()
    ]

    keys = [digest(row.prompt)[:16] for row in loaded.rows]
    assert keys[:20] == golden["first_20_key_hashes"] and keys[-5:] == golden["last_5_key_hashes"]
    for multi in golden["multi"]:
        row = loaded.rows[keys.index(multi["prompt_hash"])]
        assert [list(pair) for pair in row.pairs] == multi["pairs"]
        assert row.sft_target == row.responses[multi["sft_target_index"]]


REAL = [  # name or path, path, train rows (eval_share 0), skipped
    ("helpful", "hh", 2343, {"prompts of the pair differ": 9}),
    ("shp", "shp/shp_card_example.jsonl", 1, {}),
    ("saferlhf", "saferlhf", 5, {"both responses unsafe": 16, "both responses safe": 11}),
]


@needs_shared
@pytest.mark.parametrize("name, path, n_pairs, counts", REAL, ids=[case[0] for case in REAL])
def test_real_sets(name, path, n_pairs, counts):
    loaded = get_dataset(name, "train", path=str(SHARED / "data" / path), eval_share=0)
    assert sum(len(row.pairs) for row in loaded.rows) == n_pairs
    assert loaded.skipped == counts
