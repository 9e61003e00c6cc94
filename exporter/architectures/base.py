"""The form that every family describes itself in: counts, structure, GGUF metadata and what becomes of each tensor.

Families fill it in (one module per ``model_type``), planners and writers read it; neither side knows the other. Knows
no types of storage and no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgelm.bundle import EncoderRecord
from edgelm.errors import CheckpointError
from exporter.checkpoint import Checkpoint

COMPUTED = "(computed)"


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What pruning may leave different in every layer."""

    heads: int
    kv_heads: int
    feed_forward: int


@dataclass(frozen=True, slots=True)
class Dimensions:
    """The counts that planning and writing need.

    ``uneven`` is empty when all layers have the same widths; otherwise it holds those of every layer, and ``heads``,
    ``kv_heads`` and ``feed_forward`` are those of the first layer with attention. Layers without have no ``kv_heads``.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    feed_forward: int
    vocabulary: int
    context_trained: int
    tied: bool
    uneven: tuple[LayerShape, ...] = ()

    @property
    def kv_heads_total(self) -> int:
        """Heads of keys over all layers."""
        return sum(shape.kv_heads for shape in self.uneven) or self.layers * self.kv_heads

    @property
    def differing(self) -> bool:
        """Whether widths differ among layers of one kind."""
        return len({(item.heads, item.kv_heads or self.kv_heads, item.feed_forward) for item in self.uneven}) > 1


@dataclass(frozen=True, slots=True)
class Rotary:
    """How positions rotate queries and keys: the first ``size`` elements of a head, by p * theta^(-2i/size).

    ``adjacent``: partners are neighbours in the artefact's rows, else half of ``size`` apart. ``local_theta`` is that
    of layers with a window. ``skipped`` are layers that do not rotate. ``attention_factor`` multiplies sine and cosine.
    ``temperature`` (b, n), not of the rotation but of its settings: queries of position p times 1 + b log(1 + p // n).
    """

    size: int
    theta: float
    adjacent: bool
    scaling: Literal["default", "linear", "llama3", "yarn", "longrope"] = "default"
    attention_factor: float = 1.0
    local_theta: float | None = None
    skipped: tuple[int, ...] = ()
    temperature: tuple[float, int] | None = None


@dataclass(frozen=True, slots=True)
class Structure:
    """How the parts of a model are joined, for builders that draw the graph themselves.

    ``causal``: attention sees earlier tokens only, as in a decoder; an encoder's sees all of them.
    ``rotary`` None: positions are learned rows. ``windows`` per layer: how many tokens attention sees, 0 for all.
    ``norm_place``: norms follow attention and feed-forward network ("after"), precede them ("before") or both.
    ``query_norm``: of each head, or of all heads together, before rotation or after it. ``relu2`` is the square of what
    is positive. Scales of 1 and soft-caps of 0 do nothing. ``convolutions`` are layers with a short convolution
    over the latest tokens instead of attention.
    """

    norm: Literal["rms", "layer"]
    epsilon: float
    activation: Literal["silu", "gelu", "gelu_tanh", "relu2"]
    gated: bool
    norm_place: Literal["before", "after", "both"]
    parallel_residual: bool
    query_norm: Literal["none", "head", "all"]
    rotary: Rotary | None
    windows: tuple[int, ...]
    attention_scale: float
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    norm_after_rotation: bool = False
    causal: bool = True
    convolutions: tuple[int, ...] = ()


@dataclass(frozen=True)
class TensorDescription:
    """One tensor of the artefact.

    ``interleave`` of n > 0 reorders rows on the way: each group of n rows is two halves in the source (rotation
    partners n/2 apart) and alternates between them in the artefact (partners adjacent). ``split`` of n > 0 reorders
    too: the source holds query, key and value of n rows each head by head, the artefact all queries, all keys, all
    values. ``skipped`` rows at the start of the source are left out, as are those after the tensor's own.
    ``transposed``: columns of the source are rows here. Values are multiplied by ``scale``, then ``offset`` is added.
    ``row_factors`` and ``column_factors`` multiply the tensor's own rows and columns after all that (ONNX only).
    ``values`` holds a computed tensor, which has no place in the source.
    """

    name: str
    source_name: str
    shape: tuple[int, ...]
    interleave: int = 0
    values: npt.NDArray[np.float32] | None = None
    split: int = 0
    transposed: bool = False
    scale: float = 1.0
    offset: float = 0.0
    skipped: int = 0
    row_factors: npt.NDArray[np.float32] | None = None
    column_factors: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class EncoderDescription:
    """What an encoder makes of a text, and how many tokens of one it was tuned for."""

    record: EncoderRecord
    context: int


@dataclass(frozen=True)
class ModelDescription:
    """A checkpoint in terms of the artefact.

    ``architecture`` is GGUF's name for it, ``metadata`` are GGUF keys and values, the tokenizer's apart. ``structure``
    is None where the source is a GGUF file, which is copied as it stands. ``notes`` say what a user should know.
    ``encoder`` is None for decoders.
    """

    architecture: str
    dimensions: Dimensions
    metadata: Mapping[str, Any]
    tensors: tuple[TensorDescription, ...]
    structure: Structure | None = None
    notes: tuple[str, ...] = ()
    encoder: EncoderDescription | None = None

    @property
    def parameters(self) -> int:
        """Numbers in all tensors that come from the source."""
        return sum(int(np.prod(item.shape)) for item in self.tensors if item.values is None)


def interleave_rows(rows: npt.NDArray[Any], group: int) -> npt.NDArray[Any]:
    """Reorder rows (n * group, ...) so that row i of each group's halves become neighbours.

    Rotary embeddings in Hugging Face checkpoints rotate element i with i + group/2 of a head, in the llama family of
    GGUF files with its neighbour.
    """
    halves = rows.reshape(len(rows) // group, 2, group // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def split_rows(rows: npt.NDArray[Any], group: int) -> npt.NDArray[Any]:
    """Reorder rows (heads * 3 * group, ...) from head by head to all queries, then all keys, then all values."""
    parts = rows.reshape(len(rows) // (3 * group), 3, group, *rows.shape[1:])
    return np.ascontiguousarray(parts.swapaxes(0, 1)).reshape(rows.shape)


def ordered_rows(rows: npt.NDArray[Any], tensor: TensorDescription) -> npt.NDArray[Any]:
    """Rows of the source (rows, ...) in the order that a tensor of the artefact has them in."""
    if tensor.interleave:
        rows = interleave_rows(rows, tensor.interleave)
    return split_rows(rows, tensor.split) if tensor.split else rows


def config_count(checkpoint: Checkpoint, key: str, default: int | None = None) -> int:
    """A positive whole number from config.json. Raises ``CheckpointError``."""
    value = checkpoint.config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        told = "missing" if value is None else f"{value!r}, which is no count"
        raise CheckpointError(f"{checkpoint.source.location}: config.json: {key} is {told}")
    return value


def config_number(checkpoint: Checkpoint, key: str, default: float | None = None) -> float:
    """A positive finite number from config.json. Raises ``CheckpointError``."""
    return positive_number(checkpoint, checkpoint.config, key, default)


def positive_number(checkpoint: Checkpoint, table: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive finite number from a part of config.json. Raises ``CheckpointError``."""
    value = table.get(key)
    if value is None:
        value = default
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
        told = "missing" if value is None else f"{value!r}, which is no positive number"
        raise CheckpointError(f"{checkpoint.source.location}: config.json: {key} is {told}")
    return float(value)
