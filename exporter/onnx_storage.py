"""The data file beside ``model.onnx``: where every stored array lies and what fills it.

Places are known before any data is read, so workers write slabs of rows straight where they belong. Knows arrays and
their sources; not what a graph does with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np
import numpy.typing as npt

from exporter.architectures.base import TensorDescription
from exporter.onnx_types import WeightType

DATA_NAME = "model.onnx.data"
# Whole pages for what is large, so that a runtime can map it; cache lines for the rest.
_PAGE, _LINE, _LARGE = 4096, 64, 2**16


@dataclass(frozen=True, slots=True)
class Place:
    """An array in the data file. ``dtype`` is ``float32``, ``float16`` or ``uint8``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * np.dtype(self.dtype).itemsize

    def reshaped(self, name: str, shape: tuple[int, ...]) -> Place:
        """The same bytes under another name and shape."""
        if prod(shape) != prod(self.shape):
            raise ValueError(f"{self.name} of {self.shape} is no {shape}")
        return Place(name, self.dtype, shape, self.offset)

    def rows(self, name: str, start: int, stop: int) -> Place:
        """Some of its rows under another name."""
        row_bytes = self.size_bytes // self.shape[0]
        return Place(name, self.dtype, (stop - start, *self.shape[1:]), self.offset + start * row_bytes)


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """Rows of one or more tensors below each other, quantised. ``zeros`` None: symmetric."""

    kind: WeightType
    parts: tuple[TensorDescription, ...]
    data: Place
    scales: Place
    zeros: Place | None

    def rows(self, name: str, start: int, stop: int) -> QuantizedMatrix:
        """Some of its rows under another name."""
        return replace(
            self,
            data=self.data.rows(f"{name}.data", start, stop),
            scales=self.scales.rows(f"{name}.scales", start, stop),
            zeros=None if self.zeros is None else self.zeros.rows(f"{name}.zeros", start, stop),
        )


@dataclass(frozen=True, slots=True)
class FloatArray:
    """Tensors one after the other (along rows), as floats. ``transposed``: stored as (columns, rows)."""

    parts: tuple[TensorDescription, ...]
    place: Place
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Computed:
    """An array that is calculated and not read."""

    values: npt.NDArray[np.float32]
    place: Place


Content = QuantizedMatrix | FloatArray | Computed


@dataclass(slots=True)
class Storage:
    """The data file as far as it is laid out. ``floats`` is the type of all that is neither integers nor packed."""

    floats: str = "float32"
    contents: list[Content] = field(default_factory=list)
    size_bytes: int = 0

    def add_quantized(self, name: str, parts: Sequence[TensorDescription], kind: WeightType) -> QuantizedMatrix:
        """Lay out a quantised matrix: packed integers, scales, and zero points if it has any."""
        rows, columns = sum(part.shape[0] for part in parts), parts[0].shape[1]
        matrix = QuantizedMatrix(
            kind,
            tuple(parts),
            self._place(f"{name}.data", "uint8", kind.data_shape(rows, columns)),
            self._place(f"{name}.scales", self.floats, (rows, kind.blocks(columns))),
            self._place(f"{name}.zeros", "uint8", kind.zeros_shape(rows, columns)) if kind.asymmetric else None,
        )
        self.contents.append(matrix)
        return matrix

    def add_float(self, name: str, parts: Sequence[TensorDescription], *, transposed: bool = False) -> FloatArray:
        """Lay out tensors below each other, as floats."""
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        array = FloatArray(
            tuple(parts), self._place(name, self.floats, shape[::-1] if transposed else shape), transposed
        )
        self.contents.append(array)
        return array

    def add_computed(self, name: str, values: npt.NDArray[np.float32]) -> Computed:
        """Lay out a calculated array."""
        array = Computed(values, self._place(name, self.floats, values.shape))
        self.contents.append(array)
        return array

    def _place(self, name: str, dtype: str, shape: tuple[int, ...]) -> Place:
        size_bytes = prod(shape) * np.dtype(dtype).itemsize
        alignment = _PAGE if size_bytes >= _LARGE else _LINE
        offset = -(-self.size_bytes // alignment) * alignment
        self.size_bytes = offset + size_bytes
        return Place(name, dtype, shape, offset)
