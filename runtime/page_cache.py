"""Files in the page cache: how much of one is there, and how to get it out, so that a cold start can be measured."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path


def cached_share(paths: Sequence[Path]) -> float | None:
    """Share of the files' pages that are in the page cache (``mincore``), None where the system does not tell.

    For files that this user can neither write nor owns, Linux pretends that every page is there.
    """
    try:
        mincore = ctypes.CDLL(None, use_errno=True).mincore
    except AttributeError:
        return None
    pages = cached = 0
    for path in paths:
        size_bytes = path.stat().st_size
        if not size_bytes:
            continue
        count = -(-size_bytes // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * count)()
        # A private mapping: nothing is read, and ctypes takes the address of writable memory only.
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), size_bytes, access=mmap.ACCESS_COPY) as mapped:
            start = ctypes.c_char.from_buffer(mapped)
            failed = mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size_bytes), found) != 0
            del start
        if failed:
            return None
        pages += count
        cached += sum(flags & 1 for flags in found)
    return cached / pages if pages else None


def drop_cached(paths: Sequence[Path]) -> float | None:
    """Ask the kernel to forget the files' cached pages, and return the share that stayed.

    Pages that another process maps stay, and file systems in memory cannot let go. None where there is no way to ask.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    for path in paths:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())  # what is not written yet cannot be dropped
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return cached_share(paths)
