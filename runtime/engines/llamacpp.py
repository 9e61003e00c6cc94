"""The llama.cpp engine: token ids in, logits out, over the low-level C API of llama-cpp-python.

One batch of numpy arrays is reused for every call and handed to C as it is, logits come back as a view of llama.cpp's
own buffer: a decode step costs about 20 microseconds of Python. Knows no sampling, no chat and no text. Importing this
module does not load the library; ``load_engine`` does.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from edgelm.bundle import Choice
from edgelm.errors import BundleError, EngineError, UsageError
from runtime.attention import ON, check_attention, choose_attention, with_copies
from runtime.engine import Chunk, EngineInfo, EngineInterruptedError, EngineOptions, Logits, State, check_chunks
from runtime.engines.llamacpp_batch import AbortSwitch, Batch
from runtime.engines.llamacpp_choice import DOUBTED, GraphChoice
from runtime.engines.llamacpp_devices import can_offload, device_now, find_devices, place_layers
from runtime.engines.llamacpp_inputs import InputSquares
from runtime.engines.llamacpp_log import EngineLog
from runtime.engines.llamacpp_vocabulary import LlamaVocabulary
from runtime.gguf_header import has_single_blocks, read_gguf_header, workload_from_gguf
from runtime.huge_pages import collapse_resident, from_first_use
from runtime.libllama import import_declarations, kernel_set, load_kernels
from runtime.offload import offload_of, repacks_host, room_of
from runtime.tiles import apart, has_tiles
from runtime.waiting import decided, let_helpers_go, prepare_openmp
from targets.host import default_threads
from targets.predict import score_bytes
from targets.vram import Device, OffloadPlan

_KV_BYTES_PER_ELEMENT = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32}  # ggml blocks: q8_0 is 32 int8 and one f16 scale
_CONTEXT_STEP = 256  # llama_context pads every sequence's share of the cache to this
_MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ
_NO_SLOT, ABORTED = 1, 2  # return values of llama_decode and llama_encode


_log = EngineLog()
take_messages = _log.take


def note_buffers(device: Device | None) -> None:
    """From here on note what a model's buffers take, those on ``device`` apart; earlier messages are forgotten."""
    _log.take()
    _log.buffers, _log.device = {}, device


def noted_buffers() -> dict[str, int]:
    """Bytes of the buffers that were announced since, as ``EngineInfo.buffers`` names them."""
    return {"weights_copied": 0, **_log.buffers}


_library_lock = threading.Lock()
_library: Any = None


def load_library() -> Any:
    """The ``llama_cpp.llama_cpp`` module, with its log captured. Raises ``EngineError`` when it cannot be loaded."""
    global _library
    with _library_lock:
        if _library is None:
            prepare_openmp()
            try:
                library = import_declarations()
            except ImportError as error:
                raise EngineError(
                    f"llama-cpp-python cannot be imported: {error}", hint="pip install llama-cpp-python"
                ) from error
            except (OSError, RuntimeError) as error:  # a missing or foreign libllama
                raise EngineError(
                    f"the llama.cpp library cannot be loaded: {error}", hint="see: edgelm doctor"
                ) from error
            _log.callback = library.llama_log_callback(_log.receive)
            library.llama_log_set(_log.callback, ctypes.c_void_p(0))
            load_kernels(library)
            library.llama_backend_init()
            _library = library
        return _library


def kv_bytes_per_token(elements: int, kv_type: str) -> float:
    """Bytes of one token's keys and values, ``elements`` of them over all layers, in a cache of a type."""
    return elements * _KV_BYTES_PER_ELEMENT[kv_type]


def load_vocabulary(path: Path) -> LlamaVocabulary:
    """Only the vocabulary of a GGUF file, without weights. Raises ``BundleError`` and ``EngineError``."""
    check_file(path)
    read_gguf_header(path)
    library = load_library()
    parameters = library.llama_model_default_params()
    parameters.vocab_only = True
    _listed = place_layers(library, parameters, None, 0)
    model = library.llama_model_load_from_file(os.fsencode(path), parameters)
    if not model:
        raise EngineError(f"llama.cpp cannot read the vocabulary of {path}: {_log.take()}")
    return LlamaVocabulary(library, model, owns_model=True)


def load_engine(
    path: Path, options: EngineOptions, observer: InputSquares | None = None, *, as_filed: bool = False
) -> LlamaCppEngine:
    """Load a GGUF file. An ``observer`` sees what goes into every matrix, which makes computing slower; ``as_filed``
    has no weights rearranged for the CPU's kernels, which is for measuring alone.

    Raises ``BundleError`` when the file is missing or its header is malformed, ``UsageError`` for options that make
    no sense, ``EngineError`` when llama.cpp or the memory refuses.
    """
    _check_options(options)
    check_file(path)
    header = read_gguf_header(path)
    workload = workload_from_gguf(header)
    decode, prefill = default_threads()
    threads = (options.threads_decode or int(decode.value), options.threads_prefill or int(prefill.value))
    library = load_library()
    offload = offload_of(library, header, options, path.name)
    scores = score_bytes(workload, options.context, options.batch)
    cached = kv_bytes_per_token(workload.kv_elements_per_token, options.kv_type) * options.sequences * options.context
    held = workload.file_bytes + round(cached)
    attention = choose_attention(options, on_gpu=offload.gpu_layers > 0, scores_bytes=scores, held_bytes=held)
    started = time.perf_counter()
    note_buffers(offload.device)
    repack = not as_filed and not has_single_blocks(header)
    model = load_weights(library, path, options, repack=repack, offload=offload)
    try:
        context = _create_context(library, model, path, options, threads, attention, observer)
    except EngineError:
        library.llama_model_free(model)
        raise
    huge_page_bytes = collapse_resident()
    loaded = Loaded(library, model, context)
    info = _describe(loaded, path, options, threads, workload.kv_elements_per_token, time.perf_counter() - started)
    info = replace(info, devices=find_devices(library), gpu_backends=can_offload(library), offload=offload)
    info = replace(info, attention=attention, buffers=with_copies(info.buffers, attention, workload, options))
    return LlamaCppEngine(loaded, replace(info, huge_page_bytes=huge_page_bytes), options)


def check_file(path: Path) -> None:
    if not path.is_file():
        raise BundleError(f"model file {path} does not exist", hint="give a bundle directory or a .gguf file")


def _check_options(options: EngineOptions) -> None:
    for name in ("context", "sequences", "batch"):
        if getattr(options, name) < 1:
            raise UsageError(f"{name} must be at least 1, not {getattr(options, name)}")
    for name in ("threads_decode", "threads_prefill"):
        if not 0 <= getattr(options, name) <= 512:
            raise UsageError(f"{name} must be between 0 (ask the host) and 512, not {getattr(options, name)}")
    if options.sequences > _MAX_SEQUENCES:
        raise UsageError(f"llama.cpp keeps at most {_MAX_SEQUENCES} sequences, {options.sequences} were asked for")
    if options.kv_type not in _KV_BYTES_PER_ELEMENT:
        raise UsageError(f"no KV cache type '{options.kv_type}'", hint=f"there are: {', '.join(_KV_BYTES_PER_ELEMENT)}")
    check_attention(options)


def load_weights(
    library: Any, path: Path, options: EngineOptions, *, repack: bool = True, offload: OffloadPlan | None = None
) -> Any:
    """Weights, with the CPU but for layers that ``offload`` puts on a GPU; ``repack`` lets the CPU rearrange its."""
    parameters = library.llama_model_default_params()
    device, layers = (offload.device, offload.gpu_layers) if offload is not None else (None, 0)
    _listed = place_layers(library, parameters, device, layers)
    # Beside a GPU the place of its host buffer decides, which weights of the CPU come into before any of those.
    parameters.use_extra_bufts = repack
    parameters.no_host = repack and repacks_host(options, offload)
    parameters.load_mode = library.LLAMA_LOAD_MODE_MMAP if options.mmap else library.LLAMA_LOAD_MODE_NONE
    model = library.llama_model_load_from_file(os.fsencode(path), parameters)
    let_helpers_go()
    if not model:
        raise load_error(f"llama.cpp cannot load {path}")
    trained = int(library.llama_model_n_ctx_train(model))
    if options.context > trained:
        library.llama_model_free(model)
        raise EngineError(
            f"a context of {options.context} tokens was asked for, {path.name} was trained for {trained}",
            hint=f"use --context {trained} or less",
        )
    return model


def _create_context(
    library: Any,
    model: Any,
    path: Path,
    options: EngineOptions,
    threads: tuple[int, int],
    attention: Choice,
    observer: InputSquares | None = None,
) -> Any:
    parameters = library.llama_context_default_params()
    per_sequence = -(-options.context // _CONTEXT_STEP) * _CONTEXT_STEP
    parameters.n_ctx = per_sequence * options.sequences
    parameters.n_seq_max = options.sequences
    # Separate caches: in a unified one each sequence's attention walks over the cells of all others. The price: only
    # sequences of neighbouring numbers are computed together, so owners should take the lowest free one. SmolLM2, ms
    # of CPU, separate / unified: four sequences 54 / 59 at depth 32, 87 / 87 at 512; 0 and 2 alone 39 / 31, 58 / 48.
    parameters.kv_unified = False
    # One micro-batch per call: the same work for the CPU, and a call can be interrupted between two of them.
    parameters.n_batch = parameters.n_ubatch = options.batch
    # Without this llama.cpp reserves batch x vocabulary floats (98 MiB for 49,152 tokens) for rows nobody asks for.
    parameters.n_outputs_max = room_of(options).outputs
    parameters.n_outputs_max_per_seq = 0
    parameters.n_threads, parameters.n_threads_batch = threads
    kinds = library.LLAMA_FLASH_ATTN_TYPE_DISABLED, library.LLAMA_FLASH_ATTN_TYPE_ENABLED
    parameters.flash_attn_type = kinds[attention.value == ON]
    kv_type = {"f32": library.GGML_TYPE_F32, "f16": library.GGML_TYPE_F16, "q8_0": library.GGML_TYPE_Q8_0}
    parameters.type_k = parameters.type_v = kv_type[options.kv_type]
    parameters.no_perf = True
    if observer is not None:
        observer.attach(library, parameters)
    with from_first_use():  # buffers of intermediate results, which are not in use before the first call
        context = library.llama_init_from_model(model, parameters)
    if not context:
        raise load_error(
            f"llama.cpp cannot make a context of {options.context} tokens x {options.sequences} for {path}"
        )
    return context


def _fewer_layers() -> str:
    return "" if _log.device is None else "fewer --gpu-layers, "


def load_error(what: str) -> EngineError:
    messages = _log.take()
    if "alloc" in messages:
        return EngineError(
            f"{what}: not enough memory ({messages})",
            hint=f"use {_fewer_layers()}a smaller --context, fewer sequences or a smaller quantisation",
        )
    return EngineError(f"{what}: {messages or 'it gave no reason'}", hint="check the file with: edgelm verify")


class Loaded:
    """The C objects of one loaded model."""

    def __init__(self, library: Any, model: Any, context: Any) -> None:
        self.library = library
        self.model = model
        self.context = context

    def text(self, key: str) -> str:
        """A string from the model's metadata, empty when absent."""
        buffer = ctypes.create_string_buffer(512)
        count = self.library.llama_model_meta_val_str(self.model, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if count >= 0 else ""


def _describe(
    loaded: Loaded,
    path: Path,
    options: EngineOptions,
    threads: tuple[int, int],
    kv_elements_per_token: int,
    load_s: float,
) -> EngineInfo:
    library, model = loaded.library, loaded.model
    vocab = library.llama_model_get_vocab(model)
    kv_bytes = kv_elements_per_token * _KV_BYTES_PER_ELEMENT[options.kv_type] * library.llama_n_ctx(loaded.context)
    kernels = kernel_set()
    waiting = decided()
    return EngineInfo(
        engine="llama.cpp",
        versions={
            "llama-cpp-python": importlib.metadata.version("llama-cpp-python"),
            "llama.cpp": library.llama_version().decode(),
            **({"kernels": kernels} if kernels else {}),
        },
        model_name=loaded.text("general.name") or path.stem,
        architecture=loaded.text("general.architecture"),
        vocabulary=library.llama_vocab_n_tokens(vocab),
        context=options.context,
        context_trained=library.llama_model_n_ctx_train(model),
        sequences=options.sequences,
        threads_decode=threads[0],
        threads_prefill=threads[1],
        weights_bytes=library.llama_model_size(model),
        kv_bytes=int(kv_bytes),
        parameters=library.llama_model_n_params(model),
        load_s=load_s,
        system=library.llama_print_system_info().decode().strip(),
        buffers=noted_buffers(),
        waiting=None if waiting is None else waiting.kind,
        waiting_reason="" if waiting is None else waiting.reason,
        truncates=not (library.llama_model_is_recurrent(model) or library.llama_model_is_hybrid(model)),
    )


def _bytes_of(state: State) -> Any:
    """A buffer as llama.cpp wants it."""
    return state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


class LlamaCppEngine:
    """``runtime.engine.Engine`` over one ``llama_context``. Not thread-safe, except for ``interrupt``."""

    def __init__(self, loaded: Loaded, info: EngineInfo, options: EngineOptions) -> None:
        library = loaded.library
        self._loaded: Loaded | None = loaded
        self._info = info
        self._options = options
        self._context = loaded.context
        self._memory = library.llama_get_memory(loaded.context)
        self._lengths = [0] * options.sequences
        self._capacity = int(library.llama_n_batch(loaded.context))
        self._batch = Batch(library, self._capacity, options.sequences)
        self._offsets = np.arange(self._capacity, dtype=np.int32)
        self._decode = library.llama_decode
        self._synchronize = library.llama_synchronize
        # A prototype of its own: an address costs far less than a ctypes pointer with its type.
        prototype = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
        self._logits_address = prototype(ctypes.cast(library.llama_get_logits, ctypes.c_void_p).value or 0)
        self._views: dict[tuple[int, int], Logits] = {}
        # Sequences whose cells llama.cpp copies or turns only when it computes the next time.
        self._unsettled: set[int] = set()
        self._abort = AbortSwitch(library, loaded.context)
        self._may_share = has_tiles()
        self._choice = GraphChoice(library, loaded.context)
        # A choice that is doubted has to be taken back.
        self.chooses = info.offload is not None and info.offload.gpu_layers > 0 and info.truncates
        self.vocabulary = LlamaVocabulary(library, loaded.model)

    @property
    def info(self) -> EngineInfo:
        return self._info

    def forward(self, chunks: Sequence[Chunk]) -> Logits:
        """See ``Engine.forward``. More tokens than ``batch`` are computed in several calls of llama.cpp."""
        if len(chunks) == 1 and len(chunks[0].tokens) == 1:
            row = self._step(chunks[0])
            if row is not None:
                return row
        self._check(chunks)
        if self._choice.sequence is not None and any(chunk.logits != "none" for chunk in chunks):
            self._choice.end()
        self._abort.clear()
        before = {chunk.sequence: self._lengths[chunk.sequence] for chunk in chunks}
        parts: list[Logits] = []
        filled = rows = 0
        for chunk in chunks:
            done, count = 0, len(chunk.tokens)
            while done < count:
                take = min(count - done, self._capacity - filled)
                rows += self._fill(chunk, done, take, filled)
                filled += take
                done += take
                if filled == self._capacity:
                    self._compute(filled, before)
                    if rows:
                        parts.append(self._view(rows).copy())
                    filled = rows = 0
        if filled:
            self._compute(filled, before)
        if not parts:
            return self._view(rows)
        if rows:
            parts.append(self._view(rows))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _step(self, chunk: Chunk) -> Logits | None:
        """``forward`` for one token of one sequence, which is what decoding waits for: every line and call here counts.
        None when something is wrong with the chunk: ``_check`` says at length what.

        A token's weights leave nothing of Python in the caches, so that its code takes ten times as long as in a loop.
        """
        wanted = chunk.logits != "none"
        if wanted and self._choice.sequence is not None:
            self._choice.end()
        return self._view(int(wanted)) if self._one(chunk, wanted) else None

    def _one(self, chunk: Chunk, wanted: bool) -> bool:
        """Compute one token of one sequence; False, and nothing was done, when something is wrong with the chunk."""
        sequence, token, lengths = chunk.sequence, chunk.tokens[0], self._lengths
        if self._loaded is None or not 0 <= sequence < len(lengths) or not 0 <= token < self._info.vocabulary:
            return False
        before = lengths[sequence]
        if before >= self._info.context:
            return False
        self._batch.put(0, token, before, sequence, wanted=wanted)
        lengths[sequence] = before + 1
        self._abort.clear()
        batch = self._batch.c
        batch.n_tokens = 1
        status = apart(self._decode, self._context, batch) if self._may_share else self._decode(self._context, batch)
        if status != 0:
            self._failed(status, 1, {sequence: before})
        if self._unsettled:
            self._unsettled.clear()
        return True

    def likeliest(self, chunk: Chunk) -> int | None:
        """See ``runtime.engine.Chooser``."""
        sequence, count = chunk.sequence, len(chunk.tokens)
        if not self.chooses or chunk.logits != "last" or count > self._capacity:
            return None
        choice = self._choice
        if choice.doubted:
            return choice.from_logits(self, chunk)
        if count != 1 or choice.sequence != sequence or not self._one(chunk, wanted=True):
            self._check([chunk])
            if choice.sequence != sequence and not choice.begin(sequence):
                self.chooses = False
                return None
            self._abort.clear()
            before = self._lengths[sequence]
            self._fill(chunk, 0, count, 0)
            self._compute(count, {sequence: before})
        token = choice.token()
        if token > 0:
            return token
        self.chooses, choice.doubted = token == 0, DOUBTED
        self._forget(self._lengths[sequence] - count, sequence)
        return choice.from_logits(self, chunk)

    def _check(self, chunks: Sequence[Chunk]) -> None:
        if self._loaded is None:
            raise EngineError("the engine is closed")
        check_chunks(self, chunks, self._options)

    def _fill(self, chunk: Chunk, done: int, take: int, at: int) -> int:
        """Write ``take`` tokens of a chunk into the batch from row ``at`` on; tell how many logits are wanted."""
        batch, sequence = self._batch, chunk.sequence
        end, start = at + take, self._lengths[sequence]
        if take == 1:
            wanted = chunk.logits == "all" or (chunk.logits == "last" and done + 1 == len(chunk.tokens))
            batch.put(at, chunk.tokens[done], start, sequence, wanted=wanted)
            self._lengths[sequence] = start + 1
            return int(wanted)
        batch.tokens[at:end] = chunk.tokens if take == len(chunk.tokens) else chunk.tokens[done : done + take]
        batch.positions[at:end] = self._offsets[:take]
        batch.positions[at:end] += start
        batch.sequence_pointers[at:end] = batch.address_of_sequence[sequence]
        batch.wanted[at:end] = chunk.logits == "all"
        self._lengths[sequence] = start + take
        if chunk.logits == "all":
            return take
        if chunk.logits == "last" and done + take == len(chunk.tokens):
            batch.wanted[end - 1] = 1
            return 1
        return 0

    def _compute(self, count: int, before: dict[int, int]) -> None:
        """Run what the batch holds. Raises as ``_failed``."""
        batch = self._batch.c
        batch.n_tokens = count
        status = apart(self._decode, self._context, batch)
        if status != 0:
            self._failed(status, count, before)
        self._unsettled.clear()

    def _failed(self, status: int, count: int, before: dict[int, int]) -> NoReturn:
        """Clear the sequences that were to be computed; interrupted, they are what they were. Raises ``EngineError``
        and ``EngineInterruptedError``."""
        if status == ABORTED:
            for sequence, length in before.items():
                self._forget(length, sequence)
            _log.take()
            raise EngineInterruptedError("the computation was interrupted")
        for sequence in before:
            self._forget(0, sequence)
        reason = "no room in the KV cache" if status == _NO_SLOT else _log.take() or "no reason given"
        raise EngineError(f"llama.cpp failed to compute {count} tokens (status {status}): {reason}")

    def _view(self, rows: int) -> Logits:
        """The latest ``rows`` rows of logits; whoever reads them waits for llama.cpp to have them."""
        if rows == 0:
            self._synchronize(self._context)
            return np.empty((0, self._info.vocabulary), np.float32)
        address = self._logits_address(self._context)
        view = self._views.get((address, rows))
        if view is None:
            shape = (rows, self._info.vocabulary)
            memory = (ctypes.c_float * (shape[0] * shape[1])).from_address(address)
            view = np.ctypeslib.as_array(memory).reshape(shape)
            view.flags.writeable = False
            if len(self._views) >= 64:
                self._views.clear()
            self._views[address, rows] = view
        return view

    def length(self, sequence: int = 0) -> int:
        if not 0 <= sequence < len(self._lengths):
            raise EngineError(f"there is no sequence {sequence}: the engine keeps {len(self._lengths)}")
        return self._lengths[sequence]

    def truncate(self, length: int, sequence: int = 0) -> None:
        held = self.length(sequence)
        if self._loaded is None:
            raise EngineError("the engine is closed")
        if not 0 <= length <= held:
            raise EngineError(f"cannot truncate sequence {sequence} of {held} tokens to {length}")
        if length < held:
            self._forget(length, sequence)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """See ``runtime.engine.PrefixCopier``. Sequences have separate caches, of which llama.cpp copies the whole."""
        held = self.length(source)
        self.length(target)
        if self._loaded is None:
            raise EngineError("the engine is closed")
        if source == target or not 0 <= length <= held:
            raise EngineError(f"cannot copy {length} tokens of sequence {source}, which holds {held}, to {target}")
        library = self._loaded.library
        library.llama_memory_seq_rm(self._memory, target, -1, -1)
        library.llama_memory_seq_cp(self._memory, source, target, -1, -1)
        self._unsettled.add(target)
        self._lengths[target] = held
        self._forget(length, target)

    def discard(self, start: int, end: int, sequence: int = 0) -> bool:
        """See ``runtime.engine.Shifter``. Keys behind the gap are turned to their new positions."""
        held = self.length(sequence)
        if self._loaded is None:
            raise EngineError("the engine is closed")
        if not 0 <= start < end <= held:
            raise EngineError(f"cannot forget tokens {start} to {end} of sequence {sequence}, which holds {held}")
        library = self._loaded.library
        if not self._info.truncates or not library.llama_memory_can_shift(self._memory):
            return False
        if not library.llama_memory_seq_rm(self._memory, sequence, start, end):
            return False
        library.llama_memory_seq_add(self._memory, sequence, end, -1, start - end)
        self._unsettled.add(sequence)
        self._lengths[sequence] = held - (end - start)
        return True

    def state(self, sequence: int = 0) -> State:
        """See ``runtime.engine.StateKeeper``: cells as llama.cpp writes them, keys and values in the cache's type."""
        library = self._settled(sequence)
        state = np.empty(library.llama_state_seq_get_size(self._context, sequence), np.uint8)
        if library.llama_state_seq_get_data(self._context, _bytes_of(state), len(state), sequence) != len(state):
            raise EngineError(f"llama.cpp gave no state of sequence {sequence}: {_log.take() or 'no reason given'}")
        return state

    def restore(self, state: State, length: int, sequence: int = 0) -> None:
        """See ``runtime.engine.StateKeeper``."""
        library = self._settled(sequence)
        read = library.llama_state_seq_set_data(self._context, _bytes_of(state), len(state), sequence)
        last = library.llama_memory_seq_pos_max(self._memory, sequence)
        self._lengths[sequence] = length
        if read != len(state) or last != length - 1 or not 0 < length <= self._info.context:
            self._forget(0, sequence)
            raise EngineError(f"these bytes are no state of {length} tokens: {_log.take() or f'it ends at {last}'}")

    def _settled(self, sequence: int) -> Any:
        """The library, when the cells of a sequence are what they are said to be. Raises ``EngineError``."""
        self.length(sequence)
        if self._loaded is None:
            raise EngineError("the engine is closed")
        if sequence in self._unsettled:
            raise EngineError(f"sequence {sequence} is to be copied or moved with the next computation")
        return self._loaded.library

    def _forget(self, length: int, sequence: int) -> None:
        self._lengths[sequence] = length
        loaded = self._loaded
        if loaded is None or loaded.library.llama_memory_seq_rm(self._memory, sequence, length, -1):
            return
        # Recurrent states cannot go back to the middle of a sequence; forgetting all of it always works.
        loaded.library.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        self._lengths[sequence] = 0
        if length:
            raise EngineError(
                f"models of architecture {self._info.architecture} cannot be truncated to {length} tokens, "
                f"sequence {sequence} was cleared"
            )

    def resident_kv_bytes(self) -> int:
        """All of the cache in RAM: llama.cpp clears it when it makes it, so every page was touched."""
        buffers = self._info.buffers
        return buffers.get("kv", 0 if "vram_kv" in buffers else self._info.kv_bytes)

    def device_now(self) -> Device | None:
        """See ``runtime.engine.DeviceReader``."""
        loaded, offload = self._loaded, self._info.offload
        return device_now(loaded.library, offload.device) if loaded is not None and offload is not None else None

    def interrupt(self) -> None:
        """See ``Engine.interrupt``. Takes effect within one operation of the graph."""
        self._abort.set()

    def close(self) -> None:
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return
        self._views.clear()
        self._choice.end()
        loaded.library.llama_free(loaded.context)
        loaded.library.llama_model_free(loaded.model)
