"""Encoders in llama.cpp: sequences of token ids in, pooled vectors out, over the low-level C API.

Sequences are packed into one batch without padding and told apart by the attention mask, so one step costs its tokens
and the square of them: batches are kept small. Loading, log and batch are those of the decoder engine.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgelm.bundle import Pooling
from edgelm.errors import BundleError, EngineError, UsageError
from runtime.encoder import (
    EncoderInfo,
    EncoderOptions,
    Vectors,
    check_encoder_options,
    check_sequences,
    steps,
)
from runtime.engine import EngineInterruptedError, EngineOptions
from runtime.engines.llamacpp import (
    ABORTED,
    Loaded,
    check_file,
    load_error,
    load_library,
    load_weights,
    note_buffers,
    noted_buffers,
    take_messages,
)
from runtime.engines.llamacpp_batch import AbortSwitch, Batch
from runtime.engines.llamacpp_devices import device_now
from runtime.engines.llamacpp_vocabulary import LlamaVocabulary
from runtime.gguf_header import GGUFHeader, has_single_blocks, read_gguf_header
from runtime.huge_pages import collapse_resident, from_first_use
from runtime.libllama import kernel_set
from runtime.offload import offload_of
from runtime.tiles import apart
from targets.host import default_threads
from targets.vram import Device, OffloadPlan

MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ


def load_encoder(path: Path, options: EncoderOptions) -> LlamaCppEncoder:
    """Load a GGUF file of an encoder.

    Raises ``BundleError`` when the file is missing, malformed or says no way to pool, ``UsageError`` for options that
    make no sense, ``EngineError`` when llama.cpp or the memory refuses, ``DoesNotFitError`` when the GPU's does.
    """
    check_encoder_options(options)
    if options.sequences > MAX_SEQUENCES:
        raise UsageError(f"llama.cpp keeps at most {MAX_SEQUENCES} sequences, {options.sequences} were asked for")
    check_file(path)
    header = read_gguf_header(path)
    repack = not has_single_blocks(header)
    threads = options.threads or int(default_threads()[1].value)
    library = load_library()
    offload = encoder_offload(library, header, options, path.name)
    started = time.perf_counter()
    note_buffers(offload.device)
    sizes = EngineOptions(context=max(options.context, 1), mmap=options.mmap)
    model = load_weights(library, path, sizes, repack=repack, offload=offload)
    context = None
    try:
        length = options.context or int(library.llama_model_n_ctx_train(model))
        context = _create_context(library, model, path, options, (length, threads), on_gpu=offload.gpu_layers > 0)
        collapse_resident()
        loaded = Loaded(library, model, context)
        info = _describe(loaded, path, options, (length, threads), time.perf_counter() - started)
        info = replace(info, buffers=noted_buffers(), offload=offload)
    except (EngineError, BundleError):
        if context is not None:
            library.llama_free(context)
        library.llama_model_free(model)
        raise
    return LlamaCppEncoder(loaded, info)


def encoder_offload(library: Any, header: GGUFHeader, options: EncoderOptions, name: str) -> OffloadPlan:
    """How many layers go to which GPU, as ``runtime.offload.offload_of``, for batches as the encoder will compute them.

    Raises ``UsageError`` and ``DoesNotFitError``.
    """
    trained = header.metadata.get(f"{header.metadata.get('general.architecture')}.context_length")
    longest = options.context or (trained if isinstance(trained, int) else 0)
    batch = max(options.batch, longest)
    wanted = EngineOptions(context=batch, batch=batch, gpu_layers=options.gpu_layers, gpu=options.gpu)
    return offload_of(library, header, wanted, name)


def _create_context(
    library: Any, model: Any, path: Path, options: EncoderOptions, size: tuple[int, int], *, on_gpu: bool
) -> Any:
    """``size`` are the longest sequence and the threads."""
    length, threads = size
    parameters = library.llama_context_default_params()
    # An encoder computes a batch in one piece or aborts the process: the batch holds the longest sequence at least.
    batch = max(options.batch, length)
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = batch
    parameters.n_seq_max = min(options.sequences, batch)
    parameters.kv_unified = True  # there is no cache; the context is not to be divided among sequences
    parameters.n_threads = parameters.n_threads_batch = threads
    parameters.embeddings = True
    # Encoders have small heads, for which a GPU may lack flash attention: asked for all the same, the CPU would
    # compute the attention of every layer.
    parameters.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_AUTO if on_gpu else library.LLAMA_FLASH_ATTN_TYPE_ENABLED
    parameters.no_perf = True
    with from_first_use():
        context = library.llama_init_from_model(model, parameters)
    if not context:
        raise load_error(f"llama.cpp cannot make a context for batches of {batch} tokens of {path}")
    return context


def _describe(loaded: Loaded, path: Path, options: EncoderOptions, size: tuple[int, int], load_s: float) -> EncoderInfo:
    library, model, context = loaded.library, loaded.model, loaded.context
    kernels = kernel_set()
    batch = int(library.llama_n_batch(context))
    return EncoderInfo(
        engine="llama.cpp",
        versions={
            "llama-cpp-python": importlib.metadata.version("llama-cpp-python"),
            "llama.cpp": library.llama_version().decode(),
            **({"kernels": kernels} if kernels else {}),
        },
        model_name=loaded.text("general.name") or path.stem,
        architecture=loaded.text("general.architecture"),
        vocabulary=library.llama_vocab_n_tokens(library.llama_model_get_vocab(model)),
        dimensions=library.llama_model_n_embd_out(model),
        pooling=_pooling(library, context, path),
        context=size[0],
        context_trained=library.llama_model_n_ctx_train(model),
        batch=batch,
        sequences=min(options.sequences, batch),
        threads=size[1],
        weights_bytes=library.llama_model_size(model),
        parameters=library.llama_model_n_params(model),
        load_s=load_s,
        system=library.llama_print_system_info().decode().strip(),
    )


def _pooling(library: Any, context: Any, path: Path) -> Pooling:
    names: dict[int, Pooling] = {
        library.LLAMA_POOLING_TYPE_MEAN: "mean",
        library.LLAMA_POOLING_TYPE_CLS: "cls",
        library.LLAMA_POOLING_TYPE_LAST: "last",
    }
    found = names.get(library.llama_pooling_type(context))
    if found is None:
        raise BundleError(
            f"{path} does not say how the vectors of its tokens become one",
            hint="export it from a sentence model, which has a 1_Pooling/config.json",
        )
    return found


class LlamaCppEncoder:
    """``runtime.encoder.Encoder`` over one ``llama_context``. Not thread-safe, except for ``interrupt``."""

    def __init__(self, loaded: Loaded, info: EncoderInfo) -> None:
        self._loaded: Loaded | None = loaded
        self._info = info
        self._batch = Batch(loaded.library, info.batch, info.sequences)
        self._batch.wanted[:] = 1
        self._positions = np.arange(info.batch, dtype=np.int32)
        self._abort = AbortSwitch(loaded.library, loaded.context)
        self.vocabulary = LlamaVocabulary(loaded.library, loaded.model)

    @property
    def info(self) -> EncoderInfo:
        return self._info

    def encode(self, sequences: Sequence[Sequence[int]]) -> Vectors:
        """See ``Encoder.encode``. Sequences of like lengths beside each other make the fullest batches."""
        if self._loaded is None:
            raise EngineError("the encoder is closed")
        check_sequences(self._info, sequences)
        self._abort.clear()
        vectors = np.empty((len(sequences), self._info.dimensions), np.float32)
        for step in steps(sequences, batch=self._info.batch, most=self._info.sequences):
            self._compute(self._loaded, [sequences[index] for index in step], vectors[step.start : step.stop])
        return vectors

    def _compute(self, loaded: Loaded, sequences: Sequence[Sequence[int]], out: Vectors) -> None:
        """One step: fill the batch, run it, copy the vector of each sequence."""
        batch, filled = self._batch, 0
        for index, tokens in enumerate(sequences):
            end = filled + len(tokens)
            batch.tokens[filled:end] = tokens
            batch.positions[filled:end] = self._positions[: len(tokens)]
            batch.sequence_pointers[filled:end] = batch.address_of_sequence[index]
            filled = end
        batch.c.n_tokens = filled
        library, context = loaded.library, loaded.context
        status = apart(library.llama_encode, context, batch.c)
        if status == ABORTED:
            take_messages()
            raise EngineInterruptedError("the computation was interrupted")
        if status != 0:
            reason = take_messages() or "no reason given"
            raise EngineError(f"llama.cpp failed to encode {filled} tokens (status {status}): {reason}")
        library.llama_synchronize(context)
        for index in range(len(sequences)):
            address = library.llama_get_embeddings_seq(context, index)
            if not address:
                raise EngineError(f"llama.cpp gave no vector for sequence {index}: {take_messages()}")
            out[index] = np.ctypeslib.as_array(address, (self._info.dimensions,))

    def device_now(self) -> Device | None:
        """See ``runtime.engine.DeviceReader``."""
        loaded, offload = self._loaded, self._info.offload
        return device_now(loaded.library, offload.device) if loaded is not None and offload is not None else None

    def interrupt(self) -> None:
        """See ``Encoder.interrupt``. Takes effect within one operation of the graph."""
        self._abort.set()

    def close(self) -> None:
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return
        loaded.library.llama_free(loaded.context)
        loaded.library.llama_model_free(loaded.model)
