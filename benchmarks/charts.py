"""Make tables and bar charts of throughput.py's records. Ratios are Plumb's speed over another's,
per round if the contenders alternate.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scenarios import Scenario

Record = dict[str, Any]
COLOURS = {"plumb": "#6a4c93", "padded": "#8a8d91", "trl": "#d98f2b"}


class Line(NamedTuple):
    """Hold one contender of one scenario over its rounds."""

    label: str
    contender: str
    shape: str  # its microbatch
    pairs: list[float]  # pairs per second, by round
    unique: float  # tokens per pair, prompts once
    processed: float  # tokens per pair that the policy's forward computes
    memory: float  # GB, peak: of the GPU's allocator on a GPU, else resident
    working: (
        float  # GB of it, without imports, weights, gradients and optimizer (contenders.Memory)
    )
    ratios: list[float]  # Plumb's pairs per second over this one's


def lines(records: Sequence[Record], scenario: Scenario) -> list[Line]:
    """Return the contenders of a scenario in order of appearance, without those that failed before
    a measured step.
    """
    steps = [r for r in records if r["scenario"] == scenario.name and r["event"] == "step"]
    out: list[Line] = []
    for label in dict.fromkeys(r["label"] for r in steps):
        mine = [r for r in steps if r["label"] == label]
        pairs = [r["pairs_per_sec"] for r in mine]
        first = out[0].pairs if out else pairs
        if scenario.in_turn:
            middle = statistics.median(first)
            extremes = (min(first) / max(pairs), max(first) / min(pairs))
            ratios = [extremes[0], middle / statistics.median(pairs), extremes[1]]
        else:
            ratios = [a / b for a, b in zip(first, pairs, strict=False)]
        size = mine[0].get("budget")
        shape = f"{size} tokens" if size else f"{mine[0]['microbatch']} pairs"
        memory = max(r["peak_cuda_gb"] if "peak_cuda_gb" in r else r["peak_rss_gb"] for r in mine)
        working = max(r["working_gb"] for r in mine)
        unique, processed = (
            statistics.mean(r[key] for r in mine) for key in ("unique_tokens", "processed_tokens")
        )
        out.append(
            Line(
                label=label,
                contender=mine[0]["contender"],
                shape=shape,
                pairs=pairs,
                unique=unique,
                processed=processed,
                memory=memory,
                working=working,
                ratios=ratios,
            )
        )
    return out


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return "median (min to max)"."""
    return (
        f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to"
        f" {max(values):.{digits}f})"
    )


def tables(records: Sequence[Record], scenarios: Sequence[Scenario]) -> str:
    """Return one Markdown table per scenario, with the failures below it."""
    parts = []
    for scenario in scenarios:
        rows = [
            (
                "| contender | microbatch | rounds | pairs/s: median (min to max) | unique tokens/s"
                " | tokens computed per unique one | peak memory, GB | of it besides weights and"
                " optimizer | Plumb is faster by |"
            ),
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for i, line in enumerate(lines(records, scenario)):
            rate = statistics.median(line.pairs)
            ratio = spread(line.ratios) if i and line.contender != "plumb" else ""
            rows.append(
                f"| {line.label} | {line.shape} | {len(line.pairs)} | {spread(line.pairs)} |"
                f" {rate * line.unique:,.0f} | {line.processed / line.unique:.2f} |"
                f" {line.memory:.2f} | {line.working:.2f} | {ratio} |"
            )
        steps = [r for r in records if r["scenario"] == scenario.name and r["event"] == "step"]
        if steps and "peak_cuda_gb" not in steps[0]:
            share = 100 * sum(r["cpu_secs"] for r in steps) / sum(r["secs"] for r in steps)
            rows += [
                "",
                (f"Pairs are per second of CPU time, which was {share:.0f}% of the wall time."),
            ]
        within = [
            f"{r['label']} {r['within']:.0e}"
            for r in records
            if r["scenario"] == scenario.name and r["event"] == "agrees"
        ]
        if within:
            rows += [
                "",
                (
                    f"Relative difference of loss and gradient norm from"
                    f" {scenario.settings[0].label}'s:"
                    f" {', '.join(within)}."
                ),
            ]
        failures = [
            f"{r['label']}: {r['error']}."
            for r in records
            if r["scenario"] == scenario.name and r["event"] == "failed"
        ]
        parts.append(
            "\n".join([f"**{scenario.title}**", "", *rows, *(["", *failures] if failures else [])])
        )
    return "\n\n".join(parts)


def bars(records: Sequence[Record], scenarios: Sequence[Scenario], path: Path) -> None:
    """Draw pairs per second as horizontal bars with their range, and peak memory beside them; one
    row of panels per scenario.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [(s, rows) for s in scenarios if (rows := lines(records, s))]
    if not shown:
        return
    heights = [len(rows) + 1.2 for _, rows in shown]
    figure, axes = plt.subplots(
        len(shown),
        2,
        figsize=(11, 0.42 * sum(heights) + 0.4),
        gridspec_kw={"height_ratios": heights, "width_ratios": [2, 1]},
        squeeze=False,
        layout="constrained",
    )
    for (left, right), (scenario, rows) in zip(axes, shown, strict=True):
        colours = [COLOURS[row.contender] for row in rows]
        names = [f"{row.label}\n({row.shape})" if scenario.in_turn else row.label for row in rows]
        medians = [statistics.median(row.pairs) for row in rows]
        low_high = [
            [m - min(r.pairs) for m, r in zip(medians, rows, strict=True)],
            [max(r.pairs) - m for m, r in zip(medians, rows, strict=True)],
        ]
        left.barh(names, medians, xerr=low_high, color=colours, ecolor="#333333", capsize=3)
        right.barh(names, [row.memory for row in rows], color=colours)
        right.tick_params(labelleft=False)
        for i, (row, median) in enumerate(zip(rows, medians, strict=True)):
            factor = (
                f"   Plumb: {statistics.median(row.ratios):.1f} times"
                if row.contender != "plumb"
                else ""
            )
            for axis, x, text in (
                (left, max(row.pairs), f"{median:.2f}{factor}"),
                (right, row.memory, f"{row.memory:.2f}"),
            ):
                axis.annotate(
                    text, (x, i), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9
                )
        left.set_xlim(right=1.3 * max(max(row.pairs) for row in rows))
        right.set_xlim(right=1.2 * max(row.memory for row in rows))
        left.set_title(scenario.title, fontsize=10, loc="left")
        for axis in (left, right):
            axis.invert_yaxis()
            axis.spines[["top", "right"]].set_visible(False)
    axes[-1][0].set_xlabel("pairs per second, median and range")
    axes[-1][1].set_xlabel("peak memory, GB")
    figure.savefig(path, dpi=130)
    plt.close(figure)
