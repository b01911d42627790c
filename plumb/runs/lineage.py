"""Read what is known of the run that `model.archive` comes from: what it started from, and whether
its examples are among this run's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from omegaconf import DictConfig

from plumb.console import to_dict
from plumb.data.files import shorten
from plumb.data.registry import resolve
from plumb.data.splits import weights_of
from plumb.errors import UserError
from plumb.paths import ROOT
from plumb.runs.policy_path import resolve_archive
from plumb.runs.safe_yaml import check_config_file


class Start(NamedTuple):
    """Hold a model that weights can be read from."""

    archive: str | None  # as model.archive: a run's; None: the model at the root of all runs
    quantize: str | None  # as model.quantize
    # the types that its weights were rounded to, one after the other, as model.policy_dtype; none
    # where it is not known
    dtypes: tuple[str, ...]
    seed: int  # of its random values, if it has such


def start_of_archive(archive: str) -> Start | None:
    """Return what the adapters of a policy.pt belong to, by the config.yaml beside it: what its
    run started from, without the adapters that the run kept; None if there is no config.yaml.
    Raise UserError for one that cannot be read, and for an archive that is gone.
    """
    policy = resolve_archive(archive).resolve()
    file = config_beside(policy)
    if file is None:
        return None
    check_config_file(file)  # it came with the archive and is not trusted
    try:
        config = yaml.safe_load(file.read_text("utf-8"))
        archived = config["model"].get("archive")
        quantize = config["model"].get("quantize")
        dtype = config["model"].get("policy_dtype")
        seed = int(config.get("seed", 0))
        keeps = config.get("adapter_previous", "merge") != "merge"
    except (OSError, yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{file}: cannot be read ({str(error).splitlines()[0]}), and only it says what the"
            f" adapter of {archive} belongs to"
        ) from None
    dtypes = (str(dtype),) if dtype else ()
    if archived:
        # relative to where the run was started
        if not Path(archived).exists() and (ROOT / archived).exists():
            archived = str(ROOT / archived)
        try:
            resolve_archive(archived)
        except UserError:
            raise UserError(
                f"model.archive={archive}: holds an adapter, and what it was trained on,"
                f" {archived}, is no longer there; put it back"
            ) from None
        if keeps:
            start = start_of_archive(archived)
            return None if start is None else start._replace(dtypes=(*start.dtypes, *dtypes))
    return Start(archived, quantize, dtypes, seed)


def config_beside(policy: Path) -> Path | None:
    """Return the config.yaml of the run that a policy.pt belongs to; None if there is none."""
    files = (folder / "config.yaml" for folder in policy.parents[:2])
    return next((file for file in files if file.is_file()), None)


def lineage(config: DictConfig, decides: Sequence[str]) -> str | None:
    """Return notes on the run that model.archive comes from: that its examples are, or may be,
    among this stage's. `decides`: the knobs that, beside data_split and stage, decide which prompts
    a slice holds.
    """
    if not config.model.archive:
        return None
    try:
        policy = resolve_archive(config.model.archive).resolve()
        file = config_beside(policy)
        if file is None:
            return None
        check_config_file(file)  # it came with the archive and is not trusted
        before, now = yaml.safe_load(file.read_text("utf-8")), to_dict(config)
        shared = [
            name
            for name in map(resolve, now["datasets"])
            if name in map(resolve, before["datasets"])
        ]
        pairs = [
            (name, weights_of(before.get("data_split"), name), weights_of(now["data_split"], name))
            for name in shared
        ]
    except (
        UserError,
        OSError,
        yaml.YAMLError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RuntimeError,
    ):
        return None
    run = f"note: {file.parent}, where model.archive comes from,"
    other = ["data_split", "stage", *(knob for knob in decides if before.get(knob) != now[knob])]
    describe = lambda c: ", ".join(f"{knob} {shorten(c.get(knob))}" for knob in other)
    differ = [
        name
        for name, a, b in pairs
        if a != b or (b and any(before.get(knob) != now[knob] for knob in decides))
    ]
    if differ:
        return (
            f"{run} had {describe(before)}, and this run has {describe(now)}: their slices of"
            f" {', '.join(differ)} may overlap; give all stages the same"
        )
    again = [name for name, a, _ in pairs if a and before.get("stage") == now["stage"]]
    same = (
        f"{run} was stage={now['stage']} too: both take the same slice of {', '.join(again)}; was"
        " another stage meant?"
    )
    return same if again else None
