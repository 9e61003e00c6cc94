"""The micro-benchmark's random models, through the real engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runtime.engine import Chunk, EngineOptions
from runtime.engines.llamacpp import load_engine
from runtime.gguf_header import read_gguf_header
from runtime.kernels import NARROW, TYPES, RandomModel, timed, write_random_gguf

pytestmark = pytest.mark.tiny


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_computes_finite_logits(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.gguf"
    write_random_gguf(path, RandomModel(kind, 2, 256, 512, 4, 2))
    matrices = {tensor.type for tensor in read_gguf_header(path).tensors if len(tensor.shape) == 2}
    assert matrices == {kind}
    engine = load_engine(path, EngineOptions(context=64, threads_decode=1, threads_prefill=1))
    try:
        logits = engine.forward([Chunk(0, list(range(16)))])
        assert np.isfinite(logits).all()
        assert float(np.ptp(logits)) > 0
    finally:
        engine.close()


def test_seconds_per_token_are_measured(tmp_path: Path) -> None:
    path = tmp_path / "narrow.gguf"
    write_random_gguf(path, NARROW)
    prefill_s, decode_s = timed(path, 1)
    assert 0 < prefill_s < decode_s < 1
