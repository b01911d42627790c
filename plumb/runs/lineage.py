"""Compare a run with the run that `model.archive` comes from."""

from __future__ import annotations

from collections.abc import Sequence

import yaml
from omegaconf import DictConfig

from plumb.console import to_dict
from plumb.data.files import shorten
from plumb.data.registry import resolve
from plumb.data.splits import weights_of
from plumb.errors import UserError
from plumb.runs.policy_path import resolve_archive
from plumb.runs.safe_yaml import check_config_file


def lineage(config: DictConfig, decides: Sequence[str]) -> str | None:
    """Return notes on the run that model.archive comes from: that its examples are, or may be,
    among this stage's. `decides`: the knobs that, beside data_split and stage, decide which prompts
    a slice holds.
    """
    if not config.model.archive:
        return None
    try:
        policy = resolve_archive(config.model.archive).resolve()
        file = next(
            file for folder in policy.parents[:2] if (file := folder / "config.yaml").is_file()
        )
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
        StopIteration,
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
