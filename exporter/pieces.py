"""Gathers what many threads write into aligned pieces of a file, so that its pages end up in huge pages.

A kernel with large folios (Linux on ext4, XFS, btrfs) caches a written file in blocks as large as the single writes
were, and maps an aligned block of 2 MiB with one entry of the page table. Weights are read whole for every token; in
small blocks they miss the translation buffer. Knows bytes and where they lie, not what they are.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from exporter.ggml import Bytes

PIECE_BYTES = 2**21  # a huge page of x86-64, and of 64-bit ARM with pages of 4 KiB


class Pieces:
    """Writes ranges of a file, known beforehand, in pieces of ``PIECE_BYTES`` at multiples of it. Safe for threads.

    ``ranges`` are (position, bytes) of everything that will be written, each once, in order of position and not
    overlapping. Bytes between them are written as zeros where both sides lie in one piece. A piece is held until it is
    whole: at most two for every thread at work, and one more.
    """

    def __init__(self, descriptor: int, ranges: Iterable[tuple[int, int]]) -> None:
        self._descriptor = descriptor
        self._missing: Counter[int] = Counter()
        self._extent: dict[int, tuple[int, int]] = {}
        for position, size_bytes in ranges:
            for start, stop in _cut(position, position + size_bytes):
                piece = start // PIECE_BYTES
                self._missing[piece] += stop - start
                self._extent[piece] = (self._extent.get(piece, (start, stop))[0], stop)
        self._held: dict[int, npt.NDArray[np.uint8]] = {}
        self._lock = threading.Lock()

    def write(self, data: Bytes, position: int) -> None:
        """Take a range; what it completes is in the file when this returns. Raises ``OSError``."""
        for start, stop in _cut(position, position + data.nbytes):
            part = data[start - position : stop - position]
            piece = start // PIECE_BYTES
            first, last = self._extent[piece]
            if (first, last) == (start, stop):
                self._put(part, start)
                continue
            with self._lock:
                held = self._held.get(piece)
                if held is None:
                    held = self._held[piece] = np.zeros(last - first, dtype=np.uint8)
            held[start - first : stop - first] = part
            with self._lock:
                self._missing[piece] -= part.nbytes
                whole = self._missing[piece] == 0
                if whole:
                    del self._held[piece]
            if whole:
                self._put(held, first)

    def _put(self, data: Bytes, position: int) -> None:
        view = data.data
        while len(view):
            count = os.pwrite(self._descriptor, view, position)
            view, position = view[count:], position + count


def _cut(start: int, stop: int) -> Iterable[tuple[int, int]]:
    """A range as parts that each lie in one piece."""
    while start < stop:
        end = min(stop, (start // PIECE_BYTES + 1) * PIECE_BYTES)
        yield start, end
        start = end
