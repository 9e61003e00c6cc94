"""An existing GGUF file described as it stands: its own metadata, its own tensor names and order of rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from gguf.constants import MODEL_TENSOR, TENSOR_NAMES, Keys

from edgelm.errors import CheckpointError
from exporter.architectures.base import Dimensions, LayerShape, ModelDescription, TensorDescription
from exporter.architectures.shared.encoders import encoder_of_gguf
from exporter.checkpoint import Checkpoint

_NOT_OURS = ("tokenizer.", "split.", "quantize.")


def describe_gguf(checkpoint: Checkpoint) -> ModelDescription:
    """Describe a GGUF file. Raises ``CheckpointError`` naming the metadata that makes no sense."""
    architecture = checkpoint.architecture
    metadata = {
        key: value
        for key, value in checkpoint.config.items()
        if not key.startswith(_NOT_OURS) and key != Keys.General.ALIGNMENT
    }
    if metadata.get(Keys.LLM.EXPERT_COUNT.format(arch=architecture), 0):
        raise CheckpointError(f"{checkpoint.source.location} is a mixture of experts, which is not supported")
    tensors = tuple(TensorDescription(name, name, item.shape) for name, item in checkpoint.tensors.items())
    dimensions = _dimensions(checkpoint, metadata)
    encoder = encoder_of_gguf(checkpoint, dimensions)
    if encoder is not None:
        dimensions = replace(dimensions, tied=False)
    return ModelDescription(architecture, dimensions, metadata, tensors, encoder=encoder)


def _dimensions(checkpoint: Checkpoint, metadata: dict[str, Any]) -> Dimensions:
    def checked(name: str, value: Any, least: int = 1) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
            raise CheckpointError(f"{checkpoint.source.location}: metadata {name} is {value!r}, which is no count")
        return value

    def count(key: str, default: int | None = None) -> int:
        name = key.format(arch=checkpoint.architecture)
        return checked(name, metadata.get(name, default))

    layers = count(Keys.LLM.BLOCK_COUNT)

    def counts(key: str, default: list[int] | None = None) -> list[int]:
        name = key.format(arch=checkpoint.architecture)
        value = metadata.get(name, default)
        values = value.tolist() if isinstance(value, np.ndarray) else value
        if not isinstance(values, list):
            return [checked(name, values)] * layers
        if len(values) != layers:
            raise CheckpointError(f"{checkpoint.source.location}: metadata {name} is not one number for each layer")
        return [checked(name, item, least=0) for item in values]

    heads, hidden = counts(Keys.Attention.HEAD_COUNT), count(Keys.LLM.EMBEDDING_LENGTH)
    kv_heads = counts(Keys.Attention.HEAD_COUNT_KV, heads)
    shapes = tuple(map(LayerShape, heads, kv_heads, counts(Keys.LLM.FEED_FORWARD_LENGTH)))
    first = next((shape for shape in shapes if shape.heads and shape.kv_heads), None)
    if first is None:
        raise CheckpointError(f"{checkpoint.source.location} has no layer with attention")
    embedding = checkpoint.tensors.get(f"{TENSOR_NAMES[MODEL_TENSOR.TOKEN_EMBD]}.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{checkpoint.source.location} has no tensor token_embd.weight of two dimensions")
    return Dimensions(
        layers=layers,
        hidden=hidden,
        heads=first.heads,
        kv_heads=first.kv_heads,
        head_size=count(Keys.Attention.KEY_LENGTH, hidden // first.heads or 1),
        feed_forward=first.feed_forward,
        vocabulary=embedding.shape[0],
        context_trained=count(Keys.LLM.CONTEXT_LENGTH),
        tied=f"{TENSOR_NAMES[MODEL_TENSOR.OUTPUT]}.weight" not in checkpoint.tensors,
        uneven=shapes if len(set(shapes)) > 1 else (),
    )
