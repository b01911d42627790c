"""Make thirty files of preference pairs with one error each, for reliability_trl.py."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]


def malformed(good: list[Row]) -> dict[str, bytes]:
    """Return {name: contents of a .jsonl file}: the `good` rows, with the fifth changed."""
    lines = [json.dumps(row) + "\n" for row in good]
    text, fifth = "".join(lines), good[4]

    def with_row(row: object) -> bytes:
        return with_line(json.dumps(row) + "\n")

    def with_line(line: str, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return "".join([*lines[:4], line, *lines[5:]]).encode(encoding, errors)

    def everywhere(change: Callable[[Row], Row]) -> bytes:
        return "".join(json.dumps(change(row)) + "\n" for row in good).encode()

    def without(field: str) -> Row:
        return {k: v for k, v in fifth.items() if k != field}

    reverse = fifth | {"chosen": fifth["rejected"], "rejected": fifth["chosen"]}
    accented = json.dumps(fifth | {"chosen": " Très bien."}, ensure_ascii=False) + "\n"
    return {
        "the last line is cut off": text[:-40].encode(),
        "a closing quote is missing": with_line(lines[4].replace('"}', "}")),
        "a trailing comma": with_line(lines[4].replace("}\n", ",}\n")),
        "two objects on a line": with_line(lines[4].strip() + lines[4]),
        "a line that is no JSON": with_line("# a comment\n"),
        "a line that is a list": with_row([fifth["prompt"], fifth["chosen"], fifth["rejected"]]),
        "an empty file": b"",
        "blank lines only": b"\n\n\n",
        "UTF-16": text.encode("utf-16"),
        "Latin-1": with_line(accented, "latin-1"),
        "a lone surrogate": with_line(lines[4].replace("\\n\\nHuman", "\\ud800 Human")),
        "gzip under the name .jsonl": gzip.compress(text.encode()),
        "chosen is missing in a row": with_row(without("chosen")),
        "chosen is missing everywhere": everywhere(
            lambda row: {k: v for k, v in row.items() if k != "chosen"}
        ),
        "chosen is spelt choosen": everywhere(
            lambda row: {k.replace("chosen", "choosen"): v for k, v in row.items()}
        ),
        "chosen is null": with_row(fifth | {"chosen": None}),
        "chosen is a number": with_row(fifth | {"chosen": 7}),
        "chosen is a list of strings": with_row(fifth | {"chosen": ["a", "b"]}),
        "chosen is a dict": with_row(fifth | {"chosen": {"text": "a"}}),
        "prompt is null": with_row(fifth | {"prompt": None}),
        "prompt is a number everywhere": everywhere(lambda row: row | {"prompt": 7}),
        "chosen is empty": with_row(fifth | {"chosen": ""}),
        "both responses are empty": with_row(fifth | {"chosen": "", "rejected": ""}),
        "prompt is empty": with_row(fifth | {"prompt": ""}),
        "chosen equals rejected": with_row(fifth | {"rejected": fifth["chosen"]}),
        "the same row twice": with_line(lines[4] * 2),
        "a pair and its reverse": with_line(lines[4] + json.dumps(reverse) + "\n"),
        "a prompt longer than max_length": with_row(fifth | {"prompt": "word " * 400}),
        "every prompt longer than max_length": everywhere(
            lambda row: row | {"prompt": "word " * 400}
        ),
        "a message without a role": with_row({name: [{"content": "Hello."}] for name in fifth}),
    }
