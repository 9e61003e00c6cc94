"""The ONNX Runtime engine: token ids in, logits out, over one session whose KV cache is ours.

Every input and output is bound once to memory of this process: the cache of all sequences is allocated up front (pages
are taken as they are touched), attention reads and writes it in place, and forgetting tokens is forgetting a length.
Runs the graphs that the exporter builds (``decoder-1``), after ``runtime.onnx_header`` has validated the file. Knows no
text and no sampling. Importing this module does not load the library; ``load_engine`` does.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelm.errors import BundleError, EngineError, UsageError
from edgelm.units import format_bytes
from runtime.engine import (
    Chunk,
    Engine,
    EngineInfo,
    EngineInterruptedError,
    EngineOptions,
    Logits,
    State,
    check_chunks,
)
from runtime.engines.onnx_cache import make_cache
from runtime.engines.onnx_foreign import ForeignOnnxEngine, check_foreign_options, understand
from runtime.engines.onnx_providers import attention_device, check_providers, device_inputs
from runtime.engines.onnx_session import (
    SessionThreads,
    choose_threads,
    describe,
    first_line,
    load_library,
    open_session,
    runtime_errors,
)
from runtime.huge_pages import collapse_resident
from runtime.mapped_pages import let_go
from runtime.memory import snapshot
from runtime.onnx_header import FLOAT, FLOAT16, OnnxModel, read_onnx_model, stored_bytes

GRAPH = "decoder-1"
PREFILL_STEP = 128
"""Tokens per step of a long prompt: as fast as larger steps on CPUs, and activations stay small."""
_MAX_SEQUENCES = 256
_BINDINGS_KEPT = 16
_PAST = re.compile(r"past_key_values\.([0-9]{1,4})\.key")
_KV_TYPES = {FLOAT: "f32", FLOAT16: "f16"}
_CONTROL_INPUTS = ("input_ids", "seqlens_k", "total_sequence_length", "logit_rows")


@dataclass(frozen=True, slots=True)
class _Shape:
    """What the graph says of itself. ``kv_heads`` per layer; ``kv_type`` is that of all that it computes with."""

    kv_heads: tuple[int, ...]
    kv_type: str
    head_size: int
    vocabulary: int
    context_limit: int
    context_trained: int
    parameters: int
    weights_bytes: int

    @property
    def kv_dtype(self) -> npt.DTypeLike:
        return np.float16 if self.kv_type == "f16" else np.float32

    @property
    def kv_bytes_per_token(self) -> int:
        return np.dtype(self.kv_dtype).itemsize * 2 * sum(self.kv_heads) * self.head_size


def load_any_engine(path: Path, options: EngineOptions) -> Engine:
    """Load a ``model.onnx``, whoever exported it. Raises what ``load_engine`` raises."""
    model = read_onnx_model(path)
    return load_engine(path, options) if "edgelm.graph" in model.metadata else _load_foreign(path, model, options)


def _load_foreign(path: Path, model: OnnxModel, options: EngineOptions) -> ForeignOnnxEngine:
    _check_options(options)
    graph = understand(path, model)
    check_foreign_options(options, graph, path)
    threads = _choose_threads(options)
    started = time.perf_counter()
    runtime = load_library()
    session = open_session(runtime, path, threads, options.providers)
    info = EngineInfo(
        engine="onnxruntime",
        versions={"onnxruntime": runtime.__version__},
        model_name=path.parent.name,
        architecture="unknown",
        vocabulary=graph.vocabulary,
        context=options.context,
        context_trained=graph.context_trained or options.context,
        sequences=options.sequences,
        threads_decode=threads.count,
        threads_prefill=threads.count,
        weights_bytes=graph.weights_bytes,
        kv_bytes=8 * sum(graph.heads) * graph.head_size * options.context * options.sequences,
        parameters=graph.parameters,
        load_s=time.perf_counter() - started,
        system=describe(session, threads, options.providers)
        + ", caches that grow (a graph that EdgeLM did not export)",
        waiting=threads.waiting.kind,
        waiting_reason=threads.waiting.reason,
        kv_type="f32",
    )
    run_options = runtime.RunOptions()
    run_options.log_severity_level = 4
    errors = runtime_errors(runtime)
    return ForeignOnnxEngine(session, run_options, errors, info, graph, options)


def load_engine(path: Path, options: EngineOptions) -> OnnxEngine:
    """Load a ``model.onnx`` that ``edgelm export`` made.

    Raises ``BundleError`` when a file is missing or malformed, ``UsageError`` for options that make no sense here,
    ``EngineError`` when ONNX Runtime or the memory refuses.
    """
    _check_options(options)
    threads = _choose_threads(options)
    model = read_onnx_model(path)
    shape = _read_shape(path, model)
    if options.context > shape.context_limit:
        raise EngineError(
            f"a context of {options.context} tokens was asked for, {path.name} can compute {shape.context_limit}",
            hint=f"use --context {shape.context_limit} or less, or export with a longer --context",
        )
    started = time.perf_counter()
    runtime = load_library()
    check_providers(runtime, options.providers, path, half=shape.kv_type == "f16")
    before_bytes = snapshot().anonymous_bytes
    session = open_session(runtime, path, threads, options.providers)
    # Kernels keep packed copies of weights, and the file's pages of a table that is also looked up would stay beside.
    # Not earlier: while ONNX Runtime makes a session it unmaps what it has converted, and maps other memory there.
    let_go(path.with_name(f"{path.name}.data"))
    device = attention_device(session) if options.providers else None
    huge_page_bytes = collapse_resident()
    info = EngineInfo(
        engine="onnxruntime",
        versions={"onnxruntime": runtime.__version__},
        model_name=model.metadata.get("edgelm.name", path.stem),
        architecture=model.metadata.get("edgelm.architecture", "unknown"),
        vocabulary=shape.vocabulary,
        context=options.context,
        context_trained=shape.context_trained,
        sequences=options.sequences,
        threads_decode=threads.count,
        threads_prefill=threads.count,
        weights_bytes=shape.weights_bytes,
        kv_bytes=shape.kv_bytes_per_token * options.context * options.sequences,
        parameters=shape.parameters,
        load_s=time.perf_counter() - started,
        system=describe(session, threads, options.providers) + ("" if device is None else f", cache on {device}"),
        buffers={"weights_copied": max(snapshot().anonymous_bytes - before_bytes, 0)},
        huge_page_bytes=huge_page_bytes,
        waiting=threads.waiting.kind,
        waiting_reason=threads.waiting.reason,
        kv_type=shape.kv_type,
    )
    return OnnxEngine(runtime, session, info, (shape, device), options)


@dataclass(frozen=True, slots=True)
class TokenNotes:
    """What the exporter wrote of tokens: texts by role for templates, ids that end an answer, an id to start with."""

    special_tokens: dict[str, str]
    stop_tokens: frozenset[int]
    bos: int | None


def read_token_notes(path: Path) -> TokenNotes:
    """The notes in a model's metadata. Raises ``BundleError`` when they are missing or malformed."""
    metadata = read_onnx_model(path).metadata
    names = ("edgelm.special_tokens", "edgelm.stop_tokens", "edgelm.bos")
    try:
        texts, ends, bos = (json.loads(metadata.get(name, "")) for name in names)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: its metadata on tokens is not JSON", hint="export it again") from error
    texts_good = isinstance(texts, dict) and all(isinstance(text, str) for text in texts.values())
    ids = [*(ends if isinstance(ends, list) else [None]), *([] if bos is None else [bos])]
    if not texts_good or not all(isinstance(token, int) and 0 <= token < 2**31 for token in ids):
        raise BundleError(f"{path}: its metadata on tokens is malformed", hint="export it again")
    return TokenNotes(texts, frozenset(ends), bos)


def _check_options(options: EngineOptions) -> None:
    for name in ("context", "sequences", "batch"):
        if getattr(options, name) < 1:
            raise UsageError(f"{name} must be at least 1, not {getattr(options, name)}")
    for name in ("threads_decode", "threads_prefill"):
        if not 0 <= getattr(options, name) <= 512:
            raise UsageError(f"{name} must be between 0 (ask the host) and 512, not {getattr(options, name)}")
    if options.sequences > _MAX_SEQUENCES:
        raise UsageError(f"at most {_MAX_SEQUENCES} sequences are kept, {options.sequences} were asked for")
    if options.kv_type == "q8_0":
        raise UsageError(
            "the KV cache of an ONNX model is what its graph computes with, float32 or float16",
            hint="use a GGUF bundle for a quantised cache",
        )
    if not options.mmap:
        raise UsageError("ONNX Runtime maps weights by itself; mmap cannot be switched off", hint="leave it on")


def _choose_threads(options: EngineOptions) -> SessionThreads:
    """One session has one pool of threads: decode and prefill share it."""
    asked = {count for count in (options.threads_decode, options.threads_prefill) if count}
    if len(asked) > 1:
        raise UsageError(
            f"ONNX Runtime uses the same threads for decode and prefill, not {options.threads_decode} and "
            f"{options.threads_prefill}",
            hint="ask for one number of threads",
        )
    return choose_threads(asked.pop() if asked else 0)


def _read_shape(path: Path, model: OnnxModel) -> _Shape:
    """Counts of a ``decoder-1`` graph, from its inputs and what the exporter noted. Raises ``BundleError``."""
    if model.metadata.get("edgelm.graph") != GRAPH:
        raise BundleError(
            f"{path} is not a decoder that EdgeLM exported: its inputs are "
            f"{', '.join(value.name for value in model.inputs)[:300]}",
            hint="export the checkpoint with: edgelm export SOURCE --format onnx",
        )
    inputs = {value.name: value for value in model.inputs}
    layers = sum(1 for name in inputs if _PAST.fullmatch(name))
    expected = {*_CONTROL_INPUTS, *(f"past_key_values.{i}.{part}" for i in range(layers) for part in ("key", "value"))}
    outputs = {value.name: value for value in model.outputs}
    logits = outputs.get("logits")
    if not layers or set(inputs) != expected or logits is None or len(outputs) != 2 * layers + 1:
        raise BundleError(f"{path} does not have the inputs and outputs of its graph {GRAPH}", hint="export it again")
    caches = [inputs[f"past_key_values.{index}.key"] for index in range(layers)]
    kinds = {cache.type for cache in caches}
    shapes = [cache.shape for cache in caches if cache.shape and len(cache.shape) == 4]
    heads = [shape[1] for shape in shapes if isinstance(shape[1], int) and 0 < shape[1] < 2**16]
    sizes = {shape[3] for shape in shapes if isinstance(shape[3], int) and 0 < shape[3] < 2**16}
    vocabulary = logits.shape[-1] if logits.shape else None
    has_cache = len(heads) == layers and len(sizes) == 1 and len(kinds) == 1 and kinds <= _KV_TYPES.keys()
    if not has_cache or not isinstance(vocabulary, int) or not 0 < vocabulary < 2**31:
        raise BundleError(f"{path} does not state the shapes of its cache and logits", hint="export it again")
    return _Shape(
        kv_heads=tuple(heads),
        kv_type=_KV_TYPES[kinds.pop()],
        head_size=sizes.pop(),
        vocabulary=vocabulary,
        context_limit=_count(path, model, "edgelm.context_limit"),
        context_trained=_count(path, model, "edgelm.context_trained"),
        parameters=_count(path, model, "edgelm.parameters"),
        weights_bytes=stored_bytes(model.initializers),
    )


def context_limit(path: Path) -> int:
    """Tokens that a model can compute. Raises ``BundleError`` when it is none that EdgeLM exported."""
    return _count(path, read_onnx_model(path), "edgelm.context_limit")


def _count(path: Path, model: OnnxModel, key: str) -> int:
    value = model.metadata.get(key, "")
    if not re.fullmatch(r"[1-9][0-9]{0,15}", value):
        raise BundleError(f"{path}: its metadata {key} is {value!r}, which is no count", hint="export it again")
    return int(value)


class _Binding:
    """Inputs and outputs of one shape of step, bound to memory: ``batch`` sequences from ``first`` on."""

    def __init__(self, engine: OnnxEngine, first: int, batch: int, tokens: int, rows: int) -> None:
        self.tokens = np.zeros((batch, tokens), np.int64)
        self.lengths = np.zeros(batch, np.int32)
        self.total = np.zeros((), np.int32)
        self.rows = np.zeros(rows, np.int64)
        self.io = engine.session.io_binding()
        arrays: tuple[npt.NDArray[Any], ...] = (self.tokens, self.lengths, self.total, self.rows)
        self._controls = dict(zip(_CONTROL_INPUTS, arrays, strict=True))
        self.bind_controls(_CONTROL_INPUTS)
        for index, pair in enumerate(engine.caches):
            for part, cache in zip(("key", "value"), pair, strict=True):
                place = (cache.device, 0, cache.dtype.type, (batch, *cache.shape[1:]), cache.address(first))
                self.io.bind_input(f"past_key_values.{index}.{part}", *place)
                self.io.bind_output(f"present.{index}.{part}", *place)
        self._logits_address = 0

    def bind_controls(self, names: Iterable[str]) -> None:
        """Bind control inputs as their arrays are now: binding copies those that a device reads from its own memory."""
        for name in names:
            array = self._controls[name]
            self.io.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def bind_logits(self, logits: Logits) -> None:
        """Let the next run write its logits here."""
        if logits.ctypes.data != self._logits_address:
            self._logits_address = logits.ctypes.data
            self.io.bind_output("logits", "cpu", 0, np.float32, logits.shape, self._logits_address)


@dataclass(frozen=True, slots=True)
class _Step:
    """One run of the graph.

    ``tokens`` (batch, n) for the sequences ``first`` ...; ``starts`` their lengths before it. ``wanted`` are positions
    in the flattened tokens, ``results`` the rows of the answer that their logits become.
    """

    first: int
    tokens: npt.NDArray[np.int64]
    starts: tuple[int, ...]
    wanted: tuple[int, ...]
    results: tuple[int, ...]


class OnnxEngine:
    """``runtime.engine.Engine`` over one ``InferenceSession``. Not thread-safe, except for ``interrupt``."""

    def __init__(
        self,
        runtime: Any,
        session: Any,
        info: EngineInfo,
        placed: tuple[_Shape, str | None],
        options: EngineOptions,
    ) -> None:
        """``placed`` are the graph's shape and the device that the cache lies on, None for RAM."""
        shape, device = placed
        self.session: Any = session
        self._info = info
        self._options = options
        self._step = min(options.batch, PREFILL_STEP)
        self._lengths = [0] * options.sequences
        copied = device_inputs(session) if options.providers else frozenset()
        self._copied = tuple(name for name in _CONTROL_INPUTS if name in copied)
        try:
            self.caches = [
                tuple(
                    make_cache(
                        runtime, (options.sequences, heads, options.context, shape.head_size), shape.kv_dtype, device
                    )
                    for _ in "kv"
                )
                for heads in shape.kv_heads
            ]
        except runtime_errors(runtime) as error:
            raise EngineError(
                f"no room for a cache of {format_bytes(info.kv_bytes)}: {first_line(error)}",
                hint="use a smaller --context or fewer sequences",
            ) from error
        self._logits = np.empty((options.sequences, shape.vocabulary), np.float32)
        self._bindings: dict[tuple[int, int, int, int], _Binding] = {}
        self._run_options = runtime.RunOptions()
        self._run_options.log_severity_level = 4
        self._errors = runtime_errors(runtime)
        self._interrupted = False

    @property
    def info(self) -> EngineInfo:
        return self._info

    def forward(self, chunks: Sequence[Chunk]) -> Logits:
        """See ``Engine.forward``. Single tokens of several sequences are computed together, longer chunks in turn."""
        self._check(chunks)
        self._interrupted = self._run_options.terminate = False
        rows = [_rows(chunk) for chunk in chunks]
        total = sum(rows)
        answer = (
            self._logits[:total] if total <= len(self._logits) else np.empty((total, self._info.vocabulary), np.float32)
        )
        before = {chunk.sequence: self._lengths[chunk.sequence] for chunk in chunks}
        for step in self._steps(chunks, rows):
            self._run(step, answer, before)
        for chunk in chunks:
            self._lengths[chunk.sequence] = before[chunk.sequence] + len(chunk.tokens)
        return answer

    def _check(self, chunks: Sequence[Chunk]) -> None:
        if self.session is None:
            raise EngineError("the engine is closed")
        check_chunks(self, chunks, self._options)

    def _steps(self, chunks: Sequence[Chunk], rows: Sequence[int]) -> Iterator[_Step]:
        offsets = np.concatenate(([0], np.cumsum(rows))).tolist()
        singles = sorted((chunk.sequence, index) for index, chunk in enumerate(chunks) if len(chunk.tokens) == 1)
        for group in self._neighbours(singles):
            yield self._decode_step(group, chunks, offsets)
        for index, chunk in enumerate(chunks):
            if len(chunk.tokens) > 1:
                yield from self._prefill_steps(chunk, rows[index], offsets[index])

    def _neighbours(self, singles: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        """Runs of sequences that are computed together.

        A sequence between two of them that gets no token takes part idly: what it writes lies behind its last token.
        A full one has no room behind it, so a run ends there; so it does where more would be idle than busy.
        """
        group: list[tuple[int, int]] = []
        for item in singles:
            idle = range(group[-1][0] + 1, item[0]) if group else range(0)
            full = any(self._lengths[sequence] >= self._info.context for sequence in idle)
            if group and (full or len(idle) > len(group)):
                yield group
                group = []
            group.append(item)
        if group:
            yield group

    def _decode_step(self, group: Sequence[tuple[int, int]], chunks: Sequence[Chunk], offsets: Sequence[int]) -> _Step:
        first, last = group[0][0], group[-1][0]
        tokens = np.zeros((last - first + 1, 1), np.int64)
        wanted, results = [], []
        for sequence, index in group:
            tokens[sequence - first, 0] = chunks[index].tokens[0]
            if chunks[index].logits != "none":
                wanted.append(sequence - first)
                results.append(offsets[index])
        return _Step(first, tokens, tuple(self._lengths[first : last + 1]), tuple(wanted), tuple(results))

    def _prefill_steps(self, chunk: Chunk, rows: int, offset: int) -> Iterator[_Step]:
        tokens = np.asarray(chunk.tokens, np.int64)
        length = self._lengths[chunk.sequence]
        for start in range(0, len(tokens), self._step):
            piece = tokens[start : start + self._step]
            ends = start + len(piece) == len(tokens)
            if chunk.logits == "all":
                wanted = range(len(piece))
                results = range(offset + start, offset + start + len(piece))
            else:
                wanted = range(len(piece) - 1, len(piece)) if ends and rows else range(0)
                results = range(offset, offset + len(wanted))
            yield _Step(chunk.sequence, piece[None, :], (length + start,), tuple(wanted), tuple(results))

    def _run(self, step: _Step, answer: Logits, before: dict[int, int]) -> None:
        batch, count = step.tokens.shape
        binding = self._binding(step.first, batch, count, len(step.wanted))
        binding.tokens[:] = step.tokens
        binding.lengths[:] = step.starts
        binding.lengths += count - 1
        binding.total[...] = max(step.starts) + count
        binding.rows[:] = step.wanted
        in_order = all(after == row + 1 for row, after in pairwise(step.results))
        first_row = step.results[0] if step.results else 0
        logits = (
            answer[first_row : first_row + len(step.results)]
            if in_order
            else np.empty((len(step.results), self._info.vocabulary), np.float32)
        )
        binding.bind_logits(logits)
        if self._copied:
            binding.bind_controls(self._copied)
        try:
            self.session.run_with_iobinding(binding.io, self._run_options)
        except self._errors as error:
            self._failed(error, before)
        if not in_order:
            answer[list(step.results)] = logits

    def _failed(self, error: Exception, before: dict[int, int]) -> None:
        if self._interrupted:
            raise EngineInterruptedError("the computation was interrupted") from error
        for sequence in before:
            self._lengths[sequence] = 0
        raise EngineError(f"ONNX Runtime failed to compute: {first_line(error)}") from error

    def _binding(self, first: int, batch: int, tokens: int, rows: int) -> _Binding:
        key = (first, batch, tokens, rows)
        binding = self._bindings.get(key)
        if binding is None:
            if len(self._bindings) >= _BINDINGS_KEPT:
                self._bindings.pop(next(iter(self._bindings)))
            binding = self._bindings[key] = _Binding(self, first, batch, tokens, rows)
        return binding

    def length(self, sequence: int = 0) -> int:
        if not 0 <= sequence < len(self._lengths):
            raise EngineError(f"there is no sequence {sequence}: the engine keeps {len(self._lengths)}")
        return self._lengths[sequence]

    def truncate(self, length: int, sequence: int = 0) -> None:
        held = self.length(sequence)
        if self.session is None:
            raise EngineError("the engine is closed")
        if not 0 <= length <= held:
            raise EngineError(f"cannot truncate sequence {sequence} of {held} tokens to {length}")
        self._lengths[sequence] = length

    def state(self, sequence: int = 0) -> State:
        """See ``runtime.engine.StateKeeper``: keys and values of (heads, tokens, head size), layer by layer."""
        length = self.length(sequence)
        if self.session is None:
            raise EngineError("the engine is closed")
        held = [cache.read(sequence, length).reshape(-1) for pair in self.caches for cache in pair]
        return np.concatenate(held).view(np.uint8)

    def restore(self, state: State, length: int, sequence: int = 0) -> None:
        """See ``runtime.engine.StateKeeper``."""
        self.truncate(0, sequence)
        caches = [cache for pair in self.caches for cache in pair]
        shapes = [(cache.shape[1], length, cache.shape[3]) for cache in caches]
        sizes = [prod(shape) * cache.dtype.itemsize for shape, cache in zip(shapes, caches, strict=True)]
        if not 0 < length <= self._info.context or len(state) != sum(sizes):
            raise EngineError(f"{len(state)} bytes are no state of {length} tokens")
        start = 0
        for cache, shape, size in zip(caches, shapes, sizes, strict=True):
            cache.write(sequence, np.frombuffer(state, cache.dtype, prod(shape), start).reshape(shape))
            start += size
        self._lengths[sequence] = length

    def resident_kv_bytes(self) -> int:
        """What tokens were written to: the rest of the cache was never touched."""
        found = [cache.resident_bytes() for pair in self.caches for cache in pair]
        return sum(size for size in found if size is not None) if None not in found else self._info.kv_bytes

    def interrupt(self) -> None:
        """See ``Engine.interrupt``. Takes effect before the next operator of the graph."""
        self._interrupted = True
        self._run_options.terminate = True

    def close(self) -> None:
        self._bindings.clear()
        self.caches = []
        self.session = None


def _rows(chunk: Chunk) -> int:
    return {"none": 0, "last": 1, "all": len(chunk.tokens)}[chunk.logits]
