"""Local files, row by row: .jsonl, .json, .csv and .parquet, and folders of them.

Our own readers, because every mistake is to name the file, the line or row, and the field.
`open_source` finds the files of a split; `Source.rows()` yields a `RawRow` each, whose methods check its fields.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from tqdm import tqdm

from utils import UserError, rank

Messages = list[dict[str, str]]
Text = str | Messages

MESSAGE_KEYS = (("role", "content"), ("from", "value"))
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz", ".parquet.gz")
# The first of a split's prefixes that any file has wins, so that `validation*` counts as test only beside no `test*`.
SPLIT_PREFIXES = {"train": ("train",), "test": ("test", "validation", "valid", "eval", "dev")}
LONGEST_LINE = 2**24  # bytes of a row
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


class RawRow(NamedTuple):
    """A row as it stands in its file, and where that is."""

    fields: Mapping[str, Any]
    file: str
    number: int
    unit: str  # "line" or "row"

    @property
    def source(self) -> str:
        return f"{self.file}:{self.number}"

    @property
    def names(self) -> str:
        return ", ".join(map(str, self.fields))

    def error(self, problem: str, fix: str) -> UserError:
        return UserError(f"{self.file}, {self.unit} {self.number}: {problem}; {fix}")

    def value(self, field: str) -> Any:
        if field not in self.fields:
            raise self.error(f"no field '{field}' (the row has: {self.names})", "add it")
        return self.fields[field]

    def text(self, field: str) -> str:
        return self.check_text(self.value(field), field)

    def check_text(self, value: Any, field: str) -> str:
        """`value`, if it is a string that UTF-8 can hold. `field` is how to call it in the error."""
        if not isinstance(value, str):
            raise self.error(f"field '{field}' is {describe(value)}, not a string", "mend or remove it")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                code = f"\\u{ord(value[error.start]):04x}"
                problem = f"field '{field}' holds half a surrogate pair ({code} at character {error.start})"
                raise self.error(problem, "write the whole character") from None
        return value

    def text_or_messages(self, field: str) -> Text:
        value = self.value(field)
        return self.messages(field) if isinstance(value, list | dict) else self.check_text(value, field)

    def messages(self, field: str) -> Messages:
        """A list of {role, content} or ShareGPT {from, value}, or one of them alone, as {role, content}."""
        value = self.value(field)
        turns = [value] if isinstance(value, dict) else value
        if not isinstance(turns, list) or not turns:
            raise self.error(f"field '{field}' is {describe(value)}, not a list of messages", "mend or remove it")
        return [self._message(turn, f"{field}[{i}]") for i, turn in enumerate(turns)]

    def _message(self, turn: Any, field: str) -> dict[str, str]:
        keys = next((k for k in MESSAGE_KEYS if isinstance(turn, dict) and turn.keys() >= set(k)), None)
        if keys is None:
            raise self.error(
                f"field '{field}' is {describe(turn)}, not a message", "write {role, content} or {from, value}"
            )
        role = turn[keys[0]]
        if not isinstance(role, str) or role not in ROLES:
            raise self.error(
                f"field '{field}.{keys[0]}' is {describe(role)}, not a known role", f"use one of {', '.join(ROLES)}"
            )
        return {"role": ROLES[role], "content": self.check_text(turn[keys[1]], f"{field}.{keys[1]}")}


def describe(value: Any) -> str:
    """The value's kind in JSON's words, and its beginning."""
    if value is None:
        return "null"
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return f"{kinds.get(type(value), type(value).__name__)} ({shorten(value)})"


def shorten(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


# ---- files -> raw rows ----


class Source(NamedTuple):
    """The rows of a split. `rows()` reads them from the start each time, so that no file need be held in memory."""

    rows: Callable[[], Iterator[RawRow]]
    whole: bool  # both splits are in here, and the caller has to take its share
    version: tuple | None  # changes when the rows do: path, size and time of each file, or the hub's fingerprint; None: unknown

    def held_out(self, prompts: Callable[[], Iterable[str]], how: Hashable, share: float) -> np.ndarray:
        """`held_out` of this source's rows, once per process; `how` says how `prompts` makes prompts of the rows."""
        key = (self.version, how, share)
        if self.version is None or key not in _held_out:
            _held_out[key] = held_out(prompts(), share)
        return _held_out[key]


_held_out: dict[Hashable, np.ndarray] = {}


def held_out(prompts: Iterable[str], share: float) -> np.ndarray:
    """Which rows are the test split, when `share` of the unique prompts is: those with the lowest digests.  [rows] bool

    So the split depends on nothing but the prompts: it is the same for every stage, seed and order of the file. Shares
    of 0 and 1 leave a split empty; any other gives each split a prompt, if there are two or more.

    >>> held_out(["a", "b", "a", "c"], share=0.3)
    array([False, False, False,  True])
    """
    progress = tqdm(prompts, desc="held-out prompts", unit="row", unit_scale=True, delay=3, disable=rank() != 0)
    digests = np.fromiter(map(digest, progress), np.uint64)
    unique = np.unique(digests)
    n_test = round(share * len(unique))
    if 0 < share < 1 and len(unique):
        n_test = min(max(n_test, 1), len(unique) - 1)
    return digests <= unique[n_test - 1] if n_test else np.zeros(len(digests), bool)


def digest(text: str) -> int:
    """64 bits that stand for the text: in the split, and to find duplicates and leaks."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def files_version(files: Iterable[Path]) -> tuple:
    """Path, size and time of each file: what changes when a file does."""
    return tuple((str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files)


def open_source(path: str | Path, split: str, data_dir: str | None = None) -> Source:
    """The file, the folder's files of this split, or the folder written by `datasets.save_to_disk`.

    In a folder: the files whose names start with the split's name, at any depth (under `data_dir`, if there is such a
    subfolder). `whole` when it's one file, or a folder that has files of only one of the two splits.
    """
    if split not in SPLIT_PREFIXES:
        raise UserError(f"split '{split}' of {path}: local files have a 'train' and a 'test' split; name one of them")
    root = Path(path).expanduser()
    if not root.exists():
        raise UserError(f"{path}: no such file or folder; check the path (relative paths start at {Path.cwd()})")
    if not root.is_file() and not root.is_dir():
        raise UserError(f"{path}: not a file or folder, but a pipe or device; write the rows to a file")
    if root.is_file():
        return Source(lambda: read_file(root), whole=True, version=files_version([root]))
    if data_dir and (root / data_dir).is_dir():
        root = root / data_dir
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        return _saved_to_disk(root, split)
    files = sorted(f for f in root.rglob("*") if _is_data_file(f.relative_to(root)))
    chosen = {name: _of_split([f.name for f in files], name) for name in SPLIT_PREFIXES}
    if not any(chosen.values()):
        found = ", ".join(f.name for f in files[:3]) or "no data file"
        raise UserError(f"{path}: the folder has no train* or test* file (found: {found}); give the file itself")
    whole = not all(chosen.values())
    paths = [f for f in files if f.name in (chosen[split] or next(filter(None, chosen.values())))]
    return Source(lambda: chain.from_iterable(map(read_file, paths)), whole, files_version(paths))


def _is_data_file(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES) and not any(part.startswith(".") for part in path.parts)


def _of_split(names: Iterable[str], split: str) -> list[str]:
    names = list(names)
    return next(filter(None, ([n for n in names if n.startswith(p)] for p in SPLIT_PREFIXES[split])), [])


def _saved_to_disk(folder: Path, split: str) -> Source:
    import datasets

    saved = datasets.load_from_disk(str(folder))
    parts = saved if isinstance(saved, dict) else {"train": saved}
    chosen = {name: _of_split(parts, name) for name in SPLIT_PREFIXES}
    names = chosen[split] or next(filter(None, chosen.values()), list(parts))
    return Source(
        lambda: chain.from_iterable(number(parts[name], f"{folder}/{name}") for name in names),
        whole=not all(chosen.values()),
        version=files_version(sorted(f for f in folder.rglob("*") if f.is_file())),
    )


def number(rows: Iterable[Any], file: str) -> Iterator[RawRow]:
    """Rows in memory or in Arrow as RawRows, numbered from 1. Raises UserError for a row that isn't an object."""
    for n, fields in enumerate(rows, 1):
        yield _object(fields, file, n, "row")


def _object(fields: Any, file: str, n: int, unit: str) -> RawRow:
    row = RawRow(fields, file, n, unit)
    if not isinstance(fields, dict):
        raise row.error(f"the row is {describe(fields)}, not an object", 'write {"prompt": ..., ...}')
    return row


def read_file(path: Path) -> Iterator[RawRow]:
    """The file's rows, in order. Raises UserError at the first that can't be read, and for a file without rows."""
    name = path.name.lower().removesuffix(".gz")
    reader = next((read for suffix, read in READERS.items() if name.endswith(suffix)), None)
    if reader is None:
        raise UserError(f"{path}: can't tell its format; name it as one of {', '.join(SUFFIXES)}")
    rows = reader(path) if reader is _read_parquet else _read_bytes(path, reader)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{path}: the file is empty; it needs at least one row")
    yield first
    yield from rows


def _read_bytes(path: Path, reader: Callable[[BinaryIO, str], Iterator[RawRow]]) -> Iterator[RawRow]:
    with path.open("rb") as raw:
        magic = raw.read(2)
        raw.seek(0)
        if path.name.lower().endswith(".gz") and magic not in (b"\x1f\x8b", b""):
            raise UserError(f"{path}: not a gzip file, though its name says so; drop '.gz' from the name")
        try:
            stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if magic == b"\x1f\x8b" else raw
            yield from reader(stream, str(path))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path}: the gzip file is damaged or cut short ({error}); copy it again") from None


def _lines(stream: BinaryIO, file: str, longest: int = -1) -> Iterator[str]:
    """The lines, decoded one at a time so that an error can say where; the byte-order mark is dropped."""
    for n, line in enumerate(iter(partial(stream.readline, longest), b""), 1):
        if len(line) == longest:  # which a small gzip file can hold, and no memory
            raise UserError(f"{file}, line {n}: longer than {longest:,} bytes, which no row is; end each row with a line break")
        try:
            yield line.decode("utf-8-sig" if n == 1 else "utf-8")
        except UnicodeDecodeError as error:
            what = f"byte {error.start + 1} of the line (0x{line[error.start]:02x}) isn't UTF-8"
            raise UserError(f"{file}, line {n}: {what}; save the file as UTF-8") from None


def _read_jsonl(stream: BinaryIO, file: str) -> Iterator[RawRow]:
    lines = enumerate(_lines(stream, file, LONGEST_LINE), 1)
    for n, line in lines:
        if not line.strip():
            continue
        value, problem = _parse(line)
        if problem:
            n_more = sum(bool(rest.strip() and _parse(rest)[1]) for _, rest in lines)
            more = and_more(n_more, "line")
            raise UserError(f"{file}, line {n}: not valid JSON: {problem}; write one object a line{more}")
        yield _object(value, file, n, "line")


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"field '{twice}' stands there twice")
    return fields


JSON = json.JSONDecoder(object_pairs_hook=_object_of)


def _parse(text: str) -> tuple[Any, str]:
    """The JSON value, and what is wrong with the text ("" when nothing is)."""
    try:
        return JSON.decode(text), ""
    except json.JSONDecodeError as error:
        return None, f"{error.msg} at character {error.colno}"
    except (RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits
        return None, "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]


def and_more(n: int, unit: str) -> str:
    return f" (and {n:,} more {unit}{'s' if n > 1 else ''} with problems)" if n else ""


def _read_json(stream: BinaryIO, file: str) -> Iterator[RawRow]:
    """A list of rows, {"data": [rows]}, or JSON lines under the name .json, as SHP's own files are."""
    text = "".join(_lines(stream, file))
    if not text.strip():
        return
    first = text.lstrip().partition("\n")[0]
    if first.startswith("{") and "data" not in (_parse(first)[0] or ["data"]):
        yield from _read_jsonl(io.BytesIO(text.encode()), file)
        return
    try:
        rows = JSON.decode(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        problem = getattr(error, "msg", str(error).partition(";")[0]) if isinstance(error, ValueError) else "nested too deeply"
        raise UserError(f"{file}, line {line}: not valid JSON: {problem}; mend or complete the file") from None
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        rows = rows["data"]
    if not isinstance(rows, list):
        raise UserError(f'{file}: the file holds {describe(rows)}; write a list of rows, or {{"data": [rows]}}')
    yield from number(rows, file)


def _read_csv(stream: BinaryIO, file: str) -> Iterator[RawRow]:
    """The header names the fields; a row is called by its first line, for quoted cells may hold line breaks."""
    csv.field_size_limit(2**31 - 1)  # the default refuses cells over 128 KiB
    reader = csv.reader(_lines(stream, file), strict=True)
    header: list[str] | None = None
    while True:
        n = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{file}, line {n}: not valid CSV: {error}; close or double the quotes") from None
        if not cells:
            continue
        if header is None:
            header = cells
            if twice := [name for name, count in Counter(header).items() if count > 1]:
                raise UserError(f"{file}, line {n}: the header names '{twice[0]}' more than once; rename one")
            continue
        if len(cells) != len(header):
            problem = f"the row has {len(cells)} cells, the header {len(header)}"
            raise UserError(f"{file}, line {n}: {problem}; quote cells that hold commas or line breaks")
        yield RawRow(dict(zip(header, cells, strict=True)), file, n, "line")


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        gzipped = path.name.lower().endswith(".gz")  # Parquet is read from its end, so the whole file is unpacked first
        with pyarrow.parquet.ParquetFile(io.BytesIO(gzip.decompress(path.read_bytes())) if gzipped else path) as table:
            batches = (batch.to_pylist() for batch in table.iter_batches(batch_size=1024))
            yield from number(chain.from_iterable(batches), str(path))
    except (pyarrow.ArrowException, OSError, EOFError, zlib.error) as error:
        problem = str(error).partition("\n")[0][:80]
        raise UserError(f"{path}: not a readable parquet file ({problem}); write it again") from None


READERS: dict[str, Callable[..., Iterator[RawRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
