"""The user's own files: every format, and one line for every mistake."""

import gzip
import json
from pathlib import Path

import pytest
from own_files import BAD, GOOD, PAIR, Q, assistant, check_message, jsonl, load, user

from plumb.data.registry import Reading
from plumb.errors import UserError

FIXTURES = Path(__file__).parents[1] / "fixtures"
SHARED = Path(__file__).parents[3] / "shared/data"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"the real data of {SHARED} isn't here"
)

# ---- formats ----


def write_json(path, rows):
    path.write_text(json.dumps(rows))


def write_json_lines(path, rows):
    path.write_text("\n\n".join(map(json.dumps, rows)))


def write_csv(path, rows):
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    path.write_text("\n".join(",".join(f'"{cell}"' for cell in line) for line in cells))


def write_parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)


def compressed(write):
    def write_gz(path, rows):
        write(path, rows)
        path.write_bytes(gzip.compress(path.read_bytes()))

    return write_gz


FORMATS = {
    "own.jsonl": write_json_lines,
    "own.json": write_json,
    "lines.json": write_json_lines,
    "data.json": lambda path, rows: write_json(path, {"data": rows}),
    "bom.jsonl": lambda path, rows: path.write_text(
        "\ufeff" + "\r\n".join(map(json.dumps, rows)), newline=""
    ),
    "indented.json": lambda path, rows: path.write_text(json.dumps(rows, indent=2)),
    "own.csv": write_csv,
    "own.parquet": write_parquet,
    "own.jsonl.gz": compressed(write_json_lines),
    "own.JSON.gz": compressed(write_json),
    "own.csv.gz": compressed(write_csv),
    "own.parquet.gz": compressed(write_parquet),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path, name):
    rows = [PAIR | {"prompt": f"Nenne Käse {n}:"} for n in range(3)]
    FORMATS[name](tmp_path / name, rows)
    loaded = load(tmp_path / name)
    assert [row.prompt for row in loaded.rows] == [row["prompt"] for row in rows]
    assert loaded.rows[0].responses == [" the Baltic", " the Alps"] and loaded.rows[0].pairs == [
        (0, 1)
    ]
    numbers = [row.source.removeprefix(f"{tmp_path}/{name}:") for row in loaded.rows]
    by_line = {
        "own.jsonl": "135",
        "lines.json": "135",
        "own.jsonl.gz": "135",
        "own.csv": "234",
        "own.csv.gz": "234",
    }
    assert numbers == list(by_line.get(name, "123"))


def test_csv_cells_with_line_breaks_are_called_by_their_first_line():
    rows = load(FIXTURES / "pairs.csv").rows
    assert rows[0].prompt == "Two lines,\nplease:" and rows[0].responses == [" one\ntwo", " one"]
    assert [row.source.rpartition(":")[2] for row in rows] == ["2", "5"]


def test_saved_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    both = {
        "train": datasets.Dataset.from_list([PAIR] * 3),
        "test": datasets.Dataset.from_list([PAIR]),
    }
    datasets.DatasetDict(both).save_to_disk(str(tmp_path / "both"))
    both["train"].save_to_disk(str(tmp_path / "one"))
    assert [len(load(tmp_path / "both", split).rows) for split in ("train", "test")] == [3, 1]
    assert len(load(tmp_path / "one").rows) == 3


@pytest.mark.parametrize(
    "names, train, test",
    [
        (("train.jsonl", "test.jsonl"), "train", "test"),
        (("sub/train_0.jsonl", "sub/eval_0.jsonl"), "sub/train_0", "sub/eval_0"),
        (("train.jsonl", "validation.jsonl", "test.jsonl"), "train", "test"),
        (("train.jsonl", "dev.jsonl", ".cache/test.jsonl", "README.md"), "train", "dev"),
    ],
)
def test_folders(tmp_path, names, train, test):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(PAIR | {"prompt": name}))
    for split, stem in (("train", train), ("test", test)):
        assert [row.prompt for row in load(tmp_path, split).rows] == [f"{stem}.jsonl"]


def test_folder_with_one_split_is_split(tmp_path):
    (tmp_path / "test.jsonl").write_text(
        "\n".join(json.dumps(PAIR | {"prompt": str(n)}) for n in range(10))
    )
    assert [len(load(tmp_path, split, eval_share=0.3).rows) for split in ("train", "test")] == [
        7,
        3,
    ]
    assert "eval_share=0.3" in load(tmp_path, eval_share=0.3).form


# ---- mistakes: file contents, what the message says ----

LINE = json.dumps(PAIR)
BAD_FILES = {
    "empty": ("own.jsonl", b"", "own.jsonl: the file is empty"),
    "blank": ("own.json", b" \n", "own.json: the file is empty"),
    "no rows": ("own.csv", b"prompt,chosen,rejected\n", "own.csv: the file is empty"),
    "bad json": (
        "own.jsonl",
        f"{LINE}\n{{oops\n{LINE}\n[1\n{{\n".encode(),
        "own.jsonl, line 2: not valid JSON: Expecting",
    ),
    "bad json array": (
        "own.json",
        f"[{LINE},\n{LINE[:-1]}".encode(),
        "own.json, line 2: not valid JSON",
    ),
    "nested": ("own.jsonl", b"[" * 100_000, "line 1: not valid JSON: nested too deeply"),
    "not a list": ("own.json", b"7", "own.json: the file holds a number (7)"),
    "not an object": (
        "own.jsonl",
        f"{LINE}\n[1]".encode(),
        "line 2: the row is a list ([1]), not an object",
    ),
    "not an object in json": (
        "own.json",
        f'[{LINE}, "x"]'.encode(),
        "own.json, row 2: the row is a string ('x')",
    ),
    "latin-1": (
        "own.jsonl",
        f"{LINE}\n".encode() + '{"prompt": "Käse"}'.encode("latin-1"),
        "line 2: byte 14 of the line (0xe4) isn't UTF-8",
    ),
    "utf-16": ("own.jsonl", LINE.encode("utf-16"), "line 1: byte 1 of the line (0xff) isn't UTF-8"),
    "surrogate": (
        "own.jsonl",
        json.dumps(PAIR | {"chosen": "ok \ud83d"}).encode(),
        "line 1: field 'chosen' holds half a surrogate pair (\\ud83d at character 3)",
    ),
    "truncated gzip": (
        "own.jsonl.gz",
        gzip.compress(LINE.encode() * 999)[:-12],
        "own.jsonl.gz: the gzip file is damaged or cut short",
    ),
    "corrupt gzip": (
        "own.jsonl.gz",
        b"\x1f\x8b" + b"x" * 50,
        "own.jsonl.gz: the gzip file is damaged",
    ),
    "not gzip": ("own.jsonl.gz", LINE.encode(), "own.jsonl.gz: not a gzip file"),
    "not parquet": ("own.parquet", b"PAR1 no", "own.parquet: not a readable parquet file"),
    "duplicate header": (
        "own.csv",
        b"prompt,chosen,chosen\na,b,c\n",
        "line 1: the header names 'chosen' more than once",
    ),
    "ragged": (
        "own.csv",
        b"prompt,chosen,rejected\na,b,c\na,b\n",
        "line 3: the row has 2 cells, the header 3",
    ),
    "open quote": ("own.csv", b'prompt,chosen,rejected\na,b,c\na,"b,c\n', "line 3: not valid CSV"),
    "suffix": (
        "sub/own.txt",
        b"x",
        "own.txt: can't tell its format; name it as one of .jsonl, .json",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path, case):
    name, content, message = BAD_FILES[case]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load(path)
    check_message(caught, message)


@pytest.mark.parametrize(
    "name, content, line",
    [
        ("own.jsonl", f"{LINE}\n{{oops\n{LINE}\n", 2),
        ("own.jsonl", f"{LINE}\n[1]\n{LINE}\n", 2),
        ("own.jsonl", f"{LINE}\n{json.dumps(PAIR | {'chosen': None})}\n{LINE}\n", 2),
        ("own.jsonl", f"{LINE}\n".encode() + b'{"prompt": "\xe4"}\n' + LINE.encode(), 2),
        ("own.csv", "prompt,chosen,rejected\na,b,c\na,b\nd,e,f\n", 3),
        ("own.json", f"[{LINE}, null, {LINE}]", 2),
    ],
)
def test_bad_rows_may_be_dropped(tmp_path, name, content, line):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError):
        load(path)
    for share in (0, 0.5):  # with a pass before, that holds prompts out, a row is counted once
        loaded = load(path, reading=Reading(bad_row="drop"), eval_share=share)
        assert loaded.skipped == {"bad rows": 1}
        assert loaded.first_bad.startswith(
            f"{path}, {'row' if name == 'own.json' else 'line'} {line}: "
        )
    assert len(load(path, reading=Reading(bad_row="drop")).rows) == 2


def test_a_file_of_bad_rows_says_the_first(tmp_path):
    path = jsonl(tmp_path, [1], [2])
    with pytest.raises(
        UserError, match=r"no row is usable; the first error: .*own.jsonl, line 1: "
    ):
        load(path, reading=Reading(bad_row="drop"))


def test_nulls_within_a_table_are_absent(tmp_path):
    """Every struct of a Parquet column has the fields of all others."""
    calls = [
        {"function": {"name": "f", "arguments": {"x": 1, "y": None}}},
        {"function": {"name": "g", "arguments": {"y": 2}}},
    ]
    rows = [
        {"messages": [Q, assistant("") | {"tool_calls": [call]}], "tools": None} for call in calls
    ]
    write_parquet(tmp_path / "own.parquet", rows)
    ours = [
        row.sft_target[0]["tool_calls"][0]["function"]["arguments"]
        for row in load(tmp_path / "own.parquet").rows
    ]
    assert ours == [{"x": 1}, {"y": 2}]


@pytest.mark.parametrize(
    "text",
    [
        "prompt;chosen;rejected\np; a, b; c\n",
        "prompt\tchosen\trejected\np\t a, b\t c\n",
        '\ufeff,prompt,chosen,rejected\n0,p," a, b", c\n',
    ],
)
def test_csv_as_people_have_it(tmp_path, text):
    (tmp_path / "own.csv").write_text(text)
    assert tuple(load(tmp_path / "own.csv").rows[0])[:2] == ("p", [" a, b", " c"])


# ---- folders with several splits of a kind ----


@pytest.fixture
def ufb(tmp_path):
    """As UltraFeedback's: three training splits and three test splits, all of them of pairs."""
    for split in ("train", "test"):
        for kind in ("prefs", "sft", "gen"):
            asked = user(f"{split} {kind}")
            row = {"prompt": asked["content"], "chosen": [asked, GOOD], "rejected": [asked, BAD]}
            (tmp_path / f"{split}_{kind}-00000-of-00001.jsonl").write_text(json.dumps(row))
    return tmp_path


@pytest.mark.parametrize(
    "reading, names",
    [
        (Reading(group="pair"), ("train_prefs", "test_prefs")),
        (Reading(group="single"), ("train_sft", "test_sft")),
        (Reading(group="pair", split_names={"train": "train_gen"}), ("train_gen", "test_gen")),
        (
            Reading(group="pair", split_names={"train": "train_gen", "test": "test_sft"}),
            ("train_gen", "test_sft"),
        ),
    ],
)
def test_one_split_of_several_is_read(ufb, reading, names):
    for split, name in zip(("train", "test"), names, strict=True):
        loaded = load(ufb, split, reading=reading)
        assert [row.prompt[0]["content"] for row in loaded.rows] == [name.replace("_", " ")]
        others = ", ".join(sorted({f"{split}_{kind}" for kind in ("gen", "prefs", "sft")} - {name}))
        assert loaded.taken == f"{name} (not {others})"


def test_splits_are_told_apart_by_their_form(tmp_path):
    (tmp_path / "train_a.jsonl").write_text(json.dumps(PAIR))
    (tmp_path / "train_b.jsonl").write_text(json.dumps({"messages": [Q, GOOD]}))
    assert load(tmp_path, reading=Reading(group="pair")).rows[0].prompt == PAIR["prompt"]
    assert load(tmp_path, reading=Reading(group="single")).rows[0].prompt == [Q]


@pytest.mark.parametrize(
    "reading, message",
    [
        (
            Reading(),
            (
                "there are several train splits, train_gen, train_prefs, train_sft; choose one"
                " with split_names='{train: "
            ),
        ),
        (Reading(split_names={"train": "train_x"}), "split_names.train=train_x: "),
    ],
)
def test_which_split_must_be_clear(ufb, reading, message):
    with pytest.raises(UserError) as caught:
        load(ufb, reading=reading)
    check_message(caught, message)


def test_one_split_of_a_saved_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    splits = {
        f"train_{kind}": datasets.Dataset.from_list([PAIR | {"prompt": kind}])
        for kind in ("prefs", "sft")
    }
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "set"))
    assert [row.prompt for row in load(tmp_path / "set", reading=Reading(group="pair")).rows] == [
        "prefs"
    ]


def test_parts_of_one_split_are_one(tmp_path):
    for i in range(2):
        (tmp_path / f"train-0000{i}-of-00002.jsonl").write_text(
            json.dumps(PAIR | {"prompt": str(i)})
        )
    loaded = load(tmp_path, reading=Reading(group="pair"))
    assert [row.prompt for row in loaded.rows] == ["0", "1"] and not loaded.taken


def test_texts_without_a_prompt_are_held_out_by_their_text(tmp_path):
    path = jsonl(tmp_path, *({"text": str(n)} for n in range(10)))
    assert [len(load(path, split, eval_share=0.3).rows) for split in ("train", "test")] == [7, 3]


def test_bad_json_counts_the_lines_after_it(tmp_path):
    (tmp_path / "own.jsonl").write_text(f"{LINE}\n{{oops\n{LINE}\n[1\n{{\n")
    with pytest.raises(UserError) as caught:
        load(tmp_path / "own.jsonl")
    check_message(caught, "line 2: not valid JSON: Expecting property name")
    check_message(
        caught, "at character 2; write one object a line (and 2 more lines with problems)"
    )


def test_a_whole_file_may_be_for_evaluation(tmp_path):
    path = jsonl(tmp_path, PAIR, PAIR | {"prompt": "p"})
    assert [len(load(path, split, eval_share=1.0).rows) for split in ("train", "test")] == [0, 2]


def test_folder_without_splits(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(LINE)
    with pytest.raises(UserError, match=r"no train\* or test\* file \(found: pairs.jsonl\)"):
        load(tmp_path)


# ---- real files ----

REAL = {  # path: rows, the form, chat?
    "hh/harmless-base/test.jsonl.gz": (2307, "chosen / rejected", False),
    "polite/pairs.json.gz": (1100, "instruction + input / chosen / rejected", True),
    "polite/sft.json.gz": (1100, "instruction + input / output (SFT)", True),
    "ultrafeedback/processed/train_clean.jsonl.gz": (1000, "prompt / chosen / rejected", False),
    "ultrafeedback/noisy/label_flip_30.jsonl.gz": (1000, "prompt / chosen / rejected", False),
    "ultrafeedback/processed": (1000, "prompt / chosen / rejected", False),
    "sharegpt/dpo_en_demo.json.gz": (300, "conversations / chosen / rejected", True),
    "sharegpt/alpaca_en_demo.json.gz": (999, "instruction + input / output (SFT)", True),
    "sharegpt/message_lists_tiny.json": (1, "chosen / rejected", True),
    "stackexchange/paired_tiny.json": (25, "question / response_j / response_k", False),
}


@needs_shared
@pytest.mark.parametrize("name", REAL)
def test_real_files(name):
    n_rows, form, chat = REAL[name]
    loaded = load(SHARED / name)
    assert len(loaded.rows) == n_rows and f"{n_rows:,} rows, {form}" in loaded.form
    assert isinstance(loaded.rows[0].prompt, list) == chat


@needs_shared
def test_real_labelled_data():
    loaded = load(SHARED / "sharegpt/kto_en_demo.json.gz")
    assert "messages / label (labelled) (as chat messages)" in loaded.form
    assert {row.labels[0] for row in loaded.rows} == {True, False}
    assert all(row.sft_target is None and row.pairs == [] for row in loaded.rows)


@needs_shared
def test_polite_pairs_imitate_output():
    rows = load(SHARED / "polite/pairs.json.gz").rows
    assert all(row.sft_target[0]["role"] == "assistant" and row.pairs == [(0, 1)] for row in rows)
    assert sum(row.responses[0] == row.responses[1] for row in rows) == 6
