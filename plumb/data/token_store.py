"""Store token ids on disk: flat arrays, written once, which every process, epoch and later start
maps into memory.

A store is a folder with the columns of one split of one data set (see `COLUMNS`) and meta.json,
which records their lengths and what they depend on. It holds each text once, without truncation, so
that SFT and DPO, and all lengths, share it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from plumb.console import rank0_print
from plumb.data.registry import DataSet
from plumb.data.tokenization import Chunk, Prefixes, TextRules, automatic_bos, encode, own_template
from plumb.errors import UserError
from plumb.paths import sync_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Version of plumb's own way from rows to token ids: files, forms, templates, tokenization. Raise it
# with every change that gives other ids for the same rows; stores of other versions are then made
# anew. test_the_version_of_token_ids holds the digest that belongs to it.
VERSION = 2
LAYOUT = 6  # of the files below; another number makes every store anew
COLUMNS = {
    "ids": (),  # [tokens] of all texts, uint16 if the vocabulary allows, else int32
    "starts": (),  # [texts + 1] where each begins in ids, and where the last ends
    "digests": (),  # [texts] 64 bits that stand for the text
    "marks": (),  # [texts] see tokenization
    "rows": (
        3,
    ),  # [rows, 3] (text of the prompt, number of the file in meta.json, number within that file)
    "weights": (),  # [rows] how many rows each counts as; NaN where it does not say
    "pairs": (3,),  # [pairs, 3] (row, text of chosen, text of rejected)
    "margins": (),  # [pairs] score of chosen less that of rejected; NaN where they aren't known
    "p_chosen": (),  # [pairs] the probability that chosen is preferred; NaN where it is not given
    # [pairs, 3] of a ranked list: the levels of chosen and rejected, and the lowest; else (0, 1, 1)
    "places": (3,),
    "targets": (2,),  # [targets, 2] (row, text of the SFT target)
    "labelled": (3,),  # [labelled, 3] (row, text, 1 if desirable, else 0)
    "lists": (3,),  # [lists, 3] (row, where it begins in `ranked`, number of responses)
    "ranked": (),  # [ranked] the texts of all lists, each from best to worst
    "levels": (),  # [ranked] 0 for the best, the same for those that rank alike
}
DTYPES = {
    "starts": "<i8",
    "digests": "<u8",
    "marks": "|u1",
    "rows": "<i4",
    "weights": "<f4",
    "pairs": "<i4",
    "margins": "<f4",
    "p_chosen": "<f4",
    "places": "<i4",
    "targets": "<i4",
    "labelled": "<i4",
    "lists": "<i4",
    "ranked": "<i4",
    "levels": "<i4",
}


class TokenStore:
    """Map one split of one data set into memory: its columns by name, and the details recorded when
    it was made.

    Raises ValueError, with the reason, for an incomplete folder; and, if `spec` is given, for one
    that does not match it or whose contents have changed (1 GB/s; rank 0 asks for it).
    """

    ids: np.ndarray
    starts: np.ndarray
    digests: np.ndarray
    marks: np.ndarray
    rows: np.ndarray
    weights: np.ndarray
    pairs: np.ndarray
    margins: np.ndarray
    p_chosen: np.ndarray
    places: np.ndarray
    targets: np.ndarray
    labelled: np.ndarray
    lists: np.ndarray
    ranked: np.ndarray
    levels: np.ndarray

    def __init__(self, folder: Path, spec: dict[str, Any] | None = None):
        try:
            meta = json.loads((folder / "meta.json").read_text("utf-8"))
            if spec is not None and meta["recipe"] != spec:
                raise ValueError("it does not match this configuration")
            for name, shape in COLUMNS.items():
                dtype, n, checksum = meta["columns"][name]
                column = _mapped(folder / f"{name}.bin", np.dtype(dtype), (n, *shape))
                if (
                    spec is not None
                    and hashlib.blake2b(column.data if n else b"").hexdigest() != checksum
                ):
                    raise ValueError(f"{name}.bin has changed since it was written")
                setattr(self, name, column)
            self.name = meta["name"]
            self.split = meta["split"]
            self.form = meta["form"]
            self.truncation = meta["truncation"]
            self.n_rows = meta["n_rows"]
            self.skipped = meta["skipped"]
            self.files = meta["files"]
            self.taken = meta["taken"]
            self.unused = meta["unused"]
            self.altered = meta["altered"]
            self.first_bad = meta["first_bad"]
            self.checksums = {name: checksum for name, (_, _, checksum) in meta["columns"].items()}
        except (OSError, KeyError, TypeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None


def _mapped(file: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    if file.stat().st_size != size:
        raise ValueError(f"{file.name} has {file.stat().st_size:,} bytes instead of {size:,}")
    # as a plain array, which is sliced several times faster than a memmap; an empty file cannot be
    # mapped
    return np.asarray(np.memmap(file, dtype, "r", shape=shape)) if size else np.empty(shape, dtype)


@dataclass(frozen=True)
class StoreSpec:
    """Hold everything that decides the token ids of one split of one data set."""

    data: DataSet  # not drawn yet
    split: str
    tokenizer: PreTrainedTokenizerBase
    identity: str  # the tokenizer's fingerprint, which takes a while for a large one
    rules: TextRules
    template: str | None
    inputs: tuple[tuple, list[Path]] | None  # see registry.made_of
    options: dict[str, Any]  # what else the data set was asked for
    prefixes: Prefixes | None = None  # see tokenization


def find_or_make(spec: StoreSpec, root: Path, keep: bool = True) -> tuple[Path, bool]:
    """Return the folder of the store, found under `root` or made now, and whether it is kept for
    later starts.

    It is made under a temporary name and renamed when complete, so two runs may make the same one
    at once. `keep` false: a store that is not found is made in the system's temporary directory,
    for this run only. Prints one line.
    """
    made_of = ingredients(spec)
    what = f"tokens of {spec.data.name} ({spec.split})"
    place = root / key(made_of) if made_of else None
    if place and place.exists():
        try:
            store = TokenStore(place, made_of)
            rank0_print(f"{what}: {len(store.ids):,}, of {store.n_rows:,} rows, from the cache")
            return place, True
        except ValueError as problem:
            rank0_print(f"{what}: {place} is damaged ({problem}); making them again")
    start = time.monotonic()
    place, root = (place, root) if keep else (None, Path(tempfile.gettempdir()))
    with _writing(root):
        root.mkdir(parents=True, exist_ok=True)
        if keep:
            _remove_what_was_left(root)
        folder = Path(tempfile.mkdtemp(prefix="tmp-", dir=root))
    try:
        meta = _write(folder, spec, made_of)
        if place:
            with _writing(root):
                _move(folder, place, made_of)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    secs = time.monotonic() - start
    kept = (
        "kept"
        if place
        else "kept for this run only, since it is unknown what the loader reads (see docs/data.md)"
    )
    rank0_print(
        f"{what}: {meta['columns']['ids'][1]:,}, of {meta['n_rows']:,} rows, made in {secs:,.1f} s "
        f"({meta['n_rows'] / max(secs, 1e-3):,.0f} rows/s), {kept}"
    )
    return place or folder, place is not None


# ---- what a store is made of ----


def ingredients(spec: StoreSpec) -> dict[str, Any] | None:
    """Return what the token ids depend on, in a form that JSON can hold; None if that isn't
    known.
    """
    if spec.inputs is None:
        return None
    read, code = spec.inputs
    tokenizer, rules = spec.tokenizer, spec.rules
    made_of = {
        "layout": LAYOUT,
        "version": VERSION,
        "name": spec.data.name,
        "split": spec.split,
        **spec.options,
        "prefixes": spec.prefixes,
        "read": read,
        "bos": automatic_bos(tokenizer) if rules.add_bos else None,
        "eos_in_text": rules.eos_in_text,
        "template": spec.template or own_template(tokenizer),
        "tokenizer": spec.identity,
        "code": _digest(*(file.read_bytes() for file in code)),
        "libraries": [
            version(name)
            for name in ("transformers", "tokenizers", "datasets", "pyarrow", "selectolax")
        ],
    }
    return json.loads(json.dumps(made_of))  # as it comes back from meta.json


def key(made_of: dict[str, Any]) -> str:
    return _digest(json.dumps(made_of, sort_keys=True).encode())


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of the complete tokenizer, not of its name."""
    kind, splits = type(tokenizer).__name__, getattr(tokenizer, "split_special_tokens", False)
    special = json.dumps(
        [kind, splits, tokenizer.special_tokens_map], sort_keys=True, default=str
    ).encode()
    if tokenizer.is_fast:
        tokenizer("")  # a tokenizer.json may ask for truncation or padding, which this switches off
        return _digest(special, tokenizer.backend_tokenizer.to_str().encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return _digest(special, *(file.read_bytes() for file in sorted(Path(folder).iterdir())))


def _digest(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


# ---- writing ----


def _write(folder: Path, spec: StoreSpec, made_of: dict[str, Any] | None) -> dict[str, Any]:
    """Draw and tokenize the data set, a chunk at a time. Return the contents of meta.json."""
    data = spec.data
    small = max(spec.tokenizer.get_vocab().values(), default=0) < 2**16
    dtypes = DTYPES | {"ids": "<u2" if small else "<i4"}
    n, checksums = dict.fromkeys(COLUMNS, 0), {name: hashlib.blake2b() for name in COLUMNS}
    n_rows, files = 0, dict[str, int]()
    with _writing(folder):
        out: dict[str, BinaryIO] = {name: (folder / f"{name}.bin").open("wb") for name in COLUMNS}

    def append(columns: Mapping[str, Any]) -> None:
        with _writing(folder):
            for name, values in columns.items():
                array = np.asarray(values, dtypes[name]).reshape(-1, *COLUMNS[name])
                checksums[name].update(array.tobytes())
                out[name].write(array.tobytes())
                n[name] += len(array)

    try:
        append({"starts": [0]})
        for chunk in encode(data, spec.tokenizer, spec.rules, spec.template, spec.prefixes):
            n_rows += chunk.n_rows
            append(_columns(chunk, n, files))
        meta = {
            "name": data.name,
            "split": spec.split,
            "form": data.form,
            "truncation": data.truncation,
            "n_rows": n_rows,
            "skipped": data.skipped,
            "taken": data.taken,
            "unused": data.unused,
            "altered": data.altered,
            "first_bad": data.first_bad,
            "files": list(files),
            "recipe": made_of,
            "columns": {c: (dtypes[c], n[c], checksums[c].hexdigest()) for c in COLUMNS},
        }
        with _writing(folder):
            out["meta"] = (folder / "meta.json").open("wb")
            out["meta"].write(json.dumps(meta, indent=1).encode())
            for file in out.values():
                file.flush()
                os.fsync(file.fileno())
    finally:
        for file in out.values():
            with suppress(OSError):  # a full disk has been reported
                file.close()
    return meta


def _columns(chunk: Chunk, n: Mapping[str, int], files: dict[str, int]) -> dict[str, Any]:
    """Return the chunk's columns, with texts and rows numbered from the store's beginning, where
    its columns already have `n` entries. `files` are numbered in order of appearance.
    """
    text, row, ranked = n["digests"], n["rows"], n["ranked"]
    placed = [(prompt, *source.rpartition(":")[::2]) for prompt, source in chunk.rows]
    moved = lambda values, *by: np.array(values, np.int64).reshape(-1, len(by)) + by
    return {
        "ids": chunk.ids,
        "starts": n["ids"] + np.cumsum(chunk.lengths, dtype=np.int64),
        "digests": chunk.digests,
        "marks": chunk.marks,
        "rows": [
            (text + prompt, files.setdefault(file, len(files)), int(number))
            for prompt, file, number in placed
        ],
        "weights": chunk.weights,
        "pairs": moved(chunk.pairs, row, text, text),
        "margins": chunk.margins,
        "p_chosen": chunk.p_chosen,
        "places": chunk.places,
        "targets": moved(chunk.targets, row, text),
        "labelled": moved(chunk.labelled, row, text, 0),
        "lists": moved(chunk.lists, row, ranked, 0),
        "ranked": np.array(chunk.ranked, np.int64) + text,
        "levels": chunk.levels,
    }


def _move(folder: Path, place: Path, made_of: dict[str, Any] | None) -> None:
    """Rename the complete store into its place, unless another run was faster; a damaged store is
    replaced.
    """
    for file in (folder, folder.parent):
        sync_directory(file)
    while True:
        try:
            folder.rename(place)
            return sync_directory(place.parent)
        except OSError:
            if not place.exists():
                raise
        try:
            TokenStore(place, made_of)
            return shutil.rmtree(folder)
        except ValueError:
            aside = Path(tempfile.mkdtemp(prefix="tmp-", dir=place.parent))
            with suppress(FileNotFoundError):  # another run was faster
                place.rename(aside / "damaged")
            shutil.rmtree(aside, ignore_errors=True)


def _remove_what_was_left(root: Path) -> None:
    """Remove what runs left that were killed more than a day ago."""
    for folder in root.glob("tmp-*"):
        with suppress(OSError):
            if time.time() - max(f.stat().st_mtime for f in (folder, *folder.iterdir())) > 86_400:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = f"the token cache cannot be written ({error.strerror})"
        raise UserError(f"{path}: {problem}; free some space, or set local_dirs") from None
