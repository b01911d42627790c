"""Write the tables of docs/options.md from config/ and plumb/settings/schema.py:
`python docs/list_options.py`. The page's introduction stays as it is.

The comment above or after an option is its meaning. The schema says what may change on resume and
what eval.py reads.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from plumb.settings.schema import Kind, knob_of  # noqa: E402

HEADING = re.compile(r"^# -{10,} (.+)$", re.M)
KEY = re.compile(r"(?P<indent> *)(?P<name>\w+):[^#]*(?:# *(?P<note>.*))?$")
ON_RESUME = {
    Kind.BOOKKEEPING: "may change",
    Kind.PLACEMENT: "may change",
    Kind.CONTENTS: "contents",
    Kind.RESULT: "fixed",
}
NOT_OPTIONS = {"hydra", "defaults", "name"}
MARK = "<!-- From here on written by docs/list_options.py: begin -->\n"


class Option(NamedTuple):
    """Hold an option of a YAML file.

    Example: Option("lr", "5e-7", "learning rate", new=False)
    """

    name: str
    default: str
    meaning: str
    new: bool

    def row(self) -> str:
        """Return the option as a row of a table."""
        knob = knob_of(self.name) or knob_of(f"{self.name}.x")
        default = "required" if self.default == "???" else f"`{self.default}`"
        resume = ON_RESUME[knob.kind] if knob else ON_RESUME[Kind.RESULT]
        evaluated = "yes" if knob is None or "eval" in knob.commands else ""
        new = "yes" if self.new else ""
        cells = (f"`{self.name}`", default, escaped(self.meaning), resume, evaluated, new)
        return "| " + " | ".join(cells) + " |"


def escaped(text: str) -> str:
    """Return a comment as the text of a cell.

    >>> escaped("hf | null; <run>/hf")
    'hf \\\\| null; &lt;run>/hf'
    """
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


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
    text = (ROOT / "config" / file).read_text(encoding="utf-8")
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


def table(rows: Iterable[Option]) -> str:
    """Return the options as a Markdown table."""
    head = "| option | default | meaning and legal values | resume | eval | new |\n"
    return head + "|---|---|---|---|---|---|\n" + "\n".join(row.row() for row in rows) + "\n"


def page() -> str:
    """Return docs/options.md, keeping its introduction."""
    introduction = (ROOT / "docs/options.md").read_text(encoding="utf-8").partition(MARK)[0]
    text = (ROOT / "config/config.yaml").read_text(encoding="utf-8")
    parts = HEADING.split(text)[1:]  # heading, text, heading, text
    every = options("config.yaml")
    lines = [introduction + MARK]
    for heading, part in zip(parts[::2], parts[1::2], strict=True):
        own = [o for o in every if re.search(rf"^{o.name.split('.')[0]}:", part, re.M)]
        lines.append(f"## {heading.strip().capitalize()}\n\n{table(own)}")
    names = sorted(file.stem for file in (ROOT / "config/model").glob("*.yaml"))
    named = ", ".join(f"`{name}`" for name in names)
    lines.append(
        f"## The model: `model=NAME`\n\n`NAME` is a file of `config/model/`: {named}. The default,"
        " `blank_model`, takes any model by its path.\n\n"
        + table(options("model/blank_model.yaml", "model."))
    )
    lines.append(
        "## The loss: `loss=NAME`\n\nA loss rejects options that it does not have. The default is"
        " `loss=sft`.\n"
    )
    for file in sorted((ROOT / "config/loss").glob("*.yaml")):
        about = file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        own = options(f"loss/{file.name}", "loss.")
        lines.append(f"### `loss={file.stem}`\n\n{about}\n\n" + (table(own) if own else ""))
    return "\n".join(lines)


if __name__ == "__main__":
    (ROOT / "docs/options.md").write_text(page(), encoding="utf-8")
