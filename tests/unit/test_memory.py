"""Memory of a process: from given /proc files, and of this process with memory really taken."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from runtime.memory import Ledger, cgroup_memory, reset_peak, resident, resident_range, snapshot

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


SMAPS = """00400000-00452000 r-xp 00000000 08:02 173521 /usr/bin/python3
Size:                328 kB
Rss:                 100 kB
Anonymous:            10 kB
7f0000000000-7f0000100000 r--s 00000000 08:02 99 {model}
Size:               1024 kB
Rss:                1000 kB
01a00000-01b00000 rw-p 00000000 00:00 0 [heap]
Rss:                 300 kB
7f1000000000-7f1000100000 rw-p 00000000 00:00 0
Rss:                  50 kB
"""


def test_mappings_are_told_apart_and_add_up(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    (tmp_path / "smaps").write_text(SMAPS.format(model=model))
    found = resident((model,), tmp_path)
    assert found is not None
    assert (found.weights_bytes, found.libraries_bytes, found.anonymous_bytes) == (1024000, 102400, 350 * 1024)
    assert resident((model,), tmp_path / "none") is None


def test_the_ledger_attributes_growth_to_what_was_reserved(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    smaps = tmp_path / "smaps"

    def grow(anonymous_kib: int, weights_kib: int) -> None:
        text = SMAPS.format(model=model).replace(" 300 kB", f" {anonymous_kib} kB")
        smaps.write_text(text.replace("1000 kB", f"{weights_kib} kB"))

    grow(300, 0)
    ledger = Ledger(tmp_path)
    grow(1300, 10)  # 400 of it copied weights, 200 cache
    ledger.opened((model,), 200 * 1024)
    grow(1500, 1000)
    parts = ledger.parts((model,), 200 * 1024, {"weights_copied": 400 * 1024, "compute": 150 * 1024})
    assert parts is not None
    kib = {name: value // 1024 for name, value in parts.model_dump().items() if value is not None}
    assert kib == {
        "weights_mapped_bytes": 1000,
        "weights_copied_bytes": 400,
        "kv_bytes": 200,
        "compute_bytes": 150,
        "vocabulary_bytes": 400,
        "interpreter_bytes": 350,
        "libraries_bytes": 100,
        "unexplained_bytes": 50,  # grew by 200, only 150 were reserved
    }


@linux
def test_the_mappings_of_this_process_explain_its_resident_size() -> None:
    found = resident(())
    assert found is not None
    assert found.total_bytes == pytest.approx(snapshot().rss_bytes, rel=0.03)


@linux
def test_only_touched_pages_are_resident() -> None:
    mapped = mmap.mmap(-1, 32 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # an allocator may reuse pages
    block = np.frombuffer(mapped, np.uint8)
    address = block.ctypes.data
    untouched = resident_range(address, block.nbytes)
    assert untouched is not None
    assert untouched < 3 * 2**20
    block[: 8 * 2**20] = 1
    assert 8 * 2**20 <= (resident_range(address, block.nbytes) or 0) < 12 * 2**20


@pytest.mark.parametrize("version", [1, 2])
def test_the_control_group_has_its_own_view(tmp_path: Path, version: int) -> None:
    proc = tmp_path / "proc/self"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text("0::/box\n" if version == 2 else "4:memory:/box\n")
    group = tmp_path / ("sys/fs/cgroup/box" if version == 2 else "sys/fs/cgroup/memory/box")
    group.mkdir(parents=True)
    names = {
        1: ("memory.usage_in_bytes", "memory.max_usage_in_bytes", "memory.limit_in_bytes", "total_rss", "total_cache"),
        2: ("memory.current", "memory.peak", "memory.max", "anon", "file"),
    }[version]
    for name, value in zip(names[:3], (1000, 2000, 9223372036854771712), strict=True):
        (group / name).write_text(f"{value}\n" if version == 1 or value < 10**6 else "max\n")
    (group / "memory.stat").write_text(f"{names[3]} 600\n{names[4]} 400\n")
    found = cgroup_memory(tmp_path)
    assert found is not None
    assert found.version == version
    assert (found.current_bytes, found.peak_bytes, found.limit_bytes) == (1000, 2000, None)
    assert (found.anonymous_bytes, found.file_bytes) == (600, 400)
    assert cgroup_memory(tmp_path / "none") is None
