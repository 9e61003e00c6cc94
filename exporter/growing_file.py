"""Hashes a file behind those who write it, as far as it is finished: no second pass over it in the end.

What was hashed is handed to the kernel for writing at once, so that flushing the whole file has little left to do.
Knows bytes and where they lie; not what they are, nor who writes them.
"""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager

_PIECE_BYTES = 2**18  # still in the processor's cache when it is hashed
_FLUSHED_BYTES = 2**24


class GrowingHash(AbstractContextManager["GrowingHash"]):
    """The SHA-256 of the first ``size_bytes`` bytes behind ``descriptor``, which must be readable.

    ``finished`` takes ranges in any order; a thread reads what is finished from the beginning on. Leaving the context
    stops it. Safe to share between threads.
    """

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        self._descriptor, self._size_bytes = descriptor, size_bytes
        self._later: dict[int, int] = {}
        self._frontier = 0
        self._stopped = False
        self._failure: OSError | None = None
        self._digest = hashlib.sha256()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._follow, name="hash-behind", daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def finished(self, start: int, stop: int) -> None:
        """Bytes ``start`` to ``stop`` will not change any more. Every byte has to be in one such range."""
        with self._changed:
            self._later[start] = stop
            while self._frontier in self._later:
                self._frontier = self._later.pop(self._frontier)
            self._changed.notify()

    def hexdigest(self) -> str:
        """The hash, now that all of the file is finished. Raises ``OSError`` when it could not be read."""
        with self._changed:
            if self._frontier != self._size_bytes:
                raise ValueError(f"finished up to {self._frontier} of {self._size_bytes} bytes")
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        if self._stopped:
            raise CancelledError
        return self._digest.hexdigest()

    def _follow(self) -> None:
        try:
            position = flushed = 0
            while position < self._size_bytes:
                with self._changed:
                    self._changed.wait_for(lambda at=position: self._stopped or self._frontier > at)  # type: ignore[misc]
                    stop = self._frontier
                    if self._stopped:
                        return
                position = self._read(position, stop)
                if position - flushed >= _FLUSHED_BYTES:
                    _begin_writing(self._descriptor, flushed, position - flushed)
                    flushed = position
        except OSError as error:
            self._failure = error

    def _read(self, position: int, stop: int) -> int:
        """Hash up to ``stop``, or a good way towards it; returns how far."""
        piece, stop = memoryview(bytearray(_PIECE_BYTES)), min(stop, position + _FLUSHED_BYTES)
        while position < stop and not self._stopped:
            count = os.preadv(self._descriptor, [piece[: stop - position]], position)
            if count <= 0:
                raise OSError(0, f"the file ends at {position}, before its {self._size_bytes} bytes")
            self._digest.update(piece[:count])
            position += count
        return position


def _begin_writing(descriptor: int, start: int, size_bytes: int) -> None:
    """Let the kernel begin to write dirty pages. Linux does so for pages that are not needed any more, and keeps them
    in its cache while they are on their way; elsewhere nothing happens."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, size_bytes, os.POSIX_FADV_DONTNEED)
