"""Sums of squares of what goes into every matrix while llama.cpp computes: its importance statistic, without torch.

llama.cpp asks a callback about every node of its graph; for products of a named matrix the callback adds up the squared
inputs. The layout of ``ggml_tensor`` is part of ggml's C interface and changes rarely; it is checked against the
library's own accessors before anything is believed. Knows names and numbers, not what they are used for.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelm.errors import EngineError

_DIMENSIONS, _PARAMETERS, _SOURCES, _NAME = 4, 16, 10, 64  # GGML_MAX_*, ggml.h
_F32 = 0  # enum ggml_type


class _Tensor(ctypes.Structure):
    """``struct ggml_tensor`` up to the fields that are read here."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * _DIMENSIONS),
        ("nb", ctypes.c_size_t * _DIMENSIONS),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * _PARAMETERS),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * _SOURCES),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * _NAME),
    )


class InputSquares:
    """Collects while an engine that was loaded with it computes.

    ``sums`` (columns, float64) by the name of the matrix, ``counts`` the number of inputs that went into each. Matrices
    of experts, which see a choice of the inputs, are left out.
    """

    def __init__(self) -> None:
        self.sums: dict[str, npt.NDArray[np.float64]] = {}
        self.counts: dict[str, int] = {}
        self.callback: Any = None
        self._problem: str | None = None
        self._ggml: Any = None

    def attach(self, library: Any, parameters: Any) -> None:
        """Enter the callback into the parameters of a context that is about to be made. Raises ``EngineError``."""
        llama = Path(library._lib._name)
        try:
            self._ggml = ctypes.CDLL(str(llama.with_name(llama.name.replace("llama", "ggml-base"))))
            for name, result in (
                ("ggml_op_desc", ctypes.c_char_p),
                ("ggml_get_name", ctypes.c_char_p),
                ("ggml_get_data", ctypes.c_void_p),
                ("ggml_nbytes", ctypes.c_size_t),
            ):
                function = getattr(self._ggml, name)
                function.restype, function.argtypes = result, (ctypes.c_void_p,)
        except (OSError, AttributeError) as error:
            raise EngineError(f"what goes into matrices cannot be read: {error}") from error
        self.callback = library.ggml_backend_sched_eval_callback(self._visit)
        parameters.cb_eval = self.callback

    def check(self) -> None:
        """Raises ``EngineError`` when the library's tensors are not laid out as expected, or nothing was seen."""
        if self._problem is None and not self.sums:
            self._problem = "no matrix product was seen"
        if self._problem is not None:
            raise EngineError(
                f"what goes into matrices cannot be read: {self._problem}",
                hint="this needs llama-cpp-python >= 0.3.36",
            )

    def _visit(self, address: int, ask: bool, _data: object) -> bool:
        """Called for every node, first to ask for interest, then with its result. An exception here would be lost."""
        if self._problem is not None:
            return not ask  # false as an answer to a result would stop the computation
        if ask:
            return bool(self._ggml.ggml_op_desc(address) == b"MUL_MAT" and self._is_weight(address))
        self._add(_Tensor.from_address(address))
        return True

    def _is_weight(self, address: int) -> bool:
        tensor = _Tensor.from_address(address)
        if tensor.data is not None and tensor.data != self._ggml.ggml_get_data(address):
            self._problem = "ggml_tensor has another layout"
            return False
        if not tensor.src[0] or self._ggml.ggml_get_name(tensor.src[0]) != _Tensor.from_address(tensor.src[0]).name:
            self._problem = "ggml_tensor has another layout"
            return False
        return bool(_Tensor.from_address(tensor.src[0]).name.endswith(b".weight"))

    def _add(self, product: _Tensor) -> None:
        inputs = _Tensor.from_address(product.src[1])
        columns, rows = int(inputs.ne[0]), int(inputs.ne[1] * inputs.ne[2] * inputs.ne[3])
        size_bytes = 4 * columns * rows
        if inputs.type != _F32 or not inputs.data or self._ggml.ggml_nbytes(product.src[1]) != size_bytes:
            return  # a view or another type: llama.cpp's own collector skips these too
        raw = (ctypes.c_float * (columns * rows)).from_address(inputs.data)
        values = np.ctypeslib.as_array(raw).reshape(rows, columns)
        name = _Tensor.from_address(product.src[0]).name.decode("utf-8", "replace")
        squares = np.einsum("ij,ij->j", values, values, dtype=np.float64)
        self.sums[name] = self.sums[name] + squares if name in self.sums else squares
        self.counts[name] = self.counts.get(name, 0) + rows
