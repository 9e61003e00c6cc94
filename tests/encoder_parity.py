"""Tiny random encoders of every family, and how far an export's vectors are from transformers' own.

As ``parity`` does for decoders: one row per shape, exported as F32, run in llama.cpp and in transformers over the same
random tokens at lengths from one to all positions, as the engine runs and with plain attention. Used by the tests and
by the script that writes docs/encoders.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgelm.bundle import Pooling
from exporter.checkpoint import open_checkpoint, open_source
from exporter.embedding_quality import pool
from runtime.embedding import unit_length
from runtime.encoder import EncoderOptions, Vectors
from runtime.engines.llamacpp import load_library
from runtime.engines.llamacpp_encoder import load_encoder
from tests.parity import VOCABULARY, write_f32
from tests.tiny_encoders import write_modules
from tests.tiny_models import write_tokenizer

_MODES: Mapping[str, str] = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}


@dataclass(frozen=True)
class EncoderRow:
    """One model. ``config`` are arguments of transformers' configuration class; ``older_names`` are those of norms in
    the first checkpoints of BERT."""

    name: str
    model_type: str
    config: Mapping[str, Any]
    pooling: Pooling = "mean"
    older_names: bool = False


@dataclass(frozen=True)
class VectorDistance:
    """One minus the least cosine, and the largest difference of any number of vectors of length one."""

    cosine_loss: float
    error_max: float


@dataclass(frozen=True)
class EncoderParity:
    """Distance of an export from transformers. ``alike`` is the mean cosine of vectors of different sequences."""

    architecture: str
    engine: VectorDistance
    plain: VectorDistance
    alike: float


COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
}
DISTIL = {"vocab_size": VOCABULARY, "dim": 64, "hidden_dim": 128, "n_layers": 3, "n_heads": 4} | {
    "max_position_embeddings": 96,
    "pad_token_id": 0,
}
ROBERTA = {**COMMON, "max_position_embeddings": 98, "pad_token_id": 1, "layer_norm_eps": 1e-5, "type_vocab_size": 1}
ENCODER_ROWS = (
    EncoderRow("bert", "bert", COMMON),
    EncoderRow("bert, first token", "bert", COMMON, "cls"),
    EncoderRow("bert, last token", "bert", COMMON, "last"),
    EncoderRow("bert, older names", "bert", COMMON, older_names=True),
    EncoderRow("bert, odd widths", "bert", {**COMMON, "hidden_size": 60, "num_attention_heads": 3}),
    EncoderRow("distilbert", "distilbert", DISTIL),
    EncoderRow("roberta", "roberta", ROBERTA),
    EncoderRow("roberta, other padding", "roberta", {**ROBERTA, "pad_token_id": 5, "max_position_embeddings": 102}),
    EncoderRow("xlm-roberta", "xlm-roberta", ROBERTA, "cls"),
    EncoderRow("camembert", "camembert", ROBERTA),
)

ENCODER_HEADER = """# Encoders

Written by `python scripts/write_docs.py --parity`; do not edit.

Models that turn a text into one vector: `edgelm export` makes GGUF bundles of them like of any other checkpoint,
and with `--format onnx` ONNX ones through optimum ([docs/onnx.md](onnx.md)); what follows on llama.cpp is about GGUF.
Pooling and normalisation come from the files of sentence-transformers beside the weights (`modules.json`,
`1_Pooling/config.json`); without them vectors are means of all tokens, scaled to length one, and the plan says so.
The proof is the cosine between the artefact's vectors and those of the original model (transformers in float32, or the
checkpoint unquantised in the engine) over 120 passages of many lengths, in the manifest as `embedding_quality`.
`edgelm run BUNDLE TEXT` prints a vector, `edgelm serve BUNDLE` answers `/v1/embeddings`; `edgelm bench` measures models
that generate, `benchmarks/encoder_side_by_side.py` encoders.

`/v1/embeddings` takes a text, a list of texts (2048 at most), token ids or a list of those; texts get the special
tokens of the model around them, token ids are taken as they are. A text of more tokens than the bundle's context is
refused, never cut. `encoding_format` is `float` or `base64`; `dimensions` other than the model's own are refused, since
its vectors were not trained to be cut. Requests share the encoder's steps in turn. The engine runs in the server's own
process, so its crash would end the server.

Token ids are proven against llama.cpp as for every bundle, on texts changed alike for both sides where llama.cpp has no
rule: of WordPiece, marks with a width of their own (Devanagari's vowel signs) are left out, which llama.cpp drops, and
words of more than 100 characters cut, which it does not replace by the unknown token; of unigram, U+0085 is a space;
the space that Metaspace puts in front of some texts is written by the caller. EdgeLM itself encodes by the
`tokenizer.json` in the bundle, which has all of these rules; a bare GGUF file in other hands does not.

What is not there: relative positions (MPNet), rotation (ModernBERT, Nomic), dense layers behind the pooling, maximum
pooling, and classification or rerank heads.

Each row is a tiny random model made by transformers, exported as F32 and run in llama.cpp over the same random tokens
as in transformers (float32, eager attention), at lengths of 1, 7, 40 and 96 tokens, which are all positions. The
numbers are the largest of all lengths: one minus the cosine, and the largest difference of any number of vectors of
length one; as the engine runs, and with plain instead of flash attention, which rounds to 16 bits inside llama.cpp.
The last column is the mean cosine of different sequences: vectors that are all alike would agree with anything.
llama.cpp computes GELU by the tanh formula from a table of 16-bit values, which is most of what remains.

| model | model_type | GGUF | pooling | 1 - cosine | error | 1 - cosine, plain | error, plain | alike |
|---|---|---|---|---|---|---|---|---|
"""


def make_encoder(row: EncoderRow, directory: Path, seed: int = 0) -> Any:
    """Write the row's checkpoint; the transformers model in float32, ready to run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from transformers import AutoConfig, AutoModel

        config = AutoConfig.for_model(row.model_type, **row.config)
        model = AutoModel.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, values in model.named_parameters():
            noise = torch.randn(values.shape, generator=generator)
            if values.ndim < 2:
                values.add_(0.15 * noise)
            else:
                values.copy_(noise if "embeddings" in name else noise * 1.3 / values.shape[-1] ** 0.5)
    model.save_pretrained(directory)
    if row.older_names:
        _rename_norms(directory / "model.safetensors")
    write_tokenizer(directory, VOCABULARY)
    write_modules(directory, _MODES[row.pooling])
    return model


def _rename_norms(path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    def older(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    save_file({older(name): values for name, values in load_file(path).items()}, path, metadata={"format": "pt"})


def engine_vectors(path: Path, sequences: list[list[int]]) -> Vectors:
    """Vectors of length one."""
    encoder = load_encoder(path, EncoderOptions(threads=2))
    try:
        return unit_length(encoder.encode(sequences))
    finally:
        encoder.close()


def transformers_vectors(model: Any, sequences: list[list[int]], pooling: Pooling) -> Vectors:
    """Vectors of length one, each of one whole forward pass without padding."""
    import torch

    with torch.inference_mode():
        rows = [pool(model(torch.tensor([ids])).last_hidden_state[0].float().numpy(), pooling) for ids in sequences]
    return unit_length(np.stack(rows))


def vector_distance(ours: Vectors, theirs: Vectors) -> VectorDistance:
    """The worst of all rows."""
    cosines = np.einsum("ij,ij->i", ours.astype(np.float64), theirs.astype(np.float64))
    return VectorDistance(float(max(1 - cosines.min(), 0.0)), float(np.abs(ours - theirs).max()))


@contextmanager
def plain_attention() -> Iterator[None]:
    """Encoders opened inside compute attention step by step in float32; they have no option for it."""
    library = load_library()
    opened = library.llama_init_from_model

    def without_flash(model: Any, parameters: Any) -> Any:
        parameters.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return opened(model, parameters)

    library.llama_init_from_model = without_flash
    try:
        yield
    finally:
        library.llama_init_from_model = opened


def measure_encoder(row: EncoderRow, directory: Path) -> EncoderParity:
    """Parity of a row over all its lengths."""
    model = make_encoder(row, directory / "model")
    path = directory / "model.gguf"
    description = write_f32(open_checkpoint(open_source(str(directory / "model"))), path)
    generator = np.random.default_rng(1)
    sequences = [generator.integers(6, VOCABULARY, length).tolist() for length in (1, 7, 40, 96)]
    theirs = transformers_vectors(model, sequences, row.pooling)
    engine = vector_distance(engine_vectors(path, sequences), theirs)
    with plain_attention():
        plain = vector_distance(engine_vectors(path, sequences), theirs)
    others = (theirs @ theirs.T)[np.triu_indices(len(sequences), 1)]
    return EncoderParity(description.architecture, engine, plain, float(others.mean()))


def encoder_document(measured: Mapping[str, EncoderParity]) -> str:
    """docs/encoders.md for parities by row name."""
    lines = []
    for row in ENCODER_ROWS:
        found = measured[row.name]
        numbers = [
            f"{number:.0e}" for item in (found.engine, found.plain) for number in (item.cosine_loss, item.error_max)
        ]
        cells = [row.name, row.model_type, found.architecture, row.pooling, *numbers, f"{found.alike:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return ENCODER_HEADER + "\n".join(lines) + "\n"
