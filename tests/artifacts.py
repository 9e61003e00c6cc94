"""Writes an artefact of a checkpoint without plan, target or bundle, for the tests of proofs."""

from __future__ import annotations

from math import prod
from pathlib import Path

from edgelm.bundle import TensorPlan
from edgelm.progress import SILENT
from exporter import ggml
from exporter.architectures import describe
from exporter.checkpoint import Checkpoint
from exporter.gguf import write_gguf
from exporter.mixes import WeightShape, mix_named, tensor_types
from exporter.tokenizer import load_tokenizer


def write_artifact(checkpoint: Checkpoint, path: Path, quant: str) -> Path:
    """A GGUF file of the whole model in a mix or type."""
    description = describe(checkpoint)
    dimensions = description.dimensions
    decisions = tensor_types(
        mix_named(quant),
        [WeightShape(item.name, item.shape) for item in description.tensors],
        layers=dimensions.layers,
        heads=dimensions.heads,
        kv_heads=dimensions.kv_heads,
    )
    plans = [
        TensorPlan(
            name=item.name,
            source_name=item.source_name,
            shape=item.shape,
            type=decisions[item.name].type,
            size_bytes=ggml.TYPES[decisions[item.name].type].row_bytes(item.shape[-1]) * prod(item.shape[:-1]),
            reason=decisions[item.name].reason,
        )
        for item in description.tensors
    ]
    metadata = {**description.metadata, **load_tokenizer(checkpoint, SILENT).gguf_metadata}
    write_gguf(path, checkpoint, description.tensors, plans, metadata, threads=1)
    return path
