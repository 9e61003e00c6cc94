"""How fast a directory's storage reads, past the page cache: what loading and paging weights get. Linux only."""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from pathlib import Path

from edgelm.errors import ProfileError

SIZE_BYTES = 128 * 2**20
PIECE_BYTES = 2**20


def measure_storage(directory: Path, *, size_bytes: int = SIZE_BYTES) -> float:
    """Bytes per second of one sequential pass with O_DIRECT over a file that is written for this and removed.

    Raises ``ProfileError`` where the directory cannot be written or the system cannot read unbuffered.
    """
    direct = getattr(os, "O_DIRECT", None)
    if direct is None:
        raise ProfileError("this system cannot read past its cache", hint="leave out --storage")
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".edgelm-storage-") as stream:
            # Random bytes: some controllers and file systems compress.
            piece = os.urandom(PIECE_BYTES)
            for _ in range(size_bytes // PIECE_BYTES):
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
            return _timed(stream.name, direct)
    except OSError as error:
        raise ProfileError(
            f"cannot measure the storage of {directory}: {error.strerror}",
            hint="memory file systems (tmpfs) have no storage; give a directory on the disk that will hold the models",
        ) from error


def read_rate(path: Path, size_bytes: int) -> float | None:
    """Bytes per second of the first ``size_bytes`` of a file, past the page cache; None where that is not possible.

    Raises ``OSError`` where the file system refuses (tmpfs has no storage).
    """
    direct = getattr(os, "O_DIRECT", None)
    return None if direct is None else _timed(str(path), direct, size_bytes)


def _timed(name: str, direct: int, limit_bytes: int | None = None) -> float:
    descriptor = os.open(name, os.O_RDONLY | direct)
    try:
        with mmap.mmap(-1, PIECE_BYTES) as buffer:  # O_DIRECT wants an aligned buffer; mappings are
            total, started = 0, time.perf_counter()
            while count := os.readv(descriptor, [buffer]):
                total += count
                if limit_bytes is not None and total >= limit_bytes:
                    break
            return total / (time.perf_counter() - started)
    finally:
        os.close(descriptor)
