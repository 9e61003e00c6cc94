"""The head of a GGUF file as bytes: counts, metadata, tensor table, padding.

Everything before the data is known when the plan is, so it is encoded in one go; arrays of strings (a vocabulary and
its merges are a hundred thousand) are joined, not written piece by piece. Reading is ``runtime.gguf_header``'s job.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from edgelm.bundle import TensorPlan
from exporter import ggml

ALIGNMENT = 32
_MAGIC, _VERSION = b"GGUF", 3
# Value types of the format.
_UINT8, _UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _INT64 = 0, 4, 5, 6, 7, 8, 9, 11
_SCALARS = {_UINT32: "<I", _INT32: "<i", _FLOAT32: "<f", _BOOL: "<?", _INT64: "<q"}
_DTYPES = {_INT32: "<i4", _FLOAT32: "<f4", _BOOL: "?", _INT64: "<i8"}


def encode_header(architecture: str, metadata: Mapping[str, Any], plans: Sequence[TensorPlan]) -> bytes:
    """Bytes up to the first tensor, which starts aligned right after them.

    ``metadata`` are all other keys (a ``general.architecture`` among them wins), as plain Python values: a whole number
    is stored as uint32 (as int32 or int64 when it does not fit), a float as float32, lists hold one kind of value,
    bytes are an array of uint8. Raises ``TypeError`` for anything else.
    """
    entries = {"general.architecture": architecture, **metadata}
    parts = [_MAGIC, struct.pack("<IQQ", _VERSION, len(plans), len(entries))]
    for key, value in entries.items():
        parts += [_string(key), *_value(key, value)]
    parts += list(_tensor_table(plans))
    header = b"".join(parts)
    return header + bytes(padded(len(header)) - len(header))


def padded(size_bytes: int) -> int:
    """The next multiple of the alignment."""
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


def _tensor_table(plans: Sequence[TensorPlan]) -> Iterator[bytes]:
    position = 0
    for plan in plans:
        dimensions = plan.shape[::-1]  # the file names the row length first
        yield _string(plan.name)
        yield struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, ggml.TYPES[plan.type].id, position)
        position = padded(position + plan.size_bytes)


def _string(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded


def _value(key: str, value: Any) -> tuple[bytes, ...]:
    if isinstance(value, str):
        return struct.pack("<I", _STRING), _string(value)
    if isinstance(value, (bool, int, float)):
        kind = _scalar_kind(value)
        return (struct.pack("<I", kind) + struct.pack(_SCALARS[kind], value),)
    if isinstance(value, bytes):
        return struct.pack("<IIQ", _ARRAY, _UINT8, len(value)), value
    if isinstance(value, Mapping) or not hasattr(value, "__len__"):
        raise TypeError(f"metadata {key} is of the type {type(value).__name__}")
    items = value.tolist() if isinstance(value, np.ndarray) else list(value)
    kinds = {type(item) for item in items}
    if len(kinds) > 1 or not kinds <= {bool, int, float, str}:
        raise TypeError(f"metadata {key} is a list of {', '.join(sorted(kind.__name__ for kind in kinds))}")
    kind = {bool: _BOOL, float: _FLOAT32, str: _STRING}.get(next(iter(kinds), str), _INT32)
    body = b"".join(map(_string, items)) if kind == _STRING else np.array(items, dtype=_DTYPES[kind]).tobytes()
    return struct.pack("<IIQ", _ARRAY, kind, len(items)), body


def _scalar_kind(value: bool | float) -> int:
    if isinstance(value, bool):
        return _BOOL
    if isinstance(value, int):
        if 0 <= value < 2**32:
            return _UINT32
        return _INT32 if -(2**31) <= value < 0 else _INT64
    return _FLOAT32
