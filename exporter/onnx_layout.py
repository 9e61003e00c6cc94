"""A decoder as a graph builder needs it: which tensor plays which part in each layer, and how positions rotate.

Read from the description that a family gives of itself (``architectures``). Knows no ONNX, no types and no values but
the rotary table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgelm.errors import CheckpointError
from exporter.architectures.base import ModelDescription, TensorDescription
from exporter.checkpoint import Checkpoint

ARCHITECTURES = ("llama",)
"""GGUF architectures of which this module knows how the parts are joined."""

_HEAD_STEP = 16


@dataclass(frozen=True, slots=True)
class Part:
    """A weight and its bias, if it has one."""

    weight: TensorDescription
    bias: TensorDescription | None

    @property
    def rows(self) -> int:
        return self.weight.shape[0]

    @property
    def columns(self) -> int:
        return self.weight.shape[1]


@dataclass(frozen=True, slots=True)
class Layer:
    """One transformer block: attention and a gated feed-forward network, each after a root mean square norm."""

    heads: int
    kv_heads: int
    attention_norm: TensorDescription
    query: Part
    key: Part
    value: Part
    output: Part
    feed_forward_norm: TensorDescription
    gate: Part
    up: Part
    down: Part


@dataclass(frozen=True, slots=True)
class Rotary:
    """Position p rotates by p * ``frequencies``. ``adjacent``: partners are neighbours, not half a head apart."""

    frequencies: npt.NDArray[np.float64]
    adjacent: bool


@dataclass(frozen=True, slots=True)
class Decoder:
    """A decoder-only model. ``head`` None: the embedding is the output matrix as well."""

    architecture: str
    hidden: int
    vocabulary: int
    head_size: int
    context_trained: int
    epsilon: float
    rotary: Rotary
    embedding: TensorDescription
    layers: tuple[Layer, ...]
    final_norm: TensorDescription
    head: TensorDescription | None

    @property
    def output_matrix(self) -> TensorDescription:
        return self.embedding if self.head is None else self.head


def decoder_layout(description: ModelDescription, checkpoint: Checkpoint) -> Decoder:
    """The layout of a described model. Raises ``CheckpointError`` for families whose joints are not known here."""
    if description.architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"models of architecture '{description.architecture}' cannot be exported to ONNX",
            hint=f"there are: {', '.join(ARCHITECTURES)}; --format gguf may know it",
        )
    size = description.dimensions
    if size.head_size % _HEAD_STEP:
        raise CheckpointError(
            f"ONNX Runtime's attention needs heads of a multiple of {_HEAD_STEP}, these have {size.head_size}",
            hint="--format gguf has no such limit",
        )
    tensors = {item.name: item for item in description.tensors}
    layers = tuple(_layer(tensors, index, size.head_size) for index in range(size.layers))
    return Decoder(
        architecture=description.architecture,
        hidden=size.hidden,
        vocabulary=size.vocabulary,
        head_size=size.head_size,
        context_trained=size.context_trained,
        epsilon=float(description.metadata[f"{description.architecture}.attention.layer_norm_rms_epsilon"]),
        rotary=_rotary(description, checkpoint, layers[0]),
        embedding=tensors["token_embd.weight"],
        layers=layers,
        final_norm=tensors["output_norm.weight"],
        head=tensors.get("output.weight"),
    )


def _layer(tensors: Mapping[str, TensorDescription], index: int, head_size: int) -> Layer:
    prefix = f"blk.{index}."

    def part(name: str) -> Part:
        return Part(tensors[f"{prefix}{name}.weight"], tensors.get(f"{prefix}{name}.bias"))

    query, key = part("attn_q"), part("attn_k")
    return Layer(
        heads=query.rows // head_size,
        kv_heads=key.rows // head_size,
        attention_norm=tensors[f"{prefix}attn_norm.weight"],
        query=query,
        key=key,
        value=part("attn_v"),
        output=part("attn_output"),
        feed_forward_norm=tensors[f"{prefix}ffn_norm.weight"],
        gate=part("ffn_gate"),
        up=part("ffn_up"),
        down=part("ffn_down"),
    )


def _rotary(description: ModelDescription, checkpoint: Checkpoint, first: Layer) -> Rotary:
    """Frequencies theta^(-2i/d), divided by a linear factor or by the factors of each frequency (Llama 3.1)."""
    metadata, prefix = description.metadata, f"{description.architecture}.rope."
    size = description.dimensions.head_size
    if metadata.get(prefix + "dimension_count", size) != size:
        raise CheckpointError("rotary embeddings over a part of each head cannot be exported to ONNX")
    frequencies = float(metadata.get(prefix + "freq_base", 10000.0)) ** -(
        np.arange(0, size, 2, dtype=np.float64) / size
    )
    scaling = metadata.get(prefix + "scaling.type", "none")
    if scaling == "linear":
        frequencies = frequencies / float(metadata[prefix + "scaling.factor"])
    elif scaling != "none":
        raise CheckpointError(f"rotary scaling of type '{scaling}' cannot be exported to ONNX")
    for tensor in description.tensors:
        if tensor.name == "rope_freqs.weight":
            factors = checkpoint.load(tensor.source_name) if tensor.values is None else tensor.values
            frequencies = frequencies / factors.astype(np.float64)
    # Partners are neighbours in a llama GGUF. Rows that the description reorders are still half a head apart.
    return Rotary(frequencies, adjacent=first.query.weight.interleave == 0)
