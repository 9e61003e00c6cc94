"""The statistics behind a comparison, against published values and plain counting."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from targets.report.bench_table import curve
from targets.significance import difference, mann_whitney, median_interval, outliers


def counted(before: list[float], after: list[float]) -> float:
    """The exact two-sided p by going through all ways to deal the ranks out."""
    pooled = [*before, *after]

    def distance(chosen: tuple[int, ...]) -> float:
        rest = [pooled[index] for index in range(len(pooled)) if index not in chosen]
        above = sum(pooled[index] > other for index in chosen for other in rest)
        return abs(above - len(chosen) * len(rest) / 2)

    here = distance(tuple(range(len(before), len(pooled))))
    ways = [distance(chosen) for chosen in combinations(range(len(pooled)), len(after))]
    return sum(way >= here for way in ways) / len(ways)


@pytest.mark.parametrize("sizes", [(3, 4), (5, 5), (6, 4)])
def test_small_samples_are_counted_out(sizes: tuple[int, int]) -> None:
    random = np.random.default_rng(1)
    for _ in range(5):
        before, after = (random.normal(10, 1, size).tolist() for size in sizes)
        assert mann_whitney(before, after) == pytest.approx(counted(before, after))


def test_five_against_five_apart() -> None:
    assert mann_whitney([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]) == pytest.approx(2 / 252)  # the table's value


def test_large_samples_and_ties_take_the_normal_approximation() -> None:
    assert mann_whitney([1.0] * 30, [1.0] * 30) == 1.0
    assert mann_whitney(list(range(30)), list(range(100, 130))) < 1e-9
    assert mann_whitney([1, 1, 2, 2], [1, 2, 1, 2]) > 0.9


def test_verdicts_hold_their_error_rate() -> None:
    """Of pairs of equal samples about one in twenty may be called different, before the least change is asked for."""
    random = np.random.default_rng(0)
    wrong = sum(
        mann_whitney(random.normal(100, 5, 8).tolist(), random.normal(100, 5, 8).tolist()) < 0.05 for _ in range(400)
    )
    assert wrong / 400 < 0.08


def test_differences() -> None:
    base = [100, 101, 99, 100.5, 99.5]
    assert difference(base, [value * 0.8 for value in base]).verdict == "lower"
    assert difference(base, [value * 1.2 for value in base]).verdict == "higher"
    assert difference(base, [value * 1.01 for value in base]).verdict == "no difference"
    assert difference(base, [50.0]).verdict == "undecided"
    found = difference(base, [value * 0.8 for value in base])
    assert found.change == pytest.approx(-0.2)
    assert found.interval[0] <= found.change <= found.interval[1]


def test_intervals_and_outliers() -> None:
    assert median_interval([1, 2]) is None
    values = [10.0, 10.1, 9.9, 10.2, 9.8, 3.0]
    interval = median_interval(values)
    assert interval is not None
    assert interval[0] <= 9.95 <= interval[1]
    assert outliers(values) == (5,)
    assert outliers([1, 100]) == ()


def test_a_curve_falls_with_its_values() -> None:
    assert curve([8.0, 4.0, 1.0]) == "█▅▂"
    assert len(curve([float(index % 7 + 1) for index in range(500)])) == 60
    assert curve([]) == ""
