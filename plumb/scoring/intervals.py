"""Measure uncertainty: intervals for accuracies and win rates, calibration, and buckets of length.
Uses only numpy.

Shapes: n judgements, G clusters (prompts), b bins.
"""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """Hold a share and its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def wilson(hits: float, n: int, z: float = 1.959964) -> Interval:
    """Return the score interval of a share of n independent trials (Wilson 1927, JASA 22:209); [0,
    1] for n = 0.

    >>> print(wilson(8, 10))
    0.800 [0.490, 0.943]
    """
    if n == 0:
        return Interval(float("nan"), 0.0, 1.0)
    share = hits / n
    centre, width = share + z * z / (2 * n), z * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = ((centre + sign * width) / (1 + z * z / n) for sign in (-1, 1))
    return Interval(share, max(0.0, min(low, share)), min(1.0, max(high, share)))


def bootstrap(points: np.ndarray, prompts: np.ndarray, seed: int, n_draws: int = 4000) -> Interval:
    """Return the mean of points [n] (1 a win, 1/2 a tie, 0 a loss) with its interval over prompts;
    `prompts` [n] says to which prompt each point belongs.

    Prompts are weighted at random (Bayesian bootstrap; Rubin 1981, Ann. Statist. 9:130), together
    with half a win and half a loss, as in Jeffreys' prior. For n wins and losses, one per prompt,
    this is Jeffreys' interval for a binomial share, which also holds for small n, where the usual
    bootstrap is too narrow, and has no width if all agree (Brown, Cai & DasGupta 2001, Statist.
    Sci. 16:101).
    """
    _, cluster, sizes = np.unique(prompts, return_inverse=True, return_counts=True)  # [G]
    if not len(points):
        return Interval(float("nan"), 0.0, 1.0)
    sums = np.bincount(cluster, weights=points)  # [G]
    size = sizes.mean()
    random, rates = np.random.default_rng(seed), []
    chunk = max(1, 2_000_000 // len(sums))  # draws at once: 16 MB
    for start in range(0, n_draws, chunk):
        n = min(chunk, n_draws - start)
        weights = random.standard_exponential((n, len(sums)))
        prior = random.standard_gamma(0.5, (n, 2)) * size
        rates.append((weights @ sums + prior[:, 0]) / (weights @ sizes + prior.sum(1)))
    low, high = np.quantile(np.concatenate(rates), [0.025, 0.975]).tolist()
    value = float(points.mean())
    return Interval(value, min(low, value), max(high, value))


def length_buckets(lengths: np.ndarray) -> np.ndarray:
    """Return the power-of-two bucket of each length in tokens, as a label.  [n] -> [n] str

    >>> length_buckets(np.array([1, 2, 3, 31, 32, 100])).tolist()
    ['length 0-1', 'length 2-3', 'length 2-3', 'length 16-31', 'length 32-63', 'length 64-127']
    """
    exponents = np.maximum(np.frexp(np.maximum(lengths, 1))[1] - 1, 0)
    labels = np.array(
        [
            f"length {2**e if e else 0}-{2 ** (e + 1) - 1}"
            for e in range(int(exponents.max(initial=0)) + 1)
        ]
    )
    return labels[exponents]


class Calibration(NamedTuple):
    """Hold pairs in bins of similar margins, equally many in each: how confident a Bradley-Terry
    model was, and how often it was right.
    """

    predicted: np.ndarray  # [b] mean of sigmoid(|margin|)
    # [b] share whose chosen response scored higher; a tie counts half, as the model says 1/2
    observed: np.ndarray
    pairs: np.ndarray  # [b] how many

    @property
    def error(self) -> float:
        """Return the expected calibration error: mean |observed - predicted| over pairs, 0 to 1."""
        return (
            float(np.average(np.abs(self.observed - self.predicted), weights=self.pairs))
            if len(self.pairs)
            else float("nan")
        )


def calibration(margins: np.ndarray, n_bins: int = 10) -> Calibration:
    """Return the calibration of chosen minus rejected scores [n]. The order of the two responses
    carries no information, so this is about the winner by the model's scores.

    >>> c = calibration(np.array([4.0, 4, 4, -4]), 1)
    >>> c.predicted.round(3).tolist(), c.observed.tolist()
    ([0.982], [0.75])
    """
    order = np.argsort(np.abs(margins), kind="stable")
    bins = [
        margins[part]
        for part in np.array_split(order, max(1, min(n_bins, len(order) // 10)))
        if len(part)
    ]
    predicted = [float((1 / (1 + np.exp(-np.abs(m)))).mean()) for m in bins]
    observed = [float(((m > 0) + (m == 0) / 2).mean()) for m in bins]
    return Calibration(np.array(predicted), np.array(observed), np.array([len(m) for m in bins]))
