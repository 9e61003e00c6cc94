"""Rounding with error compensation: what one column's rounding breaks, the columns after it repair.

GPTQ (Frantar et al. 2022, https://arxiv.org/abs/2210.17323) over the blocks of ``onnx_types``: the grid of each block
is searched on the weights as already compensated, weighted by what rounding a column still costs. Pure numpy; knows
neither where the moments come from nor what a tensor is.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from exporter.onnx_quantize import Grid, PackedRows, find_grid, pack
from exporter.onnx_types import WeightType

Floats = npt.NDArray[np.float32]
DAMPING = 0.01
"""Share of the mean second moment that is added to each, so that columns hardly ever used stay solvable."""


def inverse_factor(moments: Floats) -> Floats:
    """The upper Cholesky factor of the inverse of (columns, columns) second moments of a matrix's inputs."""
    damped = moments.astype(np.float64)
    diagonal = np.einsum("ii->i", damped)
    diagonal[diagonal <= 0] = 1.0  # inputs that are always zero: their weights matter to nobody
    diagonal += DAMPING * diagonal.mean()
    upper: Floats = np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)
    return upper


def compensated_rows(rows: Floats, kind: WeightType, factor: Floats) -> PackedRows:
    """Quantise (n, columns) rows with ``inverse_factor`` of their inputs' moments."""
    count, columns = rows.shape
    work = np.array(rows.T, dtype=np.float32, order="C")  # a column is one piece of memory
    levels = np.empty((kind.blocks(columns), kind.block, count), np.float32)
    scales = np.empty((count, kind.blocks(columns)), np.float32)
    zeros = np.empty_like(scales)
    # 1 / diag^2 is the error that a column's rounding still costs once all after it have been used to repair it.
    importance = np.square(np.float32(1) / np.diagonal(factor)).astype(np.float32)
    for block in range(kind.blocks(columns)):
        start, stop = block * kind.block, min((block + 1) * kind.block, columns)
        grid = find_grid(work[start:stop].T, kind, importance[start:stop])
        scales[:, block], zeros[:, block] = grid.scales[:, 0], grid.zeros[:, 0]
        levels[block] = zeros[:, block]  # what pads the last block stands for zero
        errors = _round_block(work[start:stop], grid, kind, factor[start:stop, start:stop], levels[block])
        if stop < columns:
            work[stop:] -= factor[start:stop, stop:].T @ errors
    return pack(levels.transpose(2, 0, 1).astype(np.uint8), Grid(scales, zeros), kind)


def _round_block(work: Floats, grid: Grid, kind: WeightType, factor: Floats, levels: Floats) -> Floats:
    """Round the columns (columns, rows) of one block in turn; returns their errors in units of the factor."""
    scales, zeros = grid.scales[:, 0], grid.zeros[:, 0]
    inverse = np.zeros_like(scales)
    np.divide(1, scales, out=inverse, where=scales != 0)
    errors = np.empty_like(work)
    for column, values in enumerate(work):
        rounded = levels[column]
        np.multiply(values, inverse, out=rounded)
        np.rint(rounded, out=rounded)
        rounded += zeros
        np.clip(rounded, 0, 2**kind.bits - 1, out=rounded)
        error = errors[column]
        np.subtract(rounded, zeros, out=error)
        error *= scales
        np.subtract(values, error, out=error)
        error /= factor[column, column]
        work[column + 1 :] -= factor[column, column + 1 :, None] * error
    return errors
