"""Huge pages for weights: what was loaded into anonymous memory is moved to 2 MiB pages, where Linux has them.

A decoded token reads all weights once. In 4 KiB pages that is a miss of the translation buffer every 4 KiB, and in a
virtual machine each miss walks two page tables. glibc's allocator does not ask for huge pages, nor does llama.cpp.
Moving costs one copy, so it is done once, after loading, and only for whole huge pages whose every small page is in
use already: memory does not grow. Buffers that are not in use yet get huge pages as they are touched, which rounds
each run of touched pages up to 2 MiB. Knows the kernel's interface, no engine. Other systems: nothing happens.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

MADV_COLLAPSE = 25  # Linux 6.1; mmap has no name for it before Python 3.15
_SIZE_FILE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_MAPS = Path("/proc/self/maps")
# An anonymous mapping that may be written: no path, or the heap.
_ANONYMOUS = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) rw-p 00000000 00:00 0 *(?:\[heap\])?$", re.MULTILINE)


def wanted() -> bool:
    """Whether huge pages are to be used: unless ``EDGELM_HUGE_PAGES`` is ``off``."""
    return os.environ.get("EDGELM_HUGE_PAGES", "on") != "off"


def huge_page_bytes() -> int:
    """Size of a huge page here, 0 where the kernel has none that programs get without asking an administrator."""
    if sys.platform != "linux":
        return 0
    try:
        size = int(_SIZE_FILE.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0
    # A kernel with 16 or 64 KiB pages has huge ones of 32 or 512 MiB: hardly one would ever be full.
    return size if size <= 4 * 2**20 else 0


def collapse_resident(least_bytes: int = 0) -> int:
    """Move all full huge pages' worth of this process's anonymous memory to huge pages; how many bytes were moved.

    Mappings below ``least_bytes`` are left alone. What the kernel refuses (no free huge page, an old kernel) stays as
    it was: nothing but speed depends on it.
    """
    size = huge_page_bytes()
    if not size or not wanted():
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    moved = 0
    for start, end in _anonymous(max(least_bytes, size)):
        for place in range(-(-start // size) * size, end - size + 1, size):
            if not _all_resident(libc, place, size):
                continue
            if libc.madvise(ctypes.c_void_p(place), ctypes.c_size_t(size), MADV_COLLAPSE) == 0:
                moved += size
            elif ctypes.get_errno() == errno.EINVAL:
                return moved  # this kernel does not know the call
    return moved


@contextmanager
def from_first_use() -> Iterator[None]:
    """What is mapped meanwhile, in pieces of a huge page or more, comes in huge pages where nothing touched it yet."""
    size = huge_page_bytes()
    if not size or not wanted():
        yield
        return
    before = list(_anonymous(0))
    yield
    libc = ctypes.CDLL(None, use_errno=True)
    for start, end in _anonymous(size):
        for piece_start, piece_end in without((start, end), before):
            if piece_end - piece_start >= size:
                libc.madvise(ctypes.c_void_p(piece_start), ctypes.c_size_t(piece_end - piece_start), mmap.MADV_HUGEPAGE)


def without(whole: tuple[int, int], parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """What is left of a range of addresses when others, in ascending order, are taken out of it."""
    left = []
    start, end = whole
    for part_start, part_end in parts:
        if part_end <= start or part_start >= end:
            continue
        if part_start > start:
            left.append((start, part_start))
        start = part_end
    return [*left, (start, end)] if start < end else left


def _anonymous(least_bytes: int) -> Iterator[tuple[int, int]]:
    try:
        text = _MAPS.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for match in _ANONYMOUS.finditer(text):
        start, end = int(match[1], 16), int(match[2], 16)
        if end - start >= least_bytes:
            yield start, end


def _all_resident(libc: ctypes.CDLL, start: int, length: int) -> bool:
    found = np.zeros(length // mmap.PAGESIZE, np.uint8)
    if libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_void_p(found.ctypes.data)) != 0:
        return False
    return bool((found & 1).all())
