"""A short measurement of sustained read bandwidth, for every thread count; and of what else kept the CPUs busy.

Threads scan disjoint parts of one array, again and again, as generation does with the weights; numpy's reduction reads
without writing and leaves the interpreter lock. The whole array is far larger than most caches. Its beginnings are
scanned as well, because a small model may stay in a large cache, or in a part of it. What token generation sustains
differs a little from a plain scan; the profile that is written says how the figure was taken. Knows nothing of models.
"""

from __future__ import annotations

import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import psutil

BUFFER_BYTES = 512 * 2**20
PIECE_BYTES = 2**20
SECONDS_PER_COUNT = 0.4
SIZES_BYTES = tuple(size * 2**20 for size in (16, 32, 64, 96, 128, 192, 256))
SECONDS_PER_SIZE = 0.1


@dataclass(frozen=True, slots=True)
class ReadBandwidth:
    """Bytes per second by thread count: ``by_threads[n - 1]`` is what ``n`` threads read together.

    ``by_size`` has, for every size up to ``buffer_bytes`` and every thread count, the same for an array of that size.
    """

    by_threads: tuple[float, ...]
    buffer_bytes: int
    by_size: tuple[tuple[int, tuple[float, ...]], ...] = ()

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
    """Read bandwidth with 1 to ``threads`` threads, the best of the passes that fit into ``seconds`` for each count.

    By size it is the middle pass: what a cache keeps differs from one pass to the next.
    """
    words = np.ones(buffer_bytes // 8, dtype=np.uint64)
    counts = thread_counts(threads)
    with ThreadPoolExecutor(threads) as pool:
        rates = tuple(max(_rates(words, count, pool, seconds)) for count in range(1, threads + 1))
        by_size = []
        for size in (*(size for size in SIZES_BYTES if size < words.nbytes), words.nbytes):
            part = words[: size // 8]
            passes = (_rates(part, count, pool, seconds * SECONDS_PER_SIZE / SECONDS_PER_COUNT) for count in counts)
            by_size.append((size, every_count(dict(zip(counts, map(statistics.median, passes), strict=True)))))
    return ReadBandwidth(rates, words.nbytes, tuple(by_size))


def thread_counts(threads: int) -> list[int]:
    """The counts that are measured where all would take too long: powers of two up to ``threads``, and ``threads``."""
    return sorted({2**power for power in range(threads.bit_length()) if 2**power < threads} | {threads})


def every_count(measured: dict[int, float]) -> tuple[float, ...]:
    """Rates at 1, 2, 3 ... threads from those at some counts, linear between them."""
    counts = sorted(measured)
    filled = np.interp(range(1, counts[-1] + 1), counts, [measured[count] for count in counts])
    return tuple(float(rate) for rate in filled)


def _rates(words: npt.NDArray[np.uint64], threads: int, pool: ThreadPoolExecutor, seconds: float) -> list[float]:
    """Bytes per second of every pass that starts within ``seconds``, at least one."""
    parts = np.array_split(words, threads)
    found: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not found:
        start = time.perf_counter()
        list(pool.map(_scan, parts))
        found.append(words.nbytes / (time.perf_counter() - start))
    return found


def _scan(part: npt.NDArray[np.uint64]) -> int:
    step = PIECE_BYTES // 8
    return max(int(part[offset : offset + step].max()) for offset in range(0, part.size, step))
