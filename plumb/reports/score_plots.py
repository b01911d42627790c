"""Draw two pictures of a reward model on pairs: its scores, and the calibration of its margins.

Shapes: n pairs; scores of their chosen and rejected responses.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from plumb.reports.curves import CHOSEN, REJECTED
from plumb.scoring.intervals import calibration, wilson


def draw_evaluation(chosen: np.ndarray, rejected: np.ndarray, folder: Path, n_seen: int) -> None:
    """Draw scores-<n_seen>.png, a histogram, and calibration-<n_seen>.png, of the pairs whose
    scores [n] are numbers.
    """
    finite = np.isfinite(chosen) & np.isfinite(rejected)
    if not finite.any():
        return
    title = f"{finite.sum():,} held-out pairs, after {n_seen:,} training pairs"
    for name, draw in (("scores", draw_scores), ("calibration", draw_calibration)):
        draw(
            chosen[finite],
            rejected[finite],
            folder / f"{name}-{n_seen}.png",
            title,
        )


def draw_scores(chosen: np.ndarray, rejected: np.ndarray, path: Path, title: str) -> None:
    """Draw a histogram of the scores [n] as a PNG: chosen blue, rejected vermilion, dashed
    lines at their means.
    """
    figure, axis = _figure(title)
    edges = np.histogram_bin_edges(np.concatenate([chosen, rejected]), bins=40)
    for scores, colour, label in (
        (chosen, CHOSEN, "chosen"),
        (rejected, REJECTED, "rejected"),
    ):
        axis.hist(
            scores, edges, color=colour, alpha=0.5, label=f"{label}, mean {scores.mean():.3g}"
        )
        axis.axvline(scores.mean(), color=colour, linestyle="--", linewidth=1.2)
    axis.set_xlabel("score")
    axis.set_ylabel("responses")
    axis.legend(fontsize=9)
    _save(figure, path)


def draw_calibration(chosen: np.ndarray, rejected: np.ndarray, path: Path, title: str) -> None:
    """Draw, as a PNG, how often the response that scored higher was the chosen one, against a
    Bradley-Terry model's confidence in it, given these scores [n].
    """
    bins = calibration(chosen - rejected)
    figure, axis = _figure(f"{title}\ncalibration error {bins.error:.3f}")
    intervals = [
        wilson(observed * n, n) for observed, n in zip(bins.observed, bins.pairs, strict=True)
    ]
    bars = [[i.value - i.low for i in intervals], [i.high - i.value for i in intervals]]
    axis.plot([0.5, 1], [0.5, 1], "--", color="grey", linewidth=1, label="calibrated")
    axis.errorbar(bins.predicted, bins.observed, bars, fmt="o-", capsize=3, label="observed, 95 %")
    axis.set_xlabel("predicted: sigmoid(|margin|)")
    axis.set_ylabel("share whose chosen scored higher")
    axis.set_xlim(0.48, 1.02)
    axis.set_ylim(-0.02, 1.02)
    axis.legend(fontsize=9, loc="lower right")
    _save(figure, path)


def _figure(title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    axis.set_title(title, fontsize=10, parse_math=False)  # a path may hold dollars
    axis.grid(alpha=0.3)
    return figure, axis


def _save(figure: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(temporary, dpi=110, format="png")
    temporary.replace(path)
