"""A decoder as a graph builder needs it: which tensor plays which part in each layer, and how parts are joined.

Read from the description that a family gives of itself (``architectures``); scales that the next matrix or norm can
carry are folded into it. Knows no ONNX, no types and no values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from gguf.constants import Keys

from edgelm.errors import CheckpointError
from exporter.architectures.base import ModelDescription, Rotary, Structure, TensorDescription
from exporter.checkpoint import Checkpoint
from exporter.onnx_rotary import Rotation, local_rotation, original_context, rotation_of

GGUF_ARCHITECTURES = ("llama",)
"""Architectures of GGUF files of which this module knows how the parts are joined: a GGUF file does not say."""
ROTARY_LIMIT = 2**15
"""Positions in a rotary table unless the planned context is longer: 32768 cost 8 MiB for heads of 64."""
_HEAD_STEP = 8


@dataclass(frozen=True, slots=True)
class Part:
    """A weight and its bias, if it has one: a matrix, or a norm."""

    weight: TensorDescription
    bias: TensorDescription | None

    @property
    def rows(self) -> int:
        return self.weight.shape[0]

    def scaled(self, scale: float) -> Part:
        """The same with all that comes out of it multiplied."""
        return Part(_scaled(self.weight, scale), None if self.bias is None else _scaled(self.bias, scale))


@dataclass(frozen=True, slots=True)
class Layer:
    """One transformer block.

    ``inputs`` are queries, keys and values, or all three in one; ``up`` without ``gate`` is plain or, when it is twice
    as wide as ``down`` takes, gate and up in one. Norms that a family does not have are None. ``window`` 0: attention
    sees all; ``rotation`` names the table, None: positions do not rotate.
    """

    heads: int
    kv_heads: int
    window: int
    rotation: str | None
    attention_norm: Part | None
    inputs: tuple[Part, ...]
    query_norm: Part | None
    key_norm: Part | None
    output: Part
    attention_post_norm: Part | None
    feed_forward_norm: Part | None
    gate: Part | None
    up: Part
    down: Part
    feed_forward_post_norm: Part | None

    @property
    def joined_gate(self) -> bool:
        """Whether ``up`` holds the gate's rows before its own."""
        return self.gate is None and self.up.rows == 2 * self.down.weight.shape[1]


@dataclass(frozen=True, slots=True)
class Decoder:
    """A decoder-only model. ``head`` None: the embedding is the output matrix as well. ``embedding_factors`` multiply
    what is read from it, column by column.

    ``rotations`` by name; ``positions`` is how many tokens can be computed, ``adjacent`` whether partners of a rotation
    are neighbours instead of half of what rotates apart.
    """

    architecture: str
    structure: Structure
    hidden: int
    vocabulary: int
    head_size: int
    positions: int
    rotations: Mapping[str, Rotation]
    adjacent: bool
    embedding: TensorDescription
    learned_positions: TensorDescription | None
    layers: tuple[Layer, ...]
    final_norm: Part
    head: TensorDescription | None
    head_bias: TensorDescription | None
    embedding_factors: npt.NDArray[np.float32] | None = None

    @property
    def output_matrix(self) -> TensorDescription:
        return self.embedding if self.head is None else self.head

    @property
    def rotary_size(self) -> int:
        """Elements of a head that rotate."""
        return 2 * len(next(iter(self.rotations.values())).frequencies) if self.rotations else 0


def decoder_layout(description: ModelDescription, checkpoint: Checkpoint, context: int) -> Decoder:
    """The layout of a described model with room for ``context`` tokens. Raises ``CheckpointError`` with what it lacks.

    A rotary table ends at the trained context or ``ROTARY_LIMIT``, learned positions where they end.
    """
    structure, size = structure_of(description), description.dimensions
    check_expressible(description)
    tensors = {item.name: item for item in description.tensors}
    layers = tuple(_layer(tensors, index, structure, size.head_size) for index in range(size.layers))
    rotary, rotations = structure.rotary, dict[str, Rotation]()
    if rotary is not None:
        rotations["rotary"] = rotation_of(description, rotary, checkpoint, context)
        if rotary.local_theta is not None:
            rotations["rotary_local"] = local_rotation(rotary)
    return Decoder(
        architecture=description.architecture,
        structure=structure,
        hidden=size.hidden,
        vocabulary=size.vocabulary,
        head_size=size.head_size,
        positions=position_limit(description, context),
        rotations=rotations,
        adjacent=rotary is not None and rotary.adjacent,
        embedding=tensors["token_embd.weight"],
        learned_positions=tensors.get("position_embd.weight"),
        layers=layers,
        final_norm=_part(tensors, "output_norm").scaled(1 / structure.logit_divisor),
        head=tensors.get("output.weight"),
        head_bias=tensors.get("output.bias"),
    )


def check_expressible(description: ModelDescription) -> None:
    """Raises ``CheckpointError`` saying what a graph cannot express."""
    structure, size = structure_of(description), description.dimensions
    if not structure.causal:
        raise CheckpointError("an encoder's graph cannot be drawn", hint="use --format gguf")
    if structure.convolutions:
        raise CheckpointError(
            "layers with a short convolution instead of attention cannot be exported to ONNX", hint="use --format gguf"
        )
    if size.head_size % _HEAD_STEP:
        raise CheckpointError(
            f"ONNX Runtime's attention needs heads of a multiple of {_HEAD_STEP}, these have {size.head_size}",
            hint="--format gguf has no such limit",
        )


def position_limit(description: ModelDescription, context: int) -> int:
    """Tokens that an artefact planned for ``context`` of them can compute."""
    structure, trained = structure_of(description), description.dimensions.context_trained
    if structure.rotary is None:
        return trained
    if structure.rotary.scaling == "longrope" and context <= (original := original_context(description)):
        return min(original, ROTARY_LIMIT)  # beyond, every rotation would have to be another
    return max(context, min(trained, ROTARY_LIMIT))


def table_elements(description: ModelDescription) -> int:
    """Numbers per position in all rotary tables."""
    rotary = structure_of(description).rotary
    return 0 if rotary is None else rotary.size * (1 if rotary.local_theta is None else 2)


def structure_of(description: ModelDescription) -> Structure:
    """How the parts are joined. Raises ``CheckpointError`` for GGUF files of other architectures than are known."""
    if description.structure is not None:
        return description.structure
    name = description.architecture
    if name not in GGUF_ARCHITECTURES:
        raise CheckpointError(
            f"a GGUF file of the architecture '{name}' does not say how its parts are joined, as an ONNX graph must",
            hint=f"export from the original checkpoint; GGUF files can be of: {', '.join(GGUF_ARCHITECTURES)}",
        )
    return _llama_structure(description)


def _llama_structure(description: ModelDescription) -> Structure:
    values, name, size = description.metadata, description.architecture, description.dimensions
    kind = values.get(Keys.Rope.SCALING_TYPE.format(arch=name), "none")
    if kind not in ("none", "linear"):
        raise CheckpointError(f"rotary scaling of type '{kind}' of a GGUF file cannot be exported to ONNX")
    epsilon = values.get(Keys.Attention.LAYERNORM_RMS_EPS.format(arch=name))
    if not isinstance(epsilon, float):
        raise CheckpointError(f"metadata {Keys.Attention.LAYERNORM_RMS_EPS.format(arch=name)} is missing")
    has_factors = any(item.name == "rope_freqs.weight" for item in description.tensors)
    rotary = Rotary(
        size=int(values.get(Keys.Rope.DIMENSION_COUNT.format(arch=name), size.head_size)),
        theta=float(values.get(Keys.Rope.FREQ_BASE.format(arch=name), 10000.0)),
        adjacent=True,
        scaling="linear" if kind == "linear" else "llama3" if has_factors else "default",
    )
    return Structure(
        norm="rms",
        epsilon=epsilon,
        activation="silu",
        gated=True,
        norm_place="before",
        parallel_residual=False,
        query_norm="none",
        rotary=rotary,
        windows=(0,) * size.layers,
        attention_scale=1 / math.sqrt(size.head_size),
    )


def _scaled(tensor: TensorDescription, scale: float) -> TensorDescription:
    return tensor if scale == 1.0 else replace(tensor, scale=tensor.scale * scale, offset=tensor.offset * scale)


def _part(tensors: Mapping[str, TensorDescription], name: str) -> Part:
    return Part(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


def _layer(tensors: Mapping[str, TensorDescription], index: int, structure: Structure, head_size: int) -> Layer:
    prefix, scale = f"blk.{index}.", structure.residual_scale

    def part(name: str) -> Part | None:
        return _part(tensors, prefix + name) if f"{prefix}{name}.weight" in tensors else None

    def ending(name: str, norm: Part | None) -> Part:
        """What is added to the residual carries its factor, unless a norm comes between."""
        return _part(tensors, prefix + name).scaled(scale if norm is None else 1.0)

    joined = part("attn_qkv")
    inputs = (joined,) if joined else tuple(_part(tensors, prefix + name) for name in ("attn_q", "attn_k", "attn_v"))
    attention_post_norm, feed_forward_post_norm = part("post_attention_norm"), part("post_ffw_norm")
    output = ending("attn_output", attention_post_norm)
    heads = output.weight.shape[1] // head_size
    kv_heads = (joined.rows // head_size - heads) // 2 if joined else inputs[1].rows // head_size
    rotary, window = structure.rotary, structure.windows[index]
    rotation = None
    if rotary is not None and index not in rotary.skipped:
        rotation = "rotary_local" if window and rotary.local_theta is not None else "rotary"
    return Layer(
        heads=heads,
        kv_heads=kv_heads,
        window=window,
        rotation=rotation,
        attention_norm=part("attn_norm"),
        inputs=inputs,
        query_norm=part("attn_q_norm"),
        key_norm=part("attn_k_norm"),
        output=output,
        attention_post_norm=attention_post_norm.scaled(scale) if attention_post_norm else None,
        feed_forward_norm=part("ffn_norm"),
        gate=part("ffn_gate"),
        up=_part(tensors, prefix + "ffn_up"),
        down=ending("ffn_down", feed_forward_post_norm),
        feed_forward_post_norm=feed_forward_post_norm.scaled(scale) if feed_forward_post_norm else None,
    )
