"""What each tensor would lose in each type: quantised for real, error weighed by the model's own sensitivity.

Large tensors are judged by a sample of their rows, drawn in proportion to what they matter. The same quantiser is
used here and for the artefact: libggml's, with compensated rounding where it pays. Knows tensors and types; does not
know limits, targets or what is best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from edgelm.progress import Progress
from exporter import ggml, rounding
from exporter.architectures.base import ModelDescription, TensorDescription, ordered_rows
from exporter.checkpoint import Checkpoint
from exporter.gguf import usable_cpus
from exporter.rounding import Compensating
from exporter.sensitivity import TensorStatistics, damage

Floats = npt.NDArray[np.float32]
CANDIDATE_TYPES = ("Q4_0", "IQ4_NL", "IQ4_XS", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0")
SAMPLED_ROWS = 256
# At 8 bits the kernels' own 8-bit activations are the larger error: nothing is left to compensate.
_UNCOMPENSATED = frozenset({"Q8_0"})
_SEED = 7


@dataclass(frozen=True)
class Quantizer:
    """Quantises the rows of one tensor: compensated when the tensor has a moment and the type can be, else libggml.

    ``importance`` (columns) weighs the squared error of each column where rounding is not compensated.
    """

    importance: Floats | None = None
    compensation: Compensating | None = None

    def __call__(self, rows: Floats, type_name: str, out: ggml.Bytes | None = None) -> ggml.Bytes:
        """Bytes of float32 rows (n, columns) in a type. Errors as of ``ggml.quantize``."""
        kind = ggml.TYPES[type_name]
        if not kind.is_quantized:
            return ggml.quantize(rows, type_name, out)
        if self.compensation is not None and type_name not in _UNCOMPENSATED and rounding.supports(type_name):
            return rounding.quantize(rows, type_name, self.compensation, out)
        return ggml.quantize(rows, type_name, out, self.importance)


def quantizer(statistics: TensorStatistics) -> Quantizer:
    """The quantiser for a tensor with these statistics."""
    if statistics.moment is None:
        squares = statistics.input_squares
        return Quantizer(None if squares is None else np.ascontiguousarray(squares / statistics.tokens, np.float32))
    moment = statistics.moment
    if statistics.lookup_weights is not None and statistics.lookup_counts is not None:
        # A tied table also feeds the first layer: an error in column j costs its lookups what it costs the head.
        assert statistics.row_weights is not None
        weight = max(float(statistics.row_weights.sum()), 1e-30)
        lookups = float(statistics.lookup_counts.sum()) / statistics.tokens
        moment = moment + np.diag(statistics.lookup_weights * lookups / weight).astype(np.float32)
    importance = np.ascontiguousarray(np.diag(moment)).astype(np.float32)
    return Quantizer(importance, rounding.compensation(moment))


def quantizers(statistics: Mapping[str, TensorStatistics]) -> dict[str, Quantizer]:
    """Quantisers by tensor name. Takes a matrix factorisation per tensor, one after the other: numpy uses all cores for
    each, and several at once would wait for each other, spinning."""
    return {name: quantizer(item) for name, item in statistics.items()}


def table(
    checkpoint: Checkpoint,
    description: ModelDescription,
    statistics: Mapping[str, TensorStatistics],
    given: Mapping[str, Quantizer],
    progress: Progress,
    types: Sequence[str] = CANDIDATE_TYPES,
) -> dict[str, dict[str, float]]:
    """Damage in nats per token by tensor and type, for every tensor with statistics and every type its rows fit."""
    tensors = [item for item in description.tensors if item.name in statistics]

    def judged(item: TensorDescription) -> dict[str, float]:
        return judge(checkpoint, item, statistics[item.name], given[item.name], types)

    found: dict[str, dict[str, float]] = {}
    stage_of = progress.stage("measuring types", len(tensors), unit="tensors")
    with stage_of as stage, ThreadPoolExecutor(usable_cpus()) as pool:
        for item, losses in zip(tensors, pool.map(judged, tensors), strict=True):
            found[item.name] = losses
            stage.advance()
    return found


def judge(
    checkpoint: Checkpoint,
    item: TensorDescription,
    statistics: TensorStatistics,
    given: Quantizer,
    types: Sequence[str] = CANDIDATE_TYPES,
    *,
    pool: ThreadPoolExecutor | None = None,
) -> dict[str, float]:
    """Damage of one tensor in nats per token by type, for every type its rows fit; types in parallel in a ``pool``."""
    rows, sampled = _sample(load_rows(checkpoint, item), statistics)
    fitting = [name for name in types if rows.shape[1] % ggml.TYPES[name].block == 0]

    def lost(name: str) -> float:
        stored = given(rows, name)
        return damage(ggml.dequantize(stored, name, rows.size).reshape(rows.shape) - rows, sampled)

    return dict(zip(fitting, pool.map(lost, fitting) if pool else map(lost, fitting), strict=True))


def load_rows(checkpoint: Checkpoint, item: TensorDescription) -> Floats:
    """A matrix as float32, as the artefact has it: its rows, their order and their scale."""
    values = checkpoint.load(item.source_name)
    if item.transposed:
        values = values.T
    values = ordered_rows(values[item.skipped : item.skipped + item.shape[0]], item)
    if item.scale != 1.0 or item.offset != 0.0:
        values = values * np.float32(item.scale) + np.float32(item.offset)
    return np.ascontiguousarray(values, dtype=np.float32)


def _sample(rows: Floats, statistics: TensorStatistics) -> tuple[Floats, TensorStatistics]:
    """At most about ``SAMPLED_ROWS`` rows and statistics that make their damage an estimate of that of all.

    Each row is kept with a probability in proportion to its weight (at most 1) and counts by the inverse of it
    (Horvitz and Thompson 1952).
    """
    if len(rows) <= SAMPLED_ROWS:
        return rows, statistics
    weights = np.full(len(rows), 1e-3 / len(rows))
    for part in (statistics.row_weights, statistics.lookup_counts):
        if part is not None and part.sum() > 0:
            weights += part / part.sum()
    probabilities = np.minimum(1.0, SAMPLED_ROWS * weights / weights.sum())
    kept = np.nonzero(np.random.default_rng(_SEED).random(len(rows)) < probabilities)[0]
    scale = (1 / probabilities[kept]).astype(np.float32)
    row_weights = None if statistics.row_weights is None else statistics.row_weights[kept] * scale
    counts = None if statistics.lookup_counts is None else statistics.lookup_counts[kept] * scale
    return np.ascontiguousarray(rows[kept]), replace(statistics, row_weights=row_weights, lookup_counts=counts)


def total(damages: Mapping[str, Mapping[str, float]], types: Mapping[str, str]) -> float:
    """Sum of the damages of tensors stored as ``types`` says; types beyond the table (F32) cost nothing."""
    return math.fsum(damages[name].get(kind, 0.0) for name, kind in types.items() if name in damages)
