"""Rotary tables of a described model: the frequency of every pair of elements, with all scalings worked in.

Formulas are those of Hugging Face transformers, ``modeling_rope_utils``; numbers come from the description's metadata
and computed tensors. Knows no ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import MODEL_TENSOR, TENSOR_NAMES, Keys

from edgelm.errors import CheckpointError
from exporter.architectures.base import ModelDescription, Rotary
from exporter.checkpoint import Checkpoint

Doubles = npt.NDArray[np.float64]
FACTORS = frozenset(
    f"{TENSOR_NAMES[kind]}.weight"
    for kind in (MODEL_TENSOR.ROPE_FREQS, MODEL_TENSOR.ROPE_FACTORS_LONG, MODEL_TENSOR.ROPE_FACTORS_SHORT)
)
"""Tensors that become part of the tables and are not stored."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """Position p turns pair i by p * ``frequencies[i]``; sine and cosine are multiplied by ``factor``."""

    frequencies: Doubles
    factor: float = 1.0

    def tables(self, positions: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Cosines and sines of positions 0 to ``positions`` - 1, each (positions, pairs)."""
        angles = np.arange(positions)[:, None] * self.frequencies[None, :]
        return (self.factor * np.cos(angles)).astype(np.float32), (self.factor * np.sin(angles)).astype(np.float32)


def rotation_of(description: ModelDescription, rotary: Rotary, checkpoint: Checkpoint, context: int) -> Rotation:
    """The rotation of layers without a window. ``context`` decides between the two sets of longrope.

    Raises ``CheckpointError`` for factors that cannot be read.
    """
    plain = _frequencies(rotary.theta, rotary.size)
    values, name = description.metadata, description.architecture
    if rotary.scaling == "linear":
        return Rotation(plain / float(values[Keys.Rope.SCALING_FACTOR.format(arch=name)]))
    if rotary.scaling == "yarn":
        return Rotation(_yarn(plain, rotary, values, name), rotary.attention_factor)
    if rotary.scaling == "longrope":
        original = original_context(description)
        kind = MODEL_TENSOR.ROPE_FACTORS_SHORT if context <= original else MODEL_TENSOR.ROPE_FACTORS_LONG
        return Rotation(plain / _factors(description, checkpoint, kind), rotary.attention_factor)
    if rotary.scaling == "llama3":
        return Rotation(plain / _factors(description, checkpoint, MODEL_TENSOR.ROPE_FREQS))
    return Rotation(plain)


def local_rotation(rotary: Rotary) -> Rotation:
    """The rotation of layers with a window where they have one of their own: never scaled."""
    return Rotation(_frequencies(rotary.local_theta or rotary.theta, rotary.size))


def original_context(description: ModelDescription) -> int:
    """The context before scaling, for yarn and longrope."""
    return int(description.metadata[Keys.Rope.SCALING_ORIG_CTX_LEN.format(arch=description.architecture)])


def _frequencies(theta: float, size: int) -> Doubles:
    frequencies: Doubles = theta ** -(np.arange(0, size, 2, dtype=np.float64) / size)
    return frequencies


def _factors(description: ModelDescription, checkpoint: Checkpoint, kind: MODEL_TENSOR) -> Doubles:
    name = f"{TENSOR_NAMES[kind]}.weight"
    for tensor in description.tensors:
        if tensor.name == name:
            values = checkpoint.load(tensor.source_name) if tensor.values is None else tensor.values
            return values.astype(np.float64)
    raise CheckpointError(f"{checkpoint.source.location} has no factors {name} for its rotation")


def _yarn(plain: Doubles, rotary: Rotary, values: Mapping[str, Any], name: str) -> Doubles:
    """Fast pairs stay, slow ones are divided by the factor, those between are blended (Peng et al. 2023)."""
    factor = float(values[Keys.Rope.SCALING_FACTOR.format(arch=name)])
    original = int(values[Keys.Rope.SCALING_ORIG_CTX_LEN.format(arch=name)])
    fast = float(values.get(Keys.Rope.SCALING_YARN_BETA_FAST.format(arch=name), 32.0))
    slow = float(values.get(Keys.Rope.SCALING_YARN_BETA_SLOW.format(arch=name), 1.0))

    def pair_with(turns: float) -> float:
        return rotary.size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rotary.theta))

    low, high = max(math.floor(pair_with(fast)), 0), min(math.ceil(pair_with(slow)), rotary.size - 1)
    share = np.clip((np.arange(len(plain)) - low) / (high - low if high != low else 0.001), 0, 1)
    blended: Doubles = plain / factor * share + plain * (1 - share)
    return blended
