"""The form that every family describes itself in: counts, GGUF metadata and what becomes of each tensor.

Families fill it in (one module per ``model_type``), planners and writers read it; neither side knows the other. Knows
no types of storage and no files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelm.errors import CheckpointError
from exporter.checkpoint import Checkpoint

COMPUTED = "(computed)"


@dataclass(frozen=True, slots=True)
class Dimensions:
    """The counts that planning and writing need. All layers have the same ones."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    feed_forward: int
    vocabulary: int
    context_trained: int
    tied: bool


@dataclass(frozen=True)
class TensorDescription:
    """One tensor of the artefact.

    ``interleave`` of n > 0 reorders rows on the way: each group of n rows is two halves in the source (rotation
    partners n/2 apart) and alternates between them in the artefact (partners adjacent). ``values`` holds a computed
    tensor, which has no place in the source.
    """

    name: str
    source_name: str
    shape: tuple[int, ...]
    interleave: int = 0
    values: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class ModelDescription:
    """A checkpoint in terms of the artefact. ``metadata`` are GGUF keys and values, the tokenizer's apart."""

    architecture: str
    dimensions: Dimensions
    metadata: Mapping[str, Any]
    tensors: tuple[TensorDescription, ...]

    @property
    def parameters(self) -> int:
        """Numbers in all tensors that come from the source."""
        return sum(int(np.prod(item.shape)) for item in self.tensors if item.values is None)


Describe = Callable[[Checkpoint], ModelDescription]


def interleave_rows(rows: npt.NDArray[Any], group: int) -> npt.NDArray[Any]:
    """Reorder rows (n * group, ...) so that row i of each group's halves become neighbours.

    Rotary embeddings in Hugging Face checkpoints rotate element i with i + group/2 of a head, in the llama family of
    GGUF files with its neighbour.
    """
    halves = rows.reshape(len(rows) // group, 2, group // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


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
