"""Memory of a process: from given /proc files, and of this process with memory really taken."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from runtime.memory import reset_peak, snapshot, swapped_in_pages

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
STATUS = "Name:\tpython\nVmPeak:\t 900 kB\nVmHWM:\t 500 kB\nVmRSS:\t 400 kB\nRssAnon:\t 300 kB\nVmSwap:\t 7 kB\n"
ROLLUP = (
    "00400000-7ff [rollup]\nRss:                 410 kB\nAnonymous:           250 kB\nSwap:                  8 kB\n"
)


def test_the_rollup_is_more_exact_than_status(tmp_path: Path) -> None:
    (tmp_path / "status").write_text(STATUS)
    (tmp_path / "smaps_rollup").write_text(ROLLUP)
    memory = snapshot(tmp_path)
    assert memory.rss_bytes == 410 * 1024
    assert memory.peak_bytes == 500 * 1024
    assert memory.anonymous_bytes == 250 * 1024
    assert memory.file_bytes == 160 * 1024
    assert memory.swap_bytes == 8 * 1024


def test_old_kernels_have_only_status(tmp_path: Path) -> None:
    (tmp_path / "status").write_text(STATUS)
    memory = snapshot(tmp_path)
    assert (memory.rss_bytes, memory.anonymous_bytes, memory.file_bytes) == (400 * 1024, 300 * 1024, 100 * 1024)
    assert memory.swap_bytes == 7 * 1024


def test_without_proc_the_system_is_asked(tmp_path: Path) -> None:
    memory = snapshot(tmp_path)
    assert memory.anonymous_bytes + memory.file_bytes == memory.rss_bytes > 10**7
    assert memory.peak_bytes >= memory.rss_bytes
    assert not reset_peak(tmp_path / "none")


@linux
def test_memory_that_is_taken_shows_as_anonymous_and_in_the_peak() -> None:
    assert reset_peak()
    before = snapshot()
    # Mapped, not allocated: an allocator may hand out pages that earlier work left resident.
    with mmap.mmap(-1, 64 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        np.frombuffer(block, np.uint8)[:: mmap.PAGESIZE] = 1
        during = snapshot()
    assert 60 * 2**20 < during.anonymous_bytes - before.anonymous_bytes < 80 * 2**20
    after = snapshot()
    assert after.peak_bytes >= during.rss_bytes - 2**20
    assert reset_peak()
    assert snapshot().peak_bytes < during.peak_bytes


@linux
def test_a_mapped_file_shows_as_file(tmp_path: Path) -> None:
    path = tmp_path / "block"
    path.write_bytes(b"x" * 32 * 2**20)
    before = snapshot()
    mapped = np.memmap(path, np.uint8, mode="r")
    assert int(mapped[:: 2**10].max()) == ord("x")
    assert snapshot().file_bytes - before.file_bytes > 30 * 2**20


def test_swap_counter(tmp_path: Path) -> None:
    (tmp_path / "vmstat").write_text("pgpgin 5\npswpin 42\npswpout 3\n")
    assert swapped_in_pages(tmp_path / "vmstat") == 42
    assert swapped_in_pages(tmp_path / "none") is None
