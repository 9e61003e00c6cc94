"""``benchmarks/random_gguf.py``: a file of a real model's sizes that llama.cpp computes numbers with."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from exporter.mixes import mix_named
from runtime.engine import Chunk, EngineOptions
from runtime.engines.llamacpp import load_engine
from runtime.gguf_header import read_gguf_header
from runtime.probe import write_tiny_gguf

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import random_gguf
from random_gguf import Shape, planned

pytestmark = pytest.mark.tiny
SMALL = ["--layers", "3", "--hidden", "256", "--ffn", "768", "--heads", "4", "--kv-heads", "1", "--context", "512"]
NORMS = 65 * 4096  # two in each of 32 layers and the last one


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words") / "words.gguf"
    write_tiny_gguf(path)
    return path


def write(path: Path, words: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["random_gguf.py", str(path), "--words", str(words), *options])
    random_gguf.main()


@pytest.mark.parametrize("quant", ["Q4_K_M", "Q8_0", "F16", "Q4_0"])
def test_it_computes_numbers(quant: str, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "random.gguf"
    write(path, words, monkeypatch, *SMALL, "--quant", quant, "--vocabulary", "700")
    header = read_gguf_header(path)
    shape = Shape(3, 256, 768, 4, 1, 512)
    plans = planned(shape, 700, mix_named(quant))
    assert [(item.name, item.type, item.shape) for item in header.tensors] == [
        (item.name, item.type, item.shape) for item in plans
    ]
    engine = load_engine(path, EngineOptions(context=256, all_logits=True, threads_decode=1, threads_prefill=1))
    logits = engine.forward([Chunk(0, list(range(200)), "all")]).copy()
    engine.close()
    assert logits.shape == (200, 700)
    assert np.isfinite(logits).all()
    assert 0.1 < logits.std() < 10
    assert len(np.unique(logits[-1])) > 300  # no rows of one number


def test_a_7b_has_the_size_of_a_7b() -> None:
    """Llama 2 7B: 6,738,415,616 parameters. Q8_0 stores 32 numbers in 34 bytes, F16 one in 2, norms one in 4."""
    for quant, bytes_each in (("Q8_0", 34 / 32), ("F16", 2)):
        plans = planned(Shape(), 32000, mix_named(quant))
        assert sum(item.size_bytes for item in plans) == (6_738_415_616 - NORMS) * bytes_each + 4 * NORMS
    types = [item.type for item in planned(Shape(), 32000, mix_named("Q4_K_M"))]
    # Half of the 32 matrices of values and half of those at the end of a layer have more bits, and the head has.
    assert (types.count("Q6_K"), types.count("Q4_K"), types.count("F32")) == (33, 193, 65)


def test_what_does_not_divide_is_refused(words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="do not divide"):
        write(tmp_path / "random.gguf", words, monkeypatch, "--heads", "5")
    assert not (tmp_path / "random.gguf").exists()
