"""Lets go of pages of a mapped file that somebody has copied out of, so that no number is held twice.

Pages that are let go stay in the kernel's cache: who reads them again finds them there, or on the disk. Knows nothing
of what the file holds. Only for files whose mappings are never written to: what was written to a private one is lost.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_LEAST_BYTES = 2**16  # scales of blocks have about this; below are norms and the like


def let_go(path: Path) -> None:
    """Pages of mappings of ``path`` become no part of this process; mappings below 64 KiB are left alone.

    Only while nobody can unmap the file: what lies there instead by the time that the kernel is asked would be zeroed.
    Does nothing where there is no ``/proc/self/maps``.
    """
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    for start, size_bytes in _mappings(" " + os.path.realpath(path)):
        library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size_bytes), mmap.MADV_DONTNEED)


def _mappings(suffix: str) -> list[tuple[int, int]]:
    """Where large mappings of the file whose lines end so begin, and their sizes."""
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    places = [line.split(" ", 1)[0].split("-") for line in lines if line.endswith(suffix)]
    ranges = [(int(start, 16), int(end, 16)) for start, end in places]
    return [(start, end - start) for start, end in ranges if end - start >= _LEAST_BYTES]
