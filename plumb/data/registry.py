"""Registered data sets (`@dataset`), and the rows of a set: from the hub, from a local copy, or
from a user's own files.

A data set is one function, `get_xyz`, with `@dataset`: it turns raw rows into `{prompt: Prompt}`,
the contract of the 2023 repository, so that its users' own functions work with the decorator alone.
`get_dataset` gives the rest of the code its `Row`s, one at a time, from a registered name or from a
path to files in one of the forms of forms/. No torch, no tokenizer.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from plumb.data.files import (
    SUFFIXES,
    Choice,
    OnBad,
    RawRow,
    Source,
    files_version,
    number,
    open_source,
)
from plumb.data.forms.fitting import fitting
from plumb.data.forms.read import read_rows, row_in_turns
from plumb.data.forms.recognise import FORMS, form_of, rename
from plumb.data.hub import hub_set, open_hub_set
from plumb.data.loaded import check_loaded
from plumb.data.rows import Row, counted
from plumb.errors import UserError


class Prompt(TypedDict):
    """Hold what a loader returns for each prompt text: the original's contract, and scores if there
    are any.
    """

    responses: list[str]  # each starting with its own leading space
    pairs: list[tuple[int, int]]  # (preferred, dispreferred) indices into responses
    sft_target: str  # what SFT imitates
    scores: NotRequired[list[float]]  # one for each response
    weight: NotRequired[float]  # how many prompts it counts as


@dataclass(frozen=True)
class Hub:
    """Name a data set on the Hugging Face hub, or a local one."""

    name: str | None  # None: it isn't on the hub, and `dataset_paths` must say where it is
    data_dir: str | None = None  # the part of it that is read
    test_share: float | None = (
        None  # its own rule, for a set that is published with a train split only
    )
    test_split: str = "test"  # the name of the held-out split on the hub
    config: str | None = None


@dataclass(frozen=True)
class Reading:
    """Hold how the user's own files are read; each field is the option of that name in config.yaml,
    or what the loss needs.
    """

    role_map: Mapping[str, str] | None = None  # the file's name of a role -> the chat template's
    split_names: Mapping[str, str] | None = (
        None  # "train" or "test" -> which split of a folder with several of a kind
    )
    bad_row: str = "stop"  # "stop" | "drop": what a row that cannot be used does
    group: str | None = None  # what a loss's example holds, see losses/contract.py; None: anything
    label_threshold: float | None = None  # a label is a score, and desirable from here on
    plain_prompts: str = "verbatim"  # "verbatim" | "chat": strings become turns
    revisions: Mapping[str, str] | None = None  # owner/name on the hub -> branch, tag or commit

    def options(self) -> dict[str, Any]:
        """Return what decides how a row is read, whichever rows they are."""
        return {
            "role_map": self.role_map,
            "bad_row": self.bad_row,
            "label_threshold": self.label_threshold,
            "plain_prompts": self.plain_prompts,
        }

    def choice(self, field_map: Mapping[str, str] | None = None) -> Choice:
        return Choice(self.split_names or {}, fitting(self.group, field_map, self.label_threshold))

    def open(
        self,
        name: str,
        split: str,
        cache_dir: str | None,
        field_map: Mapping[str, str] | None = None,
        on_bad: OnBad | None = None,
    ) -> Source:
        """Return the rows of a file or folder, or of a set on the hub."""
        choice = self.choice(field_map)
        if (wanted := hub_set(name)) is None:
            return open_source(name, split, choice=choice, on_bad=on_bad)
        return open_hub_set(
            wanted,
            split,
            revision=(self.revisions or {}).get(wanted.repo),
            cache_dir=cache_dir,
            choice=choice,
        )


PACKAGE = Path(__file__).resolve().parents[1]
READING = Reading()
BAD_ROWS = "bad rows"


@dataclass
class DataSet:
    """Hold a split of one data set, whose rows can be drawn once."""

    name: str
    eval_share: float
    rows: Iterator[Row]
    n_rows: int | None = None  # about how many there will be; known after the first, if at all
    reading: Reading = READING
    # known when the rows are exhausted
    truncation: str = "keep_start"  # "keep_end" | "keep_start": which end of a long prompt survives
    skipped: Counter[str] = field(default_factory=Counter)  # reason -> count
    form: str = ""  # one line: what was read and how it was understood
    taken: str = ""  # which split of a folder with several, and which others there are
    # field that nothing reads -> rows that have it
    unused: Counter[str] = field(default_factory=Counter)
    # what the chat template leaves out -> count
    altered: Counter[str] = field(default_factory=Counter)
    first_bad: str = ""  # the error of the first row that was dropped for it

    def refuse(self, error: UserError) -> None:
        """Raise the error of a row, or drop the row and count it, as `reading.bad_row` says."""
        if self.reading.bad_row == "stop":
            raise error
        self.skipped[BAD_ROWS] += 1
        self.first_bad = self.first_bad or str(error)


@dataclass(frozen=True)
class Loader:
    """Hold a registered `get_xyz`."""

    name: str
    load: Callable[..., Any]
    truncation: str
    hub: Hub | None
    # raw fields by which a file given by its path is known to be of this schema
    fields: frozenset[str]
    pairs: bool  # False: it has SFT targets only


LOADERS: dict[str, Loader] = {}
# The data set that is being drawn; a loader may also be called directly.
_drawn: ContextVar[DataSet] = ContextVar("drawn", default=DataSet("<name>", 0.0, iter(())))  # noqa: B039  its counts are not read


def dataset(
    truncation: str = "keep_start",
    hub: str | Hub | None = None,
    fields: Iterable[str] = (),
    pairs: bool = True,
) -> Callable:
    """Register `get_xyz(split, silent=False, cache_dir=None[, path=None])` as "xyz".

    It returns `{prompt: Prompt}`, or the rows (prompt, responses, pairs, sft_target) as a list, a
    `datasets.Dataset` or a generator; it may call `skipped(reason)` for what it leaves out. With
    `path`, it reads a local copy of its set. What reads nothing but its `hub` set, or `path`, is
    tokenized once for all runs. The 2023 rule for `truncation`: HH's dialogues keep the end of a
    long prompt, all others the start.
    """
    if truncation not in ("keep_end", "keep_start"):
        raise UserError(f"@dataset(truncation={truncation!r}): write 'keep_end' or 'keep_start'")

    def register(load: Callable) -> Callable:
        if not load.__name__.startswith("get_"):
            raise UserError(
                f"@dataset: the function {load.__name__} must be called get_<name of the data set>"
            )
        name = load.__name__.removeprefix("get_")
        LOADERS[name] = Loader(
            name=name,
            load=load,
            truncation=truncation,
            hub=Hub(hub) if isinstance(hub, str) else hub,
            fields=frozenset(fields),
            pairs=pairs,
        )
        return load

    return register


def dataset_names() -> list[str]:
    return sorted(LOADERS)


def resolve(name: str) -> str:
    """Return the registered name of a set given by its name on the hub, unless a path of that name
    exists; otherwise `name` itself.
    """
    if name in LOADERS or "/" not in name or Path(name).expanduser().exists():
        return name
    same = sorted(
        loader.name for loader in LOADERS.values() if loader.hub and loader.hub.name == name
    )
    if len(same) > 1:
        raise UserError(
            f"{name}: {' and '.join(same)} read it, each in a different way; give one of these"
            f" names"
        )
    return same[0] if same else name


# ---- raw rows, from the hub or from a local copy ----


def load_rows(
    hub: Hub,
    split: str,
    prompt_of: Callable[[RawRow], str],
    *,
    path: str | None,
    cache_dir: str | None,
    silent: bool,
) -> Iterator[RawRow]:
    """Return the raw rows of the split, from the local copy at `path`, or from the hub if it is
    None.

    If there are no files for both splits, `eval_share` of the unique prompts is the test split, or
    `hub.test_share`. Raises UserError if the hub can't be reached or refuses.
    """
    source = _source(hub, split, path, cache_dir, silent)
    data = _drawn.get()
    share = data.eval_share if hub.test_share is None else hub.test_share
    if not source.unsplit:
        return source.rows()
    mine = source.held_out(lambda: map(prompt_of, source.rows()), prompt_of, share) == (
        split == "test"
    )
    data.n_rows = int(mine.sum())
    return (row for row, kept in zip(source.rows(), mine, strict=True) if kept)


_hub_sets: dict[tuple, Any] = {}  # loaded once per process


def _source(hub: Hub, split: str, path: str | None, cache_dir: str | None, silent: bool) -> Source:
    if path is not None:
        source = open_source(path, split, hub.data_dir, _drawn.get().reading.choice())
        _drawn.get().taken = source.taken
        return source
    name = _drawn.get().name
    if hub.name is None:
        raise UserError(
            f"{name}: it is not on the hub; set dataset_paths.{name}=/path/to/its/files"
        )
    import datasets

    if silent:
        datasets.disable_progress_bars()
    train_only = hub.test_share is not None
    there = "train" if train_only else hub.test_split if split == "test" else split
    options = {"split": there, "cache_dir": cache_dir, "data_dir": hub.data_dir} | (
        {"name": hub.config} if hub.config else {}
    )
    key = (hub.name, *options.values())
    try:
        rows = _hub_sets[key] = (
            _hub_sets[key] if key in _hub_sets else datasets.load_dataset(hub.name, **options)
        )
    except (
        Exception
    ) as error:  # no network, a gated set, a full disk: each library below has its own kinds
        problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
        fix = f"set dataset_paths.{name}=/path/to/local/copy, or check network and `hf auth login`"
        raise UserError(
            f"can't load {hub.name} (split {split}) from the hub ({problem}); {fix}"
        ) from error
    fingerprint = getattr(rows, "_fingerprint", None)
    return Source(
        lambda: number(rows, str(hub.name)), train_only, fingerprint and (hub.name, fingerprint)
    )


# ---- what the rest of the code calls ----


def get_dataset(
    name: str,
    split: str,
    *,
    silent: bool = False,
    cache_dir: str | None = None,
    path: str | None = None,
    field_map: Mapping[str, str] | None = None,
    reading: Reading = READING,
    eval_share: float,
) -> DataSet:
    """Return the split of a registered data set (`path`: its local copy), of the user's own file or
    folder `name`, or of a set of the hub, `owner/name` or `owner/name:subset`.

    `field_map` (our name of a field -> the file's) and `reading` are for own files. `eval_share` is
    the test split's share of the prompts if the files don't have one. Raises UserError for unknown
    names and for anything wrong in loaders and files.
    """
    if not 0 <= eval_share <= 1:
        raise UserError(
            f"eval_share={eval_share}: the share of prompts held out for evaluation must be in"
            f" [0, 1]"
        )
    name = resolve(name)
    check_name(name)
    data = DataSet(name, eval_share, iter(()), reading=reading)
    if name in LOADERS:
        if field_map:
            raise UserError(
                f"field_map={dict(field_map)}: {name} has its own schema; field_map is for"
                f" your own files"
            )
        rows = _registered(data, LOADERS[name], split, silent, cache_dir, path)
    else:
        rows = _own_files(data, split, silent, cache_dir, field_map)
    # A generator sees the context of whoever draws from it: each row is drawn in one where this
    # data set counts.
    context = copy_context()
    context.run(_drawn.set, data)
    context.run(counted.set, data.skipped)
    data.rows = iter(partial(context.run, next, rows, None), None)
    return data


def made_of(
    name: str,
    split: str,
    cache_dir: str | None,
    path: str | None,
    reading: Reading = READING,
    field_map: Mapping[str, str] | None = None,
) -> tuple[tuple, list[Path]] | None:
    """Return what decides about the rows of a data set: the version of what is read, and the files
    outside plumb whose code reads it (plumb's own code has VERSION in token_store.py).

    None where that can't be known: a user's loader that declares no hub and is given no path may
    read anything.
    """
    version: tuple | None = None
    name = resolve(name)
    if name not in LOADERS:
        version = reading.open(name, split, cache_dir, field_map).version
        functions = [form_.convert for form_ in FORMS] + [
            loader.load for loader in LOADERS.values() if loader.fields
        ]
    else:
        functions, hub = [LOADERS[name].load], LOADERS[name].hub
        if hub:
            # the loader will raise it too, unless it has another way to the set
            with suppress(UserError):
                version = _source(hub, split, path, cache_dir, silent=False).version
        elif path:
            folder = Path(path).expanduser()
            version = files_version(
                [folder] if folder.is_file() else sorted(filter(Path.is_file, folder.rglob("*")))
            )
    code = {str(inspect.getsourcefile(inspect.unwrap(function))) for function in functions}
    code = {file for file in code if not Path(file).is_relative_to(PACKAGE)}
    return (
        (version, sorted(map(Path, code)))
        if version and all(Path(file).is_file() for file in code)
        else None
    )


def check_revisions(revisions: Mapping[str, str], names: Iterable[str]) -> None:
    """Raise UserError for a revision of what is not among these data sets, or not on the hub."""
    repos = {wanted.repo for wanted in map(hub_set, names) if wanted}
    for repo in revisions:
        if repo not in repos:
            known = ", ".join(sorted(repos)) or "none"
            raise UserError(
                f"dataset_revisions: {repo} is not among the hub's sets of this run ({known}); give"
                " owner/name as in datasets"
            )


def check_name(name: str) -> None:
    """Raise UserError for what is neither a registered name nor a path."""
    if name in LOADERS or "/" in name or name.lower().endswith(SUFFIXES):
        return
    near = difflib.get_close_matches(name, LOADERS, n=1)
    known = (
        "".join(f"did you mean '{one}'? " for one in near) + f"known: {', '.join(dataset_names())}"
    )
    raise UserError(
        f"unknown data set '{name}'; {known}; a file or folder is given by its path, such as"
        f" ./{name}.jsonl, and any other set of the hub by owner/name"
    )


def _registered(
    data: DataSet, loader: Loader, split: str, silent, cache_dir, path
) -> Iterator[Row]:
    takes = inspect.signature(loader.load).parameters
    options = {"silent": silent, "cache_dir": cache_dir, "path": path}
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
        options = {option: value for option, value in options.items() if option in takes}
    if path is not None and "path" not in options:
        raise UserError(
            f"dataset_paths.{loader.name}={path}: get_{loader.name} takes no 'path'; add the"
            " parameter, or unset it"
        )
    loaded = loader.load(split, **options)
    if hasattr(loaded, "__len__"):
        data.n_rows = len(loaded)
    n_prompts = n_pairs = 0
    for row in check_loaded(loader.name, loaded):
        n_prompts, n_pairs = n_prompts + 1, n_pairs + len(row.pairs)
        yield row
    origin = path or (loader.hub.name if loader.hub else f"get_{loader.name}")
    data.truncation = loader.truncation
    data.form = (
        f"{loader.name}: {n_prompts:,} prompts with {n_pairs:,} pairs from {origin} ({split})"
    )


def _renamed(rows: Iterable[RawRow], field_map: Mapping[str, str]) -> Iterator[RawRow]:
    """Yield the rows under the names of the forms, without those that lack a field of the map: they
    are refused when they are read.
    """
    for row in rows:
        with suppress(UserError):
            yield rename(row, field_map)


def _own_files(data: DataSet, split: str, silent, cache_dir, field_map) -> Iterator[Row]:
    reading = data.reading
    on_bad = None if reading.bad_row == "stop" else data.refuse
    source = reading.open(data.name, split, cache_dir, field_map, on_bad)
    data.taken = source.taken
    first = next(source.rows(), None)
    if first is None:
        why = (
            f"no row is usable; the first error: {data.first_bad}"
            if data.first_bad
            else "it needs at least one row"
        )
        raise UserError(f"{data.name}: the data set is empty; {why}")
    schema = next(
        (
            known
            for known in LOADERS.values()
            if known.fields and known.fields <= first.fields.keys()
        ),
        None,
    )
    if schema and not field_map:
        yield from _registered(data, schema, split, silent, None, data.name)
        return
    form = form_of(first, field_map, reading.label_threshold, reading.group)
    if form.of_file:
        form = form.of_file(_renamed(source.rows(), field_map or {}))

    def read() -> Iterator[Row]:
        data.skipped.clear()  # counted by an earlier pass; this one counts the same rows again
        rows = read_rows(
            source.rows(),
            form,
            field_map,
            reading.role_map,
            on_bad,
            reading.label_threshold,
        )
        in_turns = reading.plain_prompts == "chat" and not form.dialogue
        return map(row_in_turns, rows) if in_turns else rows

    kept: Iterable[bool] = repeat(True)
    if source.unsplit:
        # rows without a prompt, of which each is a text of its own, are told apart by it
        keys = lambda: (json.dumps(row.prompt or row.sft_target, default=str) for row in read())
        how = json.dumps(
            [
                dict(field_map or {}),
                dict(reading.role_map or {}),
                reading.bad_row,
                reading.label_threshold,
                reading.plain_prompts,
            ]
        )
        kept = in_split = source.held_out(keys, how, data.eval_share) == (split == "test")
        data.n_rows = int(in_split.sum())
    n = n_kept = 0
    as_messages = False
    for row, mine in zip(read(), kept, strict=False):
        as_messages = isinstance(row.prompt, list)
        n, n_kept = n + 1, n_kept + bool(mine)
        if mine:
            yield row
    data.form = (
        f"{data.name}: {n:,} rows, {form.name} (as"
        f" {'chat messages' if as_messages else 'raw text'})"
    )
    if source.unsplit and 0 < data.eval_share < 1:
        data.form += f"; {n_kept:,} for {split}, by eval_share={data.eval_share:g}"
    # A dialogue's end matters more than its start; a single question's start is kept, as in 2023.
    as_written = rename(first, field_map or {}).fields.get("prompt")
    is_dialogue = as_messages or form.dialogue or str(as_written).endswith("\n\nAssistant:")
    data.truncation = "keep_end" if is_dialogue else "keep_start"
