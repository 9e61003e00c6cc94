"""Ranges that many threads write come together in aligned pieces."""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from exporter.pieces import PIECE_BYTES, Pieces

START = 1_000_000  # behind a head that somebody else wrote
SIZES = (700_001, 32, 3 * PIECE_BYTES, 557_056, 557_056, 557_056, PIECE_BYTES, 64, 1_300_000)
GAP = 24  # as padding leaves between tensors


def ranges() -> list[tuple[int, int]]:
    found, position = [], START
    for size in SIZES:
        found.append((position, size))
        position += size + GAP
    return found


@pytest.mark.parametrize("threads", [1, 3])
def test_every_byte_arrives_in_aligned_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    written: list[tuple[int, int]] = []
    really = os.pwrite

    def noted(descriptor: int, data: memoryview, position: int) -> int:
        written.append((position, len(data)))
        return really(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", noted)
    bytes_of = np.random.default_rng(0).integers(1, 256, ranges()[-1][0] + SIZES[-1], dtype=np.uint8)
    path = tmp_path / "file"
    path.write_bytes(bytes_of[:START].tobytes())
    descriptor = os.open(path, os.O_RDWR)
    pieces = Pieces(descriptor, ranges())
    tasks = ranges()
    random.Random(threads).shuffle(tasks)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda task: pieces.write(bytes_of[task[0] : sum(task)], task[0]), tasks))
    os.close(descriptor)
    for position, size in ranges():
        bytes_of[position + size : position + size + GAP] = 0
    assert path.read_bytes() == bytes_of.tobytes()
    ends = {position + size for position, size in written}
    assert len(written) == len({position // PIECE_BYTES for position, _ in written}), "one write for each piece"
    assert all(position % PIECE_BYTES == 0 for position, _ in written if position != START)
    assert all(end % PIECE_BYTES == 0 for end in ends if end != max(ends))


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, position: really(descriptor, data[:1000], position))
    path = tmp_path / "file"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    data = np.arange(5000, dtype=np.uint16).view(np.uint8)
    Pieces(descriptor, [(0, data.nbytes)]).write(data, 0)
    os.close(descriptor)
    assert path.read_bytes() == data.tobytes()
