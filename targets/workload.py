"""What a target has to do for one model: the only thing prediction knows of a model.

Built from an export plan or from the header of a model file by the rooms above. Knows bytes and counts, no tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Literal

from edgelm.bundle import ExportPlan, ModelShape

OwnKvType = Literal["f32", "f16"]


@dataclass(frozen=True, slots=True)
class TypedWeights:
    """All weights stored in one type (``Q4_0``, ``F32``; ONNX: ``int4``, ``int8``, ``fp32``, ``fp16``).

    ``rows`` are those of its matrices, one product of vectors each for every token; 0 where only the size is known.
    """

    type: str
    parameters: int
    size_bytes: int
    rows: int = 0


@dataclass(frozen=True, slots=True)
class Workload:
    """One model as a device sees it.

    ``weights`` are read in full for every token (a tied embedding is among them, as the head); ``lookup`` is an
    embedding table of which one row per token is read, None when tied. ``kv_elements_per_token`` counts keys and values
    of all layers. ``file_bytes`` is the size of the artefact on disk. ``own_kv_type`` is what the cache holds where the
    model decides it, None where options do. ``heads`` are the queries of a layer, 0 where nobody tells.
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
    own_kv_type: OwnKvType | None = None
    heads: int = 0

    @property
    def streamed_bytes(self) -> int:
        """Weight bytes read for every generated token."""
        return sum(item.size_bytes for item in self.weights)


def own_kv_type(format_name: str, types: Iterable[str]) -> OwnKvType | None:
    """What the cache of a model with weights of these types holds: an ONNX graph keeps what it computes with."""
    if format_name != "onnx":
        return None
    return "f16" if any(kind.endswith("fp16") for kind in types) else "f32"


def workload_from_plan(plan: ExportPlan) -> Workload | None:
    """The workload that a bundle's plan describes, None for one that states no ``shape`` and has no GGUF names."""
    shape = plan.shape or _shape_from_names(plan)
    if shape is None:
        return None
    parameters: Counter[str] = Counter()
    size_bytes: Counter[str] = Counter()
    rows: Counter[str] = Counter()
    lookup = None
    for tensor in plan.tensors:
        if tensor.name == shape.lookup_tensor:
            lookup = TypedWeights(tensor.type, prod(tensor.shape), tensor.size_bytes, prod(tensor.shape[:-1]))
            continue
        parameters[tensor.type] += prod(tensor.shape)
        size_bytes[tensor.type] += tensor.size_bytes
        rows[tensor.type] += prod(tensor.shape[:-1])
    return Workload(
        format=plan.format,
        architecture=plan.architecture,
        parameters=plan.parameters,
        file_bytes=plan.artifact_bytes,
        weights=tuple(
            TypedWeights(kind, parameters[kind], size_bytes[kind], rows[kind]) for kind in sorted(parameters)
        ),
        lookup=lookup,
        layers=shape.layers,
        hidden=shape.hidden,
        vocabulary=shape.vocabulary,
        kv_elements_per_token=shape.kv_elements_per_token,
        own_kv_type=own_kv_type(plan.format, parameters),
    )


def _shape_from_names(plan: ExportPlan) -> ModelShape | None:
    """The shape that the tensors of a GGUF show by their names; keys and values are as wide as their projections."""
    by_name = {tensor.name: tensor for tensor in plan.tensors}
    table = by_name.get("token_embd.weight")
    keys = [tensor for name, tensor in by_name.items() if name.endswith((".attn_k.weight", ".attn_v.weight"))]
    if table is None or len(table.shape) != 2 or not keys:
        return None
    return ModelShape(
        layers=len({tensor.name.split(".")[1] for tensor in keys}),
        hidden=table.shape[1],
        vocabulary=table.shape[0],
        kv_elements_per_token=sum(tensor.shape[0] for tensor in keys),
        lookup_tensor=table.name if "output.weight" in by_name else None,
    )
