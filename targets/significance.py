"""Is one set of samples faster than another, or do they only scatter? Plain statistics on lists of numbers.

Medians throughout: one disturbed repetition must not decide. Knows neither reports nor what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgelm.report import Samples

Verdict = Literal["higher", "lower", "no difference", "undecided"]

ALPHA = 0.05
LEAST_SAMPLES = 4  # with three against three the smallest possible p is 0.1
# What two runs of the same thing differ by from process to process on a quiet machine (memory layout, clocks): samples
# of one process know nothing of it, so a smaller difference is none, however significant.
NOISE = 0.03
_RESAMPLES = 2000
_EXACT = 400  # product of the sample counts up to which the distribution of U is counted out
_SEED = 0


@dataclass(frozen=True, slots=True)
class Difference:
    """The second sample against the first: relative ``change`` of the median with its 95 % interval (bootstrap).

    ``p_value`` is the two-sided Mann-Whitney probability of ranks this far apart by chance.
    """

    change: float
    interval: tuple[float, float]
    p_value: float
    verdict: Verdict


def summarise(values: Sequence[float]) -> Samples | None:
    """Median, 5th to 95th percentile (linear between samples), interval and outliers; None for no samples."""
    if not values:
        return None
    p5, median, p95 = (float(value) for value in np.percentile(values, (5, 50, 95)))
    return Samples(
        median=median,
        p5=p5,
        p95=p95,
        samples=tuple(values),
        interval=median_interval(values),
        outliers=outliers(values),
    )


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the median by percentile bootstrap (Efron); None for fewer than three values."""
    if len(values) < 3:
        return None
    low, high = np.percentile(_resampled_medians(values, np.random.default_rng(_SEED)), (2.5, 97.5))
    return float(low), float(high)


def _resampled_medians(values: Sequence[float], random: np.random.Generator) -> npt.NDArray[np.float64]:
    drawn = random.choice(np.asarray(values, np.float64), (_RESAMPLES, len(values)))
    return np.asarray(np.median(drawn, axis=1), np.float64)


def outliers(values: Sequence[float]) -> tuple[int, ...]:
    """Indices of values beyond Tukey's fences (1.5 interquartile ranges); needs five values to mean anything."""
    if len(values) < 5:
        return ()
    first, third = np.percentile(values, (25, 75))
    reach = 1.5 * (third - first)
    return tuple(index for index, value in enumerate(values) if not first - reach <= value <= third + reach)


def difference(before: Sequence[float], after: Sequence[float]) -> Difference:
    """How ``after`` differs from ``before``. Both need a value at least and medians above zero."""
    random = np.random.default_rng(_SEED)
    change = float(np.median(after) / np.median(before)) - 1
    ratios = _resampled_medians(after, random) / _resampled_medians(before, random) - 1
    low, high = (float(value) for value in np.percentile(ratios, (2.5, 97.5)))
    p_value = mann_whitney(before, after)
    return Difference(change, (low, high), p_value, _verdict(change, p_value, min(len(before), len(after))))


def _verdict(change: float, p_value: float, samples: int) -> Verdict:
    if samples < LEAST_SAMPLES:
        return "undecided"
    if p_value >= ALPHA or abs(change) < NOISE:
        return "no difference"
    return "higher" if change > 0 else "lower"


def mann_whitney(before: Sequence[float], after: Sequence[float]) -> float:
    """Two-sided p of the Mann-Whitney U test: counted out for small samples without ties, else the normal
    approximation with corrections for ties and continuity."""
    n, m = len(before), len(after)
    above = sum((a > b) + 0.5 * (a == b) for a in after for b in before)
    extreme = min(above, n * m - above)
    pooled = [*before, *after]
    ties = len(set(pooled)) < len(pooled)
    if not ties and n * m <= _EXACT:
        counts = _u_counts(n, m)
        return min(1.0, 2 * sum(counts[: int(extreme) + 1]) / sum(counts))
    _, sizes = np.unique(pooled, return_counts=True)
    total = n + m
    correction = float(((sizes.astype(np.float64) ** 3) - sizes).sum()) / (total * (total - 1)) if total > 1 else 0.0
    variance = n * m / 12 * (total + 1 - correction)
    if variance <= 0:
        return 1.0
    z = max(abs(above - n * m / 2) - 0.5, 0.0) / math.sqrt(variance)
    return math.erfc(z / math.sqrt(2))


def _u_counts(n: int, m: int) -> list[int]:
    """In how many orders of n and m values U takes each value: coefficients of the Gaussian binomial (n + m over n)."""
    counts = [1] + [0] * (n * m)
    for k in range(1, n + 1):
        for at in range(n * m, m + k - 1, -1):  # times (1 - q^(m + k))
            counts[at] -= counts[at - m - k]
        for at in range(k, n * m + 1):  # over (1 - q^k)
            counts[at] += counts[at - k]
    return counts
