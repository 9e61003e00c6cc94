"""Quantises rows so that the errors of later columns make up for those of earlier ones.

Rounding to nearest treats every number alone. Here the scales of a block come from libggml, then its numbers are
rounded one column after the other, and what a rounding does to the matrix's outputs is taken back by the columns that
are still free (Frantar et al. 2022, GPTQ, arXiv:2210.17323; the error measure is the input's second moment). The result
is an ordinary row of the same type, byte for byte readable by llama.cpp. Knows block layouts; does not know where
moments come from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from exporter import ggml

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]
# Share of the mean diagonal that is added to the moment: keeps directions that calibration never saw in place.
DAMPING = 0.01
_CODEBOOK = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)
# Index of the codebook's nearest entry for whole numbers from -128 to 127.
_NEAREST = np.abs(np.arange(-128, 128)[:, None] - _CODEBOOK[None, :]).argmin(axis=1).astype(np.float32)
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


@dataclass(frozen=True)
class _Layout:
    """How one type stores a block.

    ``steps`` gives (scales, offsets) of every number of blocks (n, block bytes), each (n, block); ``store`` writes
    whole numbers (n, block) from 0 into the blocks. A number is scale x (q + lowest) + offset, or scale x codebook[q];
    with a codebook ``lowest`` and ``highest`` are the range of its entries.
    """

    steps: Callable[[Bytes], tuple[Floats, Floats | None]]
    store: Callable[[Bytes, Bytes], None]
    lowest: int
    highest: int
    codebook: bool = False


def supports(type_name: str) -> bool:
    """Whether rows of this type can be rounded with compensation here."""
    return type_name in _LAYOUTS


def quantize(rows: Floats, type_name: str, given: Compensating, out: Bytes | None = None) -> Bytes:
    """Quantise float32 rows (n, columns) to the bytes of a type, errors compensated along each row.

    ``rows`` stays as it is. Same sizes and errors as ``ggml.quantize``.
    """
    kind, layout = ggml.type_named(type_name), _LAYOUTS[type_name]
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


def _round_block(left: Floats, blocks: Bytes, layout: _Layout, factor: Floats) -> Floats:
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
                whole[:] = _NEAREST[whole.astype(np.intp) + 128]
                np.multiply(scales[column], _CODEBOOK[whole.astype(np.intp)], out=reached)
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


# --- block layouts (ggml-common.h)


def _half(blocks: Bytes, at: int) -> Floats:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _plain_steps(with_offset: bool) -> Callable[[Bytes], tuple[Floats, Floats | None]]:
    def steps(blocks: Bytes) -> tuple[Floats, Floats | None]:
        scales = np.repeat(_half(blocks, 0), 32, axis=1)
        return scales, np.repeat(_half(blocks, 2), 32, axis=1) if with_offset else None

    return steps


def _store_nibbles(at: int) -> Callable[[Bytes, Bytes], None]:
    def store(blocks: Bytes, numbers: Bytes) -> None:
        blocks[:, at : at + 16] = numbers[:, :16] & 15 | (numbers[:, 16:] & 15) << 4

    return store


def _store_fives(at: int) -> Callable[[Bytes, Bytes], None]:
    """Four high-bit bytes, then nibbles."""

    def store(blocks: Bytes, numbers: Bytes) -> None:
        blocks[:, at : at + 4] = np.packbits(numbers >> 4 & 1, axis=1, bitorder="little")
        _store_nibbles(at + 4)(blocks, numbers)

    return store


def _store_bytes(blocks: Bytes, numbers: Bytes) -> None:
    blocks[:, 2:34] = (numbers.astype(np.int16) - 127).astype(np.int8).view(np.uint8)


def _k_scales(blocks: Bytes) -> tuple[Floats, Floats]:
    """Scales and offsets of Q4_K and Q5_K: eight 6-bit pairs in twelve bytes, times two halves."""
    packed = blocks[:, 4:16]
    low, high, mixed = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([low & 63, mixed & 15 | (low >> 6) << 4], axis=1).astype(np.float32)
    minima = np.concatenate([high & 63, mixed >> 4 | (high >> 6) << 4], axis=1).astype(np.float32)
    return np.repeat(scales * _half(blocks, 0), 32, axis=1), np.repeat(minima * -_half(blocks, 2), 32, axis=1)


def _store_k_nibbles(at: int) -> Callable[[Bytes, Bytes], None]:
    """Nibbles in runs of 64 numbers: 32 low ones, then 32 high ones."""

    def store(blocks: Bytes, numbers: Bytes) -> None:
        runs = numbers.reshape(-1, 4, 2, 32) & 15
        blocks[:, at : at + 128] = (runs[:, :, 0] | runs[:, :, 1] << 4).reshape(-1, 128)

    return store


def _store_q5_k(blocks: Bytes, numbers: Bytes) -> None:
    bits = numbers.reshape(-1, 8, 32) >> 4 & 1  # bit i of byte l is of the i-th run of 32
    blocks[:, 16:48] = np.packbits(bits, axis=1, bitorder="little").reshape(-1, 32)
    _store_k_nibbles(48)(blocks, numbers)


def _q6_k_steps(blocks: Bytes) -> tuple[Floats, Floats | None]:
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return np.repeat(scales * _half(blocks, 208), 16, axis=1), None


def _store_q6_k(blocks: Bytes, numbers: Bytes) -> None:
    quarters = numbers.reshape(-1, 2, 4, 32)  # two halves of 128, each four runs of 32
    low, high = quarters & 15, quarters >> 4 & 3
    nibbles = np.stack([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], axis=2)
    blocks[:, :128] = nibbles.reshape(-1, 128)
    pairs = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    blocks[:, 128:192] = pairs.reshape(-1, 64)


def _iq4_xs_steps(blocks: Bytes) -> tuple[Floats, Floats | None]:
    high = np.ascontiguousarray(blocks[:, 2:4]).view(np.uint16).astype(np.int32)
    low = blocks[:, 4:8].astype(np.int32)
    index = np.arange(8)
    scales = (low[:, index // 2] >> 4 * (index % 2)) & 15 | (high >> 2 * index & 3) << 4
    return np.repeat((scales - 32) * _half(blocks, 0), 32, axis=1).astype(np.float32), None


def _store_iq4_xs(blocks: Bytes, numbers: Bytes) -> None:
    runs = numbers.reshape(-1, 8, 2, 16) & 15
    blocks[:, 8:136] = (runs[:, :, 0] | runs[:, :, 1] << 4).reshape(-1, 128)


_LAYOUTS = {
    "Q4_0": _Layout(_plain_steps(False), _store_nibbles(2), -8, 7),
    "Q4_1": _Layout(_plain_steps(True), _store_nibbles(4), 0, 15),
    "Q5_0": _Layout(_plain_steps(False), _store_fives(2), -16, 15),
    "Q5_1": _Layout(_plain_steps(True), _store_fives(4), 0, 31),
    "Q8_0": _Layout(_plain_steps(False), _store_bytes, -127, 127),
    "IQ4_NL": _Layout(_plain_steps(False), _store_nibbles(2), -128, 127, codebook=True),
    "IQ4_XS": _Layout(_iq4_xs_steps, _store_iq4_xs, -128, 127, codebook=True),
    "Q4_K": _Layout(_k_scales, _store_k_nibbles(16), 0, 15),
    "Q5_K": _Layout(_k_scales, _store_q5_k, 0, 31),
    "Q6_K": _Layout(_q6_k_steps, _store_q6_k, -32, 31),
}
