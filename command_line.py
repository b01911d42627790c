"""What may be said to Hydra, on the command line and in YAML files. Looked at before Hydra is.

Hydra imports and calls what its own settings name (callbacks, launchers, search paths), and reads pickles of earlier jobs.
None of that is needed to train, so none is let through: a config holds values, and the schema in validation.py says which.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser

from utils import UserError

# Of Hydra's own settings, those that say where a sweep lies and not what is run.
HYDRA_KNOBS = {"hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.output_subdir", "hydra.mode"}
HYDRA_DEFAULTS = {"override hydra/job_logging": "none", "override hydra/hydra_logging": "none"}
MAX_BYTES, MAX_DEPTH, MAX_FILES = 100_000, 30, 1000  # of one YAML file; of its nesting; in a config folder
ADVICE = "it could import code; a config holds values only"


def check_command_line(arguments: Sequence[str], script: Path) -> None:
    """Raise UserError for what would make Hydra do more than compose values, or read a config that does."""
    parser = get_args_parser()  # Hydra's own: it takes --config-d for --config-dir, too

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; train.py takes knob=value, and flags such as -m before or behind them all")

    parser.error = refuse  # type: ignore[method-assign]  # argparse would print its usage
    given = parser.parse_args(list(arguments))
    if given.experimental_rerun:
        refuse(f"--experimental-rerun={given.experimental_rerun}: reads a pickle, which could run code")
    for flag, value in (("--config-path", given.config_path), ("--config-name", given.config_name)):
        if value and ("://" in value or (flag == "--config-name" and (".." in value or value.startswith("/")))):
            refuse(f"{flag}={value}: expected {'a folder' if flag == '--config-path' else 'a name in the config folder'}")
    folders = [script.parent / (given.config_path or "config"), *([Path(given.config_dir)] if given.config_dir else [])]
    groups = {group for folder in folders for group in check_config_folder(folder)}
    for override in OverridesParser.create().parse_overrides(given.overrides):
        line, key = override.input_line or "", override.key_or_group
        if _is_hydras(key, override.package) and key not in HYDRA_KNOBS:
            raise UserError(f"{line}: Hydra's own settings are not taken, but {', '.join(sorted(HYDRA_KNOBS))}; {ADVICE}")
        if re.search(r"(?<!\w)_target_(?!\w)", line):
            raise UserError(f"{line}: '_target_' is not taken; {ADVICE}")
        if (key in groups or "/" in key) and re.search(r"\.\.|\$", line):
            raise UserError(f"{line}: expected the name of a file in the config folder")


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """The arguments as Hydra wants them: it takes 5,0,5 for three runs, unless it is quoted.

    >>> spelled_out(["data_split=5,0,5", "stage=sft"])
    ["data_split='5,0,5'", 'stage=sft']
    """
    return [re.sub(r"^data_split=([\d.]+(?:,[\d.]+)+)$", r"data_split='\1'", argument) for argument in arguments]


def no_environment(*names: str) -> NoReturn:
    """In place of OmegaConf's ${oc.env:NAME}: configs are logged, and the environment holds keys and passwords."""
    raise UserError(f"${{oc.env:{','.join(map(str, names))}}}: configs are logged, so nothing is read from the environment; "
                    "write the value out, or have the shell put it in")  # fmt: skip


def _is_hydras(key: str, package: str | None) -> bool:
    return re.split(r"[./]", key)[0] == "hydra" or "hydra" in re.split(r"[./]", package or "")


def check_config_folder(folder: Path) -> set[str]:
    """The names of its groups, once each of its YAML files holds values only. Raises UserError."""
    groups: set[str] = set()
    files: list[Path] = []
    for here, subfolders, names in os.walk(folder, followlinks=True):
        groups |= {str((Path(here) / name).relative_to(folder)) for name in subfolders}
        files += [Path(here) / name for name in sorted(names) if name.endswith((".yaml", ".yml"))]
        if len(files) + len(groups) > MAX_FILES:
            raise UserError(f"{folder}: holds more than {MAX_FILES} files and folders; give a folder of configs alone")
    if "hydra" in groups:
        raise UserError(f"{folder}/hydra: Hydra's own groups are not taken; {ADVICE}")
    for file in files:
        check_config_file(file)
    return groups


def check_config_file(path: Path) -> None:
    """Raise UserError for a YAML file with more than values. One that is not YAML is left to Hydra, if it is asked for."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise UserError(f"{path}: larger than {MAX_BYTES:,} bytes, which no config is; put data into files of their own")
        text = raw.decode()
        _check_tokens(path, text)
        content = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        what = f"byte {error.start + 1} (0x{raw[error.start]:02x}) isn't UTF-8"
        raise UserError(f"{path}: {what}; save the file as UTF-8") from None
    except (OSError, yaml.YAMLError):
        return
    package = re.search(r"^\s*#\s*@\s*package\b(.*)$", text[:512], re.M)
    if package and "hydra" in package[1]:
        raise UserError(f"{path}: @package{package[1]}: Hydra's own settings are not taken; {ADVICE}")
    if not isinstance(content, dict):
        return
    for key in _keys(content):
        if key == "_target_":
            raise UserError(f"{path}: '_target_' is not taken; {ADVICE}")
    hydra = content.get("hydra")
    for name in _dotted(hydra, "hydra") if hydra is not None else ():
        if name not in HYDRA_KNOBS:
            raise UserError(f"{path}: {name}: Hydra's own settings are not taken, but {', '.join(sorted(HYDRA_KNOBS))}; {ADVICE}")
    defaults = content.get("defaults")
    for entry in defaults if isinstance(defaults, list) else ():
        for key, value in entry.items() if isinstance(entry, dict) else [(entry, None)]:
            said = f"{key}: {value}" if value is not None else f"{key}"
            own = str(key) in HYDRA_DEFAULTS and HYDRA_DEFAULTS[str(key)] == value
            if not own and re.search(r"\bhydra\b|\.\.|\$", said):
                raise UserError(f"{path}: defaults: '{said}' is not taken; {ADVICE}")


def _check_tokens(path: Path, text: str) -> None:
    """An alias in an alias in an alias (236 bytes of it keep a parser busy for minutes), deep nesting, and tags."""
    depth, steps = 0, dict.fromkeys(("<block mapping start>", "<block sequence start>", "{", "["), 1)
    steps |= dict.fromkeys(("<block end>", "}", "]"), -1)
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        line = token.start_mark.line + 1
        if isinstance(token, yaml.AliasToken | yaml.AnchorToken | yaml.TagToken):
            sign = {"AliasToken": "*", "AnchorToken": "&", "TagToken": "!"}[type(token).__name__]
            raise UserError(f"{path}, line {line}: '{sign}' (an anchor, alias or tag) is not taken; write the value out")
        depth += steps.get(token.id, 0)
        if depth > MAX_DEPTH:
            raise UserError(f"{path}, line {line}: nested more than {MAX_DEPTH} deep")


def _keys(value: Any) -> Iterator[Any]:
    for key, inner in value.items() if isinstance(value, dict) else ((None, inner) for inner in value):
        yield key
        if isinstance(inner, dict | list):
            yield from _keys(inner)


def _dotted(value: Any, prefix: str) -> Iterator[str]:
    """The dotted names of a mapping's leaves."""
    if not isinstance(value, dict):
        yield prefix
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from _dotted(inner, f"{prefix}.{key}")
