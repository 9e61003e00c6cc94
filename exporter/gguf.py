"""Writes a GGUF file in one pass: tensors go from the source to their final place, quantised on the way.

The layout is known before the data, so worker threads take slabs of rows, read, convert and quantise them, and write
them where they belong, in large pieces. Memory is bounded by the workers, not by the model: a slab and a piece each.
Knows what a plan says of each tensor and nothing of why.
"""

from __future__ import annotations

import errno
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from edgelm.bundle import TensorPlan
from edgelm.errors import BundleError, CheckpointError
from edgelm.progress import SILENT, Progress, Stage
from edgelm.units import format_bytes
from exporter import ggml
from exporter.architectures.base import TensorDescription, ordered_rows
from exporter.buffers import ThreadBuffers
from exporter.checkpoint import Checkpoint, TensorReader, weight_type
from exporter.gguf_header import encode_header, padded
from exporter.pieces import Pieces
from exporter.safetensors_header import TensorHeader

SLAB_ELEMENTS = 2**19


@dataclass(frozen=True, slots=True)
class _Slab:
    """Rows ``start`` to ``stop`` of one tensor and the place of its first byte in the file."""

    plan: TensorPlan
    description: TensorDescription
    start: int
    stop: int
    position: int
    size_bytes: int


class RowQuantizer(Protocol):
    """Quantises float32 rows (n, columns) to the bytes of a type, into ``out`` when given. Called from many threads."""

    def __call__(self, rows: ggml.Floats, type_name: str, out: ggml.Bytes | None = None) -> ggml.Bytes:
        """The bytes, as of ``ggml.quantize``."""
        ...


@dataclass(frozen=True)
class _Sources:
    """Where the workers' numbers come from."""

    checkpoint: Checkpoint
    quantizers: Mapping[str, RowQuantizer]


class _Cancelled(Exception):  # noqa: N818  (not an error: it tells workers to go home)
    pass


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_gguf(
    path: Path,
    checkpoint: Checkpoint,
    descriptions: Sequence[TensorDescription],
    plans: Sequence[TensorPlan],
    metadata: Mapping[str, Any],
    *,
    threads: int = 0,
    progress: Progress = SILENT,
    quantizers: Mapping[str, RowQuantizer] = MappingProxyType({}),
) -> None:
    """Write ``path`` with the planned tensors of a checkpoint, flushed to disk when this returns.

    ``metadata`` are all keys; without ``general.architecture`` it is ``checkpoint.architecture``. ``threads`` of 0
    means all usable CPUs. ``quantizers`` replaces libggml's plain quantisation for tensors by name. On any exception
    the file is removed. Raises ``BundleError`` when it cannot be written and ``CheckpointError`` when the source cannot
    be read or holds NaN or infinity.
    """
    try:
        data_start = write_head(path, checkpoint.architecture, metadata, plans)
        write_tensors(
            path, data_start, checkpoint, descriptions, plans, threads=threads, progress=progress, quantizers=quantizers
        )
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def write_head(path: Path, architecture: str, metadata: Mapping[str, Any], plans: Sequence[TensorPlan]) -> int:
    """Write everything but the tensors and give the file its final length; the position of the first tensor.

    Readers of the vocabulary can open the file from then on. Raises ``BundleError``.
    """
    with write_errors(path):
        header = encode_header(architecture, metadata, plans)
        path.write_bytes(header)
        os.truncate(path, len(header) + sum(padded(plan.size_bytes) for plan in plans))
        return len(header)


def write_tensors(
    path: Path,
    position: int,
    checkpoint: Checkpoint,
    descriptions: Sequence[TensorDescription],
    plans: Sequence[TensorPlan],
    *,
    threads: int = 0,
    progress: Progress = SILENT,
    quantizers: Mapping[str, RowQuantizer] = MappingProxyType({}),
) -> None:
    """Fill the file that ``write_head`` made with planned tensors from a position on, and flush it to disk.

    See ``write_gguf``; what is written stays there when it fails.
    """
    by_name = {item.name: item for item in descriptions}
    with write_errors(path):
        slabs = list(_slabs(plans, by_name, position))
        with progress.stage("quantising", sum(slab.size_bytes for slab in slabs), unit="bytes") as stage:
            _write_slabs(path, _Sources(checkpoint, quantizers), slabs, threads or usable_cpus(), stage)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Map failures to write ``path`` to ``BundleError``, a full disk to one that says so."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise BundleError(
                f"no room left while writing {path.name} to {path.parent}: {error.strerror}",
                hint="free some space or choose another output directory",
            ) from error
        raise BundleError(f"cannot write {path}: {error.strerror or error}") from error


def _slabs(
    plans: Sequence[TensorPlan], descriptions: Mapping[str, TensorDescription], data_start: int
) -> Iterator[_Slab]:
    position = data_start
    for plan in plans:
        description = descriptions[plan.name]
        columns, rows = plan.shape[-1], math.prod(plan.shape[:-1])
        if len(plan.shape) == 1 and _reordered(description):  # a bias: its numbers are the rows to reorder
            columns, rows = 1, plan.shape[0]
        row_bytes = ggml.TYPES[plan.type].row_bytes(columns)
        group = rows if description.split or description.transposed else description.interleave or 1
        step = max(1, SLAB_ELEMENTS // (columns * group)) * group
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            size_bytes = (stop - start) * row_bytes
            yield _Slab(plan, description, start, stop, position + start * row_bytes, size_bytes)
        position = padded(position + plan.size_bytes)


def _reordered(description: TensorDescription) -> bool:
    return bool(description.interleave or description.split)


def _changed(description: TensorDescription) -> bool:
    """Whether bytes of the source's type cannot be taken as they are, apart from their order of rows."""
    return description.transposed or description.scale != 1.0 or description.offset != 0.0


def _write_slabs(path: Path, sources: _Sources, slabs: Sequence[_Slab], threads: int, stage: Stage) -> None:
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
    try:
        with TensorReader() as reader:
            checkpoint = sources.checkpoint
            for file in {header.file for header in (*checkpoint.tensors.values(), *checkpoint.finished.values())}:
                reader.open(file)
            pieces = Pieces(descriptor, ((slab.position, slab.size_bytes) for slab in slabs))
            _run(_Worker(sources, reader, pieces), slabs, threads, stage)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _run(worker: _Worker, slabs: Sequence[_Slab], threads: int, stage: Stage) -> None:
    """All slabs over a pool of threads. The first failure, or Ctrl-C, stops every worker before its next slab."""
    pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="quantise")
    futures: dict[Future[None], _Slab] = {}
    try:
        futures = {pool.submit(worker.write, slab): slab for slab in slabs}
        for future in as_completed(futures):
            future.result()
            stage.advance(futures[future].size_bytes)
    finally:
        worker.cancelled.set()
        pool.shutdown(wait=True, cancel_futures=True)


class _Worker:
    """What each thread does with a slab. Buffers belong to threads and are reused, files are shared."""

    def __init__(self, sources: _Sources, reader: TensorReader, pieces: Pieces) -> None:
        self._checkpoint, self._quantizers = sources.checkpoint, sources.quantizers
        self._reader, self._pieces = reader, pieces
        self._buffers = ThreadBuffers()
        self.cancelled = threading.Event()

    def write(self, slab: _Slab) -> None:
        """Read, convert, quantise and write one slab. Raises ``CheckpointError`` or ``OSError``."""
        if self.cancelled.is_set():
            raise _Cancelled
        self._pieces.write(self._data(slab), slab.position)

    def _data(self, slab: _Slab) -> ggml.Bytes:
        if slab.description.values is not None:
            return np.frombuffer(slab.description.values.tobytes(), dtype=np.uint8)
        header = self._checkpoint.tensors[slab.description.source_name]
        source_type = weight_type(header)
        rows = slab.stop - slab.start
        shape = slab.plan.shape
        columns = 1 if len(shape) == 1 and _reordered(slab.description) else shape[-1]  # as in _slabs
        row_bytes = ggml.TYPES[source_type].row_bytes(columns)
        size_bytes = rows * row_bytes
        first = (slab.start + slab.description.skipped) * row_bytes
        raw = self._reader.read(header, first, size_bytes, self._buffers.bytes("raw", size_bytes))
        raw = ordered_rows(raw.reshape(rows, row_bytes), slab.description).reshape(-1)
        if source_type == slab.plan.type and not _changed(slab.description):
            if not ggml.is_valid(raw, source_type):
                raise _not_finite(header.name)
            return raw
        floats = self._buffers.floats("floats", rows * columns)
        ggml.dequantize(raw, source_type, rows * columns, floats)
        if not (math.isfinite(floats.min()) and math.isfinite(floats.max())):  # NaN goes through min and max
            raise _not_finite(header.name)
        floats = _values(floats, slab.description, rows, columns)
        out = self._buffers.bytes("out", slab.size_bytes)
        finished = self._checkpoint.finished.get(header.name)
        if finished is not None and finished.type == slab.plan.type and not _changed(slab.description):
            return self._finished(finished, slab, floats, out)
        quantize = self._quantizers.get(slab.plan.name, ggml.quantize)
        data = quantize(floats.reshape(rows, columns), slab.plan.type, out)
        if not ggml.is_valid(data, slab.plan.type):  # scales of blocks are 16 bits wide
            raise CheckpointError(
                f"tensor {header.name} holds numbers too large for {slab.plan.type}",
                hint=f"give it another type: --type '{slab.plan.name}=F32'",
            )
        return data

    def _finished(self, header: TensorHeader, slab: _Slab, floats: ggml.Floats, out: ggml.Bytes) -> ggml.Bytes:
        """Bytes that the numbers were trained for, which quantising them again might not find."""
        row_bytes = header.shape[1]
        raw = self._reader.read(header, (slab.start + slab.description.skipped) * row_bytes, slab.size_bytes, out)
        raw = ordered_rows(raw.reshape(-1, row_bytes), slab.description).reshape(-1)
        if not np.array_equal(ggml.dequantize(raw, header.type, floats.size), floats):
            raise CheckpointError(
                f"tensor {header.name} was changed after it was finished for {header.type}",
                hint=f"remove {header.file.name} beside it to quantise it anew",
            )
        return raw


def _values(floats: ggml.Floats, description: TensorDescription, rows: int, columns: int) -> ggml.Floats:
    """The numbers that the artefact wants, from those that the source has."""
    if description.transposed:
        floats = np.ascontiguousarray(floats.reshape(columns, rows).T)
    if description.scale != 1.0 or description.offset != 0.0:
        floats = floats * np.float32(description.scale) + np.float32(description.offset)
    return floats


def _not_finite(name: str) -> CheckpointError:
    return CheckpointError(
        f"tensor {name} holds NaN or infinity", hint="the checkpoint is damaged or was trained badly"
    )


def check_room(directory: Path, size_bytes: int) -> None:
    """Refuse to start what cannot be finished. Raises ``BundleError`` with the numbers."""
    parent = next(item for item in (directory, *directory.absolute().parents) if item.exists())
    status = os.statvfs(parent)
    free_bytes = status.f_bavail * status.f_frsize
    if size_bytes > free_bytes:
        raise BundleError(
            f"the bundle needs {format_bytes(size_bytes)} and {parent} has {format_bytes(free_bytes)} left",
            hint="free some space or choose another output directory",
        )
