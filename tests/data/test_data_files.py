"""The user's own files: every format, every form, and one line for every mistake."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from plumb.data import files, formats
from plumb.data.registry import Reading, get_dataset
from plumb.errors import UserError

FIXTURES = Path(__file__).parents[1] / "fixtures"
SHARED = Path(__file__).parents[3] / "shared/data"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"the real data of {SHARED} isn't here"
)

PAIR = {"prompt": "Name a sea:", "chosen": " the Baltic", "rejected": " the Alps"}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
Q = user("Name a sea.")
GOOD = assistant("The Baltic.")
BAD = assistant("The Alps.")


def shown(turn):
    return {"from": {"user": "human", "assistant": "gpt"}[turn["role"]], "value": turn["content"]}


def load(path, split="train", **options):
    """The data set with all its rows drawn."""
    data = get_dataset(str(path), split, **{"eval_share": 0, **options})
    rows = list(data.rows)
    return replace(data, rows=rows)


def jsonl(tmp_path, *rows):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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


# ---- forms: fields -> (prompt, responses, pairs, sft_target) ----

CHAT = ([Q], [[GOOD], [BAD]], [(0, 1)], [GOOD])
HH = ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", [" d", " e"], [(0, 1)], " d")
FORMS = {
    "strings": (PAIR, ("Name a sea:", [" the Baltic", " the Alps"], [(0, 1)], " the Baltic")),
    "strings with a target": (
        PAIR | {"sft_target": " x"},
        ("Name a sea:", [" the Baltic", " the Alps"], [(0, 1)], " x"),
    ),
    "empty strings": (dict.fromkeys(PAIR, ""), ("", ["", ""], [(0, 1)], "")),
    "strings with a system": (
        {
            "prompt": Q["content"],
            "chosen": "The Baltic.",
            "rejected": "The Alps.",
            "system": "Be brief.",
        },
        ([SYSTEM, Q], *CHAT[1:]),
    ),
    "strings, empty system": (
        {"prompt": Q["content"], "chosen": "The Baltic.", "rejected": "The Alps.", "system": ""},
        CHAT,
    ),
    "message lists": ({"prompt": [Q], "chosen": [GOOD], "rejected": [BAD]}, CHAT),
    "single messages": ({"prompt": [Q], "chosen": GOOD, "rejected": BAD}, CHAT),
    "lists that start with the prompt": (
        {"prompt": Q["content"], "chosen": [Q, GOOD], "rejected": [Q, BAD]},
        CHAT,
    ),
    "lists with a system before the prompt": (
        {"prompt": Q["content"], "chosen": [SYSTEM, Q, GOOD], "rejected": [SYSTEM, Q, BAD]},
        ([SYSTEM, Q], *CHAT[1:]),
    ),
    "whole dialogues": (
        {"chosen": [Q, GOOD, Q, GOOD], "rejected": [Q, GOOD, Q, BAD]},
        ([Q, GOOD, Q], *CHAT[1:]),
    ),
    "transcripts": ({"chosen": HH[0] + " d", "rejected": HH[0] + " e"}, HH),
    "sharegpt": (
        {
            "conversations": [shown(Q)],
            "chosen": shown(GOOD),
            "rejected": shown(BAD),
            "system": None,
        },
        CHAT,
    ),
    "instruction pair": (
        {
            "instruction": "Name",
            "input": "a sea",
            "chosen": "yes",
            "rejected": "no",
            "output": "out",
        },
        (
            [user("Name\n\na sea")],
            [[assistant("yes")], [assistant("no")]],
            [(0, 1)],
            [assistant("out")],
        ),
    ),
    "scores": (
        {"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 2.5, 1]},
        ("p", ["a", "b", "c"], [(1, 0), (1, 2)], "b"),
    ),
    "scores, chat": (
        {"prompt": [Q], "responses": ["The Alps.", "The Baltic."], "scores": [0, 1]},
        ([Q], [[BAD], [GOOD]], [(1, 0)], [GOOD]),
    ),
    "stack-exchange-paired": (
        {"question": "q", "response_j": "good", "response_k": "bad", "qid": 1},
        ("\n\nHuman: q\n\nAssistant:", [" good", " bad"], [(0, 1)], " good"),
    ),
    "orca": (
        {
            "question": "Name a sea.",
            "chosen": "The Baltic.",
            "rejected": "The Alps.",
            "system": "Be brief.",
        },
        ([SYSTEM, Q], *CHAT[1:]),
    ),
    "distilabel's orca": (
        {"input": "Name a sea.", "chosen": "The Baltic.", "rejected": "The Alps.", "system": ""},
        CHAT,
    ),
    "openai": (
        {
            "input": {"messages": [Q], "tools": []},
            "preferred_output": [GOOD],
            "non_preferred_output": [BAD],
        },
        CHAT,
    ),
    "openai, strings": (
        {
            "input": "Name a sea.",
            "preferred_output": "The Baltic.",
            "non_preferred_output": "The Alps.",
        },
        CHAT,
    ),
    "several rejected": (
        {"prompt": "p", "chosen": " a", "rejected": [" b", " c"]},
        ("p", [" a", " b", " c"], [(0, 1), (0, 2)], " a"),
    ),
    "several rejected, chat": (
        {"prompt": [Q], "chosen": [GOOD], "rejected": [[BAD], [assistant("")]]},
        ([Q], [[GOOD], [BAD], [assistant("")]], [(0, 1), (0, 2)], [GOOD]),
    ),
    "text": ({"text": "a b"}, ("", ["a b"], [], "a b")),
    "a list of parts": (
        {
            "prompt": [
                user([{"type": "text", "text": "Name "}, {"type": "text", "text": "a sea."}])
            ],
            "chosen": [GOOD],
            "rejected": [BAD],
        },
        CHAT,
    ),
    "lists of roles and contents": (
        {"messages": {"role": ["user", "assistant"], "content": ["Name a sea.", "The Baltic."]}},
        ([Q], [[GOOD]], [], [GOOD]),
    ),
    "null beside a message": (
        {"messages": [Q | {"name": None}, GOOD | {"tool_calls": None}]},
        ([Q], [[GOOD]], [], [GOOD]),
    ),
    "a call without content": (
        {"messages": [Q, {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]},
        (
            [Q],
            [[assistant("") | {"tool_calls": [{"id": 1}]}]],
            [],
            [assistant("") | {"tool_calls": [{"id": 1}]}],
        ),
    ),
    "roles of tools": (
        {
            "conversations": [
                shown(Q),
                {"from": "function_call", "value": "{}"},
                {"from": "observation", "value": "1"},
                shown(GOOD),
            ]
        },
        (
            [
                Q,
                {"role": "function_call", "content": "{}"},
                {"role": "observation", "content": "1"},
            ],
            [[GOOD]],
            [],
            [GOOD],
        ),
    ),
    "a weight of 0": (
        {
            "conversations": [
                shown(Q),
                shown(GOOD) | {"weight": 1},
                shown(Q),
                shown(BAD) | {"weight": 0},
            ]
        },
        ([Q], [[GOOD]], [], [GOOD]),
    ),
    "train: false": (
        {"messages": [Q, GOOD, Q, BAD | {"train": False}]},
        ([Q], [[GOOD]], [], [GOOD]),
    ),
    "completion": ({"prompt": "p", "completion": " c"}, ("p", [" c"], [], " c")),
    "completion, empty prompt": ({"prompt": "", "completion": "c"}, ("", ["c"], [], "c")),
    "response": ({"prompt": "p", "response": " c"}, ("p", [" c"], [], " c")),
    "completion, chat": ({"prompt": [Q], "completion": [GOOD]}, ([Q], [[GOOD]], [], [GOOD])),
    "messages": (
        {"messages": [SYSTEM, Q, BAD, Q, GOOD, Q]},
        ([SYSTEM, Q, BAD, Q], [[GOOD]], [], [GOOD]),
    ),
    "conversations": (
        {"conversations": [shown(Q), shown(GOOD)], "system": "Be brief."},
        ([SYSTEM, Q], [[GOOD]], [], [GOOD]),
    ),
    "instruction": (
        {"instruction": "Name", "input": "", "output": "x"},
        ([user("Name")], [[assistant("x")]], [], [assistant("x")]),
    ),
    "ranks": (
        {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [2, 1, 3]},
        ("p", ["a", "b", "c"], [(1, 0), (0, 2), (1, 2)], "b"),
    ),
    "UltraFeedback": (
        {
            "instruction": "p",
            "models": ["m", "n"],
            "completions": [
                {"model": "m", "response": "a", "overall_score": 6.5},
                {"model": "n", "response": "b", "overall_score": 8},
            ],
        },
        ([user("p")], [[assistant("a")], [assistant("b")]], [(1, 0)], [assistant("b")]),
    ),
    "label": ({"prompt": "p", "completion": " c", "label": True}, ("p", [" c"], [], None)),
    "label, response": ({"prompt": "p", "response": " c", "label": False}, ("p", [" c"], [], None)),
    "label, messages": ({"messages": [Q, GOOD], "label": "true"}, ([Q], [[GOOD]], [], None)),
    "label, conversations": (
        {"conversations": [shown(Q), shown(GOOD)], "label": True},
        ([Q], [[GOOD]], [], None),
    ),
    "a label that is none": (
        {"prompt": "p", "completion": " c", "label": 3},
        ("p", [" c"], [], " c"),
    ),
}


@pytest.mark.parametrize("case", FORMS)
def test_forms(tmp_path, case):
    fields, expected = FORMS[case]
    loaded = load(jsonl(tmp_path, fields, fields))
    assert [tuple(row)[:4] for row in loaded.rows] == [expected] * 2  # equal prompts are not merged
    assert loaded.form.startswith(f"{tmp_path}/own.jsonl: 2 rows, ")
    chat = isinstance(expected[0], list)
    assert ("(as chat messages)" if chat else "(as raw text)") in loaded.form
    assert loaded.truncation == ("keep_end" if chat or case == "transcripts" else "keep_start")


def test_every_form_is_tested(tmp_path):
    used = {
        formats.recognise(files.RawRow(fields, "x", 1, "row")).name for fields, _ in FORMS.values()
    }
    assert used == {form.name for form in formats.FORMS}


def test_pairs_whose_prompts_differ_and_equal_scores_are_counted(tmp_path):
    rows = [
        {"chosen": [Q, GOOD], "rejected": [Q, BAD]},
        {"chosen": [Q, GOOD], "rejected": [user("?"), BAD]},
    ]
    loaded = load(jsonl(tmp_path, *rows))
    assert len(loaded.rows) == 1 and loaded.skipped == {"prompts of the pair differ": 1}
    loaded = load(jsonl(tmp_path, {"prompt": "p", "responses": ["a", "b"], "scores": [1, 1]}))
    assert loaded.rows[0].pairs == [] and loaded.skipped == {"equal scores": 1}


def test_field_map(tmp_path):
    path = jsonl(tmp_path, {"question": "q", "good": " a", "bad": " b", "prompt": 7})
    loaded = load(path, field_map={"prompt": "question", "chosen": "good", "rejected": "bad"})
    assert tuple(loaded.rows[0])[:3] == ("q", [" a", " b"], [(0, 1)])


def test_ultrafeedback_binarized():
    loaded = load(FIXTURES / "ultrafeedback_binarized.jsonl")
    assert loaded.rows[0].prompt == [user("Name a river.")]
    assert loaded.rows[0].responses == [[assistant("The Rhine.")], [assistant("The lake.")]]


# ---- mistakes: file contents, what the message says, options ----

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


def check_message(caught, message):
    text = str(caught.value)
    assert message in text and "\n" not in text and "; " in text


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path, case):
    name, content, message = BAD_FILES[case]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load(path)
    check_message(caught, message)


LABELLED = {"prompt": "p", "completion": "c", "label": False}
CHAT_PAIR = {"prompt": [Q], "chosen": [GOOD], "rejected": [BAD]}
BAD_ROWS = {  # rows, message; row n stands on line n
    "no rejected at all": (
        [{"prompt": "p", "chosen": "c"}],
        "line 1: no field 'rejected' for prompt / chosen / rejected (the row has: prompt, chosen)",
    ),
    "no rejected in one": (
        [PAIR, {"prompt": "p", "chosen": "c"}],
        (
            "line 2: no field 'rejected' (the row has: prompt, chosen), but the file began as"
            " prompt / chosen / rejected"
        ),
    ),
    "unknown fields": ([{"a": 1, "b": 2}], "line 1: no known fields (the row has: a, b)"),
    "no fields": ([{}], "line 1: no known fields"),
    "another form": (
        [PAIR, {"messages": [Q, GOOD]}],
        "line 2: no field 'prompt' (the row has: messages)",
    ),
    "text, then chat": ([PAIR, CHAT_PAIR], "line 2: mixed forms: the file began with text"),
    "chat, then text": ([CHAT_PAIR, PAIR], "line 2: mixed forms: the file began with messages"),
    "null": ([PAIR, PAIR | {"chosen": None}], "line 2: field 'chosen' is null, not a string"),
    "number": ([PAIR | {"prompt": 17}], "line 1: field 'prompt' is a number (17), not a string"),
    "boolean": ([PAIR | {"prompt": True}], "field 'prompt' is a boolean (True)"),
    "list of strings": (
        [PAIR | {"chosen": ["a"]}],
        "field 'chosen[0]' is a string ('a'), not a message",
    ),
    "empty list": (
        [CHAT_PAIR | {"chosen": []}],
        "field 'chosen' is a list ([]), not a list of messages",
    ),
    "several": (
        [PAIR | {"chosen": None}] * 4,
        (
            "line 1: field 'chosen' is null, not a string; fix or remove it (and 3 more rows with"
            " problems)"
        ),
    ),
    "long value": (
        [PAIR | {"prompt": {"x": "y" * 999}}],
        "field 'prompt[0]' is an object ({'x': 'yyyyyyyy",
    ),
    "kto messages": (
        [{"messages": [Q, GOOD], "kto_tag": True}],
        (
            "line 1: labelled data (field 'kto_tag' is a boolean) in another form; write prompt,"
            " completion and label, or use field_map"
        ),
    ),
    "kto completion": (
        [LABELLED, LABELLED | {"label": 3}],
        "line 2: field 'label' is a number (3), not true or false; set label_threshold to read",
    ),
    "label in words": (
        [LABELLED, LABELLED | {"label": "maybe"}],
        "line 2: field 'label' is a string ('maybe'), not true or false; fix or remove the line",
    ),
    "negative weight": (
        [PAIR, PAIR | {"weight": -2}],
        "line 2: field 'weight' is -2, which is negative; write how many rows it counts as",
    ),
    "weight that is none": (
        [PAIR, PAIR | {"weight": float("nan")}],
        "line 2: field 'weight' is a number (nan), not a finite number; fix or remove the line",
    ),
    "weight in words": (
        [PAIR | {"weight": "heavy"}],
        "line 1: field 'weight' is a string ('heavy'), not a finite number",
    ),
    "soft label": (
        [PAIR, PAIR | {"p_chosen": 1.5}],
        "line 2: field 'p_chosen' is 1.5, not a probability; write a number from 0 to 1",
    ),
    "soft label of several pairs": (
        [PAIR | {"rejected": ["a", "b"], "p_chosen": 0.5}],
        "line 1: field 'p_chosen' is of one pair, and this row has 2 pairs; write a row for each",
    ),
    "NaN among scores": (
        [{"prompt": "p", "responses": ["a", "b"], "scores": [1, float("nan")]}],
        "line 1: field 'scores[1]' is a number (nan), not a finite number",
    ),
    "a completion without a score": (
        [{"instruction": "p", "completions": [{"response": "a"}]}],
        "line 1: field 'completions[0]' is an object ({'response': 'a'}); write {response, overall",
    ),
    "no label": (
        [LABELLED, {"prompt": "p", "completion": "c"}],
        "line 2: no field 'label' (the row has: prompt, completion), but the file began",
    ),
    "ranks": (
        [{"prompt": "p", "responses": ["a", "b"], "ranks": [1]}],
        "line 1: field 'ranks' is a list ([1]), not a list of 2 numbers",
    ),
    "role": (
        [CHAT_PAIR | {"chosen": [{"role": 7, "content": "x"}]}],
        "field 'chosen[0].role' is a number (7), not a role",
    ),
    "a tool's answer": (
        [CHAT_PAIR | {"chosen": [{"role": "tool", "content": "x"}]}],
        "field 'chosen' has no assistant's turn at its end",
    ),
    "an image": (
        [{"messages": [user([{"type": "image_url", "image_url": {"url": "x"}}]), GOOD]}],
        "field 'messages[0].content[0]' is a part of type 'image_url', and only text is read",
    ),
    "audio": (
        [
            {
                "messages": [
                    Q,
                    assistant(
                        [{"type": "text", "text": "a"}, {"type": "input_audio", "data": "x"}]
                    ),
                ]
            }
        ],
        "field 'messages[1].content[1]' is a part of type 'input_audio'",
    ),
    "a part without text": (
        [{"messages": [user([{"type": "text"}]), GOOD]}],
        "field 'messages[0].content[0].text' is null",
    ),
    "content": (
        [CHAT_PAIR | {"chosen": [{"role": "assistant", "content": None}]}],
        "field 'chosen[0].content' is null",
    ),
    "no content": (
        [CHAT_PAIR | {"chosen": [{"role": "assistant"}]}],
        "field 'chosen[0]' is an object",
    ),
    "ends with user": (
        [CHAT_PAIR | {"rejected": [BAD, Q]}],
        "field 'rejected' has no assistant's turn at its end",
    ),
    "other prompt": (
        [CHAT_PAIR | {"rejected": [user("?"), BAD]}],
        "field 'rejected' begins with a different prompt",
    ),
    "no user": ([{"messages": [GOOD]}], "field 'messages' has no user's turn"),
    "no assistant": ([{"messages": [Q]}], "field 'messages' has no assistant's turn"),
    "messages is text": (
        [{"messages": "hello"}],
        "field 'messages' is a string ('hello'), not a list of messages",
    ),
    "no marker": ([{"chosen": "a", "rejected": "b"}], "field 'chosen' holds no '\\n\\nAssistant:'"),
    "scores, too few": (
        [{"prompt": "p", "responses": ["a", "b"], "scores": [1]}],
        "field 'scores' is a list ([1]), not a list of 2 numbers",
    ),
    "scores, nan": (
        [{"prompt": "p", "responses": ["a"], "scores": [float("nan")]}],
        "field 'scores[0]' is a number (nan), not a finite number",
    ),
    "responses": (
        [{"prompt": "p", "responses": "a", "scores": [1]}],
        "field 'responses' is a string ('a')",
    ),
    "input": ([{"instruction": "i", "input": 3, "output": "o"}], "field 'input' is a number (3)"),
    "history": (
        [{"instruction": "i", "output": "o", "history": [["a", "b"]]}],
        "field 'history' isn't read",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows(tmp_path, case):
    rows, message = BAD_ROWS[case]
    path = jsonl(tmp_path, *rows)
    with pytest.raises(UserError) as caught:
        load(path)
    check_message(caught, message)
    assert str(caught.value).startswith(f"{path}, line ") and len(str(caught.value)) < 300 + len(
        str(path)
    )


@pytest.mark.parametrize(
    "field_map, message",
    [
        (
            {"prompt": "quest"},
            "line 1: no field 'quest', which field_map.prompt names (the row has: prompt, chosen,",
        ),
        ({"promt": "prompt"}, "field_map.promt: no form has such a field"),
    ],
)
def test_bad_field_map(tmp_path, field_map, message):
    with pytest.raises(UserError) as caught:
        load(jsonl(tmp_path, PAIR), field_map=field_map)
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


def test_role_map(tmp_path):
    path = jsonl(tmp_path, {"messages": [Q | {"role": "asks"}, GOOD | {"role": "bot"}]})
    loaded = load(path, reading=Reading(role_map={"asks": "user", "bot": "assistant"}))
    assert tuple(loaded.rows[0])[:2] == ([Q], [[GOOD]])


def test_turns_that_are_not_trained_are_counted(tmp_path):
    rows = [{"messages": [Q, GOOD, Q, Q]}, {"messages": [Q, GOOD | {"weight": 0}]}]
    loaded = load(jsonl(tmp_path, *rows))
    assert len(loaded.rows) == 1
    assert loaded.skipped == {
        "turns after the last answer": 2,
        "no answer with a weight above 0": 1,
    }


def test_fields_that_no_form_reads_go_with_the_row(tmp_path):
    more = {"tools": "[1]", "id": 7, "empty": [], "score_chosen": 2, "score_rejected": 1}
    (row,) = load(jsonl(tmp_path, CHAT_PAIR | more)).rows
    assert row.more == {"tools": "[1]", "id": 7} and row.scores == [2, 1]
    given = {
        "input": {"messages": [Q], "tools": [{"name": "f"}], "n": 1},
        "preferred_output": GOOD,
        "non_preferred_output": BAD,
    }
    assert load(jsonl(tmp_path, given)).rows[0].more == {"tools": [{"name": "f"}], "n": 1}


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
                "the folder has several train splits, train_gen, train_prefs, train_sft; choose one"
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
