"""The llama family: Llama 1 to 3, SmolLM and their kin, from Hugging Face names or from an existing GGUF.

Data first: which source tensor becomes which GGUF tensor, and which settings become which metadata. Widths come from
the tensors; the configuration only says what tensors cannot.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSOR, TENSOR_NAMES, Keys, RopeScalingType

from edgelm.errors import CheckpointError
from exporter.architectures.base import (
    COMPUTED,
    Dimensions,
    ModelDescription,
    TensorDescription,
    config_count,
    config_number,
    positive_number,
)
from exporter.checkpoint import Checkpoint

ARCHITECTURE = MODEL_ARCH_NAMES[MODEL_ARCH.LLAMA]
_LAYERS_LIMIT = 512  # llama.cpp's own


@dataclass(frozen=True, slots=True)
class _Rule:
    """``source`` and ``target`` without their suffix; ``rotary`` rows are reordered; ``widths`` (rows, columns)."""

    source: str
    target: MODEL_TENSOR
    widths: tuple[str, ...]
    rotary: bool = False
    biased: bool = False


_GLOBAL_RULES = (
    _Rule("model.embed_tokens", MODEL_TENSOR.TOKEN_EMBD, ("vocabulary", "hidden")),
    _Rule("model.norm", MODEL_TENSOR.OUTPUT_NORM, ("hidden",)),
)
_HEAD_RULE = _Rule("lm_head", MODEL_TENSOR.OUTPUT, ("vocabulary", "hidden"))
_LAYER = "model.layers.{layer}."
_LAYER_RULES = (
    _Rule(_LAYER + "input_layernorm", MODEL_TENSOR.ATTN_NORM, ("hidden",)),
    _Rule(_LAYER + "self_attn.q_proj", MODEL_TENSOR.ATTN_Q, ("query", "hidden"), rotary=True, biased=True),
    _Rule(_LAYER + "self_attn.k_proj", MODEL_TENSOR.ATTN_K, ("key", "hidden"), rotary=True, biased=True),
    _Rule(_LAYER + "self_attn.v_proj", MODEL_TENSOR.ATTN_V, ("key", "hidden"), biased=True),
    _Rule(_LAYER + "self_attn.o_proj", MODEL_TENSOR.ATTN_OUT, ("hidden", "query"), biased=True),
    _Rule(_LAYER + "post_attention_layernorm", MODEL_TENSOR.FFN_NORM, ("hidden",)),
    _Rule(_LAYER + "mlp.gate_proj", MODEL_TENSOR.FFN_GATE, ("feed_forward", "hidden"), biased=True),
    _Rule(_LAYER + "mlp.up_proj", MODEL_TENSOR.FFN_UP, ("feed_forward", "hidden"), biased=True),
    _Rule(_LAYER + "mlp.down_proj", MODEL_TENSOR.FFN_DOWN, ("hidden", "feed_forward"), biased=True),
)
_IGNORED_SUFFIX = "rotary_emb.inv_freq"  # a buffer that old checkpoints carry; it follows from the configuration


def describe(checkpoint: Checkpoint) -> ModelDescription:
    """Describe a llama checkpoint. Raises ``CheckpointError`` naming the setting or tensor that stands in the way."""
    return _from_gguf(checkpoint) if checkpoint.source.kind == "gguf" else _from_huggingface(checkpoint)


def _from_huggingface(checkpoint: Checkpoint) -> ModelDescription:
    _refuse_unknown_settings(checkpoint)
    dimensions = _dimensions(checkpoint)
    rope = _rope_settings(checkpoint)
    tensors = [*_mapped_tensors(checkpoint, dimensions), *_rope_factors(checkpoint, rope, dimensions.head_size)]
    return ModelDescription(ARCHITECTURE, dimensions, _metadata(checkpoint, dimensions, rope), tuple(tensors))


def _refuse_unknown_settings(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    expected = {"hidden_act": ("silu", "swish"), "num_local_experts": (None, 0, 1), "quantization_config": (None,)}
    for key, values in expected.items():
        if config.get(key, values[0]) not in values:
            told = config[key].get("quant_method", "set") if isinstance(config[key], Mapping) else repr(config[key])
            raise CheckpointError(f"{checkpoint.source.location}: config.json: {key} is {told}, which is not supported")


def _shape(checkpoint: Checkpoint, name: str, dimensions: int = 2) -> tuple[int, ...]:
    header = checkpoint.tensors.get(name)
    if header is None:
        raise CheckpointError(
            f"{checkpoint.source.location} has no tensor {name}", hint="is it a causal language model of this family?"
        )
    if len(header.shape) != dimensions or 0 in header.shape:
        raise CheckpointError(f"{checkpoint.source.location}: tensor {name} has the shape {header.shape}")
    return header.shape


def _dimensions(checkpoint: Checkpoint) -> Dimensions:
    """Widths as the first layer's tensors have them; ``_mapped_tensors`` holds all others to the same."""
    layers = config_count(checkpoint, "num_hidden_layers")
    if layers > _LAYERS_LIMIT:
        raise CheckpointError(f"{checkpoint.source.location}: {layers} layers; the engine takes {_LAYERS_LIMIT}")
    vocabulary, hidden = _shape(checkpoint, "model.embed_tokens.weight")
    first = _LAYER.format(layer=0)
    query, key = (_shape(checkpoint, f"{first}self_attn.{letter}_proj.weight")[0] for letter in "qk")
    heads = config_count(checkpoint, "num_attention_heads")
    head_size = config_count(checkpoint, "head_dim", default=hidden // heads or 1)
    if head_size % 2 or query % head_size or key % head_size or (query // head_size) % (key // head_size):
        raise CheckpointError(
            f"{checkpoint.source.location}: {query} query and {key} key rows do not divide into heads of {head_size}"
        )
    return Dimensions(
        layers=layers,
        hidden=hidden,
        heads=query // head_size,
        kv_heads=key // head_size,
        head_size=head_size,
        feed_forward=_shape(checkpoint, f"{first}mlp.gate_proj.weight")[0],
        vocabulary=vocabulary,
        context_trained=config_count(checkpoint, "max_position_embeddings", default=2048),
        tied=bool(checkpoint.config.get("tie_word_embeddings", False)),
    )


def _rules(dimensions: Dimensions) -> Iterator[tuple[_Rule, int | None]]:
    yield from ((rule, None) for rule in _GLOBAL_RULES)
    if not dimensions.tied:
        yield _HEAD_RULE, None
    for layer in range(dimensions.layers):
        yield from ((rule, layer) for rule in _LAYER_RULES)


def _mapped_tensors(checkpoint: Checkpoint, dimensions: Dimensions) -> list[TensorDescription]:
    widths = {
        "vocabulary": dimensions.vocabulary,
        "hidden": dimensions.hidden,
        "query": dimensions.heads * dimensions.head_size,
        "key": dimensions.kv_heads * dimensions.head_size,
        "feed_forward": dimensions.feed_forward,
    }
    found: list[TensorDescription] = []
    for rule, layer in _rules(dimensions):
        source, target = rule.source.format(layer=layer), TENSOR_NAMES[rule.target].format(bid=layer)
        shape = tuple(widths[name] for name in rule.widths)
        interleave = dimensions.head_size if rule.rotary else 0
        if rule.biased and f"{source}.bias" in checkpoint.tensors:
            _check_shape(checkpoint, f"{source}.bias", shape[:1])
            found.append(TensorDescription(f"{target}.bias", f"{source}.bias", shape[:1], interleave))
        _check_shape(checkpoint, f"{source}.weight", shape)
        found.append(TensorDescription(f"{target}.weight", f"{source}.weight", shape, interleave))
    _refuse_leftovers(checkpoint, {item.source_name for item in found}, dimensions)
    return found


def _check_shape(checkpoint: Checkpoint, name: str, expected: tuple[int, ...]) -> None:
    shape = _shape(checkpoint, name, len(expected))
    if shape != expected:
        raise CheckpointError(
            f"{checkpoint.source.location}: tensor {name} has the shape {shape}, the first layer implies {expected}",
            hint="llama.cpp's llama architecture needs the same widths in every layer",
        )


def _refuse_leftovers(checkpoint: Checkpoint, used: set[str], dimensions: Dimensions) -> None:
    redundant = {"lm_head.weight"} if dimensions.tied else set()
    left = [name for name in checkpoint.tensors if name not in used | redundant and not name.endswith(_IGNORED_SUFFIX)]
    if left:
        raise CheckpointError(
            f"{checkpoint.source.location} has {len(left)} tensors that a llama model has no place for, as {min(left)}",
            hint="is config.json the one of these weights?",
        )


def _rope_settings(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Rotary settings in one table: transformers 4 has them under two keys, transformers 5 in ``rope_parameters``."""
    config = checkpoint.config
    table = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(table, Mapping):
        raise CheckpointError(f"{checkpoint.source.location}: config.json: the rope settings are no table")
    kind = table.get("rope_type", table.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise CheckpointError(
            f"{checkpoint.source.location}: rotary scaling of type '{kind}' is not supported",
            hint="there are: default, linear, llama3",
        )
    theta = positive_number(checkpoint, {"rope_theta": config.get("rope_theta"), **table}, "rope_theta", 10000.0)
    return {**table, "rope_type": kind, "rope_theta": theta}


def _rope_factors(checkpoint: Checkpoint, rope: Mapping[str, Any], head_size: int) -> Iterator[TensorDescription]:
    """Llama 3.1's long-context rotation as divisors per frequency, which llama.cpp takes as a tensor.

    Formula: Hugging Face transformers, ``_compute_llama3_parameters``: frequencies with long waves are divided by
    ``factor``, short ones stay, those between are blended.
    """
    if rope["rope_type"] != "llama3":
        return
    factor, low, high, original = (
        positive_number(checkpoint, rope, key)
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    if low == high:
        raise CheckpointError(f"{checkpoint.source.location}: low_freq_factor and high_freq_factor are equal")
    exponents = np.arange(0, head_size, 2, dtype=np.float64) / head_size
    wavelengths = 2 * math.pi * rope["rope_theta"] ** exponents
    smooth = (original / wavelengths - low) / (high - low)
    divisors: npt.NDArray[np.float64] = 1 / ((1 - smooth) / factor + smooth)
    divisors = np.where(wavelengths < original / high, 1.0, np.where(wavelengths > original / low, factor, divisors))
    name = f"{TENSOR_NAMES[MODEL_TENSOR.ROPE_FREQS]}.weight"
    yield TensorDescription(name, COMPUTED, (head_size // 2,), values=divisors.astype(np.float32))


def _metadata(checkpoint: Checkpoint, dimensions: Dimensions, rope: Mapping[str, Any]) -> dict[str, Any]:
    values = {
        Keys.LLM.BLOCK_COUNT: dimensions.layers,
        Keys.LLM.CONTEXT_LENGTH: dimensions.context_trained,
        Keys.LLM.EMBEDDING_LENGTH: dimensions.hidden,
        Keys.LLM.FEED_FORWARD_LENGTH: dimensions.feed_forward,
        Keys.LLM.VOCAB_SIZE: dimensions.vocabulary,
        Keys.Attention.HEAD_COUNT: dimensions.heads,
        Keys.Attention.HEAD_COUNT_KV: dimensions.kv_heads,
        Keys.Attention.KEY_LENGTH: dimensions.head_size,
        Keys.Attention.VALUE_LENGTH: dimensions.head_size,
        Keys.Attention.LAYERNORM_RMS_EPS: config_number(checkpoint, "rms_norm_eps", 1e-6),
        Keys.Rope.DIMENSION_COUNT: dimensions.head_size,
        Keys.Rope.FREQ_BASE: rope["rope_theta"],
    }
    if rope["rope_type"] == "linear":
        values[Keys.Rope.SCALING_TYPE] = RopeScalingType.LINEAR.value
        values[Keys.Rope.SCALING_FACTOR] = positive_number(checkpoint, rope, "factor")
    general = {Keys.General.TYPE: "model", Keys.General.NAME: checkpoint.source.location.rsplit("/", 1)[-1]}
    return {**general, **{key.format(arch=ARCHITECTURE): value for key, value in values.items()}}


def _from_gguf(checkpoint: Checkpoint) -> ModelDescription:
    """An existing GGUF is described as it stands: its own metadata, its own tensor names and order of rows."""
    metadata = {
        key: value
        for key, value in checkpoint.config.items()
        if not key.startswith(("tokenizer.", "split.", "quantize."))
        and key not in (Keys.General.ARCHITECTURE, Keys.General.ALIGNMENT)
    }

    def count(key: str, default: int | None = None) -> int:
        name = key.format(arch=ARCHITECTURE)
        value = metadata.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise CheckpointError(f"{checkpoint.source.location}: metadata {name} is {value!r}, which is no count")
        return value

    heads, hidden = count(Keys.Attention.HEAD_COUNT), count(Keys.LLM.EMBEDDING_LENGTH)
    dimensions = Dimensions(
        layers=count(Keys.LLM.BLOCK_COUNT),
        hidden=hidden,
        heads=heads,
        kv_heads=count(Keys.Attention.HEAD_COUNT_KV, heads),
        head_size=count(Keys.Attention.KEY_LENGTH, hidden // heads or 1),
        feed_forward=count(Keys.LLM.FEED_FORWARD_LENGTH),
        vocabulary=_shape(checkpoint, f"{TENSOR_NAMES[MODEL_TENSOR.TOKEN_EMBD]}.weight")[0],
        context_trained=count(Keys.LLM.CONTEXT_LENGTH),
        tied=f"{TENSOR_NAMES[MODEL_TENSOR.OUTPUT]}.weight" not in checkpoint.tensors,
    )
    if metadata.get(Keys.LLM.EXPERT_COUNT.format(arch=ARCHITECTURE), 0):
        raise CheckpointError(f"{checkpoint.source.location} is a mixture of experts, which is not supported")
    tensors = tuple(TensorDescription(name, name, item.shape) for name, item in checkpoint.tensors.items())
    return ModelDescription(ARCHITECTURE, dimensions, metadata, tensors)
