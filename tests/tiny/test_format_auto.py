"""``--format auto`` on this machine, whole: both formats of a tiny model are made, proven and measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgelm.bundle import FormatContest, open_bundle
from edgelm.cli.app import run_cli
from edgelm.errors import EngineError
from edgelm.progress import SILENT
from exporter import format_contest, packages
from exporter.checkpoint import open_checkpoint, open_source
from exporter.format_choice import Contest, contest
from exporter.options import ExportOptions
from exporter.pipeline import choices, export, prepare
from runtime.trial import Trial, TrialSize, trial
from targets.profile import load_profile
from tests.tiny_encoders import make_tiny_bert
from tests.tiny_models import make_tiny_llama

pytestmark = pytest.mark.tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("source") / "tiny-both", hidden=64, vocab=512)


def decided(options: ExportOptions, *, resume: bool = False) -> Contest | str | None:
    checkpoint = open_checkpoint(open_source(options.source))
    return contest(options, checkpoint, load_profile(options.target), resume=resume)


def test_both_formats_are_made_and_one_is_left(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.setattr(format_contest, "PAIRS", 1)
    assert (
        run_cli(["export", str(model), "--format", "auto", "--max-kl", "0.05", "-o", str(place / "bundle"), "--json"])
        == 0
    )
    shown = capsys.readouterr()
    manifest = open_bundle(place / "bundle").manifest
    found = manifest.contest
    assert found is not None
    assert FormatContest.model_validate(json.loads(shown.out)["contest"]) == found
    assert [path.name for path in place.iterdir()] == ["bundle"]
    assert {path.name for path in (place / "bundle").iterdir()} == {
        "manifest.json",
        *(record.name for record in manifest.files),
    }
    assert (manifest.format, manifest.artifact) == ("gguf", "model.gguf")
    assert "fewer than 4 pairs" in found.reason
    gguf, onnx = found.candidates
    assert (gguf.quant, onnx.quant) == ("MIXED", "int8")
    for item in found.candidates:
        assert item.kl_mean is not None
        assert 0 < item.kl_mean <= 0.05
        assert len(item.prefill_tps) == len(item.decode_tps) == 1
        assert item.decode_tps[0] > 0
    faster_is_kept(model, place, monkeypatch)
    an_interruption_leaves_what_was_there(model, place, monkeypatch)


def faster_is_kept(model: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format_contest, "PAIRS", 4)
    rates = {"gguf": 100.0, "onnx": 200.0}
    monkeypatch.setattr(format_contest, "trial", lambda path, _: Trial(1000.0, rates[path.name]))
    options = ExportOptions(str(model), max_kl=0.05, measured_format=True)
    bundle = export(options, place / "bundle", force=True)
    assert [path.name for path in place.iterdir()] == ["bundle"]
    assert open_bundle(bundle.path).manifest.format == "onnx"
    assert {path.name for path in bundle.path.iterdir()} >= {"model.onnx", "model.onnx.data"}
    assert not list(bundle.path.glob("*.gguf"))
    assert bundle.manifest.quality is not None
    assert bundle.manifest.quality.kl_mean <= 0.05


def an_interruption_leaves_what_was_there(model: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(path: Path, size: TrialSize) -> Trial:
        raise KeyboardInterrupt

    monkeypatch.setattr(format_contest, "trial", stop)
    before = (place / "bundle" / "manifest.json").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        export(ExportOptions(str(model), max_kl=0.05, measured_format=True), place / "bundle", force=True)
    assert [path.name for path in place.iterdir()] == ["bundle"]
    assert (place / "bundle" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"target": "raspberry-pi-5"}, "Raspberry Pi 5 is not this machine, so speed cannot be measured"),
        ({"verify": False}, "without the proof that --no-verify leaves out"),
        ({"max_artifact_bytes": 100_000}, "as ONNX it cannot be: nothing fits"),
        ({"quant": "Q4_K_M"}, None),
        ({"type_overrides": (("ffn_down", "Q8_0"),)}, None),
        ({"format": "gguf"}, None),
        ({"measured_format": False}, None),
    ],
)
def test_where_nothing_is_measured_it_is_gguf_and_says_why(model: Path, changes: dict[str, Any], told: str) -> None:
    found = decided(replace(ExportOptions(str(model), measured_format=True), **changes))
    assert found is None if told is None else isinstance(found, str) and told in found


def test_what_else_keeps_the_formats_from_being_measured(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path / "cache"))
    options = ExportOptions(str(model), measured_format=True)
    assert decided(options, resume=True) == "--resume goes on with one artefact"
    make_tiny_bert(tmp_path / "encoder")
    assert decided(ExportOptions(str(tmp_path / "encoder"), measured_format=True)) is None
    export(ExportOptions(str(model), quant="Q8_0", verify=False), tmp_path / "q8")
    kept = export(ExportOptions(str(tmp_path / "q8" / "model.gguf"), measured_format=True), tmp_path / "kept").manifest
    assert (kept.plan.quant, kept.contest) == ("COPY", None)
    assert "format auto: GGUF: the source's own types can stay, which no ONNX model has" in kept.plan.notes
    monkeypatch.setattr(packages, "find_spec", lambda _: None)
    assert decided(options) == "as ONNX it cannot be: onnx is not installed"


def test_plans_say_what_will_decide(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path / "cache"))
    options = ExportOptions(str(model), max_kl=0.05, measured_format=True)
    told = "format auto: GGUF is planned; the export itself makes ONNX int8 as well"
    _, _, chosen, _ = choices(replace(options, max_kl=None), SILENT, measure=False)
    assert chosen is not None
    assert chosen.plan.notes[-1].startswith(told)
    planned = prepare(options).plan
    assert planned.notes[-1].startswith(told)
    assert "at most 0.05" in planned.notes[-1]
    resumed = export(options, tmp_path / "resumed", resume=True).manifest
    assert "format auto: GGUF: --resume goes on with one artefact" in resumed.plan.notes
    board = prepare(replace(options, target="raspberry-pi-5", verify=False, max_kl=None)).plan
    assert any("is not this machine" in note for note in board.notes)


def test_limits_and_texts_reach_the_other_format(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words " * 5000)
    options = ExportOptions(str(model), calibration=text, as_fast_as="F32", max_kl=0.3, measured_format=True)
    found = decided(options)
    assert isinstance(found, Contest)
    assert found.gguf == replace(options, format="gguf")
    assert (found.onnx.format, found.onnx.quant, found.onnx.calibration, found.onnx.as_fast_as) == (
        "onnx",
        "int8",
        text,
        None,
    )
    assert found.onnx.min_decode_tps
    assert found.kl_limit == 0.3


def test_a_trial_that_cannot_be_says_why(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="does not exist"):
        trial(tmp_path / "nothing", TrialSize(8, 4, 1))
