"""Write the table and the sections of docs/losses.md from the losses' docstrings and YAMLs:
`python docs/list_losses.py`. The text outside the marked blocks is written by hand.

plumb/losses/registry.py defines the form of a docstring; an option's meaning is its comment in
config/loss.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from list_options import Option, escaped, options  # noqa: E402

import plumb.losses  # noqa: E402, F401
from plumb.losses.registry import LOSSES, Declaration, Loss, build_loss  # noqa: E402

EXAMPLE_HOLDS = {
    "single": "a prompt and its target",
    "labelled": "a response, desirable or not",
    "pair": "a chosen and a rejected response",
    "list": "a ranked list of responses",
    "rollout": "the policy's own samples",
}
# the value of a required knob, if its comment calls it usual or names no value
REQUIRED = 0.1
# a source: an arXiv number without its version, or an address
SOURCE = re.compile(r"arXiv:\d{4}\.\d{5}|https?://[^\s)\]]+[^\s)\].,:]")


def numbers_are_numbers(value: Any) -> Any:
    """Return a value as Hydra reads it, since YAML 1.1 reads 1e-3 as a string.

    >>> numbers_are_numbers("1e-3"), numbers_are_numbers("sum")
    (0.001, 'sum')
    """
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def usual(meaning: str) -> float:
    """Return REQUIRED if it is among the values that a comment calls usual, otherwise the first of
    them.

    >>> usual("2 to 10 is usual; required"), usual("0.01 to 0.5 is usual"), usual("required")
    (2.0, 0.1, 0.1)
    """
    number = r"(\d[\d.]*(?:e-?\d+)?)"
    named = re.search(rf"{number}(?: (?:to|or) {number})?(?: times \w+)? is usual", meaning)
    if named is None:
        return REQUIRED
    least = float(named[1])
    return REQUIRED if least <= REQUIRED <= float(named[2] or least) else least


def knobs_of(name: str) -> dict[str, Any]:
    """Return {"name": name, knob: value} of config/loss, with usual values for required knobs."""
    text = (ROOT / f"config/loss/{name}.yaml").read_text(encoding="utf-8")
    meanings = {o.name.removeprefix("loss."): o.meaning for o in options(f"loss/{name}.yaml", "")}
    return {
        knob: usual(meanings[knob]) if value == "???" else numbers_are_numbers(value)
        for knob, value in yaml.safe_load(text).items()
    }


def written_knobs(name: str) -> list[str]:
    """Return the required knobs of a loss with usual values, as the command line takes them.

    >>> written_knobs("dpo"), written_knobs("sft")
    (['loss.beta=0.1'], [])
    """
    text = (ROOT / f"config/loss/{name}.yaml").read_text(encoding="utf-8")
    required = [knob for knob, value in yaml.safe_load(text).items() if value == "???"]
    return [f"loss.{knob}={knobs_of(name)[knob]:g}" for knob in required]


def alternatives(knobs: Mapping[str, Any], hints: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """Return (knob, how it is written, value) of other values of each knob that is a boolean, a
    word, or 0.
    """
    others: list[tuple[str, str, Any]] = []
    for knob, value in knobs.items():
        if hints[knob] is bool:
            others.append((knob, f"{knob}={str(not value).lower()}", not value))
        elif words := [x for x in get_args(hints[knob]) if isinstance(x, str) and x != value]:
            others += [(knob, f"{knob}={word}", word) for word in words]
        elif value == 0:
            others.append((knob, f"{knob}` above `0", 0.1))
    return others


def needed(name: str, setting: str) -> str:
    """Return whether a loss needs something, such as `needs_reference`, and which knobs change it.

    >>> needed("sft", "needs_reference"), needed("dpo", "needs_reference")
    ('no', 'yes; no with `reference_free=true`')
    """
    knobs = knobs_of(name)
    words = {True: "yes", False: "no"}
    now = getattr(build_loss(knobs), setting)
    if not callable(getattr(LOSSES[name], setting)):
        return words[now]
    own = {k: v for k, v in knobs.items() if k != "name"}
    hints = LOSSES[name].knobs()
    other = [
        f"`{written}`"
        for knob, written, value in alternatives(own, hints)
        if getattr(LOSSES[name], setting)(own | {knob: value}) != now
    ]
    return words[now] + (f"; {words[not now]} with {' or '.join(other)}" if other else "")


def presets(name: str) -> str:
    """Return a sentence on the other files of config/loss that set the knobs of this loss; "" where
    there are none.

    >>> presets("dpo")
    ''
    """
    own = knobs_of(name)
    lines = []
    for file in sorted((ROOT / "config/loss").glob("*.yaml")):
        spec = yaml.safe_load(file.read_text(encoding="utf-8"))
        if file.stem != name and spec["name"] == name:
            other = {knob: numbers_are_numbers(value) for knob, value in spec.items()}
            changed = [f"{k}={'null' if v is None else v}" for k, v in other.items() if v != own[k]]
            lines.append(f"- `loss={file.stem}`: `{' '.join(changed)}`")
    if not lines:
        return ""
    return "Presets, which differ in these knobs:\n\n" + "\n".join(lines) + "\n"


def paragraphs(declared: Declaration) -> list[str]:
    """Return the paragraphs of a loss's docstring, one line each."""
    text = inspect.getdoc(declared.function) or ""
    return [" ".join(part.split()) for part in text.split("\n\n")]


def linked(text: str) -> str:
    """Return prose as markdown, with arXiv numbers as links.

    >>> linked("w * h < 1, arXiv:2305.18290")
    'w \\\\* h &lt; 1, [arXiv:2305.18290](https://arxiv.org/abs/2305.18290)'
    """
    text = text.replace("*", "\\*").replace("<", "&lt;")
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def about(name: str) -> str:
    """Return the comment at the head of a loss's YAML."""
    text = (ROOT / f"config/loss/{name}.yaml").read_text(encoding="utf-8")
    head = text.partition(f"name: {name}")[0]
    return " ".join(line.lstrip("# ") for line in head.splitlines() if line.strip())


def sources(name: str) -> str:
    """Return the sources in the first paragraph of a loss's docstring, otherwise the first source
    in its YAML's head or the rest of the docstring.
    """
    first, *others = paragraphs(LOSSES[name])
    later = SOURCE.findall(" ".join([about(name), *others]))[:1]
    return ", ".join(dict.fromkeys(map(linked, SOURCE.findall(first) or later))) or "-"


def table() -> str:
    """Return the table of all losses, by what an example holds."""
    rows = ["| loss | one example holds | reference | source |", "|---|---|---|---|"]
    order = list(EXAMPLE_HOLDS)
    for name in sorted(LOSSES, key=lambda name: (order.index(LOSSES[name].group), name)):
        holds = EXAMPLE_HOLDS[LOSSES[name].group]
        reference = needed(name, "needs_reference")
        rows.append(f"| [`{name}`](#{name}) | {holds} | {reference} | {sources(name)} |")
    return "\n".join(rows) + "\n"


def knob_table(own: list[Option]) -> str:
    """Return the table of a loss's knobs."""
    rows = ["| knob | default | meaning and legal values |", "|---|---|---|"]
    for option in own:
        default = "required" if option.default == "???" else f"`{option.default}`"
        rows.append(f"| `{option.name}` | {default} | {escaped(option.meaning)} |")
    return "\n".join(rows) + "\n"


def needs(name: str, bound: Loss) -> str:
    """Return a sentence on what a loss reads and needs."""
    parts = [
        f"One example holds {EXAMPLE_HOLDS[bound.group]}",
        f"reference: {needed(name, 'needs_reference')}",
    ]
    scores = needed(name, "needs_margins")
    if scores != "no":
        parts.append(f"scores of the responses: {scores}")
    if bound.reads == "scores":
        parts.append("the model has a scalar head")
    if bound.reads == "token_logps":
        parts.append("it reads every token's log-probability")
    if bound.live_reference:
        parts.append("the reference must be live (`reference=live`)")
    if bound.context is not None:
        parts.append("it sees the batch of all ranks and microbatches at once")
    return "; ".join(parts) + "."


def section(name: str) -> str:
    """Return the page's section on one loss."""
    declared = LOSSES[name]
    bound = build_loss(knobs_of(name))
    formula, *others = paragraphs(declared)
    lines = [f"### {name}\n", linked(about(name)) + "\n", f"```text\n{wrapped(formula)}\n```\n"]
    lines += [linked(text) + "\n" for text in others]
    if bound.context is not None:
        of_context = " ".join((inspect.getdoc(bound.context.compute) or "").split())
        lines.append(f"`{bound.context.compute.__name__}`: {linked(of_context)}\n")
    lines.append(needs(name, bound) + "\n")
    if own := options(f"loss/{name}.yaml", "loss."):
        lines.append(knob_table(own))
    if named := presets(name):
        lines.append(named)
    return "\n".join(lines)


def wrapped(text: str, width: int = 110) -> str:
    """Return text in lines of fewer than `width` characters, broken at spaces."""
    lines = [""]
    for word in text.split(" "):
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return "\n".join(lines)


def page() -> str:
    """Return docs/losses.md, keeping its text outside the marked blocks."""
    text = (ROOT / "docs/losses.md").read_text(encoding="utf-8")
    blocks = {"table": table(), "sections": "\n".join(map(section, sorted(LOSSES)))}
    for name, block in blocks.items():
        begin, end = (f"<!-- {name}: {x} -->\n" for x in ("begin", "end"))
        before, _, rest = text.partition(begin)
        text = before + begin + "\n" + block + "\n" + end + rest.partition(end)[2]
    return text


if __name__ == "__main__":
    (ROOT / "docs/losses.md").write_text(page(), encoding="utf-8")
