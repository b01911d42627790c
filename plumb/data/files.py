"""Read local files row by row: .jsonl, .json, .csv and .parquet, and folders of them.

These are our own readers, so that every error names the file, the line or row, and the field.
`open_source` finds the files of a split; `Source.rows()` yields a `RawRow` each, whose methods
check its fields. A message keeps every field of its row, since what a chat template renders is not
known here.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from tqdm import tqdm

from plumb.console import rank
from plumb.errors import UserError

Messages = list[dict[str, Any]]
Text = str | Messages

MESSAGE_KEYS = (("role", "content"), ("from", "value"))
SUFFIXES = (
    ".jsonl",
    ".json",
    ".csv",
    ".parquet",
    ".jsonl.gz",
    ".json.gz",
    ".csv.gz",
    ".parquet.gz",
)
# The first of a split's prefixes that any file has wins, so that `validation*` counts as test only
# beside no `test*`.
SPLIT_PREFIXES = {"train": ("train",), "test": ("test", "validation", "valid", "eval", "dev")}
LONGEST_LINE = 2**24  # bytes of a row
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names of what every template calls so
PART = {"text", "input_text", "output_text"}  # types of a content part that is text

OnBad = Callable[[UserError], None]  # what to do with a row that cannot be read


class Message(dict[str, Any]):
    """Hold a turn: role, content (a string), other fields, and where it is in the file."""

    def __init__(self, fields: Mapping[str, Any], where: str, field: str):
        super().__init__(fields)
        self._where = where
        self._field = field

    def replaced(self, fields: Mapping[str, Any]) -> Message:
        return Message({**self, **fields}, self._where, self._field)

    def without(self, *names: str) -> Message:
        return Message({k: v for k, v in self.items() if k not in names}, self._where, self._field)


def place_of(message: Mapping[str, Any], source: str, i: int) -> tuple[str, str]:
    """Return (file and line, field) of the i-th message of a conversation from `source`, for an
    error.
    """
    if isinstance(message, Message):
        return message._where, message._field
    return source, f"messages[{i}]"


class RawRow(NamedTuple):
    """Hold a row as it is in its file, and where that is."""

    fields: Mapping[str, Any]
    file: str
    number: int
    unit: str  # "line" or "row"
    roles: Mapping[str, str] = ROLES  # a role in the file -> what the chat template is to call it
    # of a table where every struct has the fields of all others, null where they were absent
    arrow: bool = False
    label_threshold: float | None = None  # a label is a score, and desirable from here on

    @property
    def source(self) -> str:
        return f"{self.file}:{self.number}"

    @property
    def names(self) -> str:
        return ", ".join(map(str, self.fields))

    @property
    def where(self) -> str:
        return f"{self.file}, {self.unit} {self.number}"

    def error(self, problem: str, fix: str) -> UserError:
        return UserError(f"{self.where}: {problem}; {fix}")

    def value(self, field: str) -> Any:
        if field not in self.fields:
            raise self.error(f"no field '{field}' (the row has: {self.names})", "add it")
        return self.fields[field]

    def text(self, field: str) -> str:
        return self.check_text(self.value(field), field)

    def check_text(self, value: Any, field: str) -> str:
        """Return `value` if it is a string that UTF-8 can hold, otherwise raise UserError. `field`
        is its name in the error.
        """
        if not isinstance(value, str):
            raise self.error(
                f"field '{field}' is {describe(value)}, not a string", "fix or remove it"
            )
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                code = f"\\u{ord(value[error.start]):04x}"
                problem = (
                    f"field '{field}' holds half a surrogate pair ({code} at character"
                    f" {error.start})"
                )
                raise self.error(problem, "write the whole character") from None
        return value

    def text_or_messages(self, field: str) -> Text:
        return self.check_text_or_messages(self.value(field), field)

    def check_text_or_messages(self, value: Any, field: str) -> Text:
        return (
            self.check_messages(value, field)
            if isinstance(value, list | dict)
            else self.check_text(value, field)
        )

    def messages(self, field: str) -> Messages:
        return self.check_messages(self.value(field), field)

    def check_messages(self, value: Any, field: str) -> Messages:
        """Return a list of {role, content} or ShareGPT {from, value}, one of them alone, or lists
        of roles and contents, as messages.
        """
        turns = _transposed(value) if isinstance(value, dict) else value
        if not isinstance(turns, list) or not turns:
            raise self.error(
                f"field '{field}' is {describe(value)}, not a list of messages",
                "correct or remove it",
            )
        return [self._message(turn, f"{field}[{i}]") for i, turn in enumerate(turns)]

    def turn(self, role: str, text: str, field: str) -> Message:
        """Return the text of a field as a turn."""
        return Message({"role": role, "content": text}, self.where, field)

    def _message(self, turn: Any, field: str) -> Message:
        keys = next(
            (k for k in MESSAGE_KEYS if isinstance(turn, dict) and k[0] in turn), MESSAGE_KEYS[0]
        )
        role_key, content_key = keys
        more = {}
        # null: absent, as Parquet writes it into every message where one has the field
        if isinstance(turn, dict):
            more = {str(k): v for k, v in turn.items() if k not in keys and v is not None}
        if (
            not isinstance(turn, dict)
            or role_key not in turn
            or not (content_key in turn or any(more.values()))
        ):
            raise self.error(
                f"field '{field}' is {describe(turn)}, not a message",
                "write {role, content} or {from, value}",
            )
        role, content = turn[role_key], turn.get(content_key)
        if not isinstance(role, str) or not role.strip():
            raise self.error(
                f"field '{field}.{role_key}' is {describe(role)}, not a role",
                "write user, assistant, ...",
            )
        if content is None and any(more.values()):  # a tool call, say
            content = ""
        if isinstance(content, list):
            content = "".join(
                self._part(part, f"{field}.{content_key}[{i}]") for i, part in enumerate(content)
            )
        content = self.check_text(content, f"{field}.{content_key}")
        return Message(
            {"role": self.roles.get(role, role), "content": content, **more}, self.where, field
        )

    def _part(self, part: Any, field: str) -> str:
        """Return the text of a content part."""
        if isinstance(part, str):
            return self.check_text(part, field)
        kind = part.get("type") or "text" if isinstance(part, dict) else None
        if kind in PART:
            return self.check_text(part.get("text"), f"{field}.text")
        what = describe(part) if kind is None else f"a part of type {shorten(kind)}"
        raise self.error(
            f"field '{field}' is {what}, and only text is read",
            f"remove the part, or the {self.unit}",
        )


def _transposed(value: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one message as a list of it; {role: [...], content: [...]}, as some files hold a
    dialogue, as its messages.
    """
    columns = list(value.values())
    if (
        columns
        and all(isinstance(column, list) for column in columns)
        and len(set(map(len, columns))) == 1
    ):
        return [dict(zip(value, turn, strict=True)) for turn in zip(*columns, strict=True)]
    return [value]


def describe(value: Any) -> str:
    """Return the value's type in JSON's terms, and its beginning."""
    if value is None:
        return "null"
    kinds = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return f"{kinds.get(type(value), type(value).__name__)} ({shorten(value)})"


def shorten(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


# ---- files -> raw rows ----


class Source(NamedTuple):
    """Hold the rows of a split. `rows()` reads them from the start each time, so that no file need
    be kept in memory.
    """

    rows: Callable[[], Iterator[RawRow]]
    unsplit: bool  # it holds both splits, and the caller has to take its share
    version: (
        tuple | None
        # changes when the rows do: path, size and time of each file, or the hub's fingerprint;
        # None: unknown
    )
    taken: str = ""  # which split it is, where the folder has several of a kind

    def held_out(
        self, prompts: Callable[[], Iterable[str]], how: Hashable, share: float
    ) -> np.ndarray:
        """Return `held_out` of this source's rows, computed once per process; `how` identifies
        the way in which `prompts` makes prompts from the rows.
        """
        key = (self.version, how, share)
        if self.version is None or key not in _held_out:
            _held_out[key] = held_out(prompts(), share)
        return _held_out[key]


_held_out: dict[Hashable, np.ndarray] = {}


def held_out(prompts: Iterable[str], share: float) -> np.ndarray:
    """Return which rows are the test split, if `share` of the unique prompts is: those with the
    lowest digests.  [rows] bool

    So the split depends on nothing but the prompts: it is the same for every stage, seed and order
    of the file. Shares of 0 and 1 leave a split empty; any other gives each split a prompt, if
    there are two or more.

    >>> held_out(["a", "b", "a", "c"], share=0.3)
    array([False, False, False,  True])
    """
    progress = tqdm(
        prompts, desc="held-out prompts", unit="row", unit_scale=True, delay=3, disable=rank() != 0
    )
    digests = np.fromiter(map(digest, progress), np.uint64)
    unique = np.unique(digests)
    n_test = round(share * len(unique))
    if 0 < share < 1 and len(unique):
        n_test = min(max(n_test, 1), len(unique) - 1)
    return digests <= unique[n_test - 1] if n_test else np.zeros(len(digests), bool)


def digest(text: str) -> int:
    """Return a 64-bit digest of the text, used for the split, and to find duplicates and leaks."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def files_version(files: Iterable[Path]) -> tuple:
    """Return path, size and time of each file, which change when a file does."""
    return tuple((str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files)


Fits = Callable[[Mapping[str, Callable[[], RawRow | None]]], list[str]]


class Choice(NamedTuple):
    """Hold how to choose if a folder has several splits of a kind, such as train_prefs and
    train_sft.
    """

    names: Mapping[str, str]  # "train" or "test" -> the split to read
    fits: Fits  # split -> its first row: those that serve


def open_source(
    path: str | Path,
    split: str,
    data_dir: str | None = None,
    choice: Choice | None = None,
    on_bad: OnBad | None = None,
) -> Source:
    """Return the file, the folder's files of this split, or the folder that
    `datasets.save_to_disk` wrote.

    In a folder: the files whose names start with the split's name, at any depth (under `data_dir`,
    if there is such a subfolder). `unsplit` when it's one file, or a folder that has files of only
    one of the two splits. Names that differ in more than a shard's number (train_prefs, train_sft)
    are different splits, of which `choice` takes one; all of them only where `choice` is None. A
    row that cannot be read goes to `on_bad`; None: it ends the reading.
    """
    if split not in SPLIT_PREFIXES:
        raise UserError(
            f"split '{split}' of {path}: local files have a 'train' and a 'test' split; name one of"
            " them"
        )
    root = Path(path).expanduser()
    if not root.exists():
        raise UserError(
            f"{path}: no such file or folder; check the path (relative paths start at {Path.cwd()})"
        )
    if not root.is_file() and not root.is_dir():
        raise UserError(
            f"{path}: not a file or folder, but a pipe or device; write the rows to a file"
        )
    if root.is_file():
        return Source(lambda: read_file(root, on_bad), unsplit=True, version=files_version([root]))
    if data_dir and (root / data_dir).is_dir():
        root = root / data_dir
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        return _saved_to_disk(root, split, choice)
    files = sorted(f for f in root.rglob("*") if _is_data_file(f.relative_to(root)))
    chosen = {name: _of_split([f.name for f in files], name) for name in SPLIT_PREFIXES}
    if not any(chosen.values()):
        shown = ", ".join(f.name for f in files[:3]) or "no data file"
        raise UserError(
            f"{path}: the folder has no train* or test* file (found: {shown}); give the file itself"
        )
    unsplit = not all(chosen.values())
    names = chosen[split] or next(filter(None, chosen.values()))
    first = lambda names: next(
        chain.from_iterable(map(read_file, [f for f in files if f.name in names])), None
    )
    names, taken = _one_split(names, split, choice, first, str(path))
    paths = [f for f in files if f.name in names]
    rows = lambda: chain.from_iterable(read_file(file, on_bad) for file in paths)
    return Source(rows, unsplit, files_version(paths), taken)


def _is_data_file(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES) and not any(
        part.startswith(".") for part in path.parts
    )


def _of_split(names: Iterable[str], split: str) -> list[str]:
    names = list(names)
    return next(
        filter(None, ([n for n in names if n.startswith(p)] for p in SPLIT_PREFIXES[split])), []
    )


SHARD = re.compile(r"([-_.]?\d+)?([-_.]of[-_.]\d+([-_][0-9a-f]{16})?)?$")


def split_name(file: str) -> str:
    """Return the split that a file holds, or part of it.

    >>> [split_name(f"train{end}") for end in ("-00000-of-00002.parquet", "_1.jsonl.gz")]
    ['train', 'train']
    >>> [split_name("train_sft-00000-of-00001.parquet")]
    ['train_sft']
    """
    suffix = max((s for s in SUFFIXES if file.lower().endswith(s)), key=len, default="")
    stem = file[: len(file) - len(suffix)]
    return SHARD.sub("", stem) or stem


def _one_split(
    names: list[str],
    split: str,
    choice: Choice | None,
    first: Callable[[list[str]], RawRow | None],
    path: str,
) -> tuple[list[str], str]:
    """Return the names of files or splits that belong to the one split that is read, and a note on
    the choice.
    """
    splits: dict[str, list[str]] = {}
    for name in names:
        splits.setdefault(split_name(name), []).append(name)
    wanted = None if choice is None else choice.names.get(split)
    if choice is None or (len(splits) == 1 and wanted is None):
        return names, ""
    listed = ", ".join(sorted(splits))
    if wanted is not None and wanted not in splits:
        raise UserError(f"split_names.{split}={wanted}: {path} has no such split; it has {listed}")
    same = "" if wanted else _beside(choice.names, split, splits)
    fits = (
        [wanted or same]
        if wanted or same
        else choice.fits({s: partial(first, splits[s]) for s in splits})
    )
    if len(fits) != 1:
        fix = (
            f"choose one with split_names='{{{split}: {sorted(splits)[0]}}}', or give its file"
            " itself"
        )
        raise UserError(f"{path}: there are several {split} splits, {listed}; {fix}")
    others = ", ".join(s for s in sorted(splits) if s != fits[0])
    return splits[fits[0]], fits[0] + (f" (not {others})" if others else "")


def _beside(names: Mapping[str, str], split: str, splits: Iterable[str]) -> str:
    """Return the split whose name matches the one chosen for the other kind: test_prefs for
    train_prefs. "": none.
    """
    other = "train" if split == "test" else "test"
    if other not in names:
        return ""
    suffix = next(
        (names[other].removeprefix(p) for p in SPLIT_PREFIXES[other] if names[other].startswith(p)),
        "",
    )
    return next((s for s in splits for p in SPLIT_PREFIXES[split] if s == p + suffix), "")


def _saved_to_disk(folder: Path, split: str, choice: Choice | None) -> Source:
    import datasets

    saved = datasets.load_from_disk(str(folder))
    parts = saved if isinstance(saved, dict) else {"train": saved}
    version = files_version(sorted(f for f in folder.rglob("*") if f.is_file()))
    return tables_source(parts, str(folder), split, choice, version)


def tables_source(
    tables: Mapping[str, Iterable[Any]],
    path: str,
    split: str,
    choice: Choice | None,
    version: tuple,
) -> Source:
    """Return the rows of a split from tables by their split's name; a split that `choice` names may
    have any name. `path` is what the set is called, in errors and sources.
    """
    named = {} if choice is None else choice.names
    chosen = {
        kind: [named[kind]] if named.get(kind) in tables else _of_split(tables, kind)
        for kind in SPLIT_PREFIXES
    }
    names = chosen[split] or next(filter(None, chosen.values()), list(tables))
    rows_of = lambda name: _of_table(tables[name], f"{path}/{name}")
    first = lambda names: next(rows_of(names[0]), None)
    names, taken = _one_split(names, split, choice, first, path)
    return Source(
        lambda: chain.from_iterable(map(rows_of, names)),
        unsplit=not all(chosen.values()),
        version=version + tuple(names),
        taken=taken,
    )


def without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of an Arrow table without nulls below its columns.

    >>> without_nulls({"a": None, "b": [{"c": None, "d": 1}]})
    {'a': None, 'b': [{'d': 1}]}
    """
    return {name: _present(value) for name, value in fields.items()}


def _present(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _present(each) for name, each in value.items() if each is not None}
    return [_present(each) for each in value] if isinstance(value, list) else value


def number(rows: Iterable[Any], file: str, on_bad: OnBad | None = None) -> Iterator[RawRow]:
    """Yield rows in memory or in Arrow as RawRows, numbered from 1. Raise UserError for a row that
    isn't an object.
    """
    for n, fields in enumerate(rows, 1):
        yield from _object(fields, file, n, "row", on_bad)


def _of_table(rows: Iterable[Any], file: str) -> Iterator[RawRow]:
    return (row._replace(arrow=True) for row in number(rows, file))


def _object(fields: Any, file: str, n: int, unit: str, on_bad: OnBad | None) -> Iterator[RawRow]:
    row = RawRow(fields, file, n, unit)
    if isinstance(fields, dict):
        yield row
    else:
        _refuse(
            row.error(
                f"the row is {describe(fields)}, not an object", 'write {"prompt": ..., ...}'
            ),
            on_bad,
        )


def read_file(path: Path, on_bad: OnBad | None = None) -> Iterator[RawRow]:
    """Yield the file's rows in order. Raise UserError at the first that can't be read, and for a
    file without rows.

    With `on_bad`, a line that is not a row goes there, and reading continues; damage to the whole
    file still raises.
    """
    name = path.name.lower().removesuffix(".gz")
    reader = next((read for suffix, read in READERS.items() if name.endswith(suffix)), None)
    if reader is None:
        raise UserError(f"{path}: can't tell its format; name it as one of {', '.join(SUFFIXES)}")
    rows = (
        reader(path)
        if reader is _read_parquet
        else _read_bytes(path, partial(reader, on_bad=on_bad))
    )
    first = next(rows, None)
    if first is None and on_bad:  # perhaps all of them were bad
        return
    if first is None:
        raise UserError(f"{path}: the file is empty; it needs at least one row")
    yield first
    yield from rows


def _read_bytes(
    path: Path, reader: Callable[[BinaryIO, str], Iterator[RawRow]]
) -> Iterator[RawRow]:
    with path.open("rb") as raw:
        magic = raw.read(2)
        raw.seek(0)
        if path.name.lower().endswith(".gz") and magic not in (b"\x1f\x8b", b""):
            raise UserError(
                f"{path}: not a gzip file, though its name says so; drop '.gz' from the name"
            )
        try:
            stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if magic == b"\x1f\x8b" else raw
            yield from reader(stream, str(path))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(
                f"{path}: the gzip file is damaged or cut short ({error}); copy it again"
            ) from None


def _lines(
    stream: BinaryIO, file: str, longest: int = -1, on_bad: OnBad | None = None
) -> Iterator[str]:
    """Yield the lines, decoded one at a time so that an error can say where; the byte-order mark is
    dropped.

    What cannot be decoded goes to `on_bad`, where there is one, and leaves an empty line.
    """
    for n, line in enumerate(iter(partial(stream.readline, longest), b""), 1):
        if len(line) == longest:  # a small gzip file can hold more than the memory
            raise UserError(
                f"{file}, line {n}: longer than {longest:,} bytes, which no row is; end each row"
                " with a line break"
            )
        try:
            yield line.decode("utf-8-sig" if n == 1 else "utf-8")
        except UnicodeDecodeError as error:
            what = f"byte {error.start + 1} of the line (0x{line[error.start]:02x}) isn't UTF-8"
            _refuse(UserError(f"{file}, line {n}: {what}; save the file as UTF-8"), on_bad)
            yield "\n"


def _refuse(error: UserError, on_bad: OnBad | None) -> None:
    if on_bad is None:
        raise error from None
    on_bad(error)


def _read_jsonl(stream: BinaryIO, file: str, on_bad: OnBad | None = None) -> Iterator[RawRow]:
    lines = enumerate(_lines(stream, file, LONGEST_LINE, on_bad), 1)
    for n, line in lines:
        if not line.strip():
            continue
        value, problem = _parse(line)
        if problem and on_bad:
            on_bad(
                UserError(f"{file}, line {n}: not valid JSON: {problem}; write one object a line")
            )
            continue
        if problem:
            n_more = sum(bool(rest.strip() and _parse(rest)[1]) for _, rest in lines)
            more = and_more(n_more, "line")
            raise UserError(
                f"{file}, line {n}: not valid JSON: {problem}; write one object a line{more}"
            )
        yield from _object(value, file, n, "line", on_bad)


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"field '{twice}' occurs twice")
    return fields


JSON = json.JSONDecoder(object_pairs_hook=_object_of)


def _parse(text: str) -> tuple[Any, str]:
    """Return the JSON value, and what is wrong with the text ("" if nothing is)."""
    try:
        return JSON.decode(text), ""
    except json.JSONDecodeError as error:
        return None, f"{error.msg} at character {error.colno}"
    except (RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits
        return None, (
            "nested too deeply"
            if isinstance(error, RecursionError)
            else str(error).partition(";")[0]
        )


def and_more(n: int, unit: str) -> str:
    return f" (and {n:,} more {unit}{'s' if n > 1 else ''} with problems)" if n else ""


def _read_json(stream: BinaryIO, file: str, on_bad: OnBad | None = None) -> Iterator[RawRow]:
    """Yield the rows of a list, of {"data": [rows]}, or of JSON lines under the name .json, as
    SHP's own files are.
    """
    text = "".join(_lines(stream, file))
    if not text.strip():
        return
    first = text.lstrip().partition("\n")[0]
    if first.startswith("{") and "data" not in (_parse(first)[0] or ["data"]):
        yield from _read_jsonl(io.BytesIO(text.encode()), file, on_bad)
        return
    try:
        rows = JSON.decode(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        problem = (
            getattr(error, "msg", str(error).partition(";")[0])
            if isinstance(error, ValueError)
            else "nested too deeply"
        )
        raise UserError(
            f"{file}, line {line}: not valid JSON: {problem}; fix or complete the file"
        ) from None
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        rows = rows["data"]
    if not isinstance(rows, list):
        raise UserError(
            f'{file}: the file holds {describe(rows)}; write a list of rows, or {{"data": [rows]}}'
        )
    yield from number(rows, file, on_bad)


def _read_csv(stream: BinaryIO, file: str, on_bad: OnBad | None = None) -> Iterator[RawRow]:
    """Yield the rows, with the fields named by the header; a row is named after its first line,
    since quoted cells may hold line breaks.

    Cells stand apart by a comma, or by the semicolon or tab that parts the header where no comma
    does.
    """
    csv.field_size_limit(2**31 - 1)  # the default refuses cells over 128 KiB
    lines = _lines(stream, file, on_bad=on_bad)
    first = next(lines, "")
    delimiter = max(",;\t", key=lambda mark: (mark == "," and mark in first, first.count(mark)))
    reader = csv.reader(chain([first], lines), strict=True, delimiter=delimiter)
    header: list[str] | None = None
    while True:
        n = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{file}, line {n}: not valid CSV: {error}; close or double the quotes"
            ) from None
        if not cells:
            continue
        if header is None:
            header = cells
            if twice := [name for name, count in Counter(header).items() if count > 1]:
                raise UserError(
                    f"{file}, line {n}: the header names '{twice[0]}' more than once; rename one"
                )
            continue
        if len(cells) != len(header):
            problem = f"the row has {len(cells)} cells, the header {len(header)}"
            _refuse(
                UserError(
                    f"{file}, line {n}: {problem}; quote cells that hold commas or line breaks"
                ),
                on_bad,
            )
            continue
        yield RawRow(dict(zip(header, cells, strict=True)), file, n, "line")


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Parquet is read from its end, so the whole file is unpacked first
        gzipped = path.name.lower().endswith(".gz")
        with pyarrow.parquet.ParquetFile(
            io.BytesIO(gzip.decompress(path.read_bytes())) if gzipped else path
        ) as table:
            batches = (batch.to_pylist() for batch in table.iter_batches(batch_size=1024))
            yield from _of_table(chain.from_iterable(batches), str(path))
    except (pyarrow.ArrowException, OSError, EOFError, zlib.error) as error:
        problem = str(error).partition("\n")[0][:80]
        raise UserError(
            f"{path}: not a readable parquet file ({problem}); write it again"
        ) from None


READERS: dict[str, Callable[..., Iterator[RawRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
