"""Draw docs/walks.png and rewrite the counts in docs/walks.md: `python docs/draw_walks.py`.

docs/walks.md holds the lists. Each walk is a second-level heading followed by numbered lines of
the form "1. `module.function`: phrase".
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).resolve().parents[1]
COUNTS = re.compile(r"(?<=<!-- counts: begin -->\n).*?(?=<!-- counts: end -->)", re.S)
COLOURS = {
    "root": "#fde9c9",
    "data": "#dcebf7",
    "batching": "#dff0dc",
    "training": "#f6dede",
    "models": "#e8e1f4",
    "losses": "#f9f3c4",
}


class Stop(NamedTuple):
    """Hold a function on a walk.

    Example: Stop("plumb.batching.layout", "pack", "lays prompts and responses out in one row")
    """

    module: str
    function: str  # "f", or "Class.method"
    phrase: str

    @property
    def file(self) -> Path:
        return ROOT / (self.module.replace(".", "/") + ".py")

    @property
    def room(self) -> str:
        return self.module.split(".")[1] if self.module.startswith("plumb.") else "root"


def walks(text: str) -> dict[str, list[Stop]]:
    """Return the stops under each heading.

    >>> walks("## A walk\\n\\n1. `train.run`: starts a run\\n")
    {'A walk': [Stop(module='train', function='run', phrase='starts a run')]}
    """
    sections = re.split(r"^## ", text, flags=re.M)[1:]
    pattern = re.compile(r"^\d+\. `([a-z_.]+)\.((?:[A-Z_]\w*\.)?\w+)`: (.+)$", re.M)
    return {
        section.partition("\n")[0]: [Stop(*groups) for groups in pattern.findall(section)]
        for section in sections
    }


def definition(stop: Stop) -> ast.FunctionDef:
    """Return the function's syntax tree; raise LookupError if there is no such function."""
    nodes: list[ast.stmt] = []
    if stop.file.is_file():
        nodes = ast.parse(stop.file.read_text(encoding="utf-8")).body
    *classes, name = stop.function.split(".")
    for owner in classes:
        nodes = [
            inner
            for node in nodes
            if isinstance(node, ast.ClassDef) and node.name == owner
            for inner in node.body
        ]
    for node in reversed(nodes):  # those before the last are overloads, without code
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    raise LookupError(f"docs/walks.md: no function {stop.module}.{stop.function}")


def n_code_lines(stop: Stop) -> int:
    """Return the number of lines with code, without docstring, comments and blank lines."""
    node = definition(stop)
    lines = stop.file.read_text(encoding="utf-8").splitlines(keepends=True)
    source = "".join(lines[node.lineno - 1 : node.end_lineno])
    skipped = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    )
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    coded = {
        number
        for token in tokens
        if token.type not in skipped
        for number in range(token.start[0], token.end[0] + 1)
    }
    if ast.get_docstring(node):
        first = node.body[0]
        docstring = range(first.lineno, (first.end_lineno or first.lineno) + 1)
        coded -= {number - node.lineno + 1 for number in docstring}
    return len(coded)


def count(stops: list[Stop]) -> tuple[int, int, int]:
    """Return how many functions, files and lines of code a walk has."""
    return len(stops), len({stop.file for stop in stops}), sum(map(n_code_lines, stops))


def table(every_walk: dict[str, list[Stop]]) -> str:
    """Return the Markdown table of the counts."""
    rows = {title: count(stops) for title, stops in every_walk.items()}
    rows["both"] = count([stop for stops in every_walk.values() for stop in stops])
    head = "| walk | functions | files | lines |\n|---|---|---|---|\n"
    return head + "".join(f"| {title} | {n} | {f} | {c} |\n" for title, (n, f, c) in rows.items())


def draw_walk(axes: Axes, title: str, stops: list[Stop], height: float) -> None:
    """Draw one walk as a column of boxes, coloured by room; `height` is that of the longest."""
    axes.set(xlim=(0, 10), ylim=(height, -0.9))
    axes.axis("off")
    axes.text(0.1, -0.5, title, fontsize=14, fontweight="bold", va="center")
    for i, stop in enumerate(stops):
        colour = COLOURS.get(stop.room, "#eeeeee")
        box = FancyBboxPatch(
            (0.15, i + 0.06), 9.7, 0.7, "round,pad=0.02,rounding_size=0.12", fc=colour, ec="#888888"
        )
        axes.add_patch(box)
        path = str(stop.file.relative_to(ROOT)).removeprefix("plumb/")
        axes.text(0.35, i + 0.25, stop.function, family="monospace", fontsize=11, va="center")
        axes.text(9.7, i + 0.25, path, fontsize=9, ha="right", va="center", color="#555555")
        axes.text(0.35, i + 0.57, stop.phrase.replace("`", ""), fontsize=10, va="center")
        if i:
            start, end = (5, i - 0.22), (5, i + 0.05)
            axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "#555555"})


def draw(every_walk: dict[str, list[Stop]], file: Path) -> None:
    """Draw the walks side by side into a PNG."""
    longest = max(map(len, every_walk.values()))
    figure = Figure(figsize=(7.4 * len(every_walk), 0.62 * (1 + longest)), layout="tight")
    for i, (title, stops) in enumerate(every_walk.items(), 1):
        draw_walk(figure.add_subplot(1, len(every_walk), i), title, stops, longest)
    figure.savefig(file, dpi=110, metadata={"Software": None})


def main(folder: Path = ROOT / "docs") -> None:
    """Write walks.png into `folder`, and the counts into its walks.md if that exists."""
    text = (ROOT / "docs/walks.md").read_text(encoding="utf-8")
    every_walk = walks(text)
    draw(every_walk, folder / "walks.png")
    if (folder / "walks.md").is_file():
        counted = COUNTS.sub(lambda _: table(every_walk), text)
        (folder / "walks.md").write_text(counted, encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
