"""Draw curves of one or more runs as PNGs: thin lines are training steps, thick lines their running
mean, dots evaluations.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from plumb.console import quiet
from plumb.paths import new_file
from plumb.runs.history import Record, Run, is_evaluation, read_run

WITHOUT_NOISE = {"lr", "peak_memory_gb"}


class Panel(NamedTuple):
    """Describe one panel of the curves."""

    title: str
    lines: Mapping[str, str]  # label of a line -> its metric, `{}` stands for train or eval
    level: float | None = None  # a value to compare with, as a dotted line
    log: str = ""  # logarithmic if the "values" differ tenfold, or those of the "runs" do

    @property
    def raw(self) -> bool:
        """Return whether each value is drawn as it is, without a running mean."""
        return set(self.lines.values()) <= WITHOUT_NOISE


LOGPS = Panel(
    "log-probability (nats)", {"chosen": "logps_{}/chosen", "rejected": "logps_{}/rejected"}
)
LEARNING = [
    Panel("rewards", {"chosen": "rewards_{}/chosen", "rejected": "rewards_{}/rejected"}, 0.0),
    Panel("reward margin", {"": "rewards_{}/margins"}, 0.0),
    Panel("reward accuracy (dotted: chance)", {"": "rewards_{}/accuracies"}, 0.5),
    LOGPS,
]
# of a run on the policy's own responses
ROLLOUTS = [
    Panel("reward of the policy's responses", {"": "rollout_{}/reward"}),
    Panel("KL to the reference (nats per response)", {"": "kl_{}/k1"}, 0.0),
    Panel("length of a response (tokens)", {"": "rollout_{}/length"}),
    Panel("entropy (nats per token)", {"": "entropy/{}"}),
]
FURTHER = [
    Panel("ranking by log-probability alone (dotted: chance)", {"": "logps_{}/accuracies"}, 0.5),
    Panel(
        "reward / beta: log-ratio to the reference (nats)",
        {"chosen": "ratio_{}/chosen", "rejected": "ratio_{}/rejected"},
        0,
    ),
    Panel("gradient norm, before clipping", {"": "grad_norm"}, log="values"),
    Panel("learning rate", {"": "lr"}, log="runs"),
    Panel("tokens per second", {"": "tokens_per_second"}),
    Panel("peak memory (GB)", {"": "peak_memory_gb"}),
]
# Colour-blind readers can distinguish them (Okabe and Ito). In a single run, chosen is blue and
# rejected vermilion.
COLOURS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#7F7F7F",
    "#B8A800",
    "#000000",
    "#7B3294",
)
CHOSEN, REJECTED = "#0072B2", "#D55E00"
STYLES: tuple[Any, Any] = ("-", (0, (4, 2)))
# share of the steps that a running mean covers, so that the trend shows through the noise of single
# batches
SMOOTHED = 0.05
# evaluations of the policy, and of its moving average: their marker, and what the legend says
HELD_OUT = {"eval": ("o", "held-out"), "eval_ema": ("s", "held-out, moving average")}
MAX_POINTS = 4000  # of one line; more are not visible, and take minutes


def named(run: Run) -> Run:
    """Return the run with its metrics under the names of the panels: `loss/train` -> `loss
    dpo/train`, since different losses have different scales; and `ratio_*`, if a reward is beta
    times a log-ratio to a reference.
    """
    from plumb.reports.loss_families import family_of  # torch: not for --help

    name, beta = run.setting("loss.name", "of unknown kind"), family_of(run).beta()

    def change(record: Record) -> Record:
        renamed = {key.replace("loss/", f"loss {name}/"): value for key, value in record.items()}
        ratios = {
            k.replace("rewards_", "ratio_"): v / beta
            for k, v in record.items()
            if beta is not None and _is_reward(k)
        }
        return renamed | ratios

    return replace(
        run, steps=[*map(change, run.steps)], evaluations=[*map(change, run.evaluations)]
    )


def _is_reward(key: str) -> bool:
    head, _, tail = key.partition("/")
    splits = ("train", *HELD_OUT)
    return tail in ("chosen", "rejected") and head in [f"rewards_{split}" for split in splits]


def panels(runs: Sequence[Run], further: bool = True) -> list[Panel]:
    """Return the panels that the runs (as `named`) have data for. `further`: also the progress
    panels, and evaluations that no other panel shows.
    """
    # without duplicates, in order
    present = dict.fromkeys(
        key for run in runs for record in (*run.steps, *run.evaluations) for key in record
    )
    losses = dict.fromkeys(key.split("/")[0] for key in present if key.startswith("loss "))
    candidates = (
        [Panel(f"{name[5:]} loss", {"": f"{name}/{{}}"}) for name in losses]
        + ROLLOUTS
        + LEARNING
        + (FURTHER if further else [])
    )
    if further:
        shown = {metric.format("eval") for panel in candidates for metric in panel.lines.values()}
        others = [
            key
            for key in present
            if is_evaluation([key]) and key not in shown and key.count("/") == 1
        ]
        # e.g. kl_eval/policy: a metric that came later is shown under its own name
        for key in others:
            head, _, tail = key.partition("/")
            metric = f"{head}/{{}}" if tail == "eval" else f"{head[:-5]}_{{}}/{tail}"
            candidates.append(Panel(metric.format("").replace("_/", "/").strip("/"), {"": metric}))
    has = lambda metric: metric.format("train") in present or metric.format("eval") in present
    filled = [p for p in candidates if any(map(has, p.lines.values()))]
    if all(map(_loss_is_logp, runs)):  # of SFT: the two panels would be each other's mirror image
        filled = [panel for panel in filled if panel is not LOGPS]
    return filled


def _loss_is_logp(run: Run) -> bool:
    """Return whether a run (as `named`) has no other loss than the negative log-probability of its
    answers.
    """
    name = f"loss {run.setting('loss.name', 'of unknown kind')}"
    both = [
        (record[f"{name}/{split}"], record[logp])
        for record in (*run.steps, *run.evaluations)
        for split in ("train", "eval")
        if (logp := f"logps_{split}/chosen") in record and f"{name}/{split}" in record
    ]
    return bool(both) and all(abs(loss + logp) <= 1e-6 * abs(loss) for loss, logp in both)


def draw_curves(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Draw one picture of what the runs learned. `out`: by default curves.png in the first run
    directory.
    """
    out = out or run_dirs[0] / "curves.png"
    with new_file(out, "curves", "wb") as file:
        file.write(draw_all([named(run) for run in map(read_run, run_dirs)], further=False))
    return out


def draw_all(runs: Sequence[Run], further: bool = True) -> bytes:
    """Draw all panels of these runs (as `named`) in one PNG."""
    shown = panels(runs, further)
    n_columns = min(4 if len(shown) > 6 else 3, max(1, len(shown)))
    n_rows = -(-len(shown) // n_columns) or 1
    figure, axes = _figure(n_rows, n_columns)
    for axis, panel in zip(axes.flat, shown, strict=False):
        _draw(axis, panel, runs)
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    if len(runs) > 1:
        from matplotlib.lines import Line2D

        handles = [Line2D([], [], color=colour(i), linewidth=3) for i in range(len(runs))]
        labels = [_safe(run.name) for run in runs]
        figure.legend(
            handles, labels, fontsize=8, loc="outside lower center", ncols=min(4, len(runs))
        )
    return _png(figure, dpi=110)


def draw_each(runs: Sequence[Run]) -> Iterator[tuple[Panel, str, str]]:
    """Yield (panel, its PNG as a data: address, its description in words) for each panel of these
    runs (as `named`).
    """
    for panel in tqdm(panels(runs), desc="drawing", unit="panel", leave=False, disable=quiet()):
        figure, axes = _figure(1, 1)
        _draw(axes[0, 0], panel, runs)
        yield panel, data_address(_png(figure, dpi=140)), in_words(panel, runs)


def _png(figure: Any, dpi: int) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, dpi=dpi, format="png")
    return file.getvalue()


def data_address(png: bytes) -> str:
    """Return a PNG as a data: address for a page."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def colour(i: int) -> str:
    """Return the colour of the i-th run."""
    return COLOURS[i % len(COLOURS)]


def in_words(panel: Panel, runs: Sequence[Run]) -> str:
    """Return a description for readers who can't see the picture: each line's first and
    last value.
    """
    descriptions = []
    for run in runs:
        for label, metric in panel.lines.items():
            held_out = [(what, run.evaluations, name) for name, (_, what) in HELD_OUT.items()]
            for split, records, name in [("training", run.steps, "train"), *held_out]:
                _, values = points(records, metric.format(name))
                if len(values):
                    what = " ".join(filter(None, (split, label)))
                    descriptions.append(f"{run.name}, {what}: {values[0]:.4g} to {values[-1]:.4g}")
    return f"{panel.title} over training examples. {'; '.join(descriptions)}."


def points(records: Sequence[Record], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (steps, values) of a metric, where it is a number that can be drawn."""
    numbers = [(r["step"], r[key]) for r in records if key in r and abs(r[key]) < 1e300]
    steps, values = np.array(numbers, float).reshape(-1, 2).T
    return steps, values


def running_mean(values: np.ndarray) -> np.ndarray:
    """Return the mean over the last 5% of the steps, for each step.  [n] -> [n]"""
    width, n = max(1, round(len(values) * SMOOTHED)), np.arange(1, len(values) + 1)
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[n] - total[np.maximum(0, n - width)]) / np.minimum(n, width)


def _figure(n_rows: int, n_columns: int) -> tuple[Any, Any]:
    """Return a figure and its axes [n_rows, n_columns], without pyplot: a notebook's own figures
    are shown as before.
    """
    from matplotlib.figure import Figure

    size = (4.6 * n_columns, 3.2 * n_rows + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(n_rows, n_columns, squeeze=False)


def _draw(axis: Any, panel: Panel, runs: Sequence[Run]) -> None:
    for i, run in enumerate(runs):
        for (label, metric), style in zip(panel.lines.items(), STYLES, strict=False):
            own = (
                {"chosen": CHOSEN, "rejected": REJECTED}.get(label, colour(0))
                if len(runs) == 1
                else colour(i)
            )
            steps, values = points(run.steps, metric.format("train"))
            stride = -(-len(steps) // MAX_POINTS) or 1
            if len(steps):
                if not panel.raw:
                    axis.plot(
                        steps[::stride], values[::stride], color=own, alpha=0.25, linewidth=0.8
                    )
                axis.plot(
                    steps[::stride],
                    (values if panel.raw else running_mean(values))[::stride],
                    color=own,
                    linewidth=1.8,
                    linestyle=style,
                )
            for name, (marker, _) in HELD_OUT.items():
                steps, values = points(run.evaluations, metric.format(name))
                if not len(steps):
                    continue
                axis.plot(
                    steps,
                    values,
                    marker,
                    color=own,
                    linestyle=style,
                    linewidth=0.8,
                    markerfacecolor="white",
                    markersize=5,
                )
    if panel.level is not None:
        axis.axhline(panel.level, color="#777777", linewidth=0.9, linestyle=":", zorder=0)
    if logarithmic(panel, runs):
        axis.set_yscale("log")
    _legend(axis, panel, runs)
    axis.set_title(panel.title, fontsize=10)
    axis.set_xlabel("training examples", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)


def logarithmic(panel: Panel, runs: Sequence[Run]) -> bool:
    """Return whether a panel has a logarithmic scale: see `Panel.log`."""
    lines = [
        values
        for run in runs
        for metric in panel.lines.values()
        if len(values := points(run.steps, metric.format("train"))[1])
    ]
    lows, highs = [v.min() for v in lines], [v.max() for v in lines]
    low = min({"values": lows, "runs": highs}.get(panel.log, []), default=0)
    return bool(low > 0 and max(highs) > 10 * low)


def _legend(axis: Any, panel: Panel, runs: Sequence[Run]) -> None:
    """Draw the legend of the line styles; the runs' colours are explained elsewhere."""
    from matplotlib.lines import Line2D

    entries: dict[str, Any] = {}
    for (label, metric), style in zip(panel.lines.items(), STYLES, strict=False):
        if not any(_has(run, metric) for run in runs):
            continue
        own = (
            {"chosen": CHOSEN, "rejected": REJECTED}.get(label, colour(0))
            if len(runs) == 1
            else "#444444"
        )
        entries |= {label: Line2D([], [], color=own, linestyle=style)} if label else {}
    for name, (marker, label) in HELD_OUT.items():
        if any(
            metric.format(name) != metric and len(points(run.evaluations, metric.format(name))[0])
            for run in runs
            for metric in panel.lines.values()
        ):
            entries[label] = Line2D(
                [],
                [],
                color="#444444",
                marker=marker,
                linestyle="",
                markerfacecolor="white",
                markersize=5,
            )
    if entries:
        axis.legend(entries.values(), entries.keys(), fontsize=7, loc="best", framealpha=0.6)


def _has(run: Run, metric: str) -> bool:
    """Return whether a run has a value of a metric to draw, of its steps or evaluations."""
    of_splits = [(run.steps, "train"), *((run.evaluations, split) for split in HELD_OUT)]
    return any(len(points(records, metric.format(split))[0]) for records, split in of_splits)


def _safe(name: str) -> str:
    """Return text as a label that matplotlib neither treats as a formula nor leaves out."""
    return f" {name[-70:]}".replace("$", r"\$")
