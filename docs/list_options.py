"""Write the tables of docs/options.md from config/ and plumb/settings/schema.py:
`python docs/list_options.py`. The page's introduction stays as it is.

The comments of the YAML files are the meanings. The schema says what may change on resume and
what eval.py reads.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from plumb.settings.options import Option, options, sections  # noqa: E402
from plumb.settings.schema import Kind, knob_of  # noqa: E402

ON_RESUME = {
    Kind.BOOKKEEPING: "may change",
    Kind.PLACEMENT: "may change",
    Kind.CONTENTS: "contents",
    Kind.RESULT: "fixed",
    Kind.STATE: "never",
}
MARK = "<!-- From here on written by docs/list_options.py: begin -->\n"


def row(option: Option) -> str:
    """Return the option as a row of a table."""
    knob = knob_of(option.name) or knob_of(f"{option.name}.x")
    default = "required" if option.default == "???" else f"`{option.default}`"
    resume = ON_RESUME[knob.kind] if knob else ON_RESUME[Kind.RESULT]
    evaluated = "yes" if knob is None or "eval" in knob.commands else ""
    new = "yes" if option.new else ""
    cells = (f"`{option.name}`", default, escaped(option.meaning), resume, evaluated, new)
    return "| " + " | ".join(cells) + " |"


def escaped(text: str) -> str:
    """Return a comment as the text of a cell.

    >>> escaped("hf | null; <run>/hf")
    'hf \\\\| null; &lt;run>/hf'
    """
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def table(rows: Iterable[Option]) -> str:
    """Return the options as a Markdown table."""
    head = "| option | default | meaning and legal values | resume | eval | new |\n"
    return head + "|---|---|---|---|---|---|\n" + "\n".join(map(row, rows)) + "\n"


def page() -> str:
    """Return docs/options.md, keeping its introduction."""
    introduction = (ROOT / "docs/options.md").read_text(encoding="utf-8").partition(MARK)[0]
    lines = [introduction + MARK]
    for heading, own in sections().items():
        lines.append(f"## {heading.capitalize()}\n\n{table(own)}")
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
