"""Types chosen by measurement on a random tiny model: all stages run, the cache serves, limits are kept or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgelm.errors import DoesNotFitError, UsageError
from exporter import sensitivity
from exporter.options import ExportOptions
from exporter.pipeline import export, prepare
from tests.tiny_models import make_tiny_llama

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [pytest.mark.tiny, pytest.mark.reference]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("source") / "tiny-auto", hidden=64, vocab=512)


def test_auto_keeps_its_limit_and_comes_from_the_cache_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path / "cache"))
    largest = (
        export(ExportOptions(str(model), quant="Q8_0", verify=False), tmp_path / "q8").artifact_path.stat().st_size
    )
    limit = largest - 20_000
    options = ExportOptions(str(model), quant="auto", max_artifact_bytes=limit, verify=False)
    first = export(options, tmp_path / "first")
    plan = first.manifest.plan
    assert plan.quant == "MIXED"
    assert first.artifact_path.stat().st_size <= limit
    assert plan.predicted_kl is not None
    assert plan.calibration is not None
    assert plan.calibration.text.startswith("pydoc_data")
    monkeypatch.setattr(sensitivity, "collect", None)  # measuring again would fail
    second = export(options, tmp_path / "second")
    assert second.artifact_path.read_bytes() == first.artifact_path.read_bytes()
    with pytest.raises(DoesNotFitError) as failure:
        prepare(ExportOptions(str(model), quant="auto", max_artifact_bytes=1000))
    assert failure.value.exit_code == 4
    assert "nearest: smallest" in str(failure.value.hint)


def test_chat_lines_calibrate_and_bad_ones_are_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "chat.jsonl"
    line = json.dumps({"messages": [{"role": "user", "content": "What is a token? " * 20}]})
    path.write_text("\n".join([line] * 40))
    plan = prepare(ExportOptions(str(model), quant="auto", calibration=path)).plan
    assert plan.calibration is not None
    assert plan.calibration.text == "chat.jsonl"
    path.write_text(line + "\n{broken\n")
    with pytest.raises(UsageError, match="line 2"):
        prepare(ExportOptions(str(model), quant="auto", calibration=path))
    path.write_text('{"text": "too short"}')
    with pytest.raises(UsageError, match="tokens"):
        prepare(ExportOptions(str(model), quant="auto", calibration=path))
