"""Lets go of pages of a mapped file while somebody copies out of them, so that no number is held twice meanwhile.

Pages that are let go stay in the kernel's cache: who reads them again finds them there, or on the disk. Knows nothing
of what the file holds. Only for files whose mappings are never written to: what was written to a private one is lost.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
from contextlib import AbstractContextManager
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_PERIOD_S = 0.01
_LEAST_BYTES = 2**16  # scales of blocks have about this; below are norms and the like


class LettingGo(AbstractContextManager["LettingGo"]):
    """While the context lasts, and once at its end, pages of mappings of ``path`` become no part of this process.

    Mappings below 64 KiB are left alone. Does nothing where there is no ``/proc/self/maps``.
    """

    def __init__(self, path: Path) -> None:
        self._suffix = " " + os.path.realpath(path)
        self._libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="letting-go", daemon=True)

    def __enter__(self) -> LettingGo:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._let_go()

    def _follow(self) -> None:
        while not self._ended.wait(_PERIOD_S):
            self._let_go()

    def _let_go(self) -> None:
        if self._libc is None:
            return
        for start, size_bytes in self._mappings():
            self._libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size_bytes), mmap.MADV_DONTNEED)

    def _mappings(self) -> list[tuple[int, int]]:
        """Where large mappings of the file begin, and their sizes."""
        try:
            lines = _MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        except OSError:
            return []
        places = [line.split(" ", 1)[0].split("-") for line in lines if line.endswith(self._suffix)]
        ranges = [(int(start, 16), int(end, 16)) for start, end in places]
        return [(start, end - start) for start, end in ranges if end - start >= _LEAST_BYTES]
