"""Curves that one can hover over and switch on and off in a page: their data, and plotly's
JavaScript, which the page holds so that it asks no network.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from plumb.reports.curves import (
    CHOSEN,
    HELD_OUT,
    REJECTED,
    Panel,
    colour,
    in_words,
    logarithmic,
    panels,
    points,
    running_mean,
)
from plumb.runs.history import Run

MAX_POINTS = 600  # of one line of the page
OWN = Path(__file__).with_name("report.js")
SYMBOLS = {"eval": "circle-open", "eval_ema": "square-open"}


def library() -> str | None:
    """Return plotly's JavaScript; None where the package is not installed."""
    spec = find_spec("plotly")  # not imported: only this file of it is needed
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).parent / "package_data/plotly.min.js"
    return file.read_text("utf-8") if file.is_file() else None


def scripts(plotly: str) -> tuple[list[str], str]:
    """Return the page's scripts, and the sources that its Content-Security-Policy allows: these,
    by their digests, and nothing that a sample could hold.
    """
    both = [plotly, OWN.read_text("utf-8")]
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in both)
    return both, " ".join(f"'sha256-{digest}'" for digest in digests)


def charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return each panel of these runs (as `named`) as the page's script draws it."""
    return [
        {
            "title": panel.title,
            "words": in_words(panel, runs),
            "level": panel.level,
            "log": logarithmic(panel, runs),
            "traces": [
                trace for i, run in enumerate(runs) for trace in _traces(panel, i, run, len(runs))
            ],
        }
        for panel in panels(runs)
    ]


def as_json(content: Any) -> str:
    """Return JSON that can stand in a script element: no text in it can end the element."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("&", "\\u0026")


def _traces(panel: Panel, i: int, run: Run, n_runs: int) -> list[dict[str, Any]]:
    traces = []
    for j, (label, metric) in enumerate(panel.lines.items()):
        one = {"chosen": CHOSEN, "rejected": REJECTED}.get(label, colour(0))
        look = {
            "run": i,
            "color": one if n_runs == 1 else colour(i),
            "dash": "dash" if j else "solid",
        }
        name = html.escape(" ".join(filter(None, (run.name if n_runs > 1 else "", label))))
        steps, values = points(run.steps, metric.format("train"))
        if len(steps):
            smooth = values if panel.raw else running_mean(values)
            if not panel.raw:
                traces.append({**look, "kind": "raw", **_thinned(steps, values, run)})
            traces.append({**look, "kind": "line", "name": name, **_thinned(steps, smooth, run)})
        for split, (_, what) in HELD_OUT.items():
            steps, values = points(run.evaluations, metric.format(split))
            if len(steps):
                of_split = {
                    "kind": "held-out",
                    "symbol": SYMBOLS[split],
                    "name": f"{name} {what}".strip(),
                }
                traces.append({**look, **of_split, **_thinned(steps, values, run)})
    return traces


def _thinned(steps: np.ndarray, values: np.ndarray, run: Run) -> dict[str, list[float]]:
    """Return up to MAX_POINTS points, the last one among them, and the share of the run at each."""
    stride = -(-len(steps) // MAX_POINTS) or 1
    kept = np.arange(len(steps))[::-1][::stride][::-1]
    end = max((r["step"] for r in (*run.steps, *run.evaluations)), default=1.0) or 1.0
    return {
        "x": steps[kept].tolist(),
        "share": (100 * steps[kept] / end).round(2).tolist(),
        "y": [float(f"{value:.6g}") for value in values[kept]],
    }
