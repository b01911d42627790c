"""The options of config/, with what their comments say: for --help and docs/options.md.

The comment above or after an option is its meaning.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import yaml

from plumb.paths import CONFIG
from plumb.settings.schema import knob_of

HEADING = re.compile(r"^# -{10,} (.+)$", re.M)
KEY = re.compile(r"(?P<indent> *)(?P<name>\w+):[^#]*(?:# *(?P<note>.*))?$")
NOT_OPTIONS = {"hydra", "defaults", "name"}


class Option(NamedTuple):
    """Hold an option of a YAML file.

    Example: Option("lr", "5e-7", "learning rate", new=False)
    """

    name: str
    default: str
    meaning: str
    new: bool


def sections() -> dict[str, list[Option]]:
    """Return the options of config.yaml under its headings, such as "the data"."""
    parts = HEADING.split((CONFIG / "config.yaml").read_text(encoding="utf-8"))[1:]
    every = options("config.yaml")
    of_part = lambda text: [o for o in every if re.search(rf"^{o.name.split('.')[0]}:", text, re.M)]
    return {
        heading.strip(): of_part(text)
        for heading, text in zip(parts[::2], parts[1::2], strict=True)
    }


def comments(text: str) -> dict[str, str]:
    """Return {key, or group.key: its comment}, above and after it.

    >>> comments("# rate,\\n#   per step  [ours]\\nlr: 0.1\\nrules:\\n  empty: keep  # no text\\n")
    {'lr': 'rate, per step  [ours]', 'rules': '', 'rules.empty': 'no text'}
    """
    by_key: dict[str, str] = {}
    above: list[str] = []
    group = ""
    for line in text.splitlines():
        key = KEY.match(line)
        if line.strip().startswith("#") and not HEADING.match(line):
            above.append(line.strip().lstrip("#").strip())
            continue
        if key:
            group = group if key["indent"] else key["name"]
            name = f"{group}.{key['name']}" if key["indent"] else group
            by_key[name] = " ".join([*above, key["note"] or ""]).strip()
        above = []
    return by_key


def options(file: str, prefix: str = "") -> list[Option]:
    """Return the options of a YAML file of config/, in order."""
    text = (CONFIG / file).read_text(encoding="utf-8")
    notes = comments(text)
    listed = []
    for key, value in yaml.safe_load(text).items():
        if key in NOT_OPTIONS:
            continue
        name = prefix + key
        one = not isinstance(value, dict) or key == "terms" or knob_of(name) or knob_of(f"{name}.x")
        for part, default in [(key, value)] if one else value.items():
            note = notes[key if one else f"{key}.{part}"]
            new = "[ours]" in note or "[ours]" in notes[key]
            meaning = re.sub(r" *\[ours\]", "", note)
            shown = name if one else f"{name}.{part}"
            listed.append(Option(shown, written(default), meaning, new))
    return listed


def written(value: Any) -> str:
    """Return a default as the command line takes it.

    >>> written(["hh", "shp"]), written(None), written(True), written("5e-7")
    ('[hh,shp]', 'null', 'true', '5e-7')
    """
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, dict):
        parts = [f"{k}: {written(v)}" for k, v in value.items() if v is not None]
        return "{" + ", ".join(parts) + "}" if parts else "null for each"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "a new one" if str(value).startswith("${") else str(value)
