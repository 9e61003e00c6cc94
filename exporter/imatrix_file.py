"""llama.cpp's importance-matrix files: sums of squared inputs per column, read and written in both formats.

The GGUF format keeps raw sums and counts of tokens; the legacy one (``.dat``) keeps sums scaled to a number of chunks
and no chunk size. Files are untrusted: every length is checked before it is used. Knows nothing of how sums are made.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter

from edgelm.errors import BundleError, CheckpointError
from runtime.gguf_header import read_gguf_header

Floats = npt.NDArray[np.float32]
_SUMS, _COUNTS = ".in_sum2", ".counts"
_DATASETS, _CHUNKS, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
_LIMIT_BYTES = 2**30
_NAME_LIMIT = 512


@dataclass(frozen=True)
class Entry:
    """Of one matrix: ``sums`` (matrices, columns) of squared inputs and how many inputs went into each (matrices)."""

    sums: Floats
    counts: Floats

    @property
    def means(self) -> Floats:
        """Mean squared input, one row per expert (one for dense models); experts that saw nothing get ones."""
        seen = self.counts[:, None]
        return np.where(seen > 0, self.sums / np.maximum(seen, 1e-30), 1.0).astype(np.float32)


@dataclass(frozen=True)
class ImportanceFile:
    """A file's content. ``chunk_size`` of 0 is unknown, as in the legacy format, whose counts are of chunks."""

    entries: Mapping[str, Entry]
    datasets: tuple[str, ...] = ()
    chunk_count: int = 0
    chunk_size: int = 0


def read_importance(path: Path) -> ImportanceFile:
    """Read either format. Raises ``CheckpointError`` naming what is wrong with the file."""
    try:
        if path.stat().st_size > _LIMIT_BYTES:
            raise CheckpointError(f"{path} is larger than {_LIMIT_BYTES} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    try:
        found = _read_gguf(path, data) if data[:4] == b"GGUF" else _read_legacy(data)
    except BundleError as error:
        raise CheckpointError(error.message, hint=error.hint) from error
    except (struct.error, ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is no importance matrix: {error}", hint="make one with llama-imatrix") from error
    for name, entry in found.entries.items():
        if not (np.isfinite(entry.sums).all() and (entry.sums >= 0).all()):
            raise CheckpointError(f"{path}: entry {name} holds numbers that are no sums of squares")
    return found


def write_importance(path: Path, content: ImportanceFile, *, legacy: bool = False) -> None:
    """Write the GGUF format, or the legacy one. Raises ``BundleError`` when the file cannot be written."""
    try:
        if legacy:
            path.write_bytes(_legacy_bytes(content))
        else:
            _write_gguf(path, content)
    except OSError as error:
        raise BundleError(f"cannot write {path}: {error.strerror or error}") from error


def _read_gguf(path: Path, data: bytes) -> ImportanceFile:
    header = read_gguf_header(path)
    arrays: dict[str, Floats] = {}
    for item in header.tensors:
        if item.type != "F32":
            raise ValueError(f"{item.name} is stored as {item.type}")
        values = np.frombuffer(data, np.float32, item.size_bytes // 4, item.offset)
        arrays[item.name] = values.reshape(item.shape).astype(np.float32)
    entries = {}
    for name in sorted({key.removesuffix(_SUMS).removesuffix(_COUNTS) for key in arrays}):
        if name + _SUMS not in arrays or name + _COUNTS not in arrays:
            raise ValueError(f"{name} has sums or counts only")
        counts = arrays[name + _COUNTS].reshape(-1)
        entries[name] = Entry(arrays[name + _SUMS].reshape(len(counts), -1), counts)
    if not entries:
        raise ValueError("it has no entries")
    metadata = header.metadata
    datasets = metadata.get(_DATASETS, ())
    return ImportanceFile(
        entries, tuple(str(item) for item in datasets), int(metadata.get(_CHUNKS, 0)), int(metadata.get(_CHUNK_SIZE, 0))
    )


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self.position = data, 0

    def integer(self) -> int:
        (value,) = struct.unpack_from("<i", self._data, self.position)
        self.position += 4
        return int(value)

    def take(self, size_bytes: int) -> bytes:
        if size_bytes < 0 or self.position + size_bytes > len(self._data):
            raise ValueError(f"{size_bytes} bytes are announced, {len(self._data) - self.position} are left")
        self.position += size_bytes
        return self._data[self.position - size_bytes : self.position]

    def ended(self) -> bool:
        return self.position >= len(self._data)


def _read_legacy(data: bytes) -> ImportanceFile:
    reader = _Reader(data)
    count = reader.integer()
    if not 1 <= count <= len(data) // 12:
        raise ValueError(f"{count} entries are announced")
    entries = {}
    for _ in range(count):
        length = reader.integer()
        if not 1 <= length <= _NAME_LIMIT:
            raise ValueError(f"a name of {length} bytes")
        name = reader.take(length).decode()
        chunks, values = reader.integer(), reader.integer()
        if values < 1 or chunks < 1:
            raise ValueError(f"{name} has {values} values over {chunks} chunks")
        sums = np.frombuffer(reader.take(4 * values), np.float32).reshape(1, -1).copy()
        entries[name] = Entry(sums, np.array([chunks], np.float32))
    if reader.ended():
        return ImportanceFile(entries)
    chunk_count = reader.integer()
    datasets = () if reader.ended() else (reader.take(reader.integer()).decode(),)
    return ImportanceFile(entries, datasets, chunk_count)


def _write_gguf(path: Path, content: ImportanceFile) -> None:
    writer = GGUFWriter(path, arch="")
    try:
        writer.kv_data[0].pop("general.architecture", None)  # llama.cpp's files have none
        writer.add_type("imatrix")
        writer.add_array(_DATASETS, list(content.datasets) or [""])
        writer.add_uint32(_CHUNKS, content.chunk_count)
        writer.add_uint32(_CHUNK_SIZE, content.chunk_size)
        for name in sorted(content.entries):
            entry = content.entries[name]
            writer.add_tensor(name + _SUMS, np.ascontiguousarray(entry.sums, dtype=np.float32))
            writer.add_tensor(name + _COUNTS, np.ascontiguousarray(entry.counts[:, None], dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _legacy_bytes(content: ImportanceFile) -> bytes:
    size = max(content.chunk_size, 1)
    parts = [struct.pack("<i", len(content.entries))]
    for name in sorted(content.entries):
        entry, encoded = content.entries[name], name.encode()
        chunks = max(1, -(-int(entry.counts.max()) // size))
        values = (entry.means * chunks).astype(np.float32).reshape(-1)
        parts += [struct.pack("<i", len(encoded)), encoded, struct.pack("<ii", chunks, len(values)), values.tobytes()]
    dataset = (content.datasets[-1] if content.datasets else "").encode()
    return b"".join([*parts, struct.pack("<ii", content.chunk_count, len(dataset)), dataset])
