"""A file is hashed behind those who write it, in whatever order they finish."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from exporter.growing_file import GrowingHash

SIZE = 40 * 2**20 + 123


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    found = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(found, SIZE)
    yield found
    os.close(found)


def test_any_order(descriptor: int) -> None:
    content = random.Random(0).randbytes(SIZE)
    cuts = [0, *sorted(random.Random(1).sample(range(1, SIZE), 30)), SIZE]
    pieces = list(itertools.pairwise(cuts))
    random.Random(2).shuffle(pieces)
    with GrowingHash(descriptor, SIZE) as growing:
        for start, stop in pieces:
            os.pwrite(descriptor, content[start:stop], start)
            growing.finished(start, stop)
        assert growing.hexdigest() == hashlib.sha256(content).hexdigest()
    assert os.pread(descriptor, SIZE, 0) == content


def test_not_all_finished(descriptor: int) -> None:
    with GrowingHash(descriptor, SIZE) as growing:
        growing.finished(10, SIZE)
        with pytest.raises(ValueError, match="finished up to 0 of"):
            growing.hexdigest()
        growing.finished(0, 10)
        assert growing.hexdigest() == hashlib.sha256(bytes(SIZE)).hexdigest()


def test_stopped(descriptor: int) -> None:
    growing = GrowingHash(descriptor, SIZE)
    with pytest.raises(RuntimeError, match="elsewhere"), growing:
        raise RuntimeError("elsewhere")
    growing.finished(0, SIZE)
    with pytest.raises(CancelledError):
        growing.hexdigest()


def test_a_file_cut_short(descriptor: int) -> None:
    with GrowingHash(descriptor, SIZE) as growing:
        os.ftruncate(descriptor, 100)
        growing.finished(0, SIZE)
        with pytest.raises(OSError, match="the file ends at 100"):
            growing.hexdigest()


def test_an_empty_file(descriptor: int) -> None:
    with GrowingHash(descriptor, 0) as growing:
        growing.finished(0, 0)
        assert growing.hexdigest() == hashlib.sha256(b"").hexdigest()
