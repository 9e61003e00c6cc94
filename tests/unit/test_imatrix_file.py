"""Importance-matrix files: both formats there and back, and damaged ones refused by name."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from edgelm.errors import CheckpointError
from exporter.imatrix_file import Entry, ImportanceFile, read_importance, write_importance


def _content() -> ImportanceFile:
    random = np.random.default_rng(3)
    entries = {
        f"blk.{layer}.{role}.weight": Entry(
            random.random((1, width)).astype(np.float32) * 1000, np.array([1024], dtype=np.float32)
        )
        for layer in range(2)
        for role, width in (("attn_q", 64), ("ffn_down", 96))
    }
    return ImportanceFile(entries, ("calibration.txt",), chunk_count=2, chunk_size=512)


def test_gguf_form_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "importance.gguf"
    write_importance(path, _content())
    found = read_importance(path)
    assert (found.datasets, found.chunk_count, found.chunk_size) == (("calibration.txt",), 2, 512)
    for name, entry in _content().entries.items():
        np.testing.assert_array_equal(found.entries[name].sums, entry.sums)
        np.testing.assert_array_equal(found.entries[name].counts, entry.counts)


def test_legacy_form_keeps_the_means(tmp_path: Path) -> None:
    path = tmp_path / "importance.dat"
    write_importance(path, _content(), legacy=True)
    found = read_importance(path)
    assert found.chunk_count == 2
    assert found.datasets == ("calibration.txt",)
    for name, entry in _content().entries.items():
        np.testing.assert_allclose(found.entries[name].means, entry.means, rtol=1e-6)


def test_experts_without_inputs_count_as_ones() -> None:
    entry = Entry(np.array([[8.0, 4.0], [0.0, 0.0]], np.float32), np.array([4, 0], np.float32))
    np.testing.assert_array_equal(entry.means, [[2, 1], [1, 1]])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"abc",
        struct.pack("<i", -1),
        struct.pack("<i", 2**31 - 1),
        struct.pack("<ii", 1, 2**30) + b"x" * 40,
        struct.pack("<ii", 1, 3) + b"abc" + struct.pack("<ii", 1, -5) + b"x" * 8,
        struct.pack("<ii", 1, 3) + b"abc" + struct.pack("<ii", 1, 2**28) + b"x" * 8,
        struct.pack("<ii", 1, 3) + b"abc" + struct.pack("<ii", 0, 1) + b"x" * 4,
        struct.pack("<ii", 1, 3) + b"\xff\xfe\xfd" + struct.pack("<ii", 1, 1) + b"x" * 4,
        b"GGUF" + b"\0" * 20,
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.dat"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"bad\.dat|GGUF"):
        read_importance(path)


def test_numbers_that_are_no_squares_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    sums = np.array([[1.0, np.nan]], np.float32)
    write_importance(path, ImportanceFile({"blk.0.x": Entry(sums, np.array([1], np.float32))}))
    with pytest.raises(CheckpointError, match="no sums of squares"):
        read_importance(path)
