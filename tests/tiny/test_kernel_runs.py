"""The micro-benchmark's random models, through the real engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgelm.errors import EngineError
from runtime import kernels
from runtime.engine import Chunk, EngineOptions
from runtime.engines.llamacpp import load_engine
from runtime.gguf_header import read_gguf_header
from runtime.kernels import NARROW, TYPES, RandomModel, timed, write_random_gguf
from targets.host import detect_host
from targets.kernels import with_kernels
from targets.predict import RunSettings, predict_speed

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
    assert 0 < prefill_s < 1
    assert 0 < decode_s < 1


def test_only_what_the_engine_rearranges_is_measured_as_the_file_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Q4_0 has rearranged kernels wherever there are dot products of 8 bits, Q5_0 nowhere."""
    monkeypatch.setattr(kernels, "PASSES", 1)
    roles = {}
    for kind in ("Q4_0", "Q5_0"):
        path = tmp_path / "m.gguf"
        write_random_gguf(path, RandomModel(kind, 2, 256, 512, 4, 2))
        rearranged = kernels.is_rearranged(path)
        found = kernels._runs(tmp_path, RandomModel(kind, 2, 256, 512, 4, 2), [("type", 1), ("as_filed", 1)])
        roles[kind] = [case["role"] for case in found]
        assert ("as_filed" in roles[kind]) == rearranged
        engine = load_engine(path, EngineOptions(context=64), as_filed=True)
        assert engine.info.buffers["weights_copied"] == 0
        engine.close()
        assert all(case["decode_s"] > 0 for case in found)
    assert roles["Q5_0"] == ["type"]


def test_runs_become_a_profile_that_predicts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "TYPES", ("Q8_0", "F16"))
    monkeypatch.setattr(kernels, "wide_model", lambda kind, small: RandomModel(kind, 2, 256, 512, 4, 2))
    monkeypatch.setattr(kernels, "thin_model", lambda kind, small: RandomModel(kind, 4, 128, 256, 2, 2))
    monkeypatch.setattr(kernels, "SIZES_LAYERS", (1, 3))
    monkeypatch.setattr(kernels, "LARGE_LAYERS", 4)
    runs = [kernels.kernel_run(fields) for fields in kernels.run_all(tmp_path, 1, small=True)]
    assert [(run.type, run.role, run.workload.layers) for run in runs] == [
        ("Q8_0", "type", 2),
        ("Q8_0", "deep", 2),
        ("Q8_0", "plain", 2),
        ("Q8_0", "thin", 4),
        ("F16", "type", 2),
        ("F16", "thin", 4),
        ("F16", "large", 4),
        ("F16", "size", 1),
        ("F16", "size", 3),
        ("Q8_0", "narrow", 32),
    ]
    assert not list(tmp_path.iterdir()), "models are removed once they have run"
    profile = with_kernels(detect_host(), runs)
    settings = RunSettings(context=256, prompt_tokens=kernels.PROMPT_TOKENS, threads_decode=1, threads_prefill=1)
    for run in (runs[0], runs[4]):
        speed = predict_speed(run.workload, profile, settings)
        assert speed.prefill_tps == pytest.approx(1 / run.prefill_s, rel=0.02)


def test_a_child_that_does_not_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "TIMEOUT_S", 0.05)
    with pytest.raises(EngineError, match=r"measuring the kernels did not end in 0\.05 s"):
        kernels.measure_kernels(1, 2**30)
