"""Quantises rows so that the errors of later columns make up for those of earlier ones.

Rounding to nearest treats every number alone. Here the scales of a block come from libggml, then its numbers are
rounded one column after the other, and what a rounding does to the matrix's outputs is taken back by the columns that
are still free (Frantar et al. 2022, GPTQ, arXiv:2210.17323; the error measure is the input's second moment). The result
is an ordinary row of the same type, byte for byte readable by llama.cpp. Does not know where moments come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from exporter import ggml
from exporter.block_layouts import CODEBOOK, LAYOUTS, NEAREST, Layout

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]
# Share of the mean diagonal that is added to the moment: keeps directions that calibration never saw in place.
DAMPING = 0.01
# Columns rounded one by one before their errors reach the rest of a block in one matrix product.
_STEP = 8
_DAMPING_ATTEMPTS = 6
_DIRECT_INVERSE = 96


class Compensating(Protocol):
    """What a matrix's columns can do for one another, wherever it is kept."""

    @property
    def importance(self) -> Floats:
        """The cost (columns) of an error in each column after the later ones have made up for it."""
        ...

    def rows(self, start: int, stop: int) -> Floats:
        """Rows of the factor, from the diagonal on: (stop - start, columns - start). Within one block of a type."""
        ...


@dataclass(frozen=True)
class Compensation:
    """``Compensating`` in memory: the upper Cholesky factor (columns, columns) of the inverse moment."""

    factor: Floats
    importance: Floats

    def rows(self, start: int, stop: int) -> Floats:
        return self.factor[start:stop, start:]


def compensation(moment: Floats, damping: float = DAMPING) -> Compensation:
    """Factorise a second moment (columns, columns) once for all rows of a matrix, in float64.

    A moment that rounding has left without an inverse gets more damping.
    """
    damped = moment.astype(np.float64)
    damped = damped + damped.T  # in place where that can be: of 8192 columns this is half a gigabyte
    damped /= 2
    diagonal = np.diag(damped).copy()
    added = damping * float(np.trace(damped)) / len(damped) + 1e-12
    for _ in range(_DAMPING_ATTEMPTS):
        try:
            np.fill_diagonal(damped, diagonal + added)
            # With H = M M^T, M upper triangular, H^-1 = (M^-1)^T M^-1: its factor without the inverse itself.
            factor = _inverse_of_lower(np.linalg.cholesky(damped[::-1, ::-1]))[::-1, ::-1]
            break
        except np.linalg.LinAlgError:
            added *= 10
    else:
        factor = np.eye(len(damped))  # nothing is known of how columns work together: plain rounding
    importance = (1 / np.square(np.diag(factor))).astype(np.float32)
    return Compensation(np.ascontiguousarray(factor, dtype=np.float32), importance)


def _inverse_of_lower(factor: Doubles) -> Doubles:
    """Inverse of a lower triangular matrix by halves: a third of the work of a general inverse, nearly all products."""
    size = len(factor)
    if size <= _DIRECT_INVERSE:
        return np.asarray(np.linalg.inv(factor), dtype=np.float64)
    half = size // 2
    found = np.zeros_like(factor)
    found[:half, :half] = _inverse_of_lower(factor[:half, :half])
    found[half:, half:] = _inverse_of_lower(factor[half:, half:])
    found[half:, :half] = -found[half:, half:] @ (factor[half:, :half] @ found[:half, :half])
    return found


def supports(type_name: str) -> bool:
    """Whether rows of this type can be rounded with compensation here."""
    return type_name in LAYOUTS


def quantize(rows: Floats, type_name: str, given: Compensating, out: Bytes | None = None) -> Bytes:
    """Quantise float32 rows (n, columns) to the bytes of a type, errors compensated along each row.

    ``rows`` stays as it is. Same sizes and errors as ``ggml.quantize``.
    """
    kind, layout = ggml.type_named(type_name), LAYOUTS[type_name]
    count, columns = rows.shape
    block = kind.block
    stored = np.empty((count, columns // block, kind.block_bytes), dtype=np.uint8)
    left = np.ascontiguousarray(rows.T)  # columns become contiguous: the loop below works on one at a time
    for index, start in enumerate(range(0, columns, block)):
        end = start + block
        importance = np.ascontiguousarray(given.importance[start:end])
        segment = np.ascontiguousarray(left[start:end].T)
        blocks = ggml.quantize(segment, type_name, importance=importance).reshape(count, kind.block_bytes)
        factor = given.rows(start, end)
        errors = _round_block(left[start:end], blocks, layout, factor[:, :block])
        stored[:, index] = blocks
        if end < columns:
            left[end:] -= factor[:, block:].T @ errors
    if out is None:
        return stored.reshape(-1)
    out[:] = stored.reshape(-1)
    return out


def _round_block(left: Floats, blocks: Bytes, layout: Layout, factor: Floats) -> Floats:
    """Round ``left`` (block, n) in place of ``blocks``' numbers; the scaled errors (block, n)."""
    scales, offsets = layout.steps(blocks)
    scales = np.ascontiguousarray(scales.T)
    shifts = None if offsets is None else np.ascontiguousarray(offsets.T)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    weights = 1 / np.diag(factor)
    numbers, errors = np.empty_like(left), np.empty_like(left)
    wanted, reached = np.empty_like(left[0]), np.empty_like(left[0])
    for first in range(0, len(left), _STEP):
        last = min(first + _STEP, len(left))
        for column in range(first, last):
            whole, error = numbers[column], errors[column]
            if shifts is None:
                wanted[:] = left[column]
            else:
                np.subtract(left[column], shifts[column], out=wanted)
            np.multiply(wanted, inverse[column], out=whole)
            np.rint(whole, out=whole)
            np.maximum(whole, layout.lowest, out=whole)
            np.minimum(whole, layout.highest, out=whole)
            if layout.codebook:
                whole[:] = NEAREST[whole.astype(np.intp) + 128]
                np.multiply(scales[column], CODEBOOK[whole.astype(np.intp)], out=reached)
            else:
                np.multiply(scales[column], whole, out=reached)
            np.subtract(wanted, reached, out=error)
            error *= weights[column]
            if column + 1 < last:
                left[column + 1 : last] -= factor[column, column + 1 : last, None] * error
        if last < len(left):
            left[last:] -= factor[first:last, last:].T @ errors[first:last]
    if not layout.codebook:
        numbers -= layout.lowest
    layout.store(blocks, np.ascontiguousarray(numbers.T).astype(np.uint8))
    return errors
