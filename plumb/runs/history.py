"""Read a run directory: its config, how it ended, its metrics and samples, and which run it started
from.

Only reads, and accepts a run in any state: still writing, killed in the middle of a line, or never
finished.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from plumb.errors import UserError
from plumb.runs.safe_yaml import check_config_file

Record = dict[str, float]
STAMP = re.compile(r"_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(_\d{6})?$")


class Sample(NamedTuple):
    table: str  # policy_samples or reference_samples
    step: int  # training examples
    prompt: str
    text: str


@dataclass(frozen=True)
class Run:
    """Hold what was read from a run directory."""

    path: Path
    name: str
    config: dict[str, Any]  # resolved, nested; {} where there is none
    status: dict[str, Any]  # of status.json
    environment: dict[str, Any]  # of env.json
    starts: int  # how often it was started
    steps: list[Record]  # one per optimizer step; `step` counts training examples
    evaluations: list[Record]
    samples: list[Sample]
    # from its first start to its end or its last record, pauses included; 0 where that is not known
    wall_secs: float
    silent_secs: float  # since it last wrote metrics
    notes: list[str]  # what could not be read

    def setting(self, knob: str, default: Any = None) -> Any:
        """Return the value of a dotted knob, or `default` if the config has none."""
        value: Any = self.config
        for key in knob.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return default if value is None else value


def read_run(path: Path) -> Run:
    """Read a run directory in whatever state it is. Raise UserError if `path` is not a run
    directory.
    """
    if not any((path / name).is_file() for name in ("metrics.jsonl", "config.yaml")):
        why = (
            "it holds neither metrics.jsonl nor config.yaml"
            if path.is_dir()
            else "there is no such directory"
        )
        raise UserError(
            f"{path}: not a run directory ({why}); give the directory that a run named when it"
            " began"
        )
    notes: list[str] = []
    records = read_metrics(path, notes)
    samples = [
        Sample(
            str(row["table"]),
            int(row["step"]),
            str(row.get("prompt", "")),
            str(row.get("sample", "")),
        )
        for row in _rows(path / "samples.jsonl", notes)
        if "table" in row
    ]
    environment, metrics = _object(path / "env.json"), path / "metrics.jsonl"
    written = metrics.stat().st_mtime if metrics.is_file() else 0.0
    return Run(
        path=path,
        name=STAMP.sub("", path.resolve().name) or path.resolve().name,
        config=read_config(path, notes),
        status=status(path),
        environment=environment,
        starts=1 + len(_rows(path / "resumes.jsonl", notes)),
        steps=[r for r in records if not is_evaluation(r)],
        evaluations=[r for r in records if is_evaluation(r)],
        samples=samples,
        wall_secs=_wall_secs(environment, status(path), written),
        silent_secs=time.time() - written if written else 0.0,
        notes=notes,
    )


def newest_match(path: Path) -> Path:
    """Return the newest run directory that a quoted pattern matches, as model.archive takes it; a
    path that exists, or matches none, is returned as it is.
    """
    if path.exists():
        return path
    found = [Path(match) for match in glob(str(path.expanduser()))]
    runs = [match for match in found if (match / "config.yaml").is_file()]
    return max(runs, key=lambda run: (run / "config.yaml").stat().st_mtime, default=path)


def _wall_secs(environment: Mapping[str, Any], ended: Mapping[str, Any], written: float) -> float:
    """Return the seconds to status.json's time or the last record's, whichever is earlier: a later
    start may write the one, a copy of the files the other.
    """
    try:
        start = datetime.fromisoformat(environment["started"]).timestamp()
        end = datetime.strptime(ended["time"], "%Y-%m-%dT%H:%M:%S%z").timestamp()
        return max(0.0, min(end, written or end) - start)
    except (KeyError, TypeError, ValueError):
        return 0.0


def is_evaluation(keys: Iterable[str]) -> bool:
    """Return whether a record is an evaluation rather than a step, judging by its metrics."""
    return any(key.endswith("/eval") or "_eval/" in key for key in keys)


def read_metrics(run_dir: Path, notes: list[str] | None = None) -> list[Record]:
    """Return the records of metrics.jsonl in the order they were written; `step` counts training
    examples. A truncated last line is left out, and added to `notes`.
    """
    rows = _rows(run_dir / "metrics.jsonl", [] if notes is None else notes)
    return [
        {k: v for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        for row in rows
    ]


def read_config(run_dir: Path, notes: list[str] | None = None) -> dict[str, Any]:
    """Return config.yaml as nested dicts; {} if it can't be read or holds more than values, in
    which case `notes` says so.
    """
    path = run_dir / "config.yaml"
    try:
        check_config_file(path)
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        problem = "" if isinstance(config, dict) else "it has no options"
    except (OSError, ValueError, yaml.YAMLError, UserError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).partition("\n")[0]
        config, problem = None, reason or "unreadable"
    if problem and notes is not None:
        notes.append(f"config.yaml: left out ({problem})")
    return config if isinstance(config, dict) else {}


def status(run_dir: Path) -> dict[str, Any]:
    """Return status.json; {} if it can't be read."""
    return _object(run_dir / "status.json")


def _object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}


def _rows(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Return the objects in a file of JSON lines. Lines that are not objects, or have no step, are
    left out and counted in `notes`.
    """
    rows = []
    bad = []
    cut = False
    i = 0
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for i, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                step = row.get("step") if isinstance(row, dict) else None
                if isinstance(step, int | float) and abs(step) < 1e15:  # not NaN either
                    rows.append(row)
                elif cut := not line.endswith("\n"):
                    break
                else:
                    bad.append(i)
    except OSError:
        return []
    if cut:
        notes.append(
            f"{path.name}, line {i}: cut short (still being written, or the run was killed);"
            " left out"
        )
    if bad:
        notes.append(
            f"{path.name}: {len(bad)} of {i} lines are not records, the first of them line"
            f" {bad[0]};"
            " left out"
        )
    return rows


# ---- several runs ----


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted knob, value) for a nested config."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(runs: Sequence[Run], bookkeeping: Callable[[str], bool]) -> dict[str, list[Any]]:
    """Return {knob: its value in each run} for the knobs in which the runs differ; "" if a run has
    no such knob. `bookkeeping` names the knobs to leave out: they say nothing about what a run
    learned.
    """
    flat = [{k: v for k, v in flatten(run.config) if not bookkeeping(k)} for run in runs]
    knobs = dict.fromkeys(knob for settings in flat for knob in settings)
    rows = {knob: [settings.get(knob, "") for settings in flat] for knob in knobs}
    return {
        knob: values for knob, values in rows.items() if any(value != values[0] for value in values)
    }


def read_runs(paths: Sequence[Path], bookkeeping: Callable[[str], bool]) -> list[Run]:
    """Read each run once, under a unique name: its directory's; in a sweep, with the varied option;
    otherwise its path. `bookkeeping`: as for `differences`.
    """
    found = map(newest_match, paths)
    runs = [read_run(path) for path in {path.resolve(): path for path in found}.values()]
    knobs = differences(runs, bookkeeping)
    for name in (
        lambda i, run: run.name,
        lambda i, run: (
            " ".join([run.name, *(f"{knob}={values[i]}" for knob, values in knobs.items())])
            if len(knobs) < 4
            else ""
        ),
        lambda i, run: run.path.name,
        lambda i, run: str(run.path),
    ):
        names = [name(i, run) for i, run in enumerate(runs)]
        if len(set(names)) == len(runs):
            break
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


# ---- lineage ----


class Stage(NamedTuple):
    """Hold one link of the chain from a run back to its base model."""

    name: str
    what: str  # loss and data, or what the model is
    where: str  # the run directory, the file or the hub's name


class Link(NamedTuple):
    """Hold a run and the checkpoint that the next run started from (None: no next run)."""

    config: dict[str, Any]  # {} where no record of the run stands beside the checkpoint
    run_dir: Path
    archive: Path | None


def chain(config: Mapping[str, Any], run_dir: Path, archive: Path | None = None) -> Iterator[Link]:
    """Return this run, the run whose policy.pt it started from (model.archive), and so on, as far
    back as they exist.
    """
    seen: set[Path] = set()
    while config and run_dir.resolve() not in seen:
        seen.add(run_dir.resolve())
        yield Link(dict(config), run_dir, archive)
        # a file, absolute: the run's record says which one a pattern meant
        named = _group(config, "model").get("archive")
        if not named:
            return
        archive = Path(str(named))
        step = archive.parent if archive.parent.name.startswith(("step-", "interim-")) else archive
        # the second: moved together
        candidates = (
            step.parent,
            run_dir.resolve().parent / step.parent.name,
        )
        run_dir = next((p for p in candidates if (p / "config.yaml").is_file()), step.parent)
        config = read_config(run_dir)
    if not config and archive is not None:
        yield Link({}, run_dir, archive)


def lineage(run: Run) -> list[Stage]:
    """Return the run, its predecessors and the base model, each in words."""
    stages, model = list[Stage](), dict[str, Any]()
    for config, run_dir, archive in chain(run.config, run.path):
        if not config:
            name = archive.name if archive else ""
            return [
                *stages,
                Stage(name, "a checkpoint without a run's record beside it", str(archive)),
            ]
        step = archive.parent.name if archive and archive.parent != run_dir else ""
        made = f"; taken at {step}" if step.startswith(("step-", "interim-")) else ""
        stages.append(
            Stage(
                str(config.get("exp_name") or run_dir.name),
                _what(config, run_dir) + made,
                str(run_dir),
            )
        )
        model = _group(config, "model")
    if model and not model.get("archive"):
        base = model.get("name_or_path")
        kind = (
            f"pretrained weights, in {model.get('policy_dtype')}"
            if base
            else "random weights of model.architecture"
        )
        stages.append(Stage(str(base or "a new model"), kind, str(model.get("revision") or "")))
    return stages


def _group(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    group = config.get(name)
    return group if isinstance(group, dict) else {}


def _what(config: Mapping[str, Any], path: Path) -> str:
    loss = _group(config, "loss")
    knobs = ", ".join(f"{key}={value}" for key, value in loss.items() if key != "name" and value)
    data = config.get("datasets") or "?"
    data = data if isinstance(data, list) else [data]
    examples, steps = (status(path).get(key) for key in ("examples", "step"))
    length = (
        f"; {examples:,} examples in {steps:,} steps"
        if isinstance(examples, int) and isinstance(steps, int)
        else ""
    )
    return (
        f"{loss.get('name', 'unknown loss')}{f' ({knobs})' if knobs else ''} on"
        f" {', '.join(map(str, data))}{length}"
    )
