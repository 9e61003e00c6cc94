"""The keys or values of one layer of an ONNX model, for all sequences: in this process's memory, or in a device's.

Attention appends in place: past and present are bound to the same memory. Knows no graph and no positions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.memory import resident_range

Floats = npt.NDArray[Any]


class HostCache:
    """An array of (sequences, heads, context, head size) in RAM."""

    device = "cpu"

    def __init__(self, shape: tuple[int, int, int, int], dtype: npt.DTypeLike) -> None:
        # calloc: pages cost nothing until a token is written there. Sequence first, so that one or several
        # neighbouring sequences are one piece of memory.
        self._array = np.zeros(shape, dtype)
        self.shape, self.dtype = shape, self._array.dtype

    def address(self, sequence: int) -> int:
        """Where the memory of a sequence begins."""
        return int(self._array[sequence:].ctypes.data)

    def read(self, sequence: int, length: int) -> Floats:
        """The first ``length`` tokens of a sequence, (heads, tokens, head size)."""
        return self._array[sequence, :, :length]

    def write(self, sequence: int, values: Floats) -> None:
        """Let a sequence begin with these tokens."""
        self._array[sequence, :, : values.shape[1]] = values

    def resident_bytes(self) -> int | None:
        """What of it takes up RAM; None where the system does not tell."""
        return resident_range(self._array.ctypes.data, self._array.nbytes)


class DeviceCache:
    """The same in the memory of a provider's device. Reading and writing copy all of it over the bus."""

    def __init__(self, runtime: Any, shape: tuple[int, int, int, int], dtype: npt.DTypeLike, device: str) -> None:
        self.device, self.shape, self.dtype = device, shape, np.dtype(dtype)
        self._value = runtime.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), device, 0)
        self._sequence_bytes = self.dtype.itemsize * shape[1] * shape[2] * shape[3]

    def address(self, sequence: int) -> int:
        """Where the memory of a sequence begins, on the device."""
        return int(self._value.data_ptr()) + sequence * self._sequence_bytes

    def read(self, sequence: int, length: int) -> Floats:
        """The first ``length`` tokens of a sequence, (heads, tokens, head size)."""
        held: Floats = self._value.numpy()
        return held[sequence, :, :length]

    def write(self, sequence: int, values: Floats) -> None:
        """Let a sequence begin with these tokens."""
        held = np.array(self._value.numpy())
        held[sequence, :, : values.shape[1]] = values
        self._value.update_inplace(held)

    def resident_bytes(self) -> int:
        """Nothing of it lies in RAM."""
        return 0


Cache = HostCache | DeviceCache


def make_cache(runtime: Any, shape: tuple[int, int, int, int], dtype: npt.DTypeLike, device: str | None) -> Cache:
    """A cache of zeros, in RAM where ``device`` is None."""
    return HostCache(shape, dtype) if device is None else DeviceCache(runtime, shape, dtype, device)
