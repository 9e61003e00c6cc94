"""A short measurement of sustained read bandwidth, for every thread count.

Threads scan disjoint parts of one array that is far larger than the caches; numpy's reduction reads without writing
and leaves the interpreter lock. What token generation sustains is a little below what a plain scan does; the profile
that is written says how the figure was taken. Knows nothing of models.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BUFFER_BYTES = 512 * 2**20
PIECE_BYTES = 2**20
SECONDS_PER_COUNT = 0.4


@dataclass(frozen=True, slots=True)
class ReadBandwidth:
    """Bytes per second by thread count: ``by_threads[n - 1]`` is what ``n`` threads read together."""

    by_threads: tuple[float, ...]
    buffer_bytes: int

    @property
    def best(self) -> float:
        """The highest of all thread counts."""
        return max(self.by_threads)

    @property
    def best_threads(self) -> int:
        """The fewest threads that reach 97 % of the best: more only cost power."""
        return next(n for n, value in enumerate(self.by_threads, 1) if value >= 0.97 * self.best)


def measure_read_bandwidth(
    threads: int, *, buffer_bytes: int = BUFFER_BYTES, seconds: float = SECONDS_PER_COUNT
) -> ReadBandwidth:
    """Read bandwidth with 1 to ``threads`` threads, the best of the passes that fit into ``seconds`` for each count."""
    words = np.ones(buffer_bytes // 8, dtype=np.uint64)
    with ThreadPoolExecutor(threads) as pool:
        rates = tuple(_rate(words, count, pool, seconds) for count in range(1, threads + 1))
    return ReadBandwidth(rates, words.nbytes)


def _rate(words: npt.NDArray[np.uint64], threads: int, pool: ThreadPoolExecutor, seconds: float) -> float:
    parts = np.array_split(words, threads)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end or best == 0.0:
        start = time.perf_counter()
        list(pool.map(_scan, parts))
        best = max(best, words.nbytes / (time.perf_counter() - start))
    return best


def _scan(part: npt.NDArray[np.uint64]) -> int:
    step = PIECE_BYTES // 8
    return max(int(part[offset : offset + step].max()) for offset in range(0, part.size, step))
