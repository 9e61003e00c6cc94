"""What pruning may change of a model, and which sizes suit a device.

A shape counts; which layers, neurons and heads stay is ``importance``'s business. Families are those of ``anatomy``;
sizes for a device are known for layers built like Llama's: attention of q, k, v, o and a gated feed-forward network.
Knows configurations, no tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from edgelm.errors import CheckpointError, DoesNotFitError, UsageError
from exporter.compress.anatomy import ANATOMIES

K_QUANT_ROW, BLOCK_ROW = 256, 32
"""Row lengths that k-quants and the simple block formats need (ggml: QK_K and QK4_0)."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Counts of one model. A head here is a group: one head of keys and values with the query heads that share it."""

    layers: int
    neurons: int
    kv_heads: int
    hidden: int

    def __str__(self) -> str:
        return f"{self.layers} layers, {self.neurons} neurons, {self.kv_heads} KV heads, width {self.hidden}"


def shape_of(config: Any) -> Shape:
    """The shape in a transformers configuration. Raises ``CheckpointError`` for families that are not known."""
    anatomy = ANATOMIES.get(config.model_type)
    if anatomy is None:
        raise CheckpointError(
            f"models of type '{config.model_type}' cannot be pruned", hint=f"there are: {', '.join(ANATOMIES)}"
        )
    neurons = getattr(config, anatomy.neurons)
    return Shape(config.num_hidden_layers, neurons, kv_heads_of(config), config.hidden_size)


def kv_heads_of(config: Any) -> int:
    """Heads of keys and values; an encoder has as many as it has heads."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def group_of(config: Any) -> int:
    """Query heads that share one head of keys and values."""
    return int(config.num_attention_heads // kv_heads_of(config))


def told(config: Any) -> str:
    """The shape of any model in words; a teacher need not be of a family that can be pruned."""
    known = config.model_type in ANATOMIES
    return (
        str(shape_of(config)) if known else f"{config.model_type}, {config.get_text_config().num_hidden_layers} layers"
    )


def head_size(config: Any) -> int:
    """Numbers per head: stated, or the width divided by the heads."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def parameters(config: Any, shape: Shape) -> int:
    """Weights of matrices of a model of this shape; a tied table counts once."""
    group = group_of(config)
    attention: int = shape.hidden * head_size(config) * shape.kv_heads * (2 * group + 2)
    feed_forward = 3 * shape.hidden * shape.neurons
    tables = 1 if config.tie_word_embeddings else 2
    return shape.layers * (attention + feed_forward) + tables * int(config.vocab_size) * shape.hidden


def wanted_shape(
    full: Shape, *, layers: int | None = None, neurons: int | None = None, heads: int | None = None,
    hidden: int | None = None,
) -> Shape:  # fmt: skip
    """The teacher's shape with what was asked for. Raises ``UsageError`` for counts that it does not have."""
    asked = {"layers": layers, "neurons": neurons, "kv_heads": heads, "hidden": hidden}
    for name, value in asked.items():
        have = getattr(full, name)
        if value is not None and not 1 <= value <= have:
            option = {"kv_heads": "heads"}.get(name, name)
            raise UsageError(f"--{option} {value}: the teacher has {have}", hint=f"give a number from 1 to {have}")
    return replace(full, **{name: value for name, value in asked.items() if value is not None})


def steps_between(full: Shape, wanted: Shape, stages: int) -> list[Shape]:
    """Shapes on the way, ``stages`` of them, the last one as wanted."""

    def between(have: int, asked: int, stage: int) -> int:
        return have + (asked - have) * stage // stages

    return [
        Shape(*(between(getattr(full, item.name), getattr(wanted, item.name), stage) for item in fields(Shape)))
        for stage in range(1, stages + 1)
    ]


def row_remarks(config: Any, shape: Shape) -> list[str]:
    """What the shape means for quantisation: rows that no k-quant, or no block format at all, can hold."""
    group = group_of(config)
    rows = {
        "width": shape.hidden,
        "neurons": shape.neurons,
        "attention output": shape.kv_heads * group * head_size(config),
    }
    remarks = []
    for name, length in rows.items():
        if length % BLOCK_ROW:
            remarks.append(f"{name}: rows of {length} are no multiple of {BLOCK_ROW} and stay unquantised")
        elif length % K_QUANT_ROW:
            remarks.append(f"{name}: rows of {length} are no multiple of {K_QUANT_ROW}; k-quants fall back there")
    return remarks


def smaller_shapes(full: Shape) -> Iterator[Shape]:
    """Shapes below the teacher's, largest first by layers: every depth, with neurons in steps that k-quants hold.

    Widths and heads stay: they cost more quality per byte than depth and neurons do.
    """
    step = K_QUANT_ROW if full.neurons >= 4 * K_QUANT_ROW else BLOCK_ROW
    least = max(step, full.neurons // 2)
    for layers in range(full.layers, max(1, full.layers // 3) - 1, -1):
        for neurons in range(full.neurons // step * step, least - 1, -step):
            yield replace(full, layers=layers, neurons=neurons)


def no_shape(limits: str, nearest: str) -> DoesNotFitError:
    """The error for limits that no proposal meets."""
    return DoesNotFitError(f"no pruned shape meets {limits}; the nearest: {nearest}", hint="relax the limits")
