"""Upper triangles of square matrices in files, mapped when they are read: half the disk, and no memory of their own.

A file holds blocks of ``BLOCK`` rows, each from the diagonal on, one after the other, float32 as the processor has it.
Knows nothing of what the numbers mean.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
BLOCK = 256
"""Rows per block: a multiple of every storage type's block, which rounding goes through from the diagonal on."""


def upper_bytes(columns: int) -> int:
    """Size of the file of a matrix (columns, columns)."""
    return 4 * sum((min(start + BLOCK, columns) - start) * (columns - start) for start in range(0, columns, BLOCK))


def write_upper(path: Path, matrix: Floats) -> None:
    """Write what is on and above the diagonal of a matrix (columns, columns), and what blocks hold below it."""
    columns = len(matrix)
    with path.open("wb") as stream:
        for start in range(0, columns, BLOCK):
            stream.write(np.ascontiguousarray(matrix[start : start + BLOCK, start:], dtype=np.float32).data)


class UpperFile:
    """A file that ``write_upper`` wrote. Safe to share between threads. Raises ``OSError`` and ``ValueError``."""

    def __init__(self, path: Path, columns: int) -> None:
        self._numbers = np.memmap(path, dtype=np.float32, mode="r")
        self._columns = columns
        if self._numbers.nbytes != upper_bytes(columns):
            raise ValueError(f"{path.name} has {self._numbers.nbytes} bytes, not {upper_bytes(columns)}")
        self._offsets = [upper_bytes(columns) - upper_bytes(columns - start) for start in range(0, columns, BLOCK)]

    def rows(self, start: int, stop: int) -> Floats:
        """Rows from the diagonal on: (stop - start, columns - start). They are of one block."""
        first = start // BLOCK * BLOCK
        stored = min(first + BLOCK, self._columns) - first
        begin = self._offsets[start // BLOCK] // 4
        block = self._numbers[begin : begin + stored * (self._columns - first)].reshape(stored, self._columns - first)
        return block[start - first : stop - first, start - first :]

    def symmetric(self) -> Floats:
        """The whole matrix (columns, columns), what is below the diagonal mirrored from above, in memory."""
        found = np.empty((self._columns, self._columns), dtype=np.float32)
        for start in range(0, self._columns, BLOCK):
            stop = min(start + BLOCK, self._columns)
            part = self.rows(start, stop)
            found[start:stop, start:] = part
            found[stop:, start:stop] = part[:, stop - start :].T
        return found
