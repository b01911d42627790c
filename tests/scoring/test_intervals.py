"""Intervals hold what they promise at small n; the two pictures show what they are given."""

import numpy as np
import pytest

from plumb.reports.score_plots import draw_calibration, draw_scores
from plumb.scoring.intervals import bootstrap, calibration, length_buckets, wilson


def test_wilson_by_hand():
    """The roots of (p - 0.8)^2 = z^2 p (1 - p) / 10; and where no or every trial hits, a width that
    is not 0.
    """
    interval = wilson(8, 10)
    for p in interval[1:]:
        assert (p - 0.8) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / 10, rel=1e-6)
    assert wilson(0, 10).low == 0 and wilson(0, 10).high == pytest.approx(0.2775, abs=1e-4)
    assert wilson(10, 10).high == 1 and np.isnan(wilson(0, 0).value)


@pytest.mark.parametrize(
    "n, p, ties", [(8, 0.5, 0.0), (8, 0.8, 0.2), (20, 0.9, 0.0), (40, 0.6, 0.4)]
)
def test_a_win_rates_interval_covers_it(n, p, ties):
    """95 of 100, in 500 experiments: 93.0 to 99 by their own noise. The usual bootstrap covers 0.9
    with 20 in 88 of 100.
    """
    random = np.random.default_rng(0)
    points = np.where(random.random((500, n)) < ties, 0.5, random.random((500, n)) < p)
    intervals = [bootstrap(row, np.arange(n), seed, n_draws=600) for seed, row in enumerate(points)]
    truth = ties / 2 + (1 - ties) * p
    assert 0.93 <= np.mean([low <= truth <= high for _, low, high in intervals]) <= 0.99
    # not by being as wide as all
    assert np.mean([high - low for _, low, high in intervals]) < 4 * np.sqrt(0.25 / n)


def test_answers_to_one_prompt_are_no_independent_trials():
    """20 prompts of 8 answers each, all of which share their prompt's odds: clustered 95 of 100,
    else far fewer.
    """
    random = np.random.default_rng(1)
    points = (
        (random.random((300, 20, 8)) < random.beta(0.5, 0.5, (300, 20, 1)))
        .astype(float)
        .reshape(300, -1)
    )
    covered = lambda prompts: np.mean(
        [
            low <= 0.5 <= high
            for _, low, high in (
                bootstrap(row, prompts, i, n_draws=400) for i, row in enumerate(points)
            )
        ]
    )
    assert covered(np.repeat(np.arange(20), 8)) > 0.92
    assert covered(np.arange(160)) < 0.75


def test_of_wins_and_losses_it_is_jeffreys_interval():
    low, high = np.quantile(np.random.default_rng(0).beta(8.5, 2.5, 400_000), [0.025, 0.975])
    interval = bootstrap(np.array([1.0] * 8 + [0.0] * 2), np.arange(10), seed=3, n_draws=100_000)
    assert interval == pytest.approx((0.8, low, high), abs=0.005)
    # seeded
    assert bootstrap(np.ones(10), np.arange(10), 0) == bootstrap(np.ones(10), np.arange(10), 0)
    assert (
        bootstrap(np.ones(10), np.arange(10), 0).low < 0.9
        and bootstrap(np.ones(0), np.arange(0), 0).low == 0
    )


def test_length_buckets_are_powers_of_two():
    labels = length_buckets(np.arange(70)).tolist()
    for n, label in enumerate(labels):
        first, last = map(int, label.removeprefix("length ").split("-"))
        assert (
            first <= n <= last
            and (first == 0 or first & (first - 1) == 0)
            and (last + 1) & last == 0
        )
    assert len(set(labels)) == 7 and length_buckets(np.array([], int)).tolist() == []


def test_calibration_of_a_model_that_is_calibrated():
    random = np.random.default_rng(0)
    margins = random.normal(0, 2, 20_000)
    margins = np.where(random.random(20_000) < 1 / (1 + np.exp(-np.abs(margins))), 1, -1) * np.abs(
        margins
    )
    assert calibration(margins).error < 0.02 and calibration(3 * margins).error > 0.05
    ties = calibration(np.zeros(40))
    assert ties.observed.tolist() == ties.predicted.tolist() == [0.5] * 4


def test_the_pictures(tmp_path):
    """Blue stands to the right of vermilion, where chosen scores are higher; nothing half-written
    is left.
    """
    import matplotlib.image

    random = np.random.default_rng(0)
    chosen, rejected = random.normal(3, 1, 200), random.normal(-3, 1, 200)
    draw_scores(chosen, rejected, tmp_path / "scores.png", "a model")
    draw_calibration(chosen, rejected, tmp_path / "calibration.png", "a model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calibration.png", "scores.png"]
    red, green, blue = matplotlib.image.imread(tmp_path / "scores.png")[
        60:-60, 60:-20, :3
    ].transpose(2, 0, 1)
    of = lambda mine, other: np.nonzero((mine > other + 0.2) & (mine > green + 0.05))[1].mean()
    assert of(blue, red) > of(red, blue) + 100
