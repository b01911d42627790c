"""Read trends from the records of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from plumb.runs.history import Record, Run

MIN_STEPS = 10  # fewer steps show no trend


def values_of(records: Sequence[Record], key: str) -> np.ndarray:
    """Return the values of a metric where it is a number."""
    return np.array([r[key] for r in records if key in r and math.isfinite(r[key])])


def number_of(run: Run, knob: str) -> float | None:
    """Return the value of an option if it is a number, since a config may hold anything."""
    value = run.setting(knob)
    return value if isinstance(value, int | float) else None


def fifths(values: np.ndarray) -> list[np.ndarray]:
    """Return the five parts of a run."""
    return np.array_split(values, 5)


def ends(values: np.ndarray) -> str:
    """Return the first and the last value."""
    return f"{values[0]:.4g} -> {values[-1]:.4g}"
