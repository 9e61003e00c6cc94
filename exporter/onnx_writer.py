"""Writes ``model.onnx`` and its data file from a checkpoint, slab by slab of rows, quantised on the way.

Memory is bounded by the workers, not by the model: each holds one slab, or one matrix that has to be transposed (a
fused one with all of its parts) beside what was read of one part.
Knows nothing of why a matrix has its type.
"""

from __future__ import annotations

import errno
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from edgelm.bundle import FileRecord, TensorPlan
from edgelm.errors import BundleError, CheckpointError
from edgelm.progress import SILENT, Progress, Stage
from exporter import ggml
from exporter.architectures.base import ModelDescription, TensorDescription, interleave_rows, split_rows
from exporter.buffers import ThreadBuffers
from exporter.checkpoint import Checkpoint, TensorReader, weight_type
from exporter.gguf import usable_cpus
from exporter.growing_file import GrowingHash
from exporter.onnx_balance import balance_factors, balance_sites, balanced
from exporter.onnx_gptq import compensated_rows, inverse_factor
from exporter.onnx_graph import build_graph
from exporter.onnx_layout import Decoder, decoder_layout
from exporter.onnx_moments import CalibrationWindows, MomentSource, group_of
from exporter.onnx_observed import mean_squares
from exporter.onnx_quantize import quantize_rows
from exporter.onnx_storage import DATA_NAME, Computed, Content, FloatArray, Place, QuantizedMatrix, Storage
from exporter.onnx_types import WeightType, parse_type

MODEL_NAME = "model.onnx"
SLAB_ELEMENTS = 2**17
COMPENSATED_SLAB_ELEMENTS = 2**19  # column by column: longer columns, less overhead
_STRIPE = 64
_LARGEST_HALF = float(np.finfo(np.float16).max)
_COMPENSATED_BITS = 4  # rounding to 8 bits loses less than the kernels' own 8-bit activations


@dataclass(frozen=True, slots=True)
class WeightSource:
    """Where weights come from, moments of their inputs, for rounding with error compensation (4-bit only), and a text
    for balancing weights against their inputs, which the model itself reads as it is without that."""

    checkpoint: Checkpoint
    moments: MomentSource | None = None
    balance: CalibrationWindows | None = None


@dataclass(frozen=True, slots=True)
class _Task:
    """Rows ``start`` to ``stop`` of one part of a content; ``row`` is where they begin within the content.

    A float matrix that is stored transposed is one task: ``start`` to ``stop`` are the rows of all of its parts.
    """

    content: QuantizedMatrix | FloatArray
    part: TensorDescription
    start: int
    stop: int
    row: int

    @property
    def elements(self) -> int:
        return (self.stop - self.start) * (self.part.shape[-1] if len(self.part.shape) > 1 else 1)


def write_onnx(
    directory: Path,
    source: WeightSource,
    description: ModelDescription,
    plans: Sequence[TensorPlan],
    *,
    context: int,
    notes: Mapping[str, str] = MappingProxyType({}),
    threads: int = 0,
    progress: Progress = SILENT,
) -> tuple[Path, FileRecord]:
    """Write ``model.onnx`` and ``model.onnx.data`` with the planned tensors, flushed to disk.

    Returns the path of the former and the record of the latter, which is hashed while it is written.

    ``context`` is the planned one: it can be computed, and so can what ``onnx_layout.position_limit`` tells.
    ``notes`` are more metadata of the model. ``threads`` of 0 means all usable CPUs. Raises ``CheckpointError`` for
    sources that cannot be read or hold NaN or infinity, ``BundleError`` when a file cannot be written.
    """
    decoder = decoder_layout(description, source.checkpoint, context)
    types = {plan.name: parse_type(plan.type) for plan in plans}
    work = _Work(threads or usable_cpus(), progress, decoder.output_matrix.name)
    path, data_path = directory / MODEL_NAME, directory / DATA_NAME
    with _write_errors(directory):
        if source.balance is not None:
            decoder = _balanced(directory, source, decoder, types, work)
        model, storage = build_graph(
            decoder,
            lambda tensor: types[tensor.name],
            metadata={**_metadata(source.checkpoint, description, decoder.positions), **notes},
        )
        digest = _write_data(data_path, source, storage, work)
        with path.open("wb") as stream:
            stream.write(model.SerializeToString(deterministic=True))
            stream.flush()
            os.fsync(stream.fileno())
    _check(path)
    return path, FileRecord(name=DATA_NAME, size_bytes=storage.size_bytes, sha256=digest)


def _balanced(
    directory: Path, source: WeightSource, decoder: Decoder, types: Mapping[str, WeightType], work: _Work
) -> Decoder:
    """The decoder with its channels balanced, by what a first version of the artefact sees in the text."""
    assert source.balance is not None
    sites = balance_sites(decoder)
    outputs = {site.name: f"squares.{index}" for index, site in enumerate(sites)}
    model, storage = build_graph(decoder, lambda tensor: types[tensor.name], metadata={}, observed=outputs)
    path, data_path = directory / MODEL_NAME, directory / DATA_NAME
    try:
        plain = WeightSource(source.checkpoint)
        columns = _count_columns(data_path, plain, storage, work, {name for site in sites for name in site.readers})
        path.write_bytes(model.SerializeToString())
        squares = mean_squares(path, decoder, outputs, source.balance, work.progress)
    finally:
        path.unlink(missing_ok=True)
        data_path.unlink(missing_ok=True)
    return balanced(decoder, balance_factors(sites, squares, columns))


def _metadata(checkpoint: Checkpoint, description: ModelDescription, positions: int) -> dict[str, str]:
    """What an engine wants to know beside the graph, as strings."""
    return {
        "edgelm.graph": "decoder-1",
        "edgelm.name": checkpoint.source.location.rsplit("/", 1)[-1],
        "edgelm.architecture": description.architecture,
        "edgelm.parameters": str(description.parameters),
        "edgelm.context_trained": str(description.dimensions.context_trained),
        "edgelm.context_limit": str(positions),
    }


def _check(path: Path) -> None:
    try:
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError as error:  # a bug of the builder: say so instead of shipping it
        raise BundleError(f"the graph that was built is not valid ONNX: {error}") from error


@contextmanager
def _write_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise BundleError(
                f"no room left in {directory}: {error.strerror}",
                hint="free some space or choose another output directory",
            ) from error
        raise BundleError(f"cannot write to {directory}: {error.strerror or error}") from error


@dataclass(frozen=True, slots=True)
class _Work:
    """How to write: ``head`` is the name of the output matrix, which is the embedding's where both are one."""

    threads: int
    progress: Progress
    head: str


def _write_data(path: Path, source: WeightSource, storage: Storage, work: _Work) -> str:
    """Write all contents, flushed to disk; returns the file's SHA-256."""
    with _new_file(path, storage.size_bytes) as descriptor, GrowingHash(descriptor, storage.size_bytes) as growing:
        _fill(_Ends(storage, growing), source, storage, work, descriptor)
        os.fsync(descriptor)
        return growing.hexdigest()


def _count_columns(
    path: Path, source: WeightSource, storage: Storage, work: _Work, counted: AbstractSet[str]
) -> dict[str, npt.NDArray[np.float64]]:
    """Write all contents for a moment, neither hashed nor flushed; returns sums of squares of the columns of the
    ``counted`` matrices."""
    with _new_file(path, storage.size_bytes) as descriptor:
        return _fill(None, source, storage, work, descriptor, counted)


@contextmanager
def _new_file(path: Path, size_bytes: int) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o644)
    try:
        os.ftruncate(descriptor, size_bytes)
        yield descriptor
    finally:
        os.close(descriptor)


class _Ends:
    """Tells the hash which contents are finished. A content's range goes on to the next one's: nothing is written to
    the bytes between them."""

    def __init__(self, storage: Storage, growing: GrowingHash) -> None:
        starts = [0, *(_first_place(content).offset for content in storage.contents[1:]), storage.size_bytes]
        self._ranges = {id(item): pair for item, pair in zip(storage.contents, pairwise(starts), strict=True)}
        self._left = {id(item): _row_count(item) for item in storage.contents}
        self._growing = growing

    def written(self, content: Content, rows: int) -> None:
        """So many more rows of a content's parts are where they belong. One thread only."""
        self._left[id(content)] -= rows
        if not self._left[id(content)]:
            self._growing.finished(*self._ranges[id(content)])


def _row_count(content: Content) -> int:
    return 0 if isinstance(content, Computed) else sum(part.shape[0] for part in content.parts)


def _first_place(content: Content) -> Place:
    return content.data if isinstance(content, QuantizedMatrix) else content.place


def _fill(
    ends: _Ends | None,
    source: WeightSource,
    storage: Storage,
    work: _Work,
    descriptor: int,
    counted: AbstractSet[str] = frozenset(),
) -> dict[str, npt.NDArray[np.float64]]:
    """Write all contents, and tell their ends; returns sums of squares of columns as far as they are ``counted``."""
    with TensorReader() as reader:
        for file in sorted({header.file for header in source.checkpoint.tensors.values()}):
            reader.open(file)
        worker = _Worker(source, reader, descriptor, counted)
        worker.ends = ends
        for content in storage.contents:
            if isinstance(content, Computed):
                worker.put(content.place, 0, content.values)
                if ends is not None:
                    ends.written(content, 0)
        later = [] if source.moments is None else [item for item in storage.contents if _compensated(item, work)]
        plain = [item for item in storage.contents if item not in later]
        with work.progress.stage("quantising", sum(map(_elements, plain)), unit="weights") as stage:
            _run(worker, [task for item in plain for task in _tasks(item, SLAB_ELEMENTS)], work.threads, stage)
        if source.moments is not None:
            _write_compensated(worker, source.moments, later, work)
    return worker.columns


def _compensated(content: Content, work: _Work) -> bool:
    """Whether a matrix is rounded with error compensation; an embedding that is no head multiplies nothing."""
    if not isinstance(content, QuantizedMatrix) or content.kind.bits != _COMPENSATED_BITS:
        return False
    return content.parts[0].name.startswith("blk.") or content.parts[0].name == work.head


def _write_compensated(worker: _Worker, moments: MomentSource, contents: Sequence[Content], work: _Work) -> None:
    """Round and write layer by layer, as their moments become known."""
    by_group: dict[int, list[Content]] = {}
    for content in contents:
        by_group.setdefault(group_of(content.parts[0]), []).append(content)  # type: ignore[union-attr]
    wanted = [part for content in contents for part in content.parts]  # type: ignore[union-attr]
    if not wanted:
        return
    for group, found in moments.by_group(wanted):
        # Matrices that read the same input share one array of moments, and one factor.
        unique = {id(values): values for values in found.values()}
        factors = {key: inverse_factor(values) for key, values in unique.items()}
        worker.factors = {name: factors[id(values)] for name, values in found.items()}
        _run(
            worker,
            [task for item in by_group[group] for task in _tasks(item, COMPENSATED_SLAB_ELEMENTS)],
            work.threads,
        )
    worker.factors = {}


def _elements(content: Content) -> int:
    return 0 if isinstance(content, Computed) else sum(math.prod(part.shape) for part in content.parts)


def _tasks(content: Content, elements: int) -> Iterator[_Task]:
    if isinstance(content, Computed):
        return
    if isinstance(content, FloatArray) and content.transposed:
        yield _Task(content, content.parts[0], 0, _row_count(content), 0)
        return
    row = 0
    for part in content.parts:
        rows = part.shape[0]
        columns = part.shape[1] if len(part.shape) > 1 else 1
        step = rows if _reordered(part) else max(1, elements // columns)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield _Task(content, part, start, stop, row + start)
        row += rows


def _run(worker: _Worker, tasks: Sequence[_Task], threads: int, stage: Stage | None = None) -> None:
    """All tasks over a pool of threads. The first failure, or Ctrl-C, stops every worker."""
    pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="quantise")
    ended = False
    try:
        futures: Mapping[Future[None], _Task] = {pool.submit(worker.do, task): task for task in tasks}
        for future in as_completed(futures):
            future.result()
            task = futures[future]
            if worker.ends is not None:
                worker.ends.written(task.content, task.stop - task.start)
            if stage is not None:
                stage.advance(task.elements)
        ended = True
    finally:
        if not ended:
            worker.cancelled.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _arranged(
    values: npt.NDArray[np.float32], part: TensorDescription, rows: int, columns: int
) -> npt.NDArray[np.float32]:
    """The numbers that the artefact wants, in its order, from those that the source has. Vectors stay vectors."""
    if part.scale != 1.0 or part.offset != 0.0:
        values = values * np.float32(part.scale) + np.float32(part.offset)
    if part.transposed and len(part.shape) == 2:
        values = np.ascontiguousarray(values.reshape(columns, rows).T)
    elif len(part.shape) == 2:
        values = values.reshape(rows, columns)
    if part.interleave:
        values = interleave_rows(values, part.interleave)
    return split_rows(values, part.split) if part.split else values


def _turn(rows: npt.NDArray[np.float32], columns: npt.NDArray[np.float32]) -> None:
    """Copy rows to columns, by stripes that stay in the cache: twice as fast as in one go."""
    for start in range(0, len(rows), _STRIPE):
        columns[:, start : start + _STRIPE] = rows[start : start + _STRIPE].T


def _stored(place: Place, values: npt.NDArray[np.float32] | npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """Values as they lie in the file. Raises ``CheckpointError`` for those that float16 cannot hold."""
    if place.dtype != "float16":
        return np.ascontiguousarray(values)
    if float(np.abs(values).max(initial=0)) > _LARGEST_HALF:
        raise CheckpointError(
            f"{place.name} has numbers beyond {_LARGEST_HALF:.0f}, which float16 cannot hold",
            hint="use a --quant without -fp16",
        )
    return np.ascontiguousarray(values.astype(np.float16))


def _reordered(part: TensorDescription) -> bool:
    """Whether a matrix can only be read as a whole."""
    return bool(part.split or part.interleave or part.transposed)


class _Worker:
    """What each thread does with a task."""

    def __init__(
        self, source: WeightSource, reader: TensorReader, descriptor: int, counted: AbstractSet[str] = frozenset()
    ) -> None:
        self._source, self._reader, self._descriptor, self._counted = source, reader, descriptor, counted
        self.factors: Mapping[str, npt.NDArray[np.float32]] = {}
        self.columns: dict[str, npt.NDArray[np.float64]] = {}
        self.ends: _Ends | None = None
        self._lock = threading.Lock()
        self._buffers = ThreadBuffers()
        self.cancelled = threading.Event()

    def do(self, task: _Task) -> None:
        """Read, convert and write one task. Raises ``CheckpointError`` or ``OSError``."""
        if self.cancelled.is_set():
            return
        if isinstance(task.content, FloatArray) and task.content.transposed:
            self._put_transposed(task.content)
            return
        rows = self._rows(task.part, task.start, task.stop)
        if isinstance(task.content, QuantizedMatrix):
            self._put_quantized(task, task.content.kind, rows)
        else:
            self.put(task.content.place, task.row, rows)

    def put(self, place: Place, row: int, values: npt.NDArray[np.float32] | npt.NDArray[np.uint8]) -> None:
        """Write rows of an array from its row ``row`` on."""
        row_bytes = place.size_bytes // place.shape[0]
        position = place.offset + row * row_bytes
        view = _stored(place, values).data.cast("B")
        while len(view):
            count = os.pwrite(self._descriptor, view, position)
            view, position = view[count:], position + count

    def _count(self, name: str, rows: npt.NDArray[np.float32]) -> None:
        squares = np.einsum("ij,ij->j", rows, rows).astype(np.float64)
        with self._lock:
            self.columns[name] = self.columns.get(name, 0) + squares

    def _rows(self, part: TensorDescription, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows of a part as the artefact wants them: the thread's own until it asks for the next ones."""
        rows = self._unscaled_rows(part, start, stop)
        if part.row_factors is not None:
            factors = part.row_factors[start:stop]
            rows = rows * (factors if rows.ndim == 1 else factors[:, None])
        if part.column_factors is not None:
            rows = rows * part.column_factors
        if part.name in self._counted:
            self._count(part.name, rows)
        return rows

    def _unscaled_rows(self, part: TensorDescription, start: int, stop: int) -> npt.NDArray[np.float32]:
        if part.values is not None:
            return part.values[start:stop]
        header = self._source.checkpoint.tensors[part.source_name]
        columns = part.shape[1] if len(part.shape) > 1 else 1
        # A vector is too small to be cut, and perhaps smaller than a block.
        whole = len(part.shape) == 1 or _reordered(part)
        first, rows = (0, part.shape[0]) if whole else (start, stop - start)
        transposed = part.transposed and len(part.shape) == 2
        row_bytes = header.size_bytes // (part.shape[0] if transposed else header.shape[0])
        raw = self._buffers.bytes("raw", rows * row_bytes)
        self._reader.read(header, (first + part.skipped) * row_bytes, len(raw), raw)
        values = self._buffers.floats("values", rows * columns)
        ggml.dequantize(raw, weight_type(header), len(values), values)
        if not np.isfinite(values, out=self._buffers.bytes("finite", len(values)).view(np.bool_)).all():
            raise CheckpointError(f"tensor {part.source_name} holds NaN or infinity", hint="the checkpoint is broken")
        arranged = _arranged(values, part, rows, columns)
        return arranged[start:stop] if whole else arranged

    def _put_quantized(self, task: _Task, kind: WeightType, rows: npt.NDArray[np.float32]) -> None:
        matrix = task.content
        assert isinstance(matrix, QuantizedMatrix)
        factor = self.factors.get(task.part.name)
        packed = quantize_rows(rows, kind) if factor is None else compensated_rows(rows, kind, factor)
        self.put(matrix.data, task.row, packed.data)
        self.put(matrix.scales, task.row, packed.scales)
        if matrix.zeros is not None and packed.zeros is not None:
            self.put(matrix.zeros, task.row, packed.zeros)

    def _put_transposed(self, content: FloatArray) -> None:
        """A float matrix whose parts become columns beside each other: one write, however many parts there are."""
        height, width = content.place.shape
        columns = self._buffers.floats("columns", height * width).reshape(height, width)
        row = 0
        for part in content.parts:
            rows = self._rows(part, 0, part.shape[0])
            _turn(rows, columns[:, row : row + len(rows)])
            row += len(rows)
        self.put(content.place, 0, columns)
