"""Memory that a thread uses again for its next piece of work.

A fresh array of some hundred kilobytes comes from the kernel page by page, and goes back when it is dropped: writing
SmolLM2-135M in float32 had 231,000 page faults of that, 45,000 without. Knows nothing of what the bytes are.
"""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

_KEPT_BYTES = 64 * 2**20


class ThreadBuffers:
    """Buffers by name, of each thread its own. What is in one is gone when the thread asks for the same name again.

    Larger ones than 64 MiB are not kept, so that what threads hold stays small beside a model's largest matrix.
    """

    def __init__(self) -> None:
        self._held = threading.local()

    def bytes(self, name: str, size_bytes: int) -> npt.NDArray[np.uint8]:
        """The first ``size_bytes`` bytes of a buffer that has grown to the most that was asked for."""
        if size_bytes > _KEPT_BYTES:
            return np.empty(size_bytes, dtype=np.uint8)
        held: npt.NDArray[np.uint8] | None = getattr(self._held, name, None)
        if held is None or held.nbytes < size_bytes:
            held = np.empty(size_bytes, dtype=np.uint8)
            setattr(self._held, name, held)
        return held[:size_bytes]

    def floats(self, name: str, count: int) -> npt.NDArray[np.float32]:
        """The same as ``count`` numbers."""
        return self.bytes(name, 4 * count).view(np.float32)
