"""Types chosen by measurement on a random tiny model: all stages run, the cache serves, limits are kept or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgelm.bundle import Choice
from edgelm.errors import DoesNotFitError, UsageError
from edgelm.progress import SILENT
from exporter import analysis, damage, measuring_way, pipeline, sensitivity
from exporter.architectures import describe
from exporter.calibration import QUESTIONS, open_calibration
from exporter.checkpoint import open_checkpoint, open_source
from exporter.importance import collect_importance
from exporter.options import ExportOptions
from exporter.pipeline import choices, export, prepare
from exporter.token_identity import open_tokenizer
from exporter.tokenizer import load_tokenizer
from runtime.gguf_header import read_gguf_header
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
    on_board = ExportOptions(str(model), target="raspberry-pi-5")
    mix = prepare(replace(on_board, quant="Q4_K_M")).plan.predicted
    fast = prepare(replace(on_board, as_fast_as="Q4_K_M")).plan
    listed = choices(replace(on_board, as_fast_as="Q4_K_M"), SILENT)
    assert listed[2] is not None
    assert listed[2].plan.tensors == fast.tensors
    assert {item.plan.format for item in listed[1]} == {"gguf", "onnx"}
    assert (fast.quant, mix.decode_tps is None, mix.prefill_tps is None) == ("MIXED", False, False)
    assert fast.predicted.decode_tps is not None
    assert fast.predicted.prefill_tps is not None
    assert fast.predicted.decode_tps >= (mix.decode_tps or 0)
    assert fast.predicted.prefill_tps >= (mix.prefill_tps or 0)
    with pytest.raises(DoesNotFitError) as failure:
        prepare(ExportOptions(str(model), quant="auto", max_artifact_bytes=1000))
    assert failure.value.exit_code == 4
    assert "nearest: smallest" in str(failure.value.hint)
    with pytest.raises(DoesNotFitError, match="--max-kl is 1e-09") as failure:
        prepare(ExportOptions(str(model), quant="auto", max_kl=1e-9))
    assert failure.value.exit_code == 4
    assert "nearest: smallest" in str(failure.value.hint)
    move_along_the_front(model, tmp_path)


def move_along_the_front(model: Path, tmp_path: Path) -> None:
    """A prediction that is much too good: the proof misses the limit, and a better point is taken."""
    free = ExportOptions(str(model), quant="auto")
    kls = [kl for item in choices(free, SILENT)[1] if (kl := item.plan.predicted_kl) is not None]
    (path,) = (tmp_path / "cache").glob("entry-*/analysis.json")
    document = json.loads(path.read_text())
    document["knots"] = [[lost, kl / 4] for lost, kl in document["knots"]]
    path.write_text(json.dumps(document))
    limit = (min(kls) * max(kls)) ** 0.5
    bundle = export(ExportOptions(str(model), format="gguf", max_kl=limit), tmp_path / "moved")
    plan, quality = bundle.manifest.plan, bundle.manifest.quality
    assert quality is not None
    assert quality.kl_mean <= limit
    assert any("moved along the front" in note for note in plan.notes)
    assert quality.worst_tensors
    assert {item.name: item.type for item in plan.tensors} == {
        tensor.name: tensor.type for tensor in read_gguf_header(bundle.artifact_path).tensors
    }


def test_types_of_a_gguf_source_are_measured_too(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path / "cache"))
    source = export(ExportOptions(str(model), quant="F16", verify=False), tmp_path / "f16").artifact_path
    options = ExportOptions(str(source), quant="auto", verify=False)
    bundle = export(options, tmp_path / "first")
    assert bundle.manifest.plan.quant == "MIXED"
    assert bundle.manifest.plan.predicted_kl is not None
    again = export(options, tmp_path / "again", resume=True)
    assert again.artifact_path.read_bytes() == bundle.artifact_path.read_bytes()


def test_an_interrupted_measurement_goes_on_behind_its_finished_parts(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path / "cache"))

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    options = ExportOptions(str(model), quant="auto")
    for module, name in ((damage, "table"), (analysis, "compare_models")):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                prepare(options)
        monkeypatch.setattr(sensitivity, "collect", None)  # measuring a finished part again would fail
    monkeypatch.setattr(damage, "table", None)
    assert prepare(options).plan.predicted_kl is not None
    (path,) = (tmp_path / "cache").glob("entry-*/damages.json")
    path.write_text("{")
    with pytest.raises(TypeError):  # damaged: as if it were not there
        prepare(options)


def test_a_model_calibrates_itself_on_answers_to_questions(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path / "cache"))
    checkpoint = open_checkpoint(open_source(str(model)))
    words = load_tokenizer(checkpoint, SILENT)
    found = open_calibration(checkpoint, words, Path("self"), SILENT)
    assert found.record.text == "generated by the model"
    decode = open_tokenizer(words.tokenizer_json, "tokenizer.json").decode
    texts = [decode(list(window), skip_special_tokens=False) for window in found.statistics]
    assert {len(window) for window in (*found.statistics, *found.probes)} == {512}
    assert all(text.startswith("<|im_start|>user\n") for text in texts)
    assert sum(any(question in text for question in QUESTIONS) for text in texts) > len(texts) // 2
    again = open_calibration(checkpoint, words, Path("self"), SILENT)
    assert again.record == found.record


def test_without_torch_rounding_is_weighed_by_what_the_engine_sees(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path / "cache"))
    refusal = Choice(value="none", reason="torch is not installed")
    monkeypatch.setattr(pipeline, "measuring_way", lambda _checkpoint: refusal)
    largest = prepare(ExportOptions(str(model), quant="Q8_0")).plan.artifact_bytes
    found = prepare(ExportOptions(str(model), quant="auto", max_artifact_bytes=largest - 20_000))
    assert "types were not measured: torch is not installed" in found.plan.notes
    assert any("measured by the engine" in note for note in found.plan.notes)
    assert found.plan.calibration is not None
    text = tmp_path / "text.txt"
    text.write_text("A text of my own. " * 2000)
    plain = export(ExportOptions(str(model), quant="Q4_0", verify=False), tmp_path / "plain")
    weighed = export(ExportOptions(str(model), quant="Q4_0", calibration=text, verify=False), tmp_path / "weighed")
    assert weighed.manifest.plan.calibration is not None
    assert weighed.manifest.plan.calibration.text == "text.txt"
    assert weighed.manifest.plan.tensors == plain.manifest.plan.tensors
    assert weighed.artifact_path.read_bytes() != plain.artifact_path.read_bytes()
    with pytest.raises(UsageError, match="rounds nothing"):
        prepare(ExportOptions(str(model), quant="F16", calibration=text))


def test_a_machine_too_small_for_the_statistics_says_so(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(open_source(str(model)))
    assert pipeline.way_of(ExportOptions(str(model)), checkpoint).value == "whole"
    weights = describe(checkpoint).parameters * 4
    for module in (sensitivity, measuring_way):
        monkeypatch.setattr(module, "available_memory", lambda: Choice(value=weights, reason="made up"))
    way = pipeline.way_of(ExportOptions(str(model)), checkpoint)
    assert way.value == "none"
    assert "of memory even layer by layer" in way.reason


def test_the_engine_sees_what_torch_sees(model: Path) -> None:
    checkpoint = open_checkpoint(open_source(str(model)))
    windows = [tuple(range(start, start + 128)) for start in (4, 100, 300)]
    by_torch = sensitivity.collect(checkpoint, windows, SILENT)
    by_engine = collect_importance(checkpoint, windows, SILENT).entries
    assert set(by_engine) == set(by_torch)
    for name, entry in by_engine.items():
        squares = by_torch[name].input_squares
        assert squares is not None
        assert entry.counts[0] == by_torch[name].tokens
        difference = np.abs(entry.sums[0] / squares - 1)
        assert np.median(difference) < 1e-3, name
        assert difference.max() < 0.05, name


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
