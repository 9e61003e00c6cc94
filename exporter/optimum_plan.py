"""Plans of artefacts that optimum draws: the type and size of every tensor, without drawing anything.

Pure: reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from edgelm.bundle import TensorPlan
from exporter.optimum_weights import TABLE_ROWS, Rounding

CANDIDATES = ("int8-32", "int8")
"""What ``--quant auto`` chooses from, most bits first."""
GRAPH_BYTES = 2**18


def tensor_plans(tensors: Iterable[tuple[str, str, tuple[int, ...]]], rounding: Rounding) -> tuple[TensorPlan, ...]:
    """Type and size of tensors given as (name, source name, shape)."""
    return tuple(_tensor_plan(name, source, shape, rounding) for name, source, shape in tensors)


def _tensor_plan(name: str, source: str, shape: tuple[int, ...], rounding: Rounding) -> TensorPlan:
    elements = prod(shape)
    kind, size_bytes, reason = "fp32", 4 * elements, "vectors and small tables stay as they are"
    if len(shape) == 2 and shape[0] >= TABLE_ROWS:
        if not rounding.table.is_quantized:
            reason = f"default of {rounding.name}"
        elif not is_table(name) and rounding.of_product(shape[1], shape[0]) is None:
            kind, size_bytes, reason = "int8", elements + 5 * shape[0], "a scale per channel"
        elif not is_table(name) or shape[1] % rounding.table.block == 0:
            kind, size_bytes, reason = rounding.table.name, rounding.table.size_bytes(shape), f"as in {rounding.name}"
    return TensorPlan(name=name, source_name=source, shape=shape, type=kind, size_bytes=size_bytes, reason=reason)


def is_table(name: str) -> bool:
    """Whether rows of a matrix are looked up, by its name in a GGUF file or in a checkpoint."""
    return any(part in name for part in ("embd", "embed", "token_types", "shared."))
