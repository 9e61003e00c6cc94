"""A short measurement of sustained read bandwidth, for every thread count; and of what else kept the CPUs busy.

Threads scan disjoint parts of one array that is far larger than the caches; numpy's reduction reads without writing
and leaves the interpreter lock. What token generation sustains is a little below what a plain scan does; the profile
that is written says how the figure was taken. Knows nothing of models.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import psutil

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


class ForeignLoad:
    """What other processes take of the CPUs from its making on; children count as own once they have ended."""

    def __init__(self) -> None:
        self._started, self._busy_s, self._own_s = time.monotonic(), _all_cpu_s(), _own_cpu_s()

    def share(self) -> float:
        """The others' part of all CPU time since then, 0 to 1."""
        cpus = (time.monotonic() - self._started) * (psutil.cpu_count() or 1)
        foreign = (_all_cpu_s() - self._busy_s) - (_own_cpu_s() - self._own_s)
        return min(max(foreign / max(cpus, 1e-9), 0.0), 1.0)


def _all_cpu_s() -> float:
    times = psutil.cpu_times()
    return sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))


def _own_cpu_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


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
