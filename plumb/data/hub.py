"""Data sets of the Hugging Face hub that have no loader here: owner/name, or owner/name:subset."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from plumb.data.files import SUFFIXES, Choice, Source, tables_source
from plumb.errors import UserError

NAME = re.compile(r"(?P<repo>\w[\w.-]*/[\w.-]+?)(:(?P<subset>[\w.+-]+))?")
# how the library lists them: online, or those in its cache
SUBSETS = re.compile(r"[Aa]vailable[^\[]*\[(.*?)\]|in the cache: (.*?) Please")


class HubSet(NamedTuple):
    """Name a data set on the hub."""

    repo: str  # owner/name
    subset: str | None = None  # the one that the set calls its default, or its only one

    @property
    def name(self) -> str:
        return f"{self.repo}:{self.subset}" if self.subset else self.repo


def hub_set(name: str) -> HubSet | None:
    """Return the set that a name means, or None for what is, or looks like, a file or folder.

    >>> hub_set("me/pairs:easy"), hub_set("./pairs"), hub_set("data/pairs.jsonl")
    (HubSet(repo='me/pairs', subset='easy'), None, None)
    """
    match = NAME.fullmatch(name)
    if not match or name.lower().endswith(SUFFIXES) or Path(name).exists():
        return None
    return HubSet(match["repo"], match["subset"])


def open_hub_set(
    wanted: HubSet,
    split: str,
    *,
    revision: str | None,
    cache_dir: str | None,
    choice: Choice | None,
) -> Source:
    """Return the rows of a split, downloaded on first use. Splits are told apart like a folder's
    files: see `open_source`.

    Raises UserError where the hub cannot be reached, or has no such set, subset or revision.
    """
    tables = _load(wanted, revision, cache_dir)
    fingerprints = tuple((name, table._fingerprint) for name, table in tables.items())
    return tables_source(tables, wanted.name, split, choice, (wanted, fingerprints))


def _load(wanted: HubSet, revision: str | None, cache_dir: str | None) -> Mapping[str, Any]:
    import datasets

    try:
        tables = datasets.load_dataset(
            wanted.repo, wanted.subset, revision=revision, cache_dir=cache_dir
        )
    except Exception as error:  # each library below has its own kinds
        raise UserError(f"{wanted.name}: {_why(wanted, revision, error)}") from error
    _check_commit(wanted, revision, tables)
    return tables


def _check_commit(wanted: HubSet, revision: str | None, tables: Mapping[str, Any]) -> None:
    """Raise UserError where the cache, which is read without a network, holds another commit."""
    files = [file["filename"] for table in tables.values() for file in table.cache_files]
    commit = Path(files[0]).parent.name if files else ""
    full = lambda text: re.fullmatch(r"[0-9a-f]{40}", text or "")
    if full(commit) and full(revision or "") and commit != revision:
        raise UserError(
            f"{wanted.name}: the hub cannot be reached, and the cache holds the revision {commit};"
            f" go online, or set dataset_revisions='{{{wanted.repo}: {commit}}}'"
        )


def _why(wanted: HubSet, revision: str | None, error: Exception) -> str:
    """Return what went wrong, and the fix."""
    text = " ".join(str(error).split())
    here = f"there is no file or folder of that name in {Path.cwd()} either"
    if isinstance(error, ValueError) and (subsets := SUBSETS.search(text)):
        names = str(subsets[1] or subsets[2]).replace("'", "")
        missing = f"has no subset '{wanted.subset}'" if wanted.subset else "has several subsets"
        first = names.partition(",")[0]
        return f"the set {missing}: {names}; choose one, such as {wanted.repo}:{first}"
    if "gated" in text:
        page = f"https://huggingface.co/datasets/{wanted.repo}"
        return f"gated on the hub; accept its terms at {page}, then `hf auth login`"
    if text.startswith("Revision"):
        return (
            f"no revision '{revision}' on the hub; give a branch, tag or commit in"
            " dataset_revisions, or leave it out"
        )
    if "scripts are no longer supported" in text:
        fix = f"dataset_revisions='{{{wanted.repo}: refs/convert/parquet}}'"
        return f"the set is a Python script, which is not run; set {fix}"
    if type(error).__name__ == "DatasetNotFoundError":
        return (
            "no such data set on the hub (a private one needs `hf auth login`), and"
            f" {here}; check the name"
        )
    if isinstance(error, ConnectionError):
        return (
            f"the hub cannot be reached and the set is not in the cache ({text[:120]}), and {here};"
            " check the network, or give the path of a local copy"
        )
    return f"cannot be loaded from the hub ({type(error).__name__}: {text[:120]}); check the name"
