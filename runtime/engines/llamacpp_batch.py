"""What a llama.cpp context is handed: tokens in one reused batch, and a switch that stops what it computes.

Numpy arrays and buffers that C code reads in place. Knows neither models nor sequences' contents.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np


class Batch:
    """A ``llama_batch`` whose C arrays are numpy arrays, allocated once."""

    def __init__(self, library: Any, capacity: int, sequences: int) -> None:
        self.tokens = np.zeros(capacity, np.int32)
        self.positions = np.zeros(capacity, np.int32)
        self.wanted = np.zeros(capacity, np.int8)
        self._sequence_counts = np.ones(capacity, np.int32)
        # A token's list of sequences is a pointer; each points at one element of a table that holds its own index.
        self._sequence_ids = np.arange(sequences, dtype=np.int32)
        self.sequence_pointers = np.zeros(capacity, np.uintp)
        self.address_of_sequence = self._sequence_ids.ctypes.data + 4 * np.arange(sequences, dtype=np.uintp)
        batch = library.llama_batch()
        for name, array in (
            ("token", self.tokens),
            ("pos", self.positions),
            ("n_seq_id", self._sequence_counts),
            ("seq_id", self.sequence_pointers),
            ("logits", self.wanted),
        ):
            field = getattr(batch, name)
            setattr(batch, name, ctypes.cast(array.ctypes.data, type(field)))
        self.c = batch


class AbortSwitch:
    """Stops what a context computes.

    llama.cpp asks it before every graph node, hundreds of times per token: a Python function would cost more than the
    node. strlen of a two-byte buffer is the same question in C: "" is false, "!" true.
    """

    def __init__(self, library: Any, context: Any) -> None:
        self._buffer = ctypes.create_string_buffer(2)
        self._callback = ctypes.cast(ctypes.CDLL(None).strlen, library.ggml_abort_callback)
        library.llama_set_abort_callback(context, self._callback, ctypes.cast(self._buffer, ctypes.c_void_p))

    def set(self) -> None:
        """From the next node on; callable from any thread."""
        self._buffer[0] = b"!"

    def clear(self) -> None:
        """Let the next computation run."""
        self._buffer[0] = b"\0"
