"""How types of GGUF store a block: the scale and offset of each number, and where its whole number goes.

From ggml-common.h. Types whose blocks hold a scale for 16 or 32 numbers together and a few bits for each; those
that choose among vectors of a table (IQ2, IQ3) are not. Knows blocks; does not know how a number is chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from exporter.ggml import Bytes, Floats

RUN = 16
"""Numbers that share scale and offset in every type here."""
CODEBOOK = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)
# Index of the codebook's nearest entry for whole numbers from -128 to 127.
NEAREST = np.abs(np.arange(-128, 128)[:, None] - CODEBOOK[None, :]).argmin(axis=1).astype(np.float32)


@dataclass(frozen=True)
class Layout:
    """How one type stores a block.

    ``steps`` gives (scales, offsets) of every number of blocks (n, block bytes), each (n, block); ``store`` writes
    whole numbers (n, block) from 0 into the blocks. A number is scale x (q + lowest) + offset, or scale x codebook[q];
    with a codebook ``lowest`` and ``highest`` are the range of its entries. ``halves`` are the bytes where the numbers
    in half precision begin that all scales of a block are multiples of, and all its offsets.
    """

    steps: Callable[[Bytes], tuple[Floats, Floats | None]]
    store: Callable[[Bytes, Bytes], None]
    lowest: int
    highest: int
    codebook: bool = False
    halves: tuple[int, ...] = (0,)


def half(blocks: Bytes, at: int) -> Floats:
    """The number in half precision that begins at byte ``at`` of each block, (blocks, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _plain_steps(with_offset: bool) -> Callable[[Bytes], tuple[Floats, Floats | None]]:
    def steps(blocks: Bytes) -> tuple[Floats, Floats | None]:
        scales = np.repeat(half(blocks, 0), 32, axis=1)
        return scales, np.repeat(half(blocks, 2), 32, axis=1) if with_offset else None

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
    return np.repeat(scales * half(blocks, 0), 32, axis=1), np.repeat(minima * -half(blocks, 2), 32, axis=1)


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
    return np.repeat(scales * half(blocks, 208), 16, axis=1), None


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
    return np.repeat((scales - 32) * half(blocks, 0), 32, axis=1).astype(np.float32), None


def _store_iq4_xs(blocks: Bytes, numbers: Bytes) -> None:
    runs = numbers.reshape(-1, 8, 2, 16) & 15
    blocks[:, 8:136] = (runs[:, :, 0] | runs[:, :, 1] << 4).reshape(-1, 128)


LAYOUTS = {
    "Q4_0": Layout(_plain_steps(False), _store_nibbles(2), -8, 7),
    "Q4_1": Layout(_plain_steps(True), _store_nibbles(4), 0, 15, halves=(0, 2)),
    "Q5_0": Layout(_plain_steps(False), _store_fives(2), -16, 15),
    "Q5_1": Layout(_plain_steps(True), _store_fives(4), 0, 31, halves=(0, 2)),
    "Q8_0": Layout(_plain_steps(False), _store_bytes, -127, 127),
    "IQ4_NL": Layout(_plain_steps(False), _store_nibbles(2), -128, 127, codebook=True),
    "IQ4_XS": Layout(_iq4_xs_steps, _store_iq4_xs, -128, 127, codebook=True),
    "Q4_K": Layout(_k_scales, _store_k_nibbles(16), 0, 15, halves=(0, 2)),
    "Q5_K": Layout(_k_scales, _store_q5_k, 0, 31, halves=(0, 2)),
    "Q6_K": Layout(_q6_k_steps, _store_q6_k, -32, 31, halves=(208,)),
}
