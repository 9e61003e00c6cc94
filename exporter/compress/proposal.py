"""Which pruned shape a device can run fast enough: each candidate is planned as an export of it would be.

Candidates exist as headers only, made from a configuration. Knows planning; no weights and no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edgelm.bundle import ExportPlan
from edgelm.errors import DoesNotFitError
from exporter.checkpoint import Checkpoint
from exporter.compress.shape import Shape, head_size, no_shape, parameters, smaller_shapes
from exporter.options import ExportOptions
from exporter.plan import resolve
from exporter.safetensors_header import TensorHeader
from targets.profile import TargetProfile

_BF16_BYTES = 2


@dataclass(frozen=True)
class Proposal:
    """A shape and the export that it would become."""

    shape: Shape
    plan: ExportPlan


def propose(
    config: Any, full: Shape, checkpoint: Checkpoint, options: ExportOptions, profile: TargetProfile
) -> Proposal:
    """The largest shape whose export meets the limits in ``options``. Raises ``DoesNotFitError`` with the nearest."""
    nearest = ""
    for shape in sorted(smaller_shapes(full), key=lambda shape: -parameters(config, shape)):
        found = _planned(shape, imagined(config, shape, checkpoint), options, profile)
        if isinstance(found, Proposal):
            return found
        nearest = f"{shape}: {found}"
    raise no_shape(_limits(options), nearest)


def _planned(shape: Shape, student: Checkpoint, options: ExportOptions, profile: TargetProfile) -> Proposal | str:
    """The proposal, or the reason why its export does not fit."""
    try:
        return Proposal(shape, resolve(options, student, profile))
    except DoesNotFitError as error:
        return error.message


def _limits(options: ExportOptions) -> str:
    named = {
        "--min-decode-tps": options.min_decode_tps,
        "--min-prefill-tps": options.min_prefill_tps,
        "--max-ram": options.max_ram_bytes,
        "--max-bytes": options.max_artifact_bytes,
    }
    return ", ".join(f"{name} {value}" for name, value in named.items() if value is not None) or options.target


def imagined(config: Any, shape: Shape, checkpoint: Checkpoint) -> Checkpoint:
    """Headers of the student that a teacher would become; there are no weights behind them."""
    settings: Mapping[str, Any] = {
        **config.to_dict(),
        "num_hidden_layers": shape.layers,
        "intermediate_size": shape.neurons,
        "num_key_value_heads": shape.kv_heads,
        "num_attention_heads": shape.kv_heads * (config.num_attention_heads // config.num_key_value_heads),
        "hidden_size": shape.hidden,
        "head_dim": head_size(config),
    }
    tensors = {name: _header(name, size) for name, size in _shapes(config, shape)}
    source = replace(checkpoint.source, kind="huggingface")
    return Checkpoint(
        source, config.model_type, MappingProxyType(dict(settings)), MappingProxyType(tensors), (),
        checkpoint.vocabulary_bytes,
    )  # fmt: skip


def _header(name: str, shape: tuple[int, ...]) -> TensorHeader:
    return TensorHeader(name, shape, "BF16", Path(name), 0, math.prod(shape) * _BF16_BYTES)


def _shapes(config: Any, shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    vocabulary, size = int(config.vocab_size), head_size(config)
    keys = shape.kv_heads * size
    queries = keys * (config.num_attention_heads // config.num_key_value_heads)
    yield "model.embed_tokens.weight", (vocabulary, shape.hidden)
    yield "model.norm.weight", (shape.hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (vocabulary, shape.hidden)
    biased = config.model_type == "qwen2" or bool(getattr(config, "attention_bias", False))
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            yield f"{prefix}.self_attn.{name}.weight", (rows, shape.hidden)
            if biased:
                yield f"{prefix}.self_attn.{name}.bias", (rows,)
        yield f"{prefix}.self_attn.o_proj.weight", (shape.hidden, queries)
        if config.model_type == "qwen3":
            yield f"{prefix}.self_attn.q_norm.weight", (size,)
            yield f"{prefix}.self_attn.k_norm.weight", (size,)
        yield f"{prefix}.mlp.gate_proj.weight", (shape.neurons, shape.hidden)
        yield f"{prefix}.mlp.up_proj.weight", (shape.neurons, shape.hidden)
        yield f"{prefix}.mlp.down_proj.weight", (shape.hidden, shape.neurons)
        yield f"{prefix}.input_layernorm.weight", (shape.hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (shape.hidden,)
