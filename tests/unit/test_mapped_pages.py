"""Pages of a mapped file are let go, what is read afterwards is the same, and nothing else is touched."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from runtime import mapped_pages
from runtime.mapped_pages import let_go

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/maps and madvise")

SIZE = 2**22


def mapped(path: Path) -> mmap.mmap:
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    with path.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def resident(memory: mmap.mmap) -> int:
    """Bytes that the kernel counts for this mapping; ``mincore`` would tell what its cache holds."""
    import numpy as np

    start = np.frombuffer(memory, np.uint8).ctypes.data
    found = None
    for line in Path("/proc/self/smaps").read_text(errors="replace").splitlines():
        if line.startswith(f"{start:x}-"):
            found = start
        elif found and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the mapping is gone")


def test_pages_are_let_go(tmp_path: Path) -> None:
    ours, other = mapped(tmp_path / "weights"), mapped(tmp_path / "weights.other")
    sums = sum(ours[::512]), sum(other[::512])
    assert resident(ours) == resident(other) == SIZE
    let_go(tmp_path / "weights")
    assert resident(ours) == 0
    assert resident(other) == SIZE
    assert (sum(ours[::512]), sum(other[::512])) == sums


def test_small_mappings_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = mapped(tmp_path / "weights")
    assert ours[::512]
    monkeypatch.setattr(mapped_pages, "_LEAST_BYTES", SIZE + 1)
    let_go(tmp_path / "weights")
    assert resident(ours) == SIZE


def test_a_file_that_nobody_has_mapped(tmp_path: Path) -> None:
    let_go(tmp_path / "nothing")
