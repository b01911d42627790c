"""`--config my.yaml`: a YAML file of knobs becomes arguments, before those of the command line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from plumb.errors import UserError
from plumb.runs.safe_yaml import check_config_file
from plumb.settings.schema import KNOBS

FLAG = "--config"
PLAIN = re.compile(r"[\w./+-]+")  # what needs no quotes on Hydra's command line


def with_config_files(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with each `--config FILE` replaced by the file's knobs, which stand
    first, so that the command line's win. Raises UserError.
    """
    from_files: list[str] = []
    others: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        flag, equals, file = argument.partition("=")
        if flag != FLAG:
            others.append(argument)
            continue
        file = file if equals else next(waiting, "")
        if not file:
            raise UserError("--config: no file; write --config my.yaml, a file of knobs")
        from_files += knobs_of(Path(file).expanduser())
    return from_files + others


def knobs_of(path: Path) -> list[str]:
    """Return the knobs of a YAML file as knob=value. Groups may be nested (loss: {name: dpo, beta:
    0.1}) or dotted (loss.beta: 0.1).
    """
    if not path.is_file():
        raise UserError(f"--config {path}: no such file; give a YAML file of knobs")
    check_config_file(path)
    try:
        content = yaml.safe_load(path.read_text("utf-8")) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML; write knob: value on each line") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a mapping; write knob: value on each line")
    for name in ("defaults", "hydra"):
        if name in content:
            raise UserError(
                f"{path}: '{name}' is for files of a config folder (--config-dir); --config takes"
                " knob: value"
            )
    return list(_knobs(content, ""))


def _knobs(content: Mapping[Any, Any], prefix: str) -> Iterator[str]:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if not isinstance(value, dict) or name in KNOBS or name.count("."):
            yield f"{name}={written(value)}"
            continue
        if name == "loss" and "name" in value:
            yield f"loss={value['name']}"
            value = {knob: each for knob, each in value.items() if knob != "name"}
        yield from _knobs(value, f"{name}.")


def written(value: Any) -> str:
    """Return a value as Hydra's command line takes it.

    >>> written({"a": [1, "x y", None]}), written(True), written("5,0,5"), written("1e-6")
    ("{a: [1, 'x y', null]}", 'true', "'5,0,5'", '1e-6')
    """
    if isinstance(value, dict):
        parts = (f"{written(key)}: {written(each)}" for key, each in value.items())
        return "{" + ", ".join(parts) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    # "5" and "true" stay texts; 1e-6, which is a text in YAML, becomes a number
    plain = PLAIN.fullmatch(text) and isinstance(yaml.safe_load(text), str)
    if not isinstance(value, str) or plain:
        return text
    return "'" + text.replace("'", "\\'") + "'"
