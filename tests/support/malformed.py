"""Make malformed and suspicious preference files, for tests and for benchmarks that feed them to
other trainers.

Each case writes one file of pairs whose first two rows are good; the error is in line 3 unless
`line` says otherwise. `CASES` must be refused, with the words `expected` in the message. `LEGAL`
may be trained on, but not silently: `expected` is then in the summary.
"""

import gzip
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

PAIR = {"prompt": "Name a sea:", "chosen": " the Baltic", "rejected": " the Alps"}
GOOD = [PAIR, {"prompt": "Name a hill:", "chosen": " the Brocken", "rejected": " the Po"}]
HUMAN = {"role": "user", "content": "Name a sea."}
REPLY = {"role": "assistant", "content": "The Baltic."}
OTHER = {"role": "assistant", "content": "The Alps."}
CHAT = {"prompt": [HUMAN], "chosen": [REPLY], "rejected": [OTHER]}
CHATS = [CHAT, CHAT | {"prompt": [{"role": "user", "content": "And a hill?"}]}]


class Case(NamedTuple):
    """Hold how a file is written, and the words of the message about it."""

    name: str
    write: Callable[[Path], object]
    suffix: str = ".jsonl"
    expected: tuple[str, ...] = ()
    line: int | None = 3


CASES: list[Case] = []
LEGAL: list[Case] = []


def lines(*rows: object) -> bytes:
    return b"".join(
        (row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows
    )


def raw(name: str, content: bytes, *expected: str, good: list = GOOD, **more) -> None:
    """Add a case with the bytes `content` after the good rows."""
    CASES.append(
        Case(name, lambda path: path.write_bytes(lines(*good) + content), expected=expected, **more)
    )


def row(
    name: str, fields: object, *expected: str, good: list = GOOD, to: list = CASES, **more
) -> None:
    to.append(
        Case(name, lambda path: path.write_bytes(lines(*good, fields)), expected=expected, **more)
    )


def file(
    name: str, write: Callable[[Path], object], *expected: str, line: int | None = None, **more
) -> None:
    CASES.append(Case(name, write, expected=expected, line=line, **more))


def without(field: str) -> dict:
    return {k: v for k, v in PAIR.items() if k != field}


# ---- the syntax of JSON ----

SYNTAX = {
    "cut": b'{"prompt": "Name a sea:", "chosen": " the Ba',
    "no quote": b'{"prompt: "x", "chosen": "a", "rejected": "b"}',
    "comma at the end": b'{"prompt": "x", "chosen": "a", "rejected": "b",}',
    "single quotes": b"{'prompt': 'x'}",
    "two objects": b'{"prompt": "x", "chosen": "a", "rejected": "b"} {"prompt": "y"}',
    "comment": b"// rows",
    "hash comment": b"# rows",
    "no comma": b'{"prompt": "x" "chosen": "a", "rejected": "b"}',
    "no colon": b'{"prompt" "x"}',
    "bare words": b"{prompt: x}",
    "only a brace": b"{",
    "closing brace": b"}",
    "bad escape": b'{"prompt": "\\x", "chosen": "a", "rejected": "b"}',
    "short unicode escape": b'{"prompt": "\\u12", "chosen": "a", "rejected": "b"}',
    "tab in a string": b'{"prompt": "a\tb", "chosen": "a", "rejected": "b"}',
    "Python literals": b'{"prompt": None, "chosen": True, "rejected": "b"}',
    "leading zero": b'{"prompt": 01}',
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "long number": b'{"prompt": ' + b"1" * 5000 + b"}",
    "CSV": b"prompt,chosen,rejected",
    "pretty printed": b'{\n  "prompt": "x"\n}',
    "XML": b"<row/>",
    "escape sequence": b"\x1b[31m{}",
}
for name, content in SYNTAX.items():
    raw(f"syntax: {name}", content + b"\n", "JSON")
VALUES = {
    "array": b"[1, 2]",
    "text": b'"x"',
    "number": b"7",
    "null": b"null",
    "NaN": b"NaN",
    "true": b"true",
}
for name, content in VALUES.items():
    raw(f"syntax: {name} for a row", content + b"\n", "not an object")
raw(
    "syntax: field twice",
    b'{"prompt": "x", "chosen": "a", "rejected": "b", "chosen": "c"}\n',
    "'chosen'",
    "twice",
)

# ---- encoding ----

ENCODED = {
    "latin-1": "Käse".encode("latin-1"),
    "cp1252": "Käse – “Brie”".encode("cp1252"),
    "UTF-16 LE": "x".encode("utf-16-le") + "é".encode("utf-16-le"),
    "Shift JIS": "海".encode("shift_jis"),
    "GB18030": "海".encode("gb18030"),
    "overlong": b"\xc0\xaf",
    "a lone surrogate": b"\xed\xa0\x80",
    "beyond Unicode": b"\xf5\x80\x80\x80",
    "a continuation": b"\x80",
    "cut in a letter": "é".encode()[:1],
}
for name, content in ENCODED.items():
    raw(
        f"encoding: {name}",
        b'{"prompt": "' + content + b'", "chosen": "a", "rejected": "b"}\n',
        "UTF-8" if name != "UTF-16 LE" else "",
    )
raw("encoding: cut at the end of the file", b'{"prompt": "x", "chosen": "\xe6\xb5', "UTF-8")
row("encoding: half a pair", PAIR | {"chosen": " \ud83d"}, "'chosen'", "surrogate", "\\ud83d")
row("encoding: half a pair in a name", without("chosen") | {"chosen\udc00": "x"}, "'chosen'")
raw("encoding: NUL bytes", b"\0\0\0\0\n", "JSON")
file(
    "encoding: UTF-16",
    lambda p: p.write_bytes(lines(*GOOD).decode().encode("utf-16")),
    "UTF-8",
    line=1,
)
file(
    "encoding: UTF-32",
    lambda p: p.write_bytes(lines(*GOOD).decode().encode("utf-32")),
    "UTF-8",
    line=1,
)

# ---- fields ----

for field in PAIR:
    row(f"fields: no {field}", without(field), f"'{field}'")
    for name, value in {
        "null": None,
        "a number": 7,
        "true": True,
        "a float": 0.5,
        "an empty list": [],
        "an object": {},
    }.items():
        row(f"fields: {field} is {name}", PAIR | {field: value}, f"'{field}")
    if field != "rejected":  # there may be several of it
        row(f"fields: {field} is a list of texts", PAIR | {field: ["x"]}, f"'{field}[0]'")
row("fields: a misspelt name", without("chosen") | {"choosen": " the Baltic"}, "'chosen'")
row("fields: another case", without("chosen") | {"Chosen": " the Baltic"}, "'chosen'")
row("fields: a space in the name", without("chosen") | {"chosen ": " the Baltic"}, "'chosen'")
row("fields: none", {}, "'prompt'")
row("fields: a new line in a name", without("chosen") | {"cho\nsen\x1b[31m": "x"}, "'chosen'")
for name, changed in {
    "an unknown role": {"chosen": [REPLY | {"role": "robot"}]},
    "a role that is a number": {"chosen": [REPLY | {"role": 7}]},
    "no role": {"chosen": [{"content": "x"}]},
    "no content": {"chosen": [{"role": "assistant"}]},
    "content null": {"chosen": [REPLY | {"content": None}]},
    "content with an image": {"chosen": [REPLY | {"content": [{"type": "image", "image": "x"}]}]},
    "a user's answer": {"chosen": [HUMAN]},
    "no turns": {"chosen": []},
    "a text among turns": {"chosen": ["x"]},
    "null among turns": {"rejected": [None]},
    "an unknown role in the prompt": {"prompt": [HUMAN | {"role": "robot"}]},
}.items():
    field = next(iter(changed))
    row(f"messages: {name}", CHAT | changed, f"'{field}", good=CHATS)
row("messages: no user", CHAT | {"prompt": []}, "'prompt'", good=CHATS)
row(
    "messages: only a system turn",
    CHAT | {"prompt": [{"role": "system", "content": "a"}]},
    "user",
    good=CHATS,
)
row("messages: text in a file of messages", PAIR, "mixed", good=CHATS)
row("messages: messages in a file of text", CHAT, "mixed")
TRANSCRIPTS = [
    {
        "chosen": f"\n\nHuman: {n}?\n\nAssistant: yes",
        "rejected": f"\n\nHuman: {n}?\n\nAssistant: no",
    }
    for n in "ab"
]
row(
    "transcripts: no assistant",
    {"chosen": "\n\nHuman: c?", "rejected": "\n\nHuman: c?"},
    "'chosen'",
    "Assistant:",
    good=TRANSCRIPTS,
)
row(
    "transcripts: no rejected", {"chosen": TRANSCRIPTS[0]["chosen"]}, "'rejected'", good=TRANSCRIPTS
)
SCORED = [{"prompt": f"{n}?", "responses": ["yes", "no"], "scores": [1, 0]} for n in "ab"]
for name, changed in {
    "too few": {"scores": [1]},
    "too many": {"scores": [1, 2, 3]},
    "text": {"scores": ["1", "0"]},
    "null": {"scores": None},
    "boolean": {"scores": [True, False]},
    "NaN": {"scores": [float("nan"), 0]},
    "Infinity": {"scores": [float("inf"), 0]},
    "no responses": {"responses": []},
    "a text for responses": {"responses": "yes"},
    "null among responses": {"responses": ["yes", None]},
}.items():
    row(f"scores: {name}", SCORED[0] | changed, f"'{next(iter(changed))}", good=SCORED)
raw(
    "scores: 1e999",
    b'{"prompt": "c?", "responses": ["yes", "no"], "scores": [1e999, 0]}\n',
    "'scores[0]'",
    good=SCORED,
)

# ---- files ----


def fifo(path: Path) -> None:
    os.mkfifo(path)


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        # with a fixed date: some times of day have the byte of a line end
        file.writestr(zipfile.ZipInfo("rows.jsonl"), lines(*GOOD))


def parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(GOOD), path)


file("file: missing", lambda p: None, "no such file")
file("file: empty", lambda p: p.write_bytes(b""), "empty")
file("file: blank lines", lambda p: p.write_bytes(b"\n \n\t\n"), "empty")
file("file: only a byte-order mark", lambda p: p.write_bytes(b"\xef\xbb\xbf"), "empty")
file("file: a link to nothing", lambda p: p.symlink_to(p.parent / "nowhere"), "no such file")
file("file: a link to itself", lambda p: p.symlink_to(p), "")
file("file: a folder without files", lambda p: p.mkdir(), "no train")
file("file: a pipe", fifo, "not a file")
file("file: a device", lambda p: p.symlink_to("/dev/zero"), "not a file")
file("file: zip", archive, "", line=1)
file("file: parquet by another name", parquet, "", line=1)
file(
    "file: gzip cut short",
    lambda p: p.write_bytes(gzip.compress(lines(*GOOD) * 1000)[:-30]),
    "cut short",
    suffix=".jsonl.gz",
)
file(
    "file: gzip with a wrong sum",
    lambda p: p.write_bytes(gzip.compress(lines(*GOOD))[:-8] + bytes(8)),
    "damaged",
    suffix=".jsonl.gz",
)
file("file: not gzip", lambda p: p.write_bytes(lines(*GOOD)), "not a gzip", suffix=".jsonl.gz")
file(
    "file: a line that never ends",
    lambda p: p.write_bytes(gzip.compress(b" " * (2**24 + 9))),
    "longer",
    line=1,
    suffix=".jsonl.gz",
)
file("file: unknown ending", lambda p: p.write_bytes(lines(*GOOD)), "its format", suffix=".xlsx")
file("json: cut", lambda p: p.write_text(json.dumps(GOOD)[:-20]), "JSON", line=1, suffix=".json")
file(
    "json: an object",
    lambda p: p.write_text(json.dumps({"rows": GOOD}, indent=1)),
    "a list of rows",
    suffix=".json",
)
file("json: a text", lambda p: p.write_text('"x"'), "a list of rows", suffix=".json")
file("json: empty list", lambda p: p.write_text("[]"), "empty", suffix=".json")
file(
    "json: null among rows",
    lambda p: p.write_text(json.dumps([*GOOD, None])),
    "not an object",
    line=3,
    suffix=".json",
)
file("json: deep", lambda p: p.write_text("[" * 100_000), "JSON", line=1, suffix=".json")
CSV = "prompt,chosen,rejected\na,b,c\n"
file(
    "csv: a cell more", lambda p: p.write_text(CSV + "a,b,c,d\n"), "4 cells", line=3, suffix=".csv"
)
file("csv: a cell less", lambda p: p.write_text(CSV + "a,b\n"), "2 cells", line=3, suffix=".csv")
file("csv: an open quote", lambda p: p.write_text(CSV + 'a,"b,c\n'), "CSV", line=3, suffix=".csv")
file(
    "csv: a field twice",
    lambda p: p.write_text("prompt,chosen,chosen\na,b,c\n"),
    "more than once",
    line=1,
    suffix=".csv",
)
file(
    "csv: a header alone",
    lambda p: p.write_text("prompt,chosen,rejected\n"),
    "empty",
    suffix=".csv",
)
file(
    "csv: no header",
    lambda p: p.write_text("a,b,c\nd,e,f\n"),
    "no known fields",
    line=2,
    suffix=".csv",
)
file(
    "json: a field twice",
    lambda p: p.write_text('[{"prompt": "x", "prompt": "y"}]'),
    "twice",
    suffix=".json",
)
file(
    "csv: latin-1",
    lambda p: p.write_bytes(CSV.encode() + b"caf\xe9,b,c\n"),
    "UTF-8",
    line=3,
    suffix=".csv",
)
file(
    "parquet: cut",
    lambda p: (parquet(p), p.write_bytes(p.read_bytes()[:-50])),
    "parquet",
    suffix=".parquet",
)
file("parquet: text", lambda p: p.write_bytes(lines(*GOOD)), "parquet", suffix=".parquet")

# ---- legal, but worth a message ----

row("legal: the same twice", PAIR | {"rejected": " the Baltic"}, "identical pair", to=LEGAL)
row("legal: the same pair again", PAIR, "duplicate", to=LEGAL)
row("legal: an empty prompt", PAIR | {"prompt": ""}, "empty prompt", to=LEGAL)
row("legal: a blank prompt", PAIR | {"prompt": " \n"}, "empty prompt", to=LEGAL)
row("legal: an empty chosen", PAIR | {"chosen": ""}, "empty response", to=LEGAL)
row("legal: a blank rejected", PAIR | {"rejected": "   "}, "empty response", to=LEGAL)
row("legal: EOS in a response", PAIR | {"chosen": " a<|end|> b"}, "eos in text", to=LEGAL)
row("legal: a long prompt", PAIR | {"prompt": "sea " * 2000}, "prompt truncated", to=LEGAL)
row("legal: a long response", PAIR | {"chosen": " sea" * 2000}, "response truncated", to=LEGAL)
LONG = " sea" * 2000
row(
    "legal: the same after truncation",
    PAIR | {"chosen": LONG, "rejected": LONG + "s"},
    "identical after truncation",
    to=LEGAL,
)
SWAPPED = PAIR | {"chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
row("legal: the pair the other way round", SWAPPED, "contradictory", to=LEGAL)
row("legal: equal scores", SCORED[0] | {"scores": [1, 1]}, "equal scores", good=SCORED, to=LEGAL)
row(
    "legal: prompts differ",
    {"chosen": TRANSCRIPTS[0]["chosen"], "rejected": TRANSCRIPTS[1]["rejected"]},
    "prompts of the pair differ",
    good=TRANSCRIPTS,
    to=LEGAL,
)
row(
    "legal: fields of no use",
    PAIR | {"prompt": "New:", "id": 7, "extra": None},
    "prompt / chosen / rejected",
    to=LEGAL,
)
BYTES = {
    "a byte-order mark": b"\xef\xbb\xbf" + lines(*GOOD),
    "Windows lines": lines(*GOOD).replace(b"\n", b"\r\n"),
}
for name, content in (BYTES | {"no line end at the end": lines(*GOOD)[:-1]}).items():
    LEGAL.append(
        Case(
            f"legal: {name}",
            lambda p, content=content: p.write_bytes(content),
            expected=("prompt / chosen",),
        )
    )
