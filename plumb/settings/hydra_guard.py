"""Decide what the command line and YAML files may tell Hydra, before Hydra reads them.

Hydra imports and calls what its own settings name (callbacks, launchers, search paths), and reads
pickles of earlier jobs. Training needs none of that, so none is allowed: a config holds values, and
the settings' schema says which.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from yaml import MarkedYAMLError

from plumb.errors import UserError
from plumb.paths import CONFIG
from plumb.runs.safe_yaml import ADVICE, HYDRA_KNOBS, MAX_FILES, check_config_file
from plumb.settings.mistakes import hint


def on_command_line() -> set[str]:
    """Return the names of the options that this process's command line gives."""
    return {word.lstrip("+").partition("=")[0] for word in sys.argv[1:]}


def check_command_line(arguments: Sequence[str], script: Path) -> None:
    """Raise UserError for arguments that would make Hydra do more than compose values, or read a
    config that does.
    """
    parser = get_args_parser()  # Hydra's own: it also accepts --config-d for --config-dir

    def refuse(message: str) -> NoReturn:
        flag = re.search(r"unrecognized arguments:.*?--([\w-]+)[= ]?(\S*)", message)
        meant = hint(f"{flag[1]}={flag[2]}") if flag else ""
        raise UserError(
            f"{message}{meant}; train.py takes knob=value, and flags such as -m before or after"
            f" all of them"
        )

    parser.error = refuse  # type: ignore[method-assign]  # argparse would print its usage
    options = parser.parse_args(list(arguments))
    if options.experimental_rerun:
        refuse(
            f"--experimental-rerun={options.experimental_rerun}: reads a pickle, which could run"
            " code"
        )
    for flag, value in (
        ("--config-path", options.config_path),
        ("--config-name", options.config_name),
    ):
        if value and (
            "://" in value or (flag == "--config-name" and (".." in value or value.startswith("/")))
        ):
            refuse(
                f"{flag}={value}: expected"
                f" {'a folder' if flag == '--config-path' else 'a name in the config folder'}"
            )
    folders = [
        script.parent / (options.config_path or "config"),
        *([Path(options.config_dir)] if options.config_dir else []),
    ]
    groups = {group for folder in folders for group in check_config_folder(folder)}
    for override in OverridesParser.create().parse_overrides(options.overrides):
        line, key = override.input_line or "", override.key_or_group
        if _is_hydras(key, override.package) and key not in HYDRA_KNOBS:
            raise UserError(
                f"{line}: Hydra's own settings are not accepted, except"
                f" {', '.join(sorted(HYDRA_KNOBS))}; {ADVICE}"
            )
        if key == "model":
            _check_model(str(override.value()), folders)
        if re.search(r"(?<!\w)_target_(?!\w)", line):
            raise UserError(f"{line}: '_target_' is not accepted; {ADVICE}")
        if (key in groups or "/" in key) and re.search(r"\.\.|\$", line):
            raise UserError(f"{line}: expected the name of a file in the config folder")


def _check_model(name: str, folders: Sequence[Path]) -> None:
    """Raise UserError for a path or a name on the hub instead of a file of config/model."""
    known = any((folder / "model" / f"{name}.yaml").is_file() for folder in folders)
    if "/" in name and ".." not in name and not known:
        raise UserError(
            f"model={name}: model= names a file of config/model; for a folder or a model of the"
            f" hub, write model.name_or_path={name}"
        )


def are_knobs(arguments: Sequence[str]) -> bool:
    """Return whether the arguments are knobs of one run: no flag, and none of Hydra's settings,
    which may ask for a sweep.

    >>> are_knobs(["exp_name=a", "lr=1e-6"]), are_knobs(["exp_name=a,b", "-m"])
    (True, False)
    """
    return not any(re.match(r"-|[+~]*hydra\b", argument) for argument in arguments)


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """Return the arguments as Hydra needs them: it treats 5,0,5 as three runs unless it is quoted.
    A loss that is given by loss.name, as IPO was in 2023, gets the options of its own file.

    >>> spelled_out(["data_split=5,0,5", "stage=sft"])
    ["data_split='5,0,5'", 'stage=sft']
    >>> spelled_out(["loss=dpo", "loss.name=ipo", "loss.beta=0.1"])
    ['loss=ipo', 'loss.name=ipo', 'loss.beta=0.1']

    A list with spaces, which the shell has cut, is put together again:

    >>> spelled_out(["datasets=[hh,", "shp]", "lr=1"])
    ['datasets=[hh, shp]', 'lr=1']
    """
    arguments = _joined(arguments)
    quoted = [
        re.sub(r"^data_split=([\d.]+(?:,[\d.]+)+)$", r"data_split='\1'", argument)
        for argument in arguments
    ]
    named = [a.removeprefix("loss.name=") for a in quoted if re.fullmatch(r"loss\.name=\w+", a)]
    if not named or not (CONFIG / "loss" / f"{named[-1]}.yaml").is_file():
        return quoted
    return [f"loss={named[-1]}" if a.startswith("loss=") else a for a in quoted]


def _joined(arguments: Sequence[str]) -> list[str]:
    """Join the pieces of a knob whose brackets are open at the end of an argument. What never
    closes stays as it is.
    """
    is_open = lambda text: text.count("[") > text.count("]") or text.count("{") > text.count("}")
    joined: list[str] = []
    left = list(arguments)
    while left:
        argument = left.pop(0)
        if re.match(r"[\w.+~/]+=", argument) and is_open(argument):
            for n in range(1, len(left) + 1):
                if not is_open(whole := " ".join([argument, *left[:n]])):
                    argument, left = whole, left[n:]
                    break
        joined.append(argument)
    return joined


def no_environment(*names: str) -> NoReturn:
    """Replace OmegaConf's ${oc.env:NAME}: configs are logged, and the environment holds keys and
    passwords.
    """
    raise UserError(
        f"${{oc.env:{','.join(map(str, names))}}}: configs are logged, so nothing is read from the"
        " environment; write the value out, or have the shell put it in"
    )


def _is_hydras(key: str, package: str | None) -> bool:
    return re.split(r"[./]", key)[0] == "hydra" or "hydra" in re.split(r"[./]", package or "")


def check_config_folder(folder: Path) -> set[str]:
    """Return the names of the folder's groups, after checking that each of its YAML files holds
    only values. Raises UserError.
    """
    groups: set[str] = set()
    files: list[Path] = []
    for here, subfolders, names in os.walk(folder, followlinks=True):
        groups |= {str((Path(here) / name).relative_to(folder)) for name in subfolders}
        files += [Path(here) / name for name in sorted(names) if name.endswith((".yaml", ".yml"))]
        if len(files) + len(groups) > MAX_FILES:
            raise UserError(
                f"{folder}: holds more than {MAX_FILES} files and folders; give a folder that"
                " contains only configs"
            )
    if "hydra" in groups:
        raise UserError(f"{folder}/hydra: Hydra's own groups are not accepted; {ADVICE}")
    for file in files:
        check_config_file(file)
    return groups


def in_one_line(error: Exception) -> str:
    """Return Hydra's message about an override that does not compose, without its advice for
    programmers.
    """
    if isinstance(error, MarkedYAMLError) and error.problem_mark:
        return (
            f"{error.problem_mark.name}, line {error.problem_mark.line + 1}: not valid YAML:"
            f" {error.problem}"
        )
    lines = [
        line.strip()
        for line in str(error).partition("Config search path")[0].splitlines()
        if line.strip()
    ]
    # Hydra's fix is not ours: validate refuses what + adds
    if "To append to your config use +" in lines[-1]:
        knob = lines[-1].partition("+")[2]
        return (
            f"{knob}: no such knob, or not of this model or loss"
            f"{hint(knob) or '; see config/config.yaml, config/model and config/loss'}"
        )
    # Hydra also says so if the knob is null
    if nothing := re.search(r"Could not delete from config\. '(.+?)' does not exist", lines[0]):
        return (
            f"~{nothing[1]}: there is nothing to remove, since the option is null or does not"
            f" exist; leave out ~{nothing[1]}"
        )
    if lines[0].startswith("In 'config': Could not find '"):
        group, _, name = lines[0].partition("Could not find '")[2].strip("'").rpartition("/")
        known = f"no such file in config/{group}; it has: {', '.join(lines[2:])}"
        advice = f"; for a model of the hub, model.name_or_path={name}" if group == "model" else ""
        return f"{group}={name}: {known}{advice}"
    if "no viable alternative at input" in lines[0] and "rule:" in lines[0]:
        return (
            f"{lines[0]}: inside braces, = needs quotation marks, {{rule: 'length=200'}}; or write"
            " {rule: length:200}"
        )
    kept = [
        line
        for line in lines
        if not line.startswith(("full_key", "object_type", "reference_type", "See https"))
    ]
    knob = next(
        (line.partition(": ")[2] + ": " for line in lines if line.startswith("full_key")), ""
    )
    return knob + "; ".join(kept).removeprefix("UserError raised while resolving interpolation: ")
