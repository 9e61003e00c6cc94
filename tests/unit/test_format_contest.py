"""``--format auto`` by measuring: who wins by which figures, and what is left of the loser."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from edgelm.bundle import (
    Bundle,
    Choice,
    ExportPlan,
    Format,
    FormatContest,
    Manifest,
    Prediction,
    Quality,
    RamParts,
    SourceRecord,
    TokenIdentity,
    file_record,
    new_bundle,
    open_bundle,
    write_manifest,
)
from edgelm.errors import CheckpointError, DoesNotFitError, EngineError, UsageError
from edgelm.progress import SILENT
from exporter import format_contest
from exporter.format_choice import Contest
from exporter.format_contest import LIMIT_S, PAIRS, hold
from exporter.options import ExportOptions
from runtime.trial import Trial, TrialSize

ARTIFACTS: Mapping[Format, str] = {"gguf": "model.gguf", "onnx": "model.onnx"}
CONTEST = Contest(
    ExportOptions("model", format="gguf"), ExportOptions("model", format="onnx", quant="int8"), kl_limit=0.02
)
Losses = Mapping[Format, tuple[float, float] | Exception]


def plan_of(form: Format, context: int) -> ExportPlan:
    parts = RamParts(weights_bytes=1, repack_bytes=0, kv_bytes=1, compute_bytes=1, process_bytes=1)
    predicted = Prediction(
        target="t", ram_bytes=4, ram_parts=parts, prefill_tps=100.0, decode_tps=9.0, fits="fits", fit_reason="small"
    )
    return ExportPlan(
        target="t",
        format=form,
        quant={"gguf": "MIXED", "onnx": "int8"}[form],
        architecture="llama",
        parameters=1,
        bits_per_weight=8.5,
        artifact_bytes=4,
        context=Choice(value=context, reason="asked for"),
        threads_decode=Choice(value=2, reason="two cores"),
        threads_prefill=Choice(value=2, reason="two cores"),
        tensors=(),
        predicted=predicted,
    )


def quality_of(kl: float, half: float) -> Quality:
    return Quality(
        reference="transformers",
        text="t",
        text_sha256="0" * 64,
        tokens=2000,
        kl_mean=kl,
        kl_mean_interval=(kl - half, kl + half),
        kl_p99=1.0,
        kl_max=1.0,
        top1_agreement=1.0,
        ppl=2.0,
        ppl_reference=2.0,
        token_identity=TokenIdentity(identical=True, texts=1, tokens=1),
    )


def maker(losses: Losses, context: int = 2048) -> Callable[[ExportOptions, Path], Bundle]:
    """Exports that cost nothing: a file, and a manifest with that loss (mean and half its interval), or an error."""

    def make(options: ExportOptions, place: Path) -> Bundle:
        assert options.format != "auto"
        form, loss = options.format, losses[options.format]
        if isinstance(loss, Exception):
            raise loss
        place.mkdir()
        (place / ARTIFACTS[form]).write_text(form)
        manifest = Manifest(
            name="m",
            created="2026-01-01T00:00:00+00:00",
            format=form,
            artifact=ARTIFACTS[form],
            source=SourceRecord(kind="huggingface", location="m", architecture="llama", parameters=1, files=()),
            plan=plan_of(form, context),
            quality=quality_of(*loss),
            files=(file_record(place / ARTIFACTS[form]),),
            tool_versions={},
        )
        write_manifest(place, manifest)
        return open_bundle(place)

    return make


def timed(
    monkeypatch: pytest.MonkeyPatch, gguf: Any, onnx: Any, spoilt: tuple[str, ...] = ()
) -> list[tuple[str, TrialSize]]:
    """Let trials answer with these decode speeds, in turn, prompts ten times as fast; returns who was asked."""
    asked: list[tuple[str, TrialSize]] = []
    rates = {"gguf": iter(gguf), "onnx": iter(onnx)}

    def trial(path: Path, size: TrialSize) -> Trial:
        asked.append((path.name, size))
        rate = next(rates[path.name])
        if isinstance(rate, BaseException):
            raise rate
        return Trial(10 * rate, rate, spoilt)

    monkeypatch.setattr(format_contest, "trial", trial)
    return asked


def held(tmp_path: Path, losses: Losses, context: int = 2048) -> tuple[Bundle, FormatContest]:
    """The bundle that a contest leaves, which holds nothing else."""
    place = tmp_path / "bundle"
    with new_bundle(place) as staging:
        hold(CONTEST, staging, maker(losses, context), SILENT)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    bundle = open_bundle(place)
    assert {path.name for path in place.iterdir()} == {bundle.manifest.artifact, "manifest.json"}
    contest = bundle.manifest.contest
    assert contest is not None
    assert bundle.manifest.plan.notes[-1] == f"format auto: {contest.reason}"
    return bundle, contest


GOOD: Losses = {"gguf": (0.018, 0.001), "onnx": (0.001, 0.0001)}


@pytest.mark.parametrize(
    ("gguf", "onnx", "winner", "told"),
    [
        ((100, 101, 102, 103, 104, 105), (130, 131, 132, 133, 134, 135), "onnx", "ONNX int8, measured as 1.29 times"),
        ((130, 131, 132, 133, 134, 135), (100, 101, 102, 103, 104, 105), "gguf", "GGUF MIXED, measured as 1.29 times"),
        ((100, 110, 90, 105, 95, 102), (104, 96, 109, 92, 103, 99), "gguf", "no difference in speed is seen"),
        ((100, 100.1, 100.2, 100.3, 100.4, 99), (101, 101.1, 101.2, 101.3, 101.4, 101.5), "gguf", "no difference"),
    ],
)
def test_the_faster_of_two_good_ones_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gguf: Any, onnx: Any, winner: str, told: str
) -> None:
    asked = timed(monkeypatch, gguf, onnx)
    bundle, contest = held(tmp_path, GOOD)
    assert bundle.manifest.format == winner
    assert told in contest.reason
    assert "mean KL 0.0180 (GGUF MIXED) and 0.0010 (ONNX int8), both at most 0.02" in contest.reason
    assert [item.format for item in contest.candidates] == ["gguf", "onnx"]
    assert [item.decode_tps for item in contest.candidates] == [gguf, onnx]
    assert [name for name, _ in asked[:4]] == ["onnx", "gguf", "gguf", "onnx"]
    assert len(asked) == 2 * PAIRS
    assert {size for _, size in asked} == {TrialSize(128, 8)}  # 100 and 9 tokens/s are predicted


def test_what_disturbed_the_measurement_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, [100.0] * PAIRS, [200.0] * PAIRS, spoilt=("others kept 1.0 cores busy",))
    _, contest = held(tmp_path, GOOD)
    assert contest.reason.endswith("; disturbed: others kept 1.0 cores busy")


def test_short_contexts_are_not_overrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = timed(monkeypatch, [100.0] * PAIRS, [200.0] * PAIRS)
    held(tmp_path, GOOD, context=6)
    assert {size for _, size in asked} == {TrialSize(5, 5)}


@pytest.mark.parametrize(
    ("losses", "winner", "told"),
    [
        (
            {"gguf": (0.018, 0.001), "onnx": (0.11, 0.01)},
            "gguf",
            "its mean KL is 0.0180 and that of ONNX int8 0.1100; at",
        ),
        ({"gguf": (0.021, 0.005), "onnx": (0.001, 0.001)}, "onnx", "at most 0.02 is aimed at"),
        ({"gguf": (0.05, 0.01), "onnx": (0.11, 0.01)}, "gguf", "both above 0.02"),
        ({"gguf": CheckpointError("no"), "onnx": (0.9, 0.1)}, "onnx", "since GGUF cannot be: no"),
        ({"gguf": (0.9, 0.1), "onnx": DoesNotFitError("too large")}, "gguf", "ONNX int8 cannot be: too large"),
    ],
)
def test_speed_is_not_asked_where_something_else_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: Losses, winner: str, told: str
) -> None:
    asked = timed(monkeypatch, (), ())
    bundle, contest = held(tmp_path, losses)
    assert (bundle.manifest.format, asked) == (winner, [])
    assert told in contest.reason
    failed = [item.failed for item in contest.candidates]
    assert [text is not None for text in failed] == [isinstance(losses[form], Exception) for form in ("gguf", "onnx")]


def test_two_that_lose_alike_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, [100.0] * PAIRS, [150.0] * PAIRS)
    bundle, contest = held(tmp_path, {"gguf": (0.10, 0.02), "onnx": (0.13, 0.02)})
    assert bundle.manifest.format == "onnx"
    assert "both above 0.02, intervals overlap" in contest.reason


def test_one_that_does_not_run_loses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, [EngineError("it crashed")], [100.0])
    bundle, contest = held(tmp_path, GOOD)
    assert bundle.manifest.format == "onnx"
    assert "GGUF MIXED could not be measured: it crashed" in contest.reason


def test_time_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def later() -> float:
        nonlocal now
        now += 0.4 * LIMIT_S
        return now

    monkeypatch.setattr(format_contest.time, "monotonic", later)
    asked = timed(monkeypatch, [100.0] * PAIRS, [200.0] * PAIRS)
    bundle, contest = held(tmp_path, GOOD)
    assert (bundle.manifest.format, len(asked)) == ("gguf", 4)
    assert "fewer than 4 pairs" in contest.reason


@pytest.mark.parametrize("stops", [KeyboardInterrupt(), UsageError("no sense")])
def test_nothing_is_left_of_a_contest_that_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: BaseException
) -> None:
    timed(monkeypatch, [stops], [100.0])
    with pytest.raises(type(stops)), new_bundle(tmp_path / "bundle") as staging:
        hold(CONTEST, staging, maker(GOOD), SILENT)
    assert list(tmp_path.iterdir()) == []


def test_where_neither_can_be_the_error_is_that_of_gguf(tmp_path: Path) -> None:
    losses: Losses = {"gguf": DoesNotFitError("gguf"), "onnx": CheckpointError("onnx")}
    with pytest.raises(DoesNotFitError, match="gguf"):
        hold(CONTEST, tmp_path, maker(losses), SILENT)
