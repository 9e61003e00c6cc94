"""libggml's own C functions for quantising, dequantising and sizing, called through ctypes.

The library is the one inside the installed llama_cpp package (or in ``LLAMA_CPP_LIB_PATH``), found without importing
that package. Every call releases the GIL, so worker threads quantise in parallel. Knows rows of numbers; does not know
what a tensor, a model or a file is.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from edgelm.errors import EngineError, MissingDependencyError, UsageError
from runtime.gguf_header import GGML_TYPES

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

# What cannot be quantised to: ggml_quantize_chunk would abort the process.
_NOT_QUANTIZABLE = frozenset({"I8", "I16", "I32", "I64", "F64"})
_REQUIRE_IMPORTANCE = frozenset({"IQ2_XXS", "IQ2_XS", "IQ1_S"})
_FLOAT_TYPES = frozenset({"F32", "F16", "BF16"})
_LIBRARY_NAMES = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll", "libggml.so", "libggml.dylib")


@dataclass(frozen=True, slots=True)
class GgmlType:
    """One storage type: ``block`` numbers of a row are stored together in ``block_bytes`` bytes."""

    name: str
    id: int
    block: int
    block_bytes: int
    quantizable: bool
    requires_importance: bool

    @property
    def is_quantized(self) -> bool:
        return self.name not in _FLOAT_TYPES

    @property
    def bits(self) -> float:
        """Bits per number."""
        return 8 * self.block_bytes / self.block

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row; ``columns`` must be a multiple of ``block``."""
        if columns % self.block:
            raise ValueError(f"a row of {columns} is no multiple of {self.block}, as {self.name} needs")
        return columns // self.block * self.block_bytes


class _TypeTraits(ctypes.Structure):
    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("block_interleave", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )


_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


def _library_directories() -> tuple[Path, ...]:
    override = os.environ.get("LLAMA_CPP_LIB_PATH")
    if override:
        return (Path(override),)
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError(
            "llama-cpp-python is not installed; EdgeLM quantises with its libggml",
            hint="run: make setup, or pip install llama-cpp-python",
        )
    return tuple(Path(location) / "lib" for location in spec.submodule_search_locations)


def _check_types(library: ctypes.CDLL) -> None:
    # The library's own table has no bounds check, so it is asked for ids that are part of the GGUF format only.
    for kind in TYPES.values():
        traits = library.ggml_get_type_traits(kind.id).contents
        told = ((traits.type_name or b"").decode().upper(), traits.block, traits.block_bytes)
        if told != (kind.name, kind.block, kind.block_bytes):
            raise AttributeError(f"it stores type {kind.id} as {told}")


def _find_library() -> Path:
    directories = _library_directories()
    for directory in directories:
        for name in _LIBRARY_NAMES:
            if (directory / name).is_file():
                return directory / name
    raise MissingDependencyError(
        f"no libggml in {', '.join(str(directory) for directory in directories)}",
        hint="reinstall llama-cpp-python, or point LLAMA_CPP_LIB_PATH to a directory with libggml-base.so",
    )


@functools.cache
def _library() -> ctypes.CDLL:
    path = _find_library()
    try:
        library = ctypes.CDLL(str(path))
        _declare(library)
        _check_types(library)
    except (OSError, AttributeError) as error:
        raise EngineError(f"cannot use {path}: {error}", hint="reinstall llama-cpp-python >= 0.3.36") from error
    return library


def _declare(library: ctypes.CDLL) -> None:
    pointer, i64, size, type_id = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t, ctypes.c_int
    signatures = {
        "ggml_quantize_chunk": (size, (type_id, pointer, pointer, i64, i64, i64, pointer)),
        "ggml_quantize_init": (None, (type_id,)),
        "ggml_quantize_requires_imatrix": (ctypes.c_bool, (type_id,)),
        "ggml_get_type_traits": (ctypes.POINTER(_TypeTraits), (type_id,)),
        "ggml_validate_row_data": (ctypes.c_bool, (type_id, pointer, size)),
        "ggml_bf16_to_fp32_row": (None, (pointer, pointer, i64)),
        "ggml_fp16_to_fp32_row": (None, (pointer, pointer, i64)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


TYPES: Mapping[str, GgmlType] = MappingProxyType(
    {
        name: GgmlType(
            name, entry.id, entry.block, entry.block_bytes, name not in _NOT_QUANTIZABLE, name in _REQUIRE_IMPORTANCE
        )
        for name, entry in GGML_TYPES.items()
    }
)
"""All storage types by name (``Q4_K``, ``IQ4_NL``, ``BF16``). Known without the library, and checked against it."""


def type_named(name: str) -> GgmlType:
    """The type of that name, any case. Raises ``UsageError`` listing what can be quantised to."""
    found = TYPES.get(name.upper())
    if found is None:
        choices = ", ".join(item.name for item in TYPES.values() if item.quantizable)
        raise UsageError(f"'{name}' is no ggml type", hint=f"there are: {choices}")
    return found


def quantize(rows: Floats, type_name: str, out: Bytes | None = None, importance: Floats | None = None) -> Bytes:
    """Quantise contiguous float32 ``rows`` (rows, columns) to bytes, row by row.

    ``out`` receives the bytes when given (contiguous uint8 of the right size). ``importance`` (columns,) weights the
    squared error of each column. Raises ``UsageError`` for types that cannot be quantised to, and for those that need
    importance when there is none.
    """
    kind = type_named(type_name)
    if not kind.quantizable:
        raise UsageError(f"nothing can be quantised to {kind.name}")
    if kind.requires_importance and importance is None:
        raise UsageError(
            f"{kind.name} needs an importance matrix, and there is none", hint="choose a type of more bits"
        )
    if rows.ndim != 2 or rows.dtype != np.float32 or not rows.flags.c_contiguous:
        raise ValueError("rows must be a contiguous float32 matrix")
    count, columns = rows.shape
    if importance is not None and (importance.shape != (columns,) or importance.dtype != np.float32):
        raise ValueError(f"importance must be {columns} float32 values")
    size_bytes = count * kind.row_bytes(columns)
    target = np.empty(size_bytes, dtype=np.uint8) if out is None else out
    if target.nbytes != size_bytes or not target.flags.c_contiguous:
        raise ValueError(f"out must be {size_bytes} contiguous bytes")
    library = _library()
    library.ggml_quantize_init(kind.id)
    weights = None if importance is None else np.ascontiguousarray(importance).ctypes.data
    written = library.ggml_quantize_chunk(kind.id, rows.ctypes.data, target.ctypes.data, 0, count, columns, weights)
    if written != size_bytes:
        raise EngineError(f"libggml wrote {written} bytes of {kind.name} where {size_bytes} belong")
    return target


def dequantize(data: Bytes, type_name: str, count: int, out: Floats | None = None) -> Floats:
    """``count`` float32 numbers from contiguous bytes of a type, exact for F32, F16 and BF16.

    Raises ``UsageError`` for types without a way back to floats.
    """
    kind = type_named(type_name)
    if data.nbytes != kind.row_bytes(count):
        raise ValueError(f"{count} numbers of {kind.name} need {kind.row_bytes(count)} bytes, not {data.nbytes}")
    target = np.empty(count, dtype=np.float32) if out is None else out
    if target.size != count or target.dtype != np.float32 or not target.flags.c_contiguous:
        raise ValueError(f"out must be {count} contiguous float32 values")
    source = np.ascontiguousarray(data)
    library = _library()
    if kind.name == "F32":
        target.reshape(-1)[:] = source.reshape(-1).view(np.float32)
    elif kind.name == "F16":
        library.ggml_fp16_to_fp32_row(source.ctypes.data, target.ctypes.data, count)
    elif kind.name == "BF16":
        library.ggml_bf16_to_fp32_row(source.ctypes.data, target.ctypes.data, count)
    else:
        address = library.ggml_get_type_traits(kind.id).contents.to_float
        if not address:
            raise UsageError(f"libggml has no way back from {kind.name} to floats")
        _ToFloat(address)(source.ctypes.data, target.ctypes.data, count)
    return target


def is_valid(data: Bytes, type_name: str) -> bool:
    """Whether stored rows hold no NaN or infinity in values and scales. libggml names the block on stderr if so."""
    kind = type_named(type_name)
    source = np.ascontiguousarray(data)
    return bool(_library().ggml_validate_row_data(kind.id, source.ctypes.data, source.nbytes))
