"""Report on runs: `python report.py RUN [RUN ...]` writes a self-contained page, and its curves as
a PNG.

The text comes from reports/diagnosis.py and runs/history.py, the curves from reports/curves.py, the
layout from reports/report.html.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from plumb.console import one_line, redact
from plumb.errors import UserError
from plumb.paths import new_file
from plumb.reports import curves, interactive
from plumb.reports.comparison import Figure, read_figures, read_side_by_side, short
from plumb.reports.curves import colour, data_address, draw_each, named
from plumb.reports.diagnosis import (
    Finding,
    diagnose,
    family_of,
    first_and_last,
    healthy,
    verdict,
)
from plumb.runs.history import Record, Run, Sample, differences, lineage, read_runs
from plumb.settings import cli, schema
from plumb.settings.plugins import import_plugins

# Which value is better, by the start of the metric's name; of others (a margin, a reward), more is
# not better.
BETTER = {"rewards_eval/accuracies": max, "loss ": min, "perplexity/": min}
MAX_SAMPLES = 32  # prompts on the page; samples.jsonl has all


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    options = cli.Parser(
        "Show the curves, diagnosis, samples and lineage of one or more runs on one page."
    )
    options.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    options.add_argument(
        "--figures",
        nargs="+",
        default=[],
        type=Path,
        metavar="FILE",
        help="JSON of eval.py --out, score.py winrate --json or score.py pairs --json",
    )
    options.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE",
        help="import your own file with the runs' @loss; may be repeated",
    )
    options.add_argument(
        "--samples",
        type=Path,
        metavar="FILE",
        help="answers of several models to the same prompts, as sample.py --out writes them",
    )
    options.add_argument(
        "--out",
        type=Path,
        help=(
            "path of the page; a PNG of the same name goes beside it (default: report.html in"
            " the first RUN)"
        ),
    )
    return options


def main(options: argparse.Namespace) -> None:
    """Read the runs, print the summary, and write the page."""
    import_plugins(options.plugin)
    runs = read_runs(options.runs, schema.bookkeeping)
    out = options.out or runs[0].path / "report.html"
    if out.suffix not in (".html", ".htm"):
        raise UserError(f"--out={out}: expected a name that ends in .html")
    findings = [diagnose(run) for run in runs]
    figures = read_figures(options.figures)
    answers = read_side_by_side(options.samples, MAX_SAMPLES) if options.samples else None
    for figure in figures:
        print(one_line(f"{short(figure.model)}: {figure.what}: {figure}"))
    for run, of_run in zip(runs, findings, strict=True):
        print(one_line(f"{run.name}: {verdict(run)}"))
        for line in (*run.notes, healthy(of_run)):
            if line:
                print(one_line(f"  {line}"))
        for f in of_run:
            print(
                one_line(f"  {f.level}: {f.title}: {f.evidence}"),
                one_line(f"      try: {f.remedy}"),
                sep="\n",
            )
    page = render(runs, findings, figures, answers)
    with new_file(out, "--out", "wb") as file:
        # half a surrogate pair in a sample must not fail the report
        file.write(page.encode("utf-8", errors="replace"))
    picture = out.with_suffix(".png")
    with new_file(picture, "--out", "wb") as file:
        file.write(curves.draw_all([*map(named, runs)]))
    print(one_line(f"report: {out}"), one_line(f"curves: {picture}"), sep="\n")


def render(
    runs: Sequence[Run],
    findings: Sequence[Sequence[Finding]],
    figures: Sequence[Figure] = (),
    answers: dict[str, Any] | None = None,
) -> str:
    """Return the page. `figures` and `answers` are what other commands measured, and come first.
    All text is escaped when inserted, since samples may contain anything.
    """
    folder = FileSystemLoader(Path(curves.__file__).parent)
    templates = Environment(
        loader=folder,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"brief": brief}
    renamed = [named(run) for run in runs]
    table = columns(renamed)
    plotly = interactive.library()
    charts = interactive.charts(renamed) if plotly is not None else []
    scripts, allowed = interactive.scripts(plotly) if plotly is not None else ([], "")
    return templates.get_template("report.html").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        made=datetime.now().astimezone().isoformat(timespec="seconds"),
        runs=[_of_run(i, run, findings[i]) for i, run in enumerate(runs)],
        panels=[{"image": image, "alt": alt} for _, image, alt in draw_each(renamed)]
        if plotly is None
        else [],
        charts=charts,
        dashed=any(line["dash"] == "dash" for chart in charts for line in chart["traces"]),
        chart_data=interactive.as_json({"panels": charts}),
        scripts=scripts,
        allowed_scripts=allowed,
        ratio=any(
            key.startswith("ratio_")
            for run in renamed
            for record in run.evaluations + run.steps
            for key in record
        ),
        averaged=any("loss/eval_ema" in record for run in runs for record in run.evaluations),
        differences=differences(runs, schema.bookkeeping) if len(runs) > 1 else {},
        columns=table,
        evaluations=evaluations(table),
        parts=parts(table),
        samples=side_by_side(at_the_end(runs)),
        figures=[(short(figure.model), figure.what, str(figure)) for figure in figures],
        answers=answers,
        comparable=len(runs) > 1 and same_data(runs),
        several=len(runs) > 1,
    )


def _of_run(i: int, run: Run, findings: Sequence[Finding]) -> dict[str, Any]:
    """Return what the page shows of one run."""
    command = run.environment.get("command")
    return {
        "name": run.name,
        "path": str(run.path.resolve()),
        "colour": colour(i),
        "verdict": verdict(run),
        "notes": run.notes,
        "state": run.status.get("state") or "unknown",
        "findings": findings,
        "healthy": healthy(findings),
        "meanings": " ".join(family_of(run).meanings()),
        "lineage": lineage(run),
        "samples": side_by_side(before_and_after(run)),
        "pictures": pictures(run),
        "config": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
        if run.config
        else "",
        "command": redact(" ".join(map(str, command))) if isinstance(command, list) else "",
        "environment": {
            k: v
            for k, v in run.environment.items()
            if k in ("started", "commit", "python", "platform", "gpus")
        },
    }


def brief(value: Any) -> str:
    """Return a number in a readable form; other values unchanged, in YAML syntax.

    >>> brief(0.99333), brief(-1236.4), brief(123456), brief(None), brief(5e-07)
    ('0.9933', '-1,236', '123,456', 'null', '5e-07')
    """
    if isinstance(value, list):
        return f"[{', '.join(map(brief, value))}]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if not isinstance(value, int | float) or not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


# ---- evaluations ----


class Column(NamedTuple):
    """Describe one column of the tables of evaluations."""

    title: str
    colour: str
    run: Run
    record: Record


def columns(runs: Sequence[Run]) -> list[Column]:
    """Return the last evaluation of each of several runs; for a single run, the first and
    the last.
    """
    if len(runs) > 1:
        return [
            Column(run.name, colour(i), run, run.evaluations[-1] if run.evaluations else {})
            for i, run in enumerate(runs)
        ]
    ends = [
        record
        for i, record in enumerate(runs[0].evaluations)
        if i in (0, len(runs[0].evaluations) - 1)
    ]
    return [
        Column("first" if len(ends) > i + 1 else "last", colour(0), runs[0], record)
        for i, record in enumerate(ends)
    ]


def evaluations(table: Sequence[Column]) -> dict[str, list[tuple[float | None, bool]]]:
    """Return {metric: (value, whether it is the best) per column}, for metrics over all held-out
    examples.
    """
    keys = dict.fromkeys(
        k for c in table for k in c.record if k.count("/") == 1 and not k.startswith("ratio_")
    )
    best = {key: _best(key, table) for key in keys}
    return {
        key: [
            (c.record.get(key), best[key] is not None and c.record.get(key) == best[key])
            for c in table
        ]
        for key in keys
    }


def parts(table: Sequence[Column]) -> dict[str, dict[str, list[float | None]]]:
    """Return {part: value per column}, by data set and length, for each metric that is split
    (`rewards_eval/accuracies/length 32-63`).
    """
    by_metric: dict[str, dict[str, list[float | None]]] = {}
    for key in dict.fromkeys(k for c in table for k in c.record if k.count("/") > 1):
        metric, part = "/".join(key.split("/")[:2]), "/".join(key.split("/")[2:])
        by_metric.setdefault(metric, {})[part] = [c.record.get(key) for c in table]
    return by_metric


def _best(key: str, table: Sequence[Column]) -> float | None:
    """Return the best value of a metric, if values of several runs are comparable and differ."""
    runs = [c.run for c in table if key in c.record]
    values = [c.record[key] for c in table if key in c.record and math.isfinite(c.record[key])]
    better = next((better for name, better in BETTER.items() if key.startswith(name)), None)
    same_loss = not key.startswith("loss") or all(
        run.config.get("loss") == runs[0].config.get("loss") for run in runs
    )
    several = len({run.path for run in runs}) > 1 and len(set(values)) > 1
    return better(values) if better and same_loss and several and same_data(runs) else None


def same_data(runs: Sequence[Run]) -> bool:
    """Return whether the runs were evaluated on the same held-out examples, as far as their configs
    say. Losses can be compared where the loss's knobs agree, too.
    """
    data = [
        run.config
        | {"eval_datasets": run.config.get("eval_datasets") or run.config.get("datasets")}
        for run in runs
    ]
    return all(
        one.get(knob) == data[0].get(knob) for one in data for knob in schema.deciding_held_out()
    )


# ---- samples and pictures ----


def before_and_after(run: Run) -> list[tuple[str, list[Sample]]]:
    """Return (title, samples): the policy's first and last, and the reference's last."""
    own, reference = first_and_last(run), first_and_last(run, "reference_samples")
    titled = [(f"policy, after {rows[0].step:,} examples", rows) for rows in own if rows]
    return titled + [("reference", rows) for rows in [reference[1] or reference[0]] if rows]


def at_the_end(runs: Sequence[Run]) -> list[tuple[str, list[Sample]]]:
    """Return (run, the policy's last samples) for each run that has some, if there are several
    runs.
    """
    last = [(run.name, rows[1] or rows[0]) for run in runs if any(rows := first_and_last(run))]
    return last if len(last) > 1 else []


def side_by_side(titled: Sequence[tuple[str, list[Sample]]]) -> dict[str, Any]:
    """Return samples for the same prompts in one row: {titles, rows, left_out}, each row (prompt,
    text or None, ...).
    """
    texts = [{s.prompt: s.text for s in samples} for _, samples in titled]
    prompts = list(dict.fromkeys(prompt for by_prompt in texts for prompt in by_prompt))
    rows = [
        (prompt, *(by_prompt.get(prompt) for by_prompt in texts))
        for prompt in prompts[:MAX_SAMPLES]
    ]
    return {
        "titles": [title for title, _ in titled],
        "rows": rows,
        "left_out": len(prompts) - len(rows),
        "file": "samples.jsonl",
    }


def pictures(run: Run) -> list[tuple[str, str, str]]:
    """Return (title, data: address, alternative text) for the newest of each kind of picture that
    the run drew: `scores-800.png`.
    """
    newest: dict[str, tuple[int, Path]] = {}
    for file in run.path.glob("*-*.png"):
        kind, _, number = file.stem.rpartition("-")
        if number.isdigit() and file.is_file():
            newest[kind] = max(newest.get(kind, (-1, file)), (int(number), file))
    return [
        (
            kind,
            data_address(file.read_bytes()),
            f"{kind} after {step:,} training examples of {run.name}; {file.name} in the run",
        )
        for kind, (step, file) in sorted(newest.items())
    ]


if __name__ == "__main__":
    cli.run(parser(), main)
