"""What a target has to do for one model: the only thing prediction knows of a model.

Built from an export plan or from the header of a model file by the rooms above. Knows bytes and counts, no tensors.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import Literal

from edgelm.bundle import ExportPlan


@dataclass(frozen=True, slots=True)
class TypedWeights:
    """All weights stored in one type (``Q4_0``, ``F32``; ONNX: ``int4``, ``int8``, ``fp32``)."""

    type: str
    parameters: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Workload:
    """One model as a device sees it.

    ``weights`` are read in full for every token (a tied embedding is among them, as the head); ``lookup`` is an
    embedding table of which one row per token is read, None when tied. ``kv_elements_per_token`` counts keys and values
    of all layers. ``file_bytes`` is the size of the artefact on disk.
    """

    format: Literal["gguf", "onnx"]
    architecture: str
    parameters: int
    file_bytes: int
    weights: tuple[TypedWeights, ...]
    lookup: TypedWeights | None
    layers: int
    hidden: int
    vocabulary: int
    kv_elements_per_token: int

    @property
    def streamed_bytes(self) -> int:
        """Weight bytes read for every generated token."""
        return sum(item.size_bytes for item in self.weights)


def workload_from_plan(plan: ExportPlan) -> Workload | None:
    """The workload that a bundle's plan describes; None for a plan that was stored without its ``shape``."""
    if plan.shape is None:
        return None
    parameters: Counter[str] = Counter()
    size_bytes: Counter[str] = Counter()
    lookup = None
    for tensor in plan.tensors:
        if tensor.name == plan.shape.lookup_tensor:
            lookup = TypedWeights(tensor.type, prod(tensor.shape), tensor.size_bytes)
            continue
        parameters[tensor.type] += prod(tensor.shape)
        size_bytes[tensor.type] += tensor.size_bytes
    return Workload(
        format=plan.format,
        architecture=plan.architecture,
        parameters=plan.parameters,
        file_bytes=plan.artifact_bytes,
        weights=tuple(TypedWeights(kind, parameters[kind], size_bytes[kind]) for kind in sorted(parameters)),
        lookup=lookup,
        layers=plan.shape.layers,
        hidden=plan.shape.hidden,
        vocabulary=plan.shape.vocabulary,
        kv_elements_per_token=plan.shape.kv_elements_per_token,
    )
