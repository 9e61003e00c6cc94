"""Strict reading of safetensors headers and shard indexes, before anything else trusts them.

Accepts what the reference implementation accepts and no more: a bounded JSON header without duplicate names, known
element types, sizes that follow from shapes, offsets that cover the data part exactly once. Reads headers only.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelm.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEADER_LIMIT_BYTES = 100_000_000  # the reference implementation's own limit
INDEX_LIMIT_BYTES = 64 * 2**20
_TENSOR_LIMIT = 200_000
_NAME_LIMIT = 1024
_DIMENSIONS_LIMIT = 8
_ELEMENT_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8,
}  # fmt: skip
FINISHED = "finished.safetensors"
"""Beside the weights of a student that was trained for a bundle: its matrices as types store them."""
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}\.safetensors")
_AGAIN = "download or copy the checkpoint again"


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """Where one tensor lies. ``shape`` is row-major, ``type`` a ggml or safetensors name, ``offset`` absolute."""

    name: str
    shape: tuple[int, ...]
    type: str
    file: Path
    offset: int
    size_bytes: int

    @property
    def elements(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)


def read_safetensors_header(path: Path) -> dict[str, TensorHeader]:
    """Tensors of one safetensors file by name.

    Raises ``CheckpointError`` naming the file and the first thing that is wrong with it.
    """
    try:
        with path.open("rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path} is not a regular file")
            raw = stream.read(header_length(stream.read(8), path, status.st_size))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}", hint=_AGAIN) from error
    return parse_safetensors_header(raw, path, status.st_size - 8 - len(raw))


def header_length(prefix: bytes, path: Path, size_bytes: int) -> int:
    """Length of the JSON header of a file of ``size_bytes``, from its first eight bytes. Raises ``CheckpointError``."""
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length < 2 or 8 + length > size_bytes:
        raise _broken(path, f"is truncated or no safetensors file ({size_bytes} bytes)")
    if length > HEADER_LIMIT_BYTES:
        raise _broken(path, f"claims a header of {length} bytes")
    return length


def parse_safetensors_header(raw: bytes, path: Path, data_bytes: int) -> dict[str, TensorHeader]:
    """Tensors from the JSON header ``raw`` of ``path``, whose data part has ``data_bytes`` bytes.

    Raises ``CheckpointError``.
    """
    document = _load_json(raw, path)
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "has metadata that are not a table of texts")
    if len(document) > _TENSOR_LIMIT:
        raise _broken(path, f"lists {len(document)} tensors, more than {_TENSOR_LIMIT}")
    start = 8 + len(raw)
    tensors = {name: _tensor(name, entry, path, start) for name, entry in document.items()}
    _check_cover(tensors.values(), path, start, data_bytes)
    return tensors


def read_index(path: Path) -> dict[str, str]:
    """The shard of every tensor from a ``*.safetensors.index.json``. Raises ``CheckpointError``."""
    try:
        size_bytes = path.stat().st_size
        if size_bytes > INDEX_LIMIT_BYTES:
            raise _broken(path, f"has {size_bytes} bytes")
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}", hint=_AGAIN) from error
    shards = _load_json(raw, path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise _broken(path, "has no weight_map")
    for name, shard in shards.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise _broken(path, f"puts {name!r} into {shard!r}, which is no plain safetensors file name")
    return shards


def _broken(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} {what}", hint=_AGAIN)


def _load_json(raw: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a name occurs twice")
        return table

    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise _broken(path, f"has no valid JSON header: {error}") from error
    if not isinstance(document, dict):
        raise _broken(path, "has a header that is no table")
    return document


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _tensor(name: str, entry: object, path: Path, start: int) -> TensorHeader:
    if not name or len(name) > _NAME_LIMIT:
        raise _broken(path, f"has a tensor name of {len(name)} characters")
    if not isinstance(entry, Mapping) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"describes tensor {name!r} in a way that is not safetensors")
    shape, offsets, element_type = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not isinstance(shape, list) or len(shape) > _DIMENSIONS_LIMIT or not all(_is_count(size) for size in shape):
        raise _broken(path, f"gives tensor {name!r} the shape {shape!r}")
    if not isinstance(element_type, str) or element_type not in _ELEMENT_BYTES:
        raise _broken(path, f"gives tensor {name!r} the unknown type {element_type!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise _broken(path, f"gives tensor {name!r} the offsets {offsets!r}")
    size_bytes = math.prod(shape) * _ELEMENT_BYTES[element_type]
    if offsets[1] - offsets[0] != size_bytes:
        raise _broken(path, f"gives tensor {name!r} {offsets[1] - offsets[0]} bytes where its shape needs {size_bytes}")
    return TensorHeader(name, tuple(shape), element_type, path, start + offsets[0], size_bytes)


def _check_cover(tensors: Iterable[TensorHeader], path: Path, start: int, data_bytes: int) -> None:
    end = start
    for tensor in sorted(tensors, key=lambda item: (item.offset, item.size_bytes)):
        if tensor.offset != end:
            kind = "overlaps the tensor before it" if tensor.offset < end else "leaves a gap before it"
            raise _broken(path, f"is malformed: tensor {tensor.name!r} {kind}")
        end = tensor.offset + tensor.size_bytes
    if end - start != data_bytes:
        missing = end - start - data_bytes
        raise _broken(
            path, f"is truncated: {missing} bytes are missing" if missing > 0 else f"has {-missing} bytes too many"
        )
