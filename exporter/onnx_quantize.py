"""Rounds rows of float32 weights to blocks of 4 or 8 bits with searched scales and zero points.

For every block the scale and zero point are those, among a grid of clipped ranges, that leave the smallest (weighted)
squared error; each candidate's scale is the least-squares one for the integers it gives. Pure numpy on rows: knows
neither tensors nor graphs. The error of a candidate costs no second pass:
sum w (x - s u)^2 = sum w x^2 - (sum w x u)^2 / sum w u^2 for s = sum w x u / sum w u^2, with u = q - zero point.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from exporter.onnx_types import WeightType

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

# Shares of the full range that the search clips a block to; the full range comes first and is always a candidate.
_CLIPS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.79, 0.74)
_ONE_SIDED = ((1.0, 0.86), (0.86, 1.0))
_TINY = np.float32(1e-30)


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows as they are stored: packed integers (rows, blocks, bytes), scales (rows, blocks), packed zero points."""

    data: Bytes
    scales: Floats
    zeros: Bytes | None


@dataclass(frozen=True, slots=True)
class Grid:
    """The chosen grid: ``scales`` and ``zeros`` (rows, blocks), zeros as whole numbers in float32."""

    scales: Floats
    zeros: Floats


def quantize_rows(rows: Floats, kind: WeightType, importance: Floats | None = None) -> PackedRows:
    """Quantise (n, columns) float32 rows. ``importance`` (columns,) weighs the squared error of each column."""
    grid = find_grid(rows, kind, importance)
    return pack(round_to_grid(rows, grid, kind), grid, kind)


def find_grid(rows: Floats, kind: WeightType, importance: Floats | None = None) -> Grid:
    """The grid of least (weighted) squared error per block, among the clipped ranges."""
    shape = (len(rows), kind.blocks(rows.shape[1]))
    lanes = _lanes(rows, kind)
    weights = None if importance is None else np.tile(_lanes(importance[None, :], kind), len(rows))
    best = _Best(lanes, weights)
    if kind.asymmetric:
        _offer_asymmetric(best, lanes, kind)
    else:
        _offer_symmetric(best, lanes, kind)
    return Grid(best.scales.reshape(shape), best.zeros.reshape(shape))


def round_to_grid(rows: Floats, grid: Grid, kind: WeightType) -> Bytes:
    """Nearest integers 0 .. 2^bits - 1 in the shape (rows, blocks, block)."""
    blocks = _padded(rows, kind).reshape(*grid.scales.shape, kind.block)
    levels = blocks * _inverse(grid.scales)[..., None]
    np.rint(levels, out=levels)
    levels += grid.zeros[..., None]
    np.clip(levels, 0, 2**kind.bits - 1, out=levels)
    return levels.astype(np.uint8)


def pack(levels: Bytes, grid: Grid, kind: WeightType) -> PackedRows:
    """Integers (rows, blocks, block) and their grid in the stored form."""
    data, zeros = levels, grid.zeros.astype(np.uint8)
    if kind.bits == 4:
        data = _nibbles(levels)
        zeros = _nibbles(np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2))))
    return PackedRows(data, grid.scales, zeros if kind.asymmetric else None)


def dequantize_rows(packed: PackedRows, kind: WeightType, columns: int) -> Floats:
    """The float32 rows (n, columns) that packed rows stand for."""
    data, zeros = packed.data, packed.zeros
    if kind.bits == 4:
        data = np.stack((data & 15, data >> 4), axis=-1).reshape(*data.shape[:2], kind.block)
        if zeros is not None:
            zeros = np.stack((zeros & 15, zeros >> 4), axis=-1).reshape(len(zeros), -1)[:, : data.shape[1]]
    rows = data.astype(np.float32)
    rows -= np.float32(2 ** (kind.bits - 1)) if zeros is None else zeros.astype(np.float32)[..., None]
    rows *= packed.scales[..., None]
    return rows.reshape(len(rows), -1)[:, :columns]


def _nibbles(values: Bytes) -> Bytes:
    """Pairs of neighbours along the last axis in one byte, the first in the low half."""
    packed: Bytes = np.left_shift(values[..., 1::2], 4)
    packed |= values[..., 0::2]
    return packed


def _padded(rows: Floats, kind: WeightType) -> Floats:
    """Rows with zeros behind them up to a whole block."""
    columns = kind.blocks(rows.shape[1]) * kind.block
    return rows if columns == rows.shape[1] else np.pad(rows, ((0, 0), (0, columns - rows.shape[1])))


def _lanes(rows: Floats, kind: WeightType) -> Floats:
    """(block, rows * blocks): one block per column, so that whole rows of blocks are computed in one instruction."""
    return np.ascontiguousarray(_padded(rows, kind).reshape(-1, kind.block).T)


def _inverse(scales: Floats) -> Floats:
    inverse = np.zeros_like(scales)
    np.divide(np.float32(1), scales, out=inverse, where=np.abs(scales) > _TINY)
    return inverse


class _Best:
    """The best candidate of every block so far. The score is (sum w x u)^2 / sum w u^2: larger is less error."""

    def __init__(self, lanes: Floats, weights: Floats | None) -> None:
        self._weighted = lanes if weights is None else lanes * weights
        self._weights = weights
        self._product = None if weights is None else np.empty_like(lanes)
        self._score = np.full(lanes.shape[1], -1, np.float32)
        self.scales = np.zeros(lanes.shape[1], np.float32)
        self.zeros = np.zeros(lanes.shape[1], np.float32)

    def offer(self, centred: Floats, zeros: Floats) -> None:
        """Take over the blocks for which ``centred`` (integers less zero point) fits better than anything before."""
        # One pass without an array in between: half the time of a product and its sum.
        along = np.einsum("ij,ij->j", self._weighted, centred)
        weighted = centred if self._weights is None else np.multiply(centred, self._weights, out=self._product)
        scales = along / np.maximum(np.einsum("ij,ij->j", weighted, centred), _TINY)
        score = scales * along
        better = score > self._score
        np.copyto(self._score, score, where=better)
        np.copyto(self.scales, scales, where=better)
        np.copyto(self.zeros, zeros, where=better)


def _offer_symmetric(best: _Best, lanes: Floats, kind: WeightType) -> None:
    """Zero point 2^(bits-1). The grid has one more step below it than above: the largest weight takes that side."""
    middle = np.float32(2 ** (kind.bits - 1))
    high, low = lanes.max(axis=0), lanes.min(axis=0)
    full = np.where(high > -low, high, low) / -middle  # negative where the largest weight is positive
    zeros, centred = np.full(full.shape, middle, np.float32), np.empty_like(lanes)
    for clip in _CLIPS if kind.bits == 4 else (1.0, 128 / 127):
        np.multiply(lanes, _inverse(full * np.float32(clip)), out=centred)
        np.rint(centred, out=centred)
        np.clip(centred, -middle, middle - 1, out=centred)
        best.offer(centred, zeros)


def _offer_asymmetric(best: _Best, lanes: Floats, kind: WeightType) -> None:
    """A zero point per block: ranges [low, high] that contain 0, clipped on both sides or on one."""
    steps = np.float32(2**kind.bits - 1)
    high, low = np.maximum(lanes.max(axis=0), 0), np.minimum(lanes.min(axis=0), 0)
    centred = np.empty_like(lanes)
    for low_clip, high_clip in [*((clip, clip) for clip in _CLIPS), *_ONE_SIDED] if kind.bits == 4 else [(1.0, 1.0)]:
        start, end = low * np.float32(low_clip), high * np.float32(high_clip)
        inverse = _inverse((end - start) / steps)
        zeros = np.clip(np.rint(-start * inverse), 0, steps)
        np.multiply(lanes, inverse, out=centred)
        np.rint(centred, out=centred)
        np.maximum(centred, -zeros, out=centred)
        np.minimum(centred, steps - zeros, out=centred)
        best.offer(centred, zeros)
