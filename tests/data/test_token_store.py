"""Tokens are made once: what a store holds, when it is used again and when it is not, and who makes
it.
"""

import errno
import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHAT, tiny_tokenizer

from plumb.data import files as data_files
from plumb.data import registry, token_store, tokenization
from plumb.data.prepare import load_examples
from plumb.data.registry import DataSet, dataset
from plumb.data.rows import Row
from plumb.data.token_store import (
    COLUMNS,
    StoreSpec,
    TokenStore,
    find_or_make,
    ingredients,
    key,
    tokenizer_fingerprint,
)
from plumb.data.tokenization import TextRules
from plumb.errors import UserError

RULES = TextRules(
    max_length=64,
    max_prompt_length=32,
    response_truncation="fixed",
    add_bos=True,
    eos_in_text="strip",
)
TOKENIZER = tiny_tokenizer()
PAIRS = [{"prompt": f"Name {i}:", "chosen": f" yes {i}", "rejected": " no"} for i in range(30)]


def recipe(rows, tokenizer=TOKENIZER, inputs=((1,), []), **changes):
    """Of `rows`, which are known by `inputs`."""
    data = DataSet("d", 0.1, iter(rows))
    spec = StoreSpec(
        data=data,
        split="train",
        tokenizer=tokenizer,
        identity=tokenizer_fingerprint(tokenizer),
        rules=RULES,
        template=None,
        inputs=inputs,
        options={},
    )
    return replace(spec, **changes)


def made(tmp_path, rows, **changes):
    folder, _ = find_or_make(recipe(rows, **changes), tmp_path)
    return TokenStore(folder)


# ---- what it holds ----

EOS_PARTS = st.sampled_from(["</s>", "</", "s>", "", " ", "ä", "\n\nAssistant:"])
texts = st.lists(st.one_of(st.text(max_size=8), EOS_PARTS), max_size=4).map("".join)
answers = st.lists(texts, min_size=2, max_size=4)


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(st.tuples(texts, answers, st.one_of(st.none(), texts)), max_size=5))
def test_a_store_holds_what_direct_tokenization_gives(rows, tmp_path_factory):
    n_pairs = lambda n: [(i, j) for i in range(n) for j in range(n) if i < j]
    data = [
        Row(
            prompt=p,
            responses=r,
            pairs=n_pairs(len(r)),
            sft_target=target,
            source=f"dir/f{i % 2}:x:{i}",
        )
        for i, (p, r, target) in enumerate(rows)
    ]
    store = made(tmp_path_factory.mktemp("store"), data, inputs=None)

    def ids(text, response):
        while response and TOKENIZER.eos_token in text:
            text = text.replace(TOKENIZER.eos_token, "")
        return (
            TOKENIZER(text, add_special_tokens=False)["input_ids"]
            + [TOKENIZER.eos_token_id] * response
        )

    def text(n):
        return store.ids[store.starts[n] : store.starts[n + 1]].tolist()

    def place(n):
        return f"{store.files[store.rows[n, 1]]}:{store.rows[n, 2]}"

    pairs = [(text(store.rows[n, 0]), text(c), text(r), place(n)) for n, c, r in store.pairs]
    targets = [(text(store.rows[n, 0]), text(t), place(n)) for n, t in store.targets]
    expected = [
        (ids(d.prompt, 0), ids(d.responses[w], 1), ids(d.responses[l], 1), d.source)
        for d in data
        for w, l in d.pairs
    ]
    assert pairs == expected
    assert targets == [
        (ids(d.prompt, 0), ids(d.sft_target, 1), d.source) for d in data if d.sft_target is not None
    ]
    # each text once
    assert len(store.marks) == sum(1 + len({*d.responses, d.sft_target} - {None}) for d in data)
    assert store.n_rows == len(data) and store.ids.dtype == np.uint16


def test_a_large_vocabulary_takes_four_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(type(TOKENIZER), "get_vocab", lambda self: {"a": 2**16})
    assert (
        made(
            tmp_path,
            [
                Row(
                    prompt="a",
                    responses=["b"],
                    pairs=[],
                    sft_target="b",
                    source="d:1",
                )
            ],
        ).ids.dtype
        == np.int32
    )


def test_memory_does_not_grow_with_the_data_set(register, tmp_path):
    """A generator's rows, and a file's, live only as long as their chunk."""
    alive, most = weakref.WeakSet(), 0

    class Responses(list):
        __hash__ = object.__hash__

    @register()
    def get_many(split, silent=False, cache_dir=None):
        nonlocal most
        for i in range(6 * tokenization.CHUNK):
            responses = Responses(["a", "b"])
            alive.add(responses)
            most = max(most, len(alive))
            yield {"prompt": f"{i}", "responses": responses, "pairs": [(0, 1)], "sft_target": "a"}

    data = registry.get_dataset("many", "train", eval_share=0.1)
    folder, kept = find_or_make(replace(recipe([], inputs=None), data=data), tmp_path)
    assert len(TokenStore(folder).pairs) == 6 * tokenization.CHUNK and not kept
    assert data.form == "many: 6,000 prompts with 6,000 pairs from get_many (train)"
    assert most <= 2 * tokenization.CHUNK

    path = tmp_path / "own.jsonl"
    path.write_text(
        "".join(json.dumps(PAIRS[0] | {"prompt": "x" * 500 + str(i)}) + "\n" for i in range(8000))
    )
    data_files.held_out(["a"], 0.5)  # numpy imports more when it is first asked
    tracemalloc.start()
    data = registry.get_dataset(str(path), "train", eval_share=0.1)
    assert sum(1 for _ in data.rows) == data.n_rows == 7200
    assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 5
    tracemalloc.stop()


# ---- once ----


@pytest.fixture
def register(monkeypatch):
    """`dataset`, for loaders that vanish after the test."""
    monkeypatch.setattr(registry, "LOADERS", dict(registry.LOADERS))
    return dataset


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return path


@pytest.fixture
def load(compose, tmp_path, monkeypatch, capsys):
    """`load(*overrides, tokenizer=..., group="pair")` -> (train, eval, what was printed)"""
    monkeypatch.setattr(data_files, "_held_out", {})  # as in a fresh process

    def run(*overrides, tokenizer=TOKENIZER, group="pair"):
        config = compose("exp_name=x", f"local_dirs=[{tmp_path}/runs]", *overrides)
        return *load_examples(config, tokenizer, group), capsys.readouterr().out

    return run


def plain(examples):
    return [(e.prompt.tolist(), [r.tolist() for r in e.responses], e.source) for e in examples]


def test_a_second_start_reads_nothing_and_gives_the_same(load, own, monkeypatch):
    train, evaluation, out = load(f"datasets=[{own}]")
    assert len(train) == 27 and len(evaluation) == 3 and out.count("made in") == 2
    monkeypatch.setattr(data_files, "read_file", lambda path: pytest.fail(f"{path} was read again"))
    again, evaluation_again, out_again = load(f"datasets=[{own}]")
    assert plain(again) == plain(train) and plain(evaluation_again) == plain(evaluation)
    assert out_again.count("from the cache") == 2 and "made in" not in out_again
    told = lambda out: [line for line in out.splitlines() if not line.startswith("tokens of")]
    assert told(out) == told(out_again)  # the form line and the table, too
    sft = load(
        f"datasets=[{own}]",
        "max_length=8",
        "max_prompt_length=4",
        "truncation_mode=keep_start",
        group="single",
    )
    # other cuts, the same tokens
    assert "made in" not in sft[2] and plain(sft[0])[0][0] == train[0].prompt[:4].tolist()


def test_the_split_is_drawn_once_per_process(load, own, monkeypatch):
    drawn, held_out = [], data_files.held_out
    monkeypatch.setattr(
        data_files, "held_out", lambda prompts, share: drawn.append(1) or held_out(prompts, share)
    )
    load(f"datasets=[{own}]")
    assert len(drawn) == 1


CHANGES = {
    "the file": lambda own, monkeypatch: own.write_text(
        json.dumps(PAIRS[0]) + "\n" + json.dumps(PAIRS[1])
    ),
    "its time": lambda own, monkeypatch: os.utime(own, ns=(0, 0)),
    "eval_share": ["eval_share=0.2"],
    "field_map": ["field_map={chosen: rejected, rejected: chosen}"],
    "chat_template": ["chat_template=hh"],
    "plain_prompts": ["plain_prompts=chat"],
    "eos_in_text": ["eos_in_text=keep"],
    "the tokenizer": tiny_tokenizer(bos=True),
    "its template": tiny_tokenizer(chat_template=CHAT),
    "a special token": tiny_tokenizer(),
    "the layout": lambda own, monkeypatch: monkeypatch.setattr(token_store, "LAYOUT", -1),
    "a library": lambda own, monkeypatch: monkeypatch.setattr(
        token_store, "version", lambda name: "next"
    ),
}


CHANGES["a special token"].eos_token = "<pad>"


@pytest.mark.parametrize("case", CHANGES)
def test_each_ingredient_makes_new_tokens(load, own, monkeypatch, case):
    change, tokenizer = CHANGES[case], TOKENIZER
    # strings do not go through it, but it is simpler to keep it in
    if case in ("chat_template", "its template"):
        tokenizer = tiny_tokenizer(chat_template=CHAT.replace("<", "["))
    load(f"datasets=[{own}]", tokenizer=tokenizer)
    if callable(change) and not hasattr(change, "get_vocab"):
        change(own, monkeypatch)
    elif not isinstance(change, list):
        tokenizer = change
    out = load(
        f"datasets=[{own}]", *(change if isinstance(change, list) else []), tokenizer=tokenizer
    )[2]
    assert out.count("made in") == 2 and "from the cache" not in out


def test_bos_is_an_ingredient_where_there_is_one(load, own):
    tokenizer = tiny_tokenizer(bos=True)
    with_bos, _, _ = load(f"datasets=[{own}]", tokenizer=tokenizer)
    without, _, out = load(f"datasets=[{own}]", "add_bos=false", tokenizer=tokenizer)
    assert "made in" in out and with_bos[0].prompt.tolist() == [
        tokenizer.bos_token_id,
        *without[0].prompt,
    ]


def test_the_code_is_an_ingredient(tmp_path, own):
    """A plugin's, where it reads the data, and preference_datasets.py, which users edit."""
    code = tmp_path / "plugin.py"
    key_of = lambda: key(ingredients(recipe([], inputs=((1,), [code]))))
    code.write_text("a")
    first = key_of()
    code.write_text("b")
    assert key_of() != first
    _, files = registry.made_of(str(own), "train", None, None)
    assert [file.name for file in files] == ["preference_datasets.py"]


FIXTURES = Path(__file__).parents[1] / "fixtures"
MESSAGES = [{"role": "user", "content": "Hi </s>"}, {"role": "assistant", "content": "Ho"}]
OF_EACH_FORM = [
    {"prompt": "a b", "chosen": " c", "rejected": " d"},
    {"prompt": MESSAGES[:1], "chosen": MESSAGES[1:], "rejected": [{**MESSAGES[1], "content": "?"}]},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"instruction": "a", "input": "b", "chosen": "c", "rejected": "d"},
    {"question": "a", "chosen": "b", "rejected": "c"},
    {"prompt": "a", "responses": [" b", " c", " d"], "scores": [1, 3, 2]},
    {"question": "a", "response_j": "b", "response_k": "c"},
    {"prompt": "a", "completion": " b"},
    {"messages": MESSAGES},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"instruction": "a", "input": "", "output": "b"},
    {"text": "a b"},
    {"prompt": "a", "completion": " b", "label": "thumbs down", "weight": 2},
    {"prompt": "a b", "chosen": " c", "rejected": " d", "p_chosen": 0.75, "weight": 0.5},
    {"prompt": "a", "responses": [" b", " c", " d"], "scores": [1, 3, 1]},
    {"instruction": "a", "completions": [{"response": "b", "overall_score": 1}] * 2},
]
NAMED = {"hh": "hh.jsonl", "shp": "shp.jsonl", "se": "se.jsonl", "saferlhf": "saferlhf_old.json"}
OF_VERSION = {  # 2: labels, weights, soft labels and ties beside the same ids
    1: "c79aa01965adb9711279699b777efcae68e0366fa6f5eeb54acee615dcb49f59",
    2: "6e658f6d9c910a0c76e290b3fabcc2cf2981653e4e0601b907082c4ec227f5d6",
}


def test_the_version_of_token_ids(tmp_path):
    """If this fails, stores of earlier versions no longer hold what is computed: raise VERSION, and
    add its digest.
    """
    paths = [FIXTURES / "ultrafeedback_binarized.jsonl"]
    for i, row in enumerate(OF_EACH_FORM):
        paths.append(tmp_path / f"form{i}.jsonl")
        paths[-1].write_text(json.dumps(row) + "\n")
    sets = [(str(path), None) for path in paths]
    sets += [(name, str(FIXTURES / file)) for name, file in NAMED.items()]
    whole = hashlib.sha256()
    for tokenizer in (tiny_tokenizer(bos=True), tiny_tokenizer(chat_template=CHAT)):
        for name, path in sets:
            data = registry.get_dataset(name, "train", path=path, eval_share=0.0)
            store = made(tmp_path, data.rows, tokenizer=tokenizer, inputs=None)
            for column in token_store.COLUMNS:
                whole.update(np.asarray(getattr(store, column)).tobytes())
    assert whole.hexdigest() == OF_VERSION[token_store.VERSION]


def test_the_whole_tokenizer_counts_and_not_its_name():
    a, b = tiny_tokenizer(), tiny_tokenizer()
    b.name_or_path = "somewhere/else"
    assert tokenizer_fingerprint(a) == tokenizer_fingerprint(b)
    b.add_tokens(["qu"])
    assert tokenizer_fingerprint(a) != tokenizer_fingerprint(b)
    a.backend_tokenizer.enable_truncation(5)  # as a tokenizer.json may ask for
    assert (
        tokenizer_fingerprint(a) == tokenizer_fingerprint(tiny_tokenizer())
        and len(a("a" * 9)["input_ids"]) == 9
    )


# ---- the hub, and loaders of users ----


def test_the_hub_s_set_is_known_by_its_fingerprint(load, register, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(registry, "_hub_sets", {})
    rows = [
        {
            "chosen": f"\n\nHuman: {i}?\n\nAssistant: a",
            "rejected": f"\n\nHuman: {i}?\n\nAssistant: b",
        }
        for i in range(9)
    ]
    asked = []

    def load_dataset(name, split, **options):
        asked.append(split)
        return datasets.Dataset.from_list(rows if split == "train" else [rows[0]])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    train, _, out = load("datasets=[hh]")
    # once per process
    assert len(train) == 9 and out.count("made in") == 2 and sorted(asked) == ["test", "train"]
    assert load("datasets=[hh]")[2].count("from the cache") == 2
    registry._hub_sets.clear()
    rows[0] = rows[1]
    assert load("datasets=[hh]")[2].count("made in") == 2


def test_a_loader_that_may_read_anything_is_run_at_each_start(load, register, tmp_path):
    calls = []

    @register()
    def get_own(split, silent=False, cache_dir=None):
        calls.append(split)
        return {
            f"{split}?": {
                "responses": [f" {len(calls)}", " no"],
                "pairs": [(0, 1)],
                "sft_target": " a",
            }
        }

    (first,), _, out = load("datasets=[own]")
    (second,), (held_out,), _ = load("datasets=[own]")
    assert calls == ["train", "test"] * 2
    assert "for this run only" in out
    decode = lambda e: TOKENIZER.decode(e.responses[0])
    # readable, though:
    assert (decode(first), decode(second), decode(held_out)) == (
        " 1</s>",
        " 3</s>",
        " 4</s>",
    )
    assert list((tmp_path / "runs").glob("*/token_cache/*")) == []


def test_a_loader_with_a_path_is_known_by_its_files(load, register, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "any.txt").write_text("yes")
    calls = []

    @register()
    def get_own(split, silent=False, cache_dir=None, path=None):
        calls.append(split)
        yield {
            "prompt": split,
            "responses": [],
            "pairs": [],
            "sft_target": (Path(path) / "any.txt").read_text(),
        }

    options = ["datasets=[own]", f"+dataset_paths.own={folder}"]
    load(*options, group="single")
    load(*options, group="single")
    assert calls == ["train", "test"]
    (folder / "any.txt").write_text("no!")
    (example,), _, _ = load(*options, group="single")
    assert len(calls) == 4 and TOKENIZER.decode(example.responses[0]) == "no!</s>"


# ---- damage, and more than one at work ----

ROWS = [
    Row(
        prompt=f"p{i}",
        responses=[" a", " bc"],
        pairs=[(0, 1)],
        sft_target=" a",
        source=f"d:{i}",
        labels=[True, False],
    )
    for i in range(5)
]


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


DAMAGE = {
    **{
        f"a bit of {name}": lambda folder, name=name: flip(folder / f"{name}.bin")
        for name in COLUMNS
    },
    **{f"{name} cut": lambda folder, name=name: cut(folder / f"{name}.bin") for name in COLUMNS},
    "a column gone": lambda folder: (folder / "ids.bin").unlink(),
    "meta cut": lambda folder: cut(folder / "meta.json"),
    "meta gone": lambda folder: (folder / "meta.json").unlink(),
    "meta of something else": (
        lambda folder: (folder / "meta.json").write_text(
            (folder / "meta.json")
            .read_text()
            .replace('"eos_in_text": "strip"', '"eos_in_text": "keep"')
        )
    ),
    "another meta": lambda folder: (folder / "meta.json").write_text("[1]"),
    "a file in its place": lambda folder: (
        folder.rename(folder.with_name("x")),
        folder.write_text(""),
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_store_is_made_again(tmp_path, capsys, case):
    folder, _ = find_or_make(recipe(ROWS), tmp_path)
    whole = {f.name: f.read_bytes() for f in folder.iterdir()}
    DAMAGE[case](folder)
    again, _ = find_or_make(recipe(ROWS), tmp_path)
    assert again == folder and {f.name: f.read_bytes() for f in again.iterdir()} == whole
    assert "is damaged (" in capsys.readouterr().out
    assert not list(tmp_path.glob("tmp-*"))
    assert "from the cache" in (find_or_make(recipe([]), tmp_path), capsys.readouterr().out)[1]


def test_an_empty_folder_in_its_place(tmp_path):
    folder, _ = find_or_make(recipe(ROWS), tmp_path)
    for file in folder.iterdir():
        file.unlink()
    assert len(made(tmp_path, ROWS).pairs) == 5


def test_two_runs_that_make_the_same(tmp_path, monkeypatch):
    """The second is done first; what the first has mapped by then stays."""
    write = token_store._write

    def slow(*arguments):
        monkeypatch.setattr(token_store, "_write", write)
        earlier.append(made(tmp_path, ROWS))
        return write(*arguments)

    earlier = []
    monkeypatch.setattr(token_store, "_write", slow)
    store = made(tmp_path, ROWS)
    assert np.array_equal(store.ids, earlier[0].ids) and len(list(tmp_path.iterdir())) == 1


def test_a_bad_row_leaves_nothing_behind(load, own, tmp_path):
    with own.open("a") as file:
        file.write(json.dumps(PAIRS[0] | {"chosen": 7}) + "\n")
    with pytest.raises(UserError, match=r"own.jsonl, line 31: field 'chosen' is a number"):
        load(f"datasets=[{own}]", "eval_share=0")
    assert list((tmp_path / "runs").glob("*/token_cache/*")) == []


def test_a_full_disk_is_said_in_one_line(tmp_path, monkeypatch):
    def fsync(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError) as caught:
        made(tmp_path, ROWS)
    assert (
        str(tmp_path) in str(caught.value)
        and "No space left" in str(caught.value)
        and "local_dirs" in str(caught.value)
    )
    assert not list(tmp_path.iterdir())


def test_what_killed_runs_left_is_removed_after_a_day(tmp_path):
    for name, age in (("tmp-old", 90_000), ("tmp-new", 600)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ids.bin").write_bytes(b"")
        for path in (tmp_path / name / "ids.bin", tmp_path / name):
            os.utime(path, (path.stat().st_mtime - age,) * 2)
    made(tmp_path, ROWS)
    assert [f.name for f in tmp_path.glob("tmp-*")] == ["tmp-new"]


RANKS = """
import sys, time
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist, torch.multiprocessing as mp

def work(rank, folder):
    from plumb.distributed import collectives
    from plumb.errors import UserError
    Path(folder, f"ready{rank}").touch()
    while not Path(folder, f"ready{1 - rank}").exists():  # however long the imports take
        time.sleep(0.05)
    group = dict(rank=rank, world_size=2, timeout=timedelta(seconds=3))
    dist.init_process_group("gloo", f"file://{folder}/meet", **group)
    def make():
        with open(f"{folder}/made", "a") as file:
            file.write(f"{rank}")
        time.sleep(5)  # longer than the group's patience
        return ["a"]
    def fail():
        raise UserError("a bad row")
    assert collectives.from_rank0(make) == ["a"]
    try:
        collectives.from_rank0(fail)
    except UserError as error:
        assert str(error) == "a bad row"
        open(f"{folder}/failed{rank}", "w").close()
    collectives.barrier()

if __name__ == "__main__":
    mp.spawn(work, args=(sys.argv[1],), nprocs=2)
"""


def test_rank_0_makes_and_the_others_wait_however_long(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [sys.executable, tmp_path / "ranks.py", tmp_path]
    subprocess.run(
        command, check=True, timeout=120, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert (tmp_path / "made").read_text() == "0" and {
        f.name for f in tmp_path.glob("failed*")
    } == {"failed0", "failed1"}
