"""Read YAML files from anywhere as values, and refuse them if they hold more."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from plumb.errors import UserError

# Of Hydra's own settings, those that say where a sweep lies and not what is run.
HYDRA_KNOBS = {
    "hydra.run.dir",
    "hydra.sweep.dir",
    "hydra.sweep.subdir",
    "hydra.output_subdir",
    "hydra.mode",
}
HYDRA_DEFAULTS = {"override hydra/job_logging": "none", "override hydra/hydra_logging": "none"}
# of one YAML file; of its nesting; in a config folder
MAX_BYTES = 100_000
MAX_DEPTH = 30
MAX_FILES = 1000
ADVICE = "it could import code; a config holds values only"


def check_config_file(path: Path) -> None:
    """Raise UserError for a YAML file that holds more than values. A file that is not YAML is left
    to Hydra, if it is asked for.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise UserError(
                f"{path}: larger than {MAX_BYTES:,} bytes, which no config is; put data into files"
                " of their own"
            )
        text = raw.decode()
        content = _ValuesOnly(path, text).get_single_data()
    except UnicodeDecodeError as error:
        what = f"byte {error.start + 1} (0x{raw[error.start]:02x}) isn't UTF-8"
        raise UserError(f"{path}: {what}; save the file as UTF-8") from None
    except (OSError, yaml.YAMLError):
        return
    package = re.search(r"^\s*#\s*@\s*package\b(.*)$", text[:512], re.M)
    if package and "hydra" in package[1]:
        raise UserError(
            f"{path}: @package{package[1]}: Hydra's own settings are not accepted; {ADVICE}"
        )
    if not isinstance(content, dict):
        return
    for key in _keys(content):
        if key == "_target_":
            raise UserError(f"{path}: '_target_' is not accepted; {ADVICE}")
    hydra = content.get("hydra")
    for name in _dotted(hydra, "hydra") if hydra is not None else ():
        if name not in HYDRA_KNOBS - {"hydra.mode"}:  # only a command line asks for a sweep
            raise UserError(
                f"{path}: {name}: Hydra's own settings are not accepted, except"
                f" {', '.join(sorted(HYDRA_KNOBS - {'hydra.mode'}))}; {ADVICE}"
            )
    defaults = content.get("defaults")
    for entry in defaults if isinstance(defaults, list) else ():
        for key, value in entry.items() if isinstance(entry, dict) else [(entry, None)]:
            shown = f"{key}: {value}" if value is not None else f"{key}"
            own = str(key) in HYDRA_DEFAULTS and HYDRA_DEFAULTS[str(key)] == value
            if not own and re.search(r"\bhydra\b|\.\.|\$", shown):
                raise UserError(f"{path}: defaults: '{shown}' is not accepted; {ADVICE}")


class _ValuesOnly(yaml.SafeLoader):
    """Load YAML in one pass, without aliases (236 bytes of nested ones keep a parser busy for
    minutes), tags and deep nesting. Raises UserError for these.
    """

    def __init__(self, path: Path, text: str):
        super().__init__(text)
        self.path = path
        self.depth = 0

    def refuse(self, sign: str) -> NoReturn:
        raise UserError(
            f"{self.path}, line {self.line + 1}: '{sign}' (an anchor, alias or tag) is not"
            " accepted; write the value out"
        )

    def fetch_alias(self) -> None:
        self.refuse("*")

    def fetch_anchor(self) -> None:
        self.refuse("&")

    def fetch_tag(self) -> None:
        self.refuse("!")

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        line = self.peek_event().start_mark.line + 1
        self.depth += 1
        if self.depth > MAX_DEPTH + 1:  # a value is one deeper than what holds it
            raise UserError(f"{self.path}, line {line}: nested more than {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _keys(value: Any) -> Iterator[Any]:
    for key, inner in (
        value.items() if isinstance(value, dict) else ((None, inner) for inner in value)
    ):
        yield key
        if isinstance(inner, dict | list):
            yield from _keys(inner)


def _dotted(value: Any, prefix: str) -> Iterator[str]:
    """Return the dotted names of a mapping's leaves."""
    if not isinstance(value, dict):
        yield prefix
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from _dotted(inner, f"{prefix}.{key}")
