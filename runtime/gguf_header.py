"""Reads and validates the header of a GGUF file before any C or C++ parser sees it.

Strict on purpose: whatever a well-formed writer never produces is refused, with one message per way to be wrong, and no
allocation is larger than the bytes really present in the file. Standard library and numpy only. Reads no tensor data
and knows nothing of what tensors mean, except in ``workload_from_gguf``.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, overload

import numpy as np
import numpy.typing as npt

from edgelm.errors import BundleError
from targets.workload import TypedWeights, Workload

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 2**16
MAX_COUNT = 2**16
"""Most metadata keys, and most tensors; the largest models published have a few thousand."""
MAX_KEY_BYTES = 2**16 - 1
MAX_NAME_BYTES = 63
MAX_DIMENSIONS = 4
MAX_STRING_BYTES = 64 * 2**20
MAX_ARRAY_ELEMENTS = 2**24
MAX_METADATA_BYTES = 256 * 2**20
MAX_ELEMENTS = 2**63 - 1
_PIECE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class GGMLType:
    """A storage type: its number in the file, elements per block and bytes per block."""

    id: int
    block: int
    block_bytes: int


GGML_TYPES: Mapping[str, GGMLType] = MappingProxyType(
    {
        "F32": GGMLType(0, 1, 4),
        "F16": GGMLType(1, 1, 2),
        "Q4_0": GGMLType(2, 32, 18),
        "Q4_1": GGMLType(3, 32, 20),
        "Q5_0": GGMLType(6, 32, 22),
        "Q5_1": GGMLType(7, 32, 24),
        "Q8_0": GGMLType(8, 32, 34),
        "Q2_K": GGMLType(10, 256, 84),
        "Q3_K": GGMLType(11, 256, 110),
        "Q4_K": GGMLType(12, 256, 144),
        "Q5_K": GGMLType(13, 256, 176),
        "Q6_K": GGMLType(14, 256, 210),
        "IQ2_XXS": GGMLType(16, 256, 66),
        "IQ2_XS": GGMLType(17, 256, 74),
        "IQ3_XXS": GGMLType(18, 256, 98),
        "IQ1_S": GGMLType(19, 256, 50),
        "IQ4_NL": GGMLType(20, 32, 18),
        "IQ3_S": GGMLType(21, 256, 110),
        "IQ2_S": GGMLType(22, 256, 82),
        "IQ4_XS": GGMLType(23, 256, 136),
        "I8": GGMLType(24, 1, 1),
        "I16": GGMLType(25, 1, 2),
        "I32": GGMLType(26, 1, 4),
        "I64": GGMLType(27, 1, 8),
        "F64": GGMLType(28, 1, 8),
        "IQ1_M": GGMLType(29, 256, 56),
        "BF16": GGMLType(30, 1, 2),
        "TQ1_0": GGMLType(34, 256, 54),
        "TQ2_0": GGMLType(35, 256, 66),
        "MXFP4": GGMLType(39, 32, 17),
        "NVFP4": GGMLType(40, 64, 36),
        "Q1_0": GGMLType(41, 128, 18),
        "Q2_0": GGMLType(42, 64, 18),
    }
)
"""Every type that can be stored. Q8_1 and Q8_K exist only inside kernels and are refused in a file."""

_TYPE_NAMES = {entry.id: name for name, entry in GGML_TYPES.items()}


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor as announced. ``shape`` is row-major (rows first, row length last), ``offset`` counts from byte 0."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    size_bytes: int

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """A validated header. Arrays of numbers are numpy arrays, arrays of strings ``GGUFStrings``."""

    version: int
    alignment: int
    metadata: Mapping[str, Any]
    tensors: tuple[GGUFTensor, ...]
    data_offset: int
    file_bytes: int


class GGUFStrings(Sequence[str]):
    """An array of strings that decodes on access: a vocabulary costs its bytes, not hundreds of thousands of objects.

    Raises ``BundleError`` on access to an element that is not UTF-8.
    """

    __slots__ = ("_blob", "_ends", "_key")

    def __init__(self, key: str, blob: bytes, ends: npt.NDArray[np.int64]) -> None:
        self._key, self._blob, self._ends = key, blob, ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(index)
        start = int(self._ends[position - 1]) if position else 0
        return self._text(start, int(self._ends[position]), position)

    def __iter__(self) -> Iterator[str]:
        start = 0
        for position, end in enumerate(self._ends.tolist()):
            yield self._text(start, end, position)
            start = end

    def _text(self, start: int, end: int, position: int) -> str:
        try:
            return self._blob[start + 8 : end].decode("utf-8")
        except UnicodeDecodeError as error:
            raise BundleError(f"metadata key {self._key!r}: element {position} is not UTF-8") from error


def _refuse(path: Path, message: str) -> BundleError:
    return BundleError(f"{path} is not a valid GGUF file: {message}", hint="download or export the file again")


class _Cursor:
    """The bytes of the header, read in pieces as they are asked for and never past the metadata limit."""

    def __init__(self, path: Path, stream: BinaryIO, file_bytes: int) -> None:
        self.path, self._stream, self.file_bytes = path, stream, file_bytes
        self.buffer = bytearray()
        self.position = 0

    def need(self, size_bytes: int, what: str) -> int:
        """Make ``size_bytes`` bytes available and step over them; returns the position where they start."""
        start, end = self.position, self.position + size_bytes
        if end > len(self.buffer):
            self._fill(end, what)
        self.position = end
        return start

    def _fill(self, end: int, what: str) -> None:
        if end > self.file_bytes:
            raise _refuse(self.path, f"truncated at {self.file_bytes} bytes, inside {what}")
        if end > MAX_METADATA_BYTES:
            raise _refuse(self.path, f"its header is larger than {MAX_METADATA_BYTES} bytes")
        while len(self.buffer) < end:
            piece = self._stream.read(max(_PIECE_BYTES, end - len(self.buffer)))
            if not piece:
                raise _refuse(self.path, f"truncated while it was read, inside {what}")
            self.buffer += piece

    def number(self, layout: struct.Struct, what: str) -> Any:
        return layout.unpack_from(self.buffer, self.need(layout.size, what))[0]

    def text(self, limit_bytes: int, what: str) -> str:
        length = self.number(_U64, what)
        if length > limit_bytes:
            raise _refuse(self.path, f"{what} has {length} bytes, more than {limit_bytes}")
        start = self.need(length, what)
        try:
            return self.buffer[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise _refuse(self.path, f"{what} is not UTF-8") from error


_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_BOOL, _STRING, _ARRAY = 7, 8, 9
# Scalar value types of the format: number -> little-endian layout.
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: _U32,
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    _BOOL: struct.Struct("<B"),
    10: _U64,
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}


def _read_value(cursor: _Cursor, key: str) -> tuple[int, Any]:
    what = f"metadata key {key!r}"
    kind = cursor.number(_U32, what)
    if kind == _STRING:
        return kind, cursor.text(MAX_STRING_BYTES, what)
    if kind == _ARRAY:
        return kind, _read_array(cursor, key, what)
    layout = _SCALARS.get(kind)
    if layout is None:
        raise _refuse(cursor.path, f"{what} has the unknown value type {kind}")
    value = cursor.number(layout, what)
    if kind != _BOOL:
        return kind, value
    if value > 1:
        raise _refuse(cursor.path, f"{what} is a boolean with the value {value}")
    return kind, bool(value)


def _read_array(cursor: _Cursor, key: str, what: str) -> GGUFStrings | npt.NDArray[Any]:
    kind, count = cursor.number(_U32, what), cursor.number(_U64, what)
    if kind == _ARRAY:
        raise _refuse(cursor.path, f"{what} is an array of arrays, which no reader of models accepts")
    if count > MAX_ARRAY_ELEMENTS:
        raise _refuse(cursor.path, f"{what} has {count} elements, more than {MAX_ARRAY_ELEMENTS}")
    if kind == _STRING:
        return _read_strings(cursor, key, what, count)
    layout = _SCALARS.get(kind)
    if layout is None:
        raise _refuse(cursor.path, f"{what} is an array of the unknown value type {kind}")
    start = cursor.need(count * layout.size, what)
    values = np.frombuffer(bytes(cursor.buffer[start : cursor.position]), dtype=np.dtype(layout.format))
    if kind != _BOOL:
        return values
    if values.size and int(values.max()) > 1:
        raise _refuse(cursor.path, f"{what} is an array of booleans with the value {int(values.max())}")
    return values.astype(np.bool_)


def _read_strings(cursor: _Cursor, key: str, what: str, count: int) -> GGUFStrings:
    """Walk over ``count`` strings without making them; each takes at least 8 bytes, so the file bounds the work."""
    if cursor.position + 8 * count > cursor.file_bytes:
        raise _refuse(cursor.path, f"truncated at {cursor.file_bytes} bytes, inside {what}")
    start, ends, unpack = cursor.position, np.empty(count, dtype=np.int64), _U64.unpack_from
    for index in range(count):
        length = unpack(cursor.buffer, cursor.need(8, what))[0]
        if length > MAX_STRING_BYTES:
            raise _refuse(cursor.path, f"{what}: element {index} has {length} bytes, more than {MAX_STRING_BYTES}")
        cursor.need(length, what)
        ends[index] = cursor.position - start
    return GGUFStrings(key, bytes(cursor.buffer[start : cursor.position]), ends)


def _read_count(cursor: _Cursor, what: str) -> int:
    count: int = cursor.number(_U64, f"the number of {what}")
    if count > MAX_COUNT:
        raise _refuse(cursor.path, f"it announces {count} {what}, more than {MAX_COUNT}")
    return count


def _read_version(cursor: _Cursor) -> int:
    start = cursor.need(4, "the magic")
    magic = bytes(cursor.buffer[start : start + 4])
    if magic != MAGIC:
        raise _refuse(cursor.path, f"it starts with {magic!r}, not with {MAGIC!r}")
    version: int = cursor.number(_U32, "the version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in VERSIONS:
            raise _refuse(cursor.path, f"it is a big-endian file (version {swapped}); only little-endian ones are read")
        raise _refuse(cursor.path, f"version {version} is not one of {', '.join(map(str, VERSIONS))}")
    return version


def _read_metadata(cursor: _Cursor, count: int) -> tuple[dict[str, Any], int]:
    """All keys and values, and the alignment that they ask for."""
    metadata: dict[str, Any] = {}
    alignment = DEFAULT_ALIGNMENT
    for index in range(count):
        key = cursor.text(MAX_KEY_BYTES, f"the name of metadata key {index}")
        if not key:
            raise _refuse(cursor.path, f"metadata key {index} has an empty name")
        if key in metadata:
            raise _refuse(cursor.path, f"metadata key {key!r} occurs twice")
        kind, metadata[key] = _read_value(cursor, key)
        if key == "general.alignment":
            alignment = _checked_alignment(cursor.path, kind, metadata[key])
    return metadata, alignment


def _checked_alignment(path: Path, kind: int, value: Any) -> int:
    if kind != 4:
        raise _refuse(path, "general.alignment is not an unsigned 32-bit number")
    if not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):
        raise _refuse(path, f"alignment {value} is not a power of two between 8 and {MAX_ALIGNMENT}")
    return int(value)


@dataclass(frozen=True, slots=True)
class _Announced:
    """A tensor before its place is known: ``relative`` counts from the start of the data section."""

    name: str
    shape: tuple[int, ...]
    type: str
    relative: int
    size_bytes: int


def _read_tensor(cursor: _Cursor, index: int) -> _Announced:
    name = cursor.text(MAX_NAME_BYTES, f"the name of tensor {index}")
    what, path = f"tensor {name!r}", cursor.path
    if not name:
        raise _refuse(path, f"tensor {index} has an empty name")
    dimensions = cursor.number(_U32, what)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise _refuse(path, f"{what} has {dimensions} dimensions, not 1 to {MAX_DIMENSIONS}")
    extents = [cursor.number(_U64, what) for _ in range(dimensions)]
    for extent in extents:
        if extent == 0 or extent > MAX_ELEMENTS:
            raise _refuse(path, f"{what} has a zero or negative dimension")
    if prod(extents) > MAX_ELEMENTS:
        raise _refuse(path, f"{what} has more elements than 64 bits can count")
    number = cursor.number(_U32, what)
    type_name = _TYPE_NAMES.get(number)
    if type_name is None:
        raise _refuse(path, f"{what} has the unknown type {number}")
    entry = GGML_TYPES[type_name]
    if extents[0] % entry.block:
        raise _refuse(path, f"{what} has rows of {extents[0]}, no multiple of the {entry.block} of {type_name}")
    size_bytes = prod(extents) // entry.block * entry.block_bytes
    return _Announced(name, tuple(reversed(extents)), type_name, cursor.number(_U64, what), size_bytes)


def _read_tensors(cursor: _Cursor, count: int) -> list[_Announced]:
    announced: dict[str, _Announced] = {}
    for index in range(count):
        tensor = _read_tensor(cursor, index)
        if tensor.name in announced:
            raise _refuse(cursor.path, f"tensor {tensor.name!r} occurs twice")
        announced[tensor.name] = tensor
    return list(announced.values())


def _place(path: Path, announced: Sequence[_Announced], data_offset: int, alignment: int, file_bytes: int) -> None:
    """Check that every tensor lies aligned inside the file and that no two share a byte."""
    for tensor in announced:
        if tensor.relative % alignment:
            raise _refuse(path, f"tensor {tensor.name!r} starts at {tensor.relative}, not at a multiple of {alignment}")
        if data_offset + tensor.relative + tensor.size_bytes > file_bytes:
            raise _refuse(path, f"tensor {tensor.name!r} ends past the end of the file ({file_bytes} bytes)")
    previous: _Announced | None = None
    for tensor in sorted(announced, key=lambda item: item.relative):
        if previous is not None and tensor.relative < previous.relative + previous.size_bytes:
            raise _refuse(path, f"tensors {previous.name!r} and {tensor.name!r} overlap")
        previous = tensor


def read_gguf_header(path: Path) -> GGUFHeader:
    """The validated header of a GGUF file of version 2 or 3.

    Raises ``BundleError``, with one message for each way a file can be wrong.
    """
    try:
        if not path.is_file():
            raise BundleError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
        with path.open("rb") as stream:
            return _read_header(_Cursor(path, stream, path.stat().st_size))
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error


def _read_header(cursor: _Cursor) -> GGUFHeader:
    version = _read_version(cursor)
    tensor_count = _read_count(cursor, "tensors")
    key_count = _read_count(cursor, "metadata keys")
    metadata, alignment = _read_metadata(cursor, key_count)
    announced = _read_tensors(cursor, tensor_count)
    data_offset = -(-cursor.position // alignment) * alignment
    _place(cursor.path, announced, data_offset, alignment, cursor.file_bytes)
    tensors = tuple(
        GGUFTensor(item.name, item.shape, item.type, data_offset + item.relative, item.size_bytes) for item in announced
    )
    return GGUFHeader(version, alignment, MappingProxyType(metadata), tensors, data_offset, cursor.file_bytes)


def _positive(header: GGUFHeader, key: str, default: int | None = None) -> int:
    value = header.metadata.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise BundleError(f"metadata key {key!r} is {'missing' if value is None else f'{value!r}, not a count'}")
    return value


def count_per_layer(header: GGUFHeader, key: str, layers: int, default: Sequence[int] | None = None) -> list[int]:
    """A count per layer: one number for all, or an array with one for each. Raises ``BundleError``."""
    value = header.metadata.get(key)
    if value is None and default is not None:
        return list(default)
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
        if len(value) != layers or value.min() < 0 or value.max() >= 2**31:
            raise BundleError(f"metadata key {key!r} is not a list of {layers} counts")
        return [int(item) for item in value]
    return [_positive(header, key)] * layers


def _typed(tensors: Sequence[GGUFTensor]) -> tuple[TypedWeights, ...]:
    groups: dict[str, list[GGUFTensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.type, []).append(tensor)
    return tuple(
        TypedWeights(
            name,
            sum(item.parameters for item in group),
            sum(item.size_bytes for item in group),
            sum(prod(item.shape[:-1]) for item in group),
        )
        for name, group in groups.items()
    )


def has_single_blocks(header: GGUFHeader) -> bool:
    """Whether a quantised matrix has rows of one block, as heads that were pruned to very few leave them.

    llama.cpp's kernels for AMX compute those wrongly once 32 tokens come together (0.3.36: mean KL 2.8 instead of
    0.007 on a tiny model of Q8_0 with rows of 32), its plain kernels do not.
    """
    return any(len(item.shape) > 1 and 1 < GGML_TYPES[item.type].block == item.shape[-1] for item in header.tensors)


def kv_elements_per_layer(header: GGUFHeader) -> list[int]:
    """Keys and values that one token leaves in each layer; heads may differ from layer to layer.

    Raises ``BundleError`` when the architecture's counts are missing or absurd.
    """
    architecture = header.metadata.get("general.architecture")
    layers = _positive(header, f"{architecture}.block_count")
    if layers > MAX_COUNT:
        raise BundleError(f"metadata key '{architecture}.block_count' announces {layers} layers")
    hidden = _positive(header, f"{architecture}.embedding_length")
    heads = count_per_layer(header, f"{architecture}.attention.head_count", layers)
    kv_heads = count_per_layer(header, f"{architecture}.attention.head_count_kv", layers, heads)
    head_size = hidden // max(heads[0], 1) or None
    key_length = _positive(header, f"{architecture}.attention.key_length", head_size)
    value_length = _positive(header, f"{architecture}.attention.value_length", head_size)
    return [count * (key_length + value_length) for count in kv_heads]


def workload_from_gguf(header: GGUFHeader) -> Workload:
    """What a device has to do for the model in a GGUF file.

    With tied weights (no ``output.weight``) the embedding is read in full as the head, otherwise it is a ``lookup``.
    An encoder has neither head nor cache.
    Head counts may differ per layer. Raises ``BundleError`` when the architecture's counts are missing or absurd.
    """
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise BundleError("metadata key 'general.architecture' is missing or no string")
    by_name = {tensor.name: tensor for tensor in header.tensors}
    embedding = by_name.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise BundleError(
            "the file has no tensor 'token_embd.weight' of two dimensions", hint="it holds no whole model"
        )
    # Attention that looks both ways keeps no cache, and such a model has no head: one row per token is looked up.
    encodes = header.metadata.get(f"{architecture}.attention.causal") is False
    tied = "output.weight" not in by_name and not encodes
    per_layer = kv_elements_per_layer(header)
    return Workload(
        format="gguf",
        architecture=architecture,
        parameters=sum(tensor.parameters for tensor in header.tensors),
        file_bytes=header.file_bytes,
        weights=_typed([tensor for tensor in header.tensors if tied or tensor is not embedding]),
        lookup=None if tied else _typed([embedding])[0],
        layers=len(per_layer),
        hidden=_positive(header, f"{architecture}.embedding_length"),
        vocabulary=embedding.shape[0],
        kv_elements_per_token=0 if encodes else sum(per_layer),
        heads=max(count_per_layer(header, f"{architecture}.attention.head_count", len(per_layer), [0]), default=0),
    )
