"""Rotary embeddings: from the many forms of a configuration to GGUF keys and factors per frequency.

Formulas are those of Hugging Face transformers, ``modeling_rope_utils``. Knows no tensors of a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from gguf.constants import MODEL_TENSOR, TENSOR_NAMES, Keys, RopeScalingType

from edgelm.errors import CheckpointError
from exporter.architectures.base import COMPUTED, Rotary, TensorDescription, config_count, positive_number
from exporter.architectures.shared.family import RopeSettings, Target
from exporter.checkpoint import Checkpoint

Scaling = Literal["default", "linear", "llama3", "yarn", "longrope"]
# transformers' "dynamic" changes nothing within max_position_embeddings, and an artefact ends there.
_SAME = {"su": "longrope", "none": "default", "dynamic": "default"}


@dataclass(frozen=True)
class RopeDescription:
    """What an artefact needs: the description, GGUF keys (without the architecture) and computed tensors."""

    rotary: Rotary
    metadata: Mapping[str, Any]
    tensors: tuple[TensorDescription, ...]


def describe_rope(checkpoint: Checkpoint, settings: RopeSettings, target: Target, head_size: int) -> RopeDescription:
    """The rotation of a checkpoint. Raises ``CheckpointError`` for scalings that the target has no place for."""
    table, local = _tables(checkpoint)
    kind = _kind(checkpoint, table, target)
    size = int(head_size * _setting(checkpoint, table, settings.share))
    if not 0 < size <= head_size or size % 2:
        raise CheckpointError(f"{checkpoint.source.location}: {size} of the {head_size} elements of a head rotate")
    theta = _setting(checkpoint, table, settings.theta)
    if table.get("alpha") and "dynamic" in (table.get("rope_type"), table.get("type")):
        theta *= positive_number(checkpoint, table, "alpha") ** (size / (size - 2))  # Hunyuan's, of any length
    metadata: dict[str, Any] = {Keys.Rope.DIMENSION_COUNT: size, Keys.Rope.FREQ_BASE: theta}
    local_theta = None
    if settings.local_theta is not None:
        name, default = settings.local_theta
        default = theta if name == settings.theta[0] else default
        local_theta = positive_number(
            checkpoint, {name: checkpoint.config.get(name), **_renamed(local, name)}, name, default
        )
        metadata[Keys.Rope.FREQ_BASE_SWA] = local_theta
    factor = 1.0
    tensors: tuple[TensorDescription, ...] = ()
    if kind == "linear":
        metadata[Keys.Rope.SCALING_TYPE] = RopeScalingType.LINEAR.value
        metadata[Keys.Rope.SCALING_FACTOR] = positive_number(checkpoint, table, "factor")
    elif kind == "yarn":
        factor = _yarn(checkpoint, table, metadata)
    elif kind == "llama3":
        tensors = (_factors(MODEL_TENSOR.ROPE_FREQS, _llama3_divisors(checkpoint, table, theta, size)),)
    elif kind == "longrope":
        factor, tensors = _longrope(checkpoint, table, size, metadata)
    temperature = _temperature(checkpoint, table, settings.temperature)
    if temperature is not None:
        metadata[Keys.Attention.TEMPERATURE_SCALE] = temperature[0]
        metadata[Keys.Rope.SCALING_ORIG_CTX_LEN] = temperature[1]
    rotary = Rotary(size, theta, target.adjacent, kind, factor, local_theta, temperature=temperature)
    return RopeDescription(rotary, metadata, tensors)


def _temperature(checkpoint: Checkpoint, table: Mapping[str, Any], name: str | None) -> tuple[float, int] | None:
    if name is None or not table.get(name):
        return None
    return positive_number(checkpoint, table, name), _original_context(checkpoint, table)


def _tables(checkpoint: Checkpoint) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Settings of full layers and of those with a window: transformers 5 keeps all in ``rope_parameters``."""
    config = checkpoint.config
    table = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(table, Mapping):
        raise CheckpointError(f"{checkpoint.source.location}: config.json: the rope settings are no table")
    local = table.get("sliding_attention") or {}
    table = table.get("full_attention", table)
    if not isinstance(table, Mapping) or not isinstance(local, Mapping):
        raise CheckpointError(f"{checkpoint.source.location}: config.json: the rope settings are no table")
    return table, local


def _renamed(local: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {name: local["rope_theta"]} if "rope_theta" in local else {}


def _kind(checkpoint: Checkpoint, table: Mapping[str, Any], target: Target) -> Scaling:
    kind = table.get("rope_type", table.get("type", "default"))
    kind = _SAME.get(kind, kind) if isinstance(kind, str) else kind
    for known in get_args(Scaling):
        if kind == known:
            scaling: Scaling = known
            break
    else:
        raise CheckpointError(
            f"{checkpoint.source.location}: rotary scaling of type '{kind}' is not supported",
            hint=f"there are: {', '.join(get_args(Scaling))}",
        )
    if kind in ("llama3", "longrope") and kind not in target.factors:
        raise CheckpointError(
            f"{checkpoint.source.location}: rotary scaling of type '{kind}' has no place in llama.cpp's {target.name}"
        )
    return scaling


def _setting(checkpoint: Checkpoint, table: Mapping[str, Any], setting: tuple[str, float]) -> float:
    """A number that stands in config.json under a family's name or, since transformers 5, in the table."""
    name, default = setting
    known = "rope_theta" if name in ("rope_theta", "rotary_emb_base") else "partial_rotary_factor"
    for source, key in ((table, known), (checkpoint.config, name), (checkpoint.config, known)):
        if source.get(key) is not None:
            return positive_number(checkpoint, source, key)
    return default


def _factors(kind: MODEL_TENSOR, values: npt.NDArray[np.float64]) -> TensorDescription:
    return TensorDescription(f"{TENSOR_NAMES[kind]}.weight", COMPUTED, (len(values),), values=values.astype(np.float32))


def _llama3_divisors(
    checkpoint: Checkpoint, table: Mapping[str, Any], theta: float, size: int
) -> npt.NDArray[np.float64]:
    """Divisors per frequency: long waves are divided by ``factor``, short ones stay, those between are blended."""
    factor, low, high, original = (
        positive_number(checkpoint, table, key)
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    if low == high:
        raise CheckpointError(f"{checkpoint.source.location}: low_freq_factor and high_freq_factor are equal")
    wavelengths = 2 * math.pi * theta ** (np.arange(0, size, 2, dtype=np.float64) / size)
    smooth = (original / wavelengths - low) / (high - low)
    divisors: npt.NDArray[np.float64] = 1 / ((1 - smooth) / factor + smooth)
    long = np.where(wavelengths > original / low, factor, divisors)
    return np.where(wavelengths < original / high, 1.0, long)


def _original_context(checkpoint: Checkpoint, table: Mapping[str, Any]) -> int:
    known = table.get("original_max_position_embeddings")
    if known is not None:
        return int(positive_number(checkpoint, table, "original_max_position_embeddings"))
    name = "original_max_position_embeddings"
    return config_count(checkpoint, name if name in checkpoint.config else "max_position_embeddings")


def _yarn(checkpoint: Checkpoint, table: Mapping[str, Any], metadata: dict[str, Any]) -> float:
    """Fills in yarn's keys; the factor on sine and cosine, which llama.cpp computes as 0.1 ln(factor) + 1."""
    factor = positive_number(checkpoint, table, "factor")
    if table.get("truncate") is False:
        raise CheckpointError(f"{checkpoint.source.location}: config.json: yarn's truncate is not supported")

    def grown(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    own = default = grown(1)
    if table.get("mscale") and table.get("mscale_all_dim"):  # either alone is ignored
        scales = (positive_number(checkpoint, table, name) for name in ("mscale", "mscale_all_dim"))
        default = grown(next(scales)) / grown(next(scales))
    asked = positive_number(checkpoint, table, "attention_factor", default)
    metadata[Keys.Rope.SCALING_TYPE] = RopeScalingType.YARN.value
    metadata[Keys.Rope.SCALING_FACTOR] = factor
    metadata[Keys.Rope.SCALING_ORIG_CTX_LEN] = _original_context(checkpoint, table)
    metadata[Keys.Rope.SCALING_YARN_BETA_FAST] = positive_number(checkpoint, table, "beta_fast", 32.0)
    metadata[Keys.Rope.SCALING_YARN_BETA_SLOW] = positive_number(checkpoint, table, "beta_slow", 1.0)
    metadata[Keys.Rope.SCALING_ATTN_FACTOR] = asked / own
    return asked


def _longrope(
    checkpoint: Checkpoint, table: Mapping[str, Any], size: int, metadata: dict[str, Any]
) -> tuple[float, tuple[TensorDescription, ...]]:
    """Two sets of divisors. transformers takes the long ones when a text is longer than the original context,
    llama.cpp when the context that it was opened with is."""
    tensors = []
    for key, kind in (
        ("long_factor", MODEL_TENSOR.ROPE_FACTORS_LONG),
        ("short_factor", MODEL_TENSOR.ROPE_FACTORS_SHORT),
    ):
        values = table.get(key)
        if (
            not isinstance(values, list)
            or len(values) != size // 2
            or not all(isinstance(value, (int, float)) and value > 0 for value in values)
        ):
            raise CheckpointError(f"{checkpoint.source.location}: config.json: {key} is no list of {size // 2} numbers")
        tensors.append(_factors(kind, np.array(values, dtype=np.float64)))
    original = _original_context(checkpoint, table)
    ratio = config_count(checkpoint, "max_position_embeddings") / original
    own = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    factor = positive_number(checkpoint, table, "attention_factor", own)
    metadata[Keys.Rope.SCALING_ORIG_CTX_LEN] = original
    metadata[Keys.Rope.SCALING_ATTN_FACTOR] = factor
    return factor, tuple(tensors)
