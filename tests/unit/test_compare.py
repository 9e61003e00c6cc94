"""Comparisons: what stands beside what, what is refused, what the command prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgelm.bundle import (
    Choice,
    ExportPlan,
    FileRecord,
    Manifest,
    ModelShape,
    Prediction,
    Quality,
    RamParts,
    SourceRecord,
    TensorPlan,
    TokenIdentity,
    file_record,
    new_bundle,
    write_manifest,
)
from edgelm.cli.app import run_cli
from edgelm.errors import BundleError, ProfileError, UsageError
from edgelm.report import (
    EngineRecord,
    HostRecord,
    Label,
    Measurement,
    MemoryRecord,
    ModelRecord,
    Report,
    Samples,
    Settings,
)
from targets.compare import compare, pareto
from targets.workload import workload_from_plan

PARTS = RamParts(weights_bytes=90, repack_bytes=0, kv_bytes=5, compute_bytes=3, process_bytes=2)
PREDICTION = Prediction(
    target="host",
    ram_bytes=100,
    ram_parts=PARTS,
    prefill_tps=200.0,
    decode_tps=50.0,
    fits="fits",
    fit_reason="100 of 200",
)
TENSORS = (
    TensorPlan(name="token_embd.weight", source_name="e", shape=(1000, 64), type="Q8_0", size_bytes=68000, reason="r"),
    TensorPlan(name="blk.0.attn_k.weight", source_name="k", shape=(32, 64), type="Q4_0", size_bytes=1152, reason="r"),
    TensorPlan(name="blk.0.attn_v.weight", source_name="v", shape=(32, 64), type="Q4_0", size_bytes=1152, reason="r"),
    TensorPlan(name="output.weight", source_name="o", shape=(1000, 64), type="Q8_0", size_bytes=68000, reason="r"),
)


def quality(kl: float, text: str = "a") -> Quality:
    return Quality(
        reference="f32",
        text="default",
        text_sha256=text * 64,
        tokens=2048,
        kl_mean=kl,
        kl_p99=kl,
        kl_max=kl,
        top1_agreement=0.9,
        ppl=10,
        ppl_reference=9,
        token_identity=TokenIdentity(identical=True, texts=1, tokens=1),
    )


def bundle(directory: Path, name: str, *, kl: float | None = 0.1, text: str = "a", **changes: Any) -> Path:
    """A bundle with a model of a few tensors that no engine ever opens."""
    plan = ExportPlan(
        target="raspberry-pi-5",
        format="gguf",
        quant="Q4_0",
        architecture="llama",
        parameters=132_096,
        bits_per_weight=8.4,
        artifact_bytes=140_000,
        context=Choice(value=512, reason="r"),
        threads_decode=Choice(value=2, reason="r"),
        threads_prefill=Choice(value=4, reason="r"),
        tensors=TENSORS,
        predicted=PREDICTION,
    ).model_copy(update=changes)
    with new_bundle(directory / name) as staging:
        (staging / "model.gguf").write_bytes(name.encode())
        record: FileRecord = file_record(staging / "model.gguf")
        source = SourceRecord(kind="gguf", location="x", architecture="llama", parameters=1, files=())
        manifest = Manifest(
            name=name,
            created="2026-01-01T00:00:00Z",
            format="gguf",
            artifact="model.gguf",
            source=source,
            plan=plan,
            quality=None if kl is None else quality(kl, text),
            files=(record,),
            tool_versions={},
        )
        write_manifest(staging, manifest)
    return directory / name


def report(path: Path, name: str = "m", **changes: Any) -> Path:
    samples = {
        key: Samples(median=value, p5=value, p95=value, samples=(value,)) for key, value in (("p", 160.0), ("d", 40.0))
    }
    settings = Settings(
        prompt_tokens=changes.pop("prompt_tokens", 512),
        generated_tokens=changes.pop("generated_tokens", 128),
        repetitions=1,
        depth=changes.pop("depth", 0),
        context=1024,
        threads_decode=2,
        threads_prefill=2,
    )
    document = Report(
        created="2026-01-01T00:00:00Z",
        model=ModelRecord(
            name=name,
            format=changes.pop("format", "gguf"),
            quant=changes.pop("quant", "Q4_0"),
            architecture="llama",
            parameters=changes.pop("parameters", 132_096),
            artifact_bytes=changes.pop("artifact_bytes", 140_000),
            sha256=changes.pop("sha256", None),
        ),
        settings=settings,
        engine=EngineRecord(name="llama.cpp", versions={}, system=""),
        prefill_tps=samples["p"],
        decode_tps=samples["d"],
        ttft_s=None,
        load_s=0.1,
        memory=MemoryRecord(rss_peak_bytes=125, anonymous_bytes=1, file_bytes=1, kv_bytes=1, weights_bytes=1),
        predicted=PREDICTION,
        quality=None,
        host=HostRecord(
            profile="host", cpu="Test CPU", isa=(), cores=2, ram_bytes=10, available_ram_bytes=9, os="Linux"
        ),
        valid=changes.pop("valid", True),
        warnings=changes.pop("warnings", ()),
        measurements=changes.pop("measurements", ()),
    )
    path.write_text(document.model_dump_json(), encoding="utf-8")
    return path


def test_predicted_stands_beside_measured_with_the_error(tmp_path: Path) -> None:
    line = compare([report(tmp_path / "r.json")], []).lines[0]
    assert (line.decode_tps.predicted, line.decode_tps.measured) == (50.0, 40.0)
    assert line.decode_tps.error_pct == pytest.approx(25)
    assert line.ram_bytes.error_pct == pytest.approx(-20)
    assert line.device == "Test CPU"


@pytest.mark.parametrize(
    ("format_name", "quant", "bits"),
    [
        ("onnx", "fp32", 32.1),
        ("onnx", "int8", 9.1),
        ("onnx", "int4-mixed-gptq", 6.5),
        ("onnx", "int4-64-asym", 4.7),
        ("onnx", "uint8", 9.0),  # what a folder of somebody else's is called after
        ("gguf", "MIXED", 5.1),
    ],
)
def test_models_known_from_reports_are_predicted_whatever_their_types_are_called(
    tmp_path: Path, format_name: str, quant: str, bits: float
) -> None:
    size = {"parameters": 100_000_000, "artifact_bytes": round(100_000_000 * bits / 8)}
    path = report(tmp_path / "r.json", format=format_name, quant=quant, **size)
    measured, predicted = compare([path], ["raspberry-pi-5"]).lines
    assert (measured.format, predicted.format, predicted.quant) == (format_name, format_name, quant)
    usual = report(tmp_path / "s.json", "usual", format="gguf", quant="F32", **{**size, "artifact_bytes": 400_000_000})
    slow = compare([usual], ["raspberry-pi-5"]).lines[1].decode_tps.value
    assert predicted.decode_tps.value is not None
    assert slow is not None
    # At 32 bits both are bound by the same memory; with fewer, fewer bytes are read.
    assert (
        predicted.decode_tps.value == pytest.approx(slow, rel=0.05) if bits > 32 else predicted.decode_tps.value > slow
    )


def test_a_bundle_is_predicted_for_every_target(tmp_path: Path) -> None:
    result = compare([bundle(tmp_path, "a")], ["raspberry-pi-5", "pi4"])
    assert [line.target for line in result.lines] == ["raspberry-pi-5", "raspberry-pi-4"]
    assert all(line.kl_mean == 0.1 and line.fits == "fits" for line in result.lines)
    assert result.lines[0].decode_tps.value > result.lines[1].decode_tps.value  # type: ignore[operator]
    assert result.best["decode_tps"] == 0
    assert "kl_mean" not in result.best
    assert result.notes == ()


def test_a_report_of_a_bundle_takes_its_quality_and_is_one_model(tmp_path: Path) -> None:
    path = bundle(tmp_path, "a")
    sha256 = file_record(path / "model.gguf").sha256
    result = compare([path, report(tmp_path / "r.json", name="a", sha256=sha256)], ["pi4"])
    assert [line.target for line in result.lines] == ["host", "raspberry-pi-4"]
    assert [line.kl_mean for line in result.lines] == [0.1, 0.1]


@pytest.mark.parametrize("setting", ["prompt_tokens", "generated_tokens", "depth"])
def test_unlike_runs_are_refused_with_the_reason(tmp_path: Path, setting: str) -> None:
    paths = [report(tmp_path / "a.json"), report(tmp_path / "b.json", **{setting: 64})]
    with pytest.raises(UsageError, match="not comparable") as error:
        compare(paths, [])
    assert "a.json" in error.value.message
    assert setting.split("_")[0] in error.value.message


def test_kl_of_another_text_is_left_out_and_said(tmp_path: Path) -> None:
    paths = [bundle(tmp_path, "a"), bundle(tmp_path, "b"), bundle(tmp_path, "c", kl=0.01, text="b")]
    result = compare(paths, ["pi5"])
    assert [line.kl_mean for line in result.lines] == [0.1, 0.1, None]
    assert any("c Q4_0" in note and "another text" in note for note in result.notes)


def test_a_spoilt_run_is_shown_and_never_the_best(tmp_path: Path) -> None:
    good = report(tmp_path / "a.json")
    bad = report(tmp_path / "b.json", name="b", valid=False, warnings=("throttled",))
    document = json.loads(bad.read_text())
    document["decode_tps"]["median"] = 999.0
    bad.write_text(json.dumps(document))
    result = compare([bad, good], [])
    assert result.lines[0].spoilt == "throttled"
    assert result.best.get("decode_tps") != 0


def test_the_pareto_front_keeps_what_nothing_beats(tmp_path: Path) -> None:
    base = compare([bundle(tmp_path, "a")], ["pi5"]).lines[0]

    def point(kl: float, speed: float) -> Any:
        return base.model_copy(
            update={"kl_mean": kl, "decode_tps": base.decode_tps.model_copy(update={"predicted": speed})}
        )

    assert pareto([point(0.3, 30), point(0.1, 10), point(0.2, 5), point(0.1, 9), point(0.4, 30)]) == [1, 0]


def test_the_shape_is_read_off_the_names_or_taken_as_stated(tmp_path: Path) -> None:
    plan = compare_plan(bundle(tmp_path, "a"))
    derived = workload_from_plan(plan)
    assert derived is not None
    assert (derived.layers, derived.hidden, derived.vocabulary, derived.kv_elements_per_token) == (1, 64, 1000, 64)
    assert derived.lookup is not None
    assert derived.streamed_bytes == 68000 + 2 * 1152
    shape = ModelShape(layers=3, hidden=64, vocabulary=1000, kv_elements_per_token=7)
    stated = workload_from_plan(plan.model_copy(update={"shape": shape}))
    assert stated is not None
    assert (stated.layers, stated.kv_elements_per_token, stated.lookup) == (3, 7, None)


def compare_plan(path: Path) -> ExportPlan:
    return Manifest.model_validate_json((path / "manifest.json").read_bytes()).plan


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to compare"):
        compare([], ["pi5"])
    with pytest.raises(ProfileError, match=r"cannot read report .*nix\.json"):
        compare([tmp_path / "nix.json"], [])
    with pytest.raises(BundleError, match="is not a bundle"):
        compare([tmp_path], [])
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ProfileError, match="not a valid report"):
        compare([tmp_path / "x.json"], [])


def test_the_command_prints_a_table_markdown_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, measured = str(bundle(tmp_path, "a|b".replace("|", "-"))), str(report(tmp_path / "r.json"))
    assert run_cli(["compare", source, measured, "--target", "pi5", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["lines"][0]["decode_tps"] == {"predicted": 50.0, "measured": 40.0, "error_pct": pytest.approx(25)}
    assert run_cli(["compare", source, measured, "--target", "pi5", "--markdown"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith("| model | target |")
    assert "40 (~50, +25 %)" in table[2]
    assert run_cli(["compare", source, "--target", "pi5"]) == 0
    assert "raspberry-pi-5" in capsys.readouterr().out
    assert run_cli(["compare"]) == 2
    assert capsys.readouterr().err.startswith("error: nothing to compare")


def test_the_targets_commands_speak_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = ["--params-b", "1.24", "--file-mib", "770", "--quant", "Q4_K_M"]
    assert run_cli(["targets", "predict", "raspberry-pi-5", *figures, "--threads", "4", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {"decode_tps", "prefill_tps", "ram_bytes"} <= set(document)
    assert 5 < document["decode_tps"] < 20
    rows = tmp_path / "rows.csv"
    rows.write_text("device_id,backend,quant,file_mib,tg_tps\nraspberry-pi-5,cpu,Q4_0,400,25\nnone,cpu,Q4_0,400,25\n")
    assert run_cli(["targets", "validate", str(rows), "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["rows"] == 2
    assert {"median_abs_pct_error", "within_25_pct", "worst"} <= set(outcome["decode"])
    assert outcome["without_profile"] == {"none (cpu)": 1}
    assert outcome["leave_one_device_out"]["decode"]["median_abs_pct_error"] > 0
    assert run_cli(["targets", "list", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["targets"]) > 100
    output = tmp_path / "me.toml"
    assert run_cli(["targets", "detect", "--no-measure", "--id", "me", "-o", str(output)]) == 0
    assert run_cli(["targets", "show", str(output)]) == 0
    assert 'id = "me"' in capsys.readouterr().out
    assert run_cli(["targets", "predict", "nowhere", *figures]) == 1
    assert capsys.readouterr().err.startswith("error: there is no target 'nowhere'")


def points(*tps: float, labels: tuple[Label, ...] = ()) -> tuple[Measurement, ...]:
    """One decode point with these samples."""
    samples = Samples(median=sorted(tps)[len(tps) // 2], p5=min(tps), p95=max(tps), samples=tps)
    return (
        Measurement(
            kind="decode",
            tokens=128,
            depth=0,
            sequences=1,
            threads=2,
            tps=samples,
            started_s=0,
            seconds=1,
            labels=labels,
        ),
    )


BASE = (100.0, 101.0, 99.0, 100.5, 99.5, 100.2)


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        ((100.1, 99.4, 100.9, 100.6, 99.8, 99.9), "no difference"),
        ((102.1, 102.4, 101.9, 102.6, 101.8, 102.2), "no difference"),  # certain, and too little to mean anything
        ((80.1, 79.4, 80.9, 80.6, 79.8, 79.9), "slower"),
        ((120.1, 119.4, 120.9, 120.6, 119.8, 119.9), "faster"),
        ((80.0, 79.0, 81.0), "undecided"),
        ((80.0, 130.0, 95.0, 105.0, 140.0, 70.0), "no difference"),
    ],
)
def test_the_second_report_is_judged_against_the_first(
    tmp_path: Path, after: tuple[float, ...], verdict: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [
        report(tmp_path / "a.json", measurements=points(*BASE)),
        report(tmp_path / "b.json", measurements=points(*after)),
    ]
    change = compare(paths, []).changes[0]
    assert (change.figure, change.verdict) == ("tg128 (tok/s)", verdict)
    assert run_cli(["compare", *map(str, paths)]) == 0
    assert f": {verdict} (" in capsys.readouterr().out


def test_a_report_does_not_differ_from_itself(tmp_path: Path) -> None:
    path = report(tmp_path / "a.json", measurements=points(*BASE))
    result = compare([path, path], [])
    assert {change.verdict for change in result.changes} == {"no difference"}
    assert result.unlike == ()


def test_spoilt_runs_are_shown_and_not_judged(tmp_path: Path) -> None:
    label = Label(kind="throttled", reason="too hot")
    paths = [
        report(tmp_path / "a.json", measurements=points(*BASE)),
        report(tmp_path / "b.json", measurements=points(50, 51, 52, 50, labels=(label,))),
    ]
    change = compare(paths, []).changes[0]
    assert (change.verdict, change.reason) == ("spoilt", "labelled throttled")
