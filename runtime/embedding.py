"""An encoder ready to make vectors of texts: from a bundle or a bare GGUF file, tokenizer and normalisation included.

``run``, ``serve``, ``bench`` and the proof all come here, so they agree on special tokens, on limits and on what is
scaled to length one. Knows where things are stored; nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgelm.bundle import Bundle, Manifest
from edgelm.errors import BundleError, EngineError, UsageError
from runtime.encoder import Encoder, EncoderOptions, Vectors
from runtime.engine import EngineOptions
from runtime.engines import load_encoder
from runtime.engines.llamacpp import load_library
from runtime.engines.llamacpp_encoder import encoder_offload
from runtime.engines.llamacpp_encoder import load_encoder as load_llamacpp_encoder
from runtime.gguf_header import read_gguf_header
from runtime.model import TOKENIZER_NAME, artifact_of, check_memory, is_encoder
from runtime.tokenizer import GgufTokenizer, JsonTokenizer, TextTokenizer


@dataclass(frozen=True, slots=True)
class LoadedEncoder:
    """Everything that embedding needs. ``prefix`` and ``suffix`` are the ids around every text, as [CLS] and [SEP].

    ``artifact`` is the model file, ``manifest`` None for a bare one. ``normalized``: vectors are scaled to length one.
    """

    name: str
    artifact: Path
    encoder: Encoder
    tokenizer: TextTokenizer
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    normalized: bool
    manifest: Manifest | None

    def text_ids(self, text: str, most: int | None = None) -> list[int]:
        """Ids of one text as the model was trained on it; special tokens written in it count as such. With ``most``
        the end of the text is left out as far as it takes to have no more ids than that."""
        ids = self.tokenizer.encode(text)
        if most is not None:
            ids = ids[: max(most - len(self.prefix) - len(self.suffix), 0)]
        return [*self.prefix, *ids, *self.suffix]

    def embed_ids(self, sequences: Sequence[Sequence[int]]) -> Vectors:
        """Vectors, float32 of shape (sequences, dimensions), of ids that are taken as they are.

        Sequences of like lengths are computed together. Raises what ``Encoder.encode`` raises, and ``EngineError`` for
        vectors that are no finite numbers.
        """
        order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
        vectors = np.empty((len(sequences), self.encoder.info.dimensions), np.float32)
        vectors[order] = self.encoder.encode([sequences[index] for index in order])
        if not np.isfinite(vectors).all():
            raise EngineError(f"{self.name} computes values that are not finite", hint="try: edgelm doctor")
        return unit_length(vectors) if self.normalized else vectors

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Vectors of texts, see ``embed_ids``. Raises ``ContextOverflowError`` for a text that is too long."""
        return self.embed_ids([self.text_ids(text) for text in texts])

    def close(self) -> None:
        """Free the encoder."""
        self.encoder.close()


def unit_length(vectors: Vectors) -> Vectors:
    """Rows scaled to length one; a row of zeros stays."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    scaled: Vectors = vectors / np.maximum(lengths, np.float32(1e-12))
    return scaled


def open_encoder(path: Path, options: EncoderOptions) -> LoadedEncoder:
    """Load a bundle directory or a bare ``.gguf`` file of an encoder.

    ``options.context`` of 0 means: what the bundle's plan chose, or for a bare file all positions that it has. Vectors
    of a bare file are normalised, since nothing says otherwise. Raises ``BundleError``, ``UsageError`` (for a model
    that is none), ``EngineError``, and ``DoesNotFitError`` when the memory that is free now is too small.
    """
    artifact, bundle = artifact_of(path)
    if not is_encoder(artifact, bundle.manifest if bundle else None):
        raise UsageError(
            f"{path} generates text and makes no vectors of it", hint="export an encoder, as all-MiniLM-L6-v2"
        )
    if bundle is not None and options.context == 0:
        options = replace(options, context=int(bundle.manifest.plan.context.value))
    return (
        _open_onnx(artifact, bundle, options) if artifact.suffix == ".onnx" else _open_gguf(artifact, bundle, options)
    )


def _open_onnx(artifact: Path, bundle: Bundle | None, options: EncoderOptions) -> LoadedEncoder:
    """An ONNX encoder: its tokenizer and how its vectors are scaled stand in the bundle."""
    if options.gpu_layers > 0 or options.gpu:
        raise UsageError(f"{artifact} is an ONNX model: --gpu-layers and --gpu are for GGUF", hint="leave them out")
    tokenizer_path = bundle.file(TOKENIZER_NAME) if bundle else None
    record = bundle.manifest.encoder if bundle else None
    if bundle is None or tokenizer_path is None or record is None:
        raise BundleError(f"{artifact} has no tokenizer with it", hint="give the bundle that it is part of")
    words = JsonTokenizer(tokenizer_path)
    prefix, suffix = words.frame()
    return LoadedEncoder(
        name=bundle.manifest.name,
        artifact=artifact,
        encoder=load_encoder(artifact, options),
        tokenizer=words,
        prefix=prefix,
        suffix=suffix,
        normalized=record.normalized,
        manifest=bundle.manifest,
    )


def _open_gguf(artifact: Path, bundle: Bundle | None, options: EncoderOptions) -> LoadedEncoder:
    header = read_gguf_header(artifact)
    sizes = EngineOptions(context=max(options.context, options.batch), mmap=options.mmap)
    offload = encoder_offload(load_library(), header, options, artifact.name)
    check_memory(artifact, header, sizes, on_gpu_bytes=offload.spared_bytes)
    tokenizer_path = bundle.file(TOKENIZER_NAME) if bundle else None
    words = JsonTokenizer(tokenizer_path) if tokenizer_path else None
    encoder = load_llamacpp_encoder(artifact, options)
    try:
        prefix, suffix = words.frame() if words else encoder.vocabulary.frame()
    except BundleError:
        encoder.close()
        raise
    record = bundle.manifest.encoder if bundle else None
    return LoadedEncoder(
        name=bundle.manifest.name if bundle else artifact.stem,
        artifact=artifact,
        encoder=encoder,
        tokenizer=words or GgufTokenizer(encoder.vocabulary),
        prefix=prefix,
        suffix=suffix,
        normalized=record.normalized if record else True,
        manifest=bundle.manifest if bundle else None,
    )
