"""Huge pages: only memory that is wholly in use is moved, what it says stays the same, and it can be refused."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest

from runtime import huge_pages
from runtime.huge_pages import collapse_resident, from_first_use, huge_page_bytes, without


def anonymous_huge_kib() -> int:
    text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    match = re.search(r"^AnonHugePages: +(\d+) kB$", text, re.MULTILINE)
    assert match is not None
    return int(match[1])


def resident_kib() -> int:
    match = re.search(r"^Rss: +(\d+) kB$", Path("/proc/self/smaps_rollup").read_text(encoding="ascii"), re.MULTILINE)
    assert match is not None
    return int(match[1])


@pytest.fixture
def block() -> mmap.mmap:
    """16 MiB of anonymous memory, untouched, that no allocator manages."""
    return mmap.mmap(-1, 16 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def fill(block: mmap.mmap, length: int) -> bytes:
    pattern = bytes(range(256)) * (length // 256)
    block[:length] = pattern
    return pattern


needs_huge_pages = pytest.mark.skipif(
    not huge_page_bytes(), reason="this kernel has no huge pages of 2 MiB for programs: nothing is moved"
)


@needs_huge_pages
def test_full_memory_is_moved_and_says_the_same(block: mmap.mmap) -> None:
    pattern = fill(block, len(block))
    moved = collapse_resident(8 * 2**20)
    if not moved:
        pytest.fail("nothing was moved although the kernel has huge pages")
    assert moved % huge_page_bytes() == 0
    assert anonymous_huge_kib() * 1024 >= 12 * 2**20
    assert block[:] == pattern


@needs_huge_pages
def test_memory_does_not_grow(block: mmap.mmap) -> None:
    """One byte of each huge page is in use: moving would make 16 MiB of 32 KiB."""
    for place in range(0, len(block), 2**21):
        block[place] = 1
    before = resident_kib()
    collapse_resident(8 * 2**20)
    assert resident_kib() - before < 1024


def new_block() -> mmap.mmap:
    return mmap.mmap(-1, 16 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


@needs_huge_pages
def test_memory_mapped_meanwhile_is_huge_from_its_first_use(block: mmap.mmap) -> None:
    with from_first_use():
        new = new_block()
    before = anonymous_huge_kib()
    new[8 * 2**20] = 1
    assert anonymous_huge_kib() - before == huge_page_bytes() // 1024
    block[8 * 2**20] = 1  # was there before
    assert anonymous_huge_kib() - before == huge_page_bytes() // 1024


@needs_huge_pages
def test_first_use_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELM_HUGE_PAGES", "off")
    with from_first_use():
        new = new_block()
    before = anonymous_huge_kib()
    new[8 * 2**20] = 1
    assert anonymous_huge_kib() == before


def test_ranges_without_others() -> None:
    assert without((10, 20), []) == [(10, 20)]
    assert without((10, 20), [(0, 5), (20, 30)]) == [(10, 20)]
    assert without((10, 20), [(0, 12), (14, 15), (18, 30)]) == [(12, 14), (15, 18)]
    assert without((10, 20), [(5, 25)]) == []


def test_switched_off(block: mmap.mmap, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(block, len(block))
    monkeypatch.setenv("EDGELM_HUGE_PAGES", "off")
    assert collapse_resident() == 0


def test_without_huge_pages(block: mmap.mmap, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fill(block, len(block))
    monkeypatch.setattr(huge_pages, "_SIZE_FILE", tmp_path / "missing")
    assert huge_page_bytes() == 0
    assert collapse_resident() == 0
    large = tmp_path / "size"
    large.write_text("33554432\n", encoding="ascii")
    monkeypatch.setattr(huge_pages, "_SIZE_FILE", large)
    assert collapse_resident() == 0
