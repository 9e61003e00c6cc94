"""From a tiny checkpoint to an ONNX bundle that proves itself, answers and is measured, through the usual doors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgelm.bundle import Bundle, open_bundle
from edgelm.cli.app import run_cli
from edgelm.errors import BundleError, DoesNotFitError, ProofError, UsageError
from exporter import packages
from exporter.options import ExportOptions, parse_type_override
from exporter.pipeline import export
from exporter.verification import verify
from runtime.bench import BenchOptions, bench
from runtime.engine import EngineOptions
from runtime.generate import GenerationRequest, Session, generate
from runtime.model import open_model
from runtime.onnx_header import read_onnx_model
from tests.tiny_models import make_tiny_llama

pytestmark = [pytest.mark.tiny, pytest.mark.reference]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def bundle(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    options = ExportOptions(source=str(source), format="onnx", quant="int8")
    return export(options, tmp_path_factory.mktemp("bundles") / "int8")


def test_the_bundle_states_its_proof(bundle: Bundle) -> None:
    manifest = open_bundle(bundle.path).manifest
    assert (manifest.format, manifest.artifact, manifest.plan.quant) == ("onnx", "model.onnx", "int8")
    assert manifest.quality is not None
    assert manifest.quality.kl_mean < 2e-3
    assert manifest.quality.reference.startswith("transformers")
    assert manifest.quality.token_identity.identical
    sizes = {item.name: item.size_bytes for item in manifest.files}
    assert manifest.artifact_bytes == sizes["model.onnx"] + sizes["model.onnx.data"]
    assert abs(manifest.artifact_bytes - manifest.plan.artifact_bytes) < 0.1 * manifest.artifact_bytes
    assert {"onnx", "onnxruntime"} <= set(manifest.tool_versions)


def test_float_bundles_lose_nothing(source: Path, tmp_path: Path) -> None:
    quality = export(ExportOptions(source=str(source), format="onnx", quant="fp32"), tmp_path / "out").manifest.quality
    assert quality is not None
    assert quality.kl_mean < 1e-5


def test_verify_proves_it_again(bundle: Bundle, source: Path) -> None:
    result = verify(bundle.path, str(source))
    assert result.quality is not None
    assert result.quality.kl_mean < 2e-3


def test_a_plan_that_the_artefact_does_not_keep_is_noticed(bundle: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in bundle.path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["plan"]["tensors"][0]["size_bytes"] += 4
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="bytes of weights"):
        verify(copy, None)


def test_it_generates_and_stops_where_the_source_says(bundle: Bundle) -> None:
    model = open_model(bundle.path, EngineOptions(context=0, threads_decode=2, threads_prefill=2))
    assert model.stop_tokens >= {2}
    assert model.engine.info.context == bundle.manifest.plan.context.value
    assert model.chat_template is not None
    prompt = model.tokenizer.encode("the statement")
    request = GenerationRequest(prompt=prompt, max_tokens=8)
    first = [event.token for event in generate(Session(model.engine), model.tokenizer, request)]
    again = [event.token for event in generate(Session(model.engine), model.tokenizer, request)]
    model.close()
    assert first == again
    assert 0 < len(first) <= 9


def test_bench_measures_it_and_predicts_beside(bundle: Bundle) -> None:
    report = bench(bundle.path, BenchOptions(prompts=(16,), generated_tokens=4, repetitions=2))
    assert (report.model.format, report.engine.name) == ("onnx", "onnxruntime")
    assert report.model.artifact_bytes == bundle.manifest.artifact_bytes
    assert report.predicted is not None
    assert report.decode_tps is not None
    assert report.quality == bundle.manifest.quality


def test_command_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "export",
        str(source),
        "--format",
        "onnx",
        "--quant",
        "int4",
        "--type",
        "attn_v=int8-64",
        "--no-verify",
    ]
    assert run_cli([*arguments, "-o", str(tmp_path / "out"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["format"] == "onnx"
    assert result["tensor_types"]["int8-64"] == 2
    assert result["artifact_bytes"] > 0
    assert run_cli(["plan", str(source), "--format", "onnx", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [item["quant"] for item in found["candidates"]] == ["int8", "int4-mixed", "int4"]
    assert {item["format"] for item in found["candidates"]} == {"onnx"}
    assert run_cli(["plan", str(source), "--json"]) == 0
    both = json.loads(capsys.readouterr().out)
    shown = {(item["format"], item["quant"]) for item in both["candidates"]}
    assert {("gguf", "Q4_K_M"), ("onnx", "int8"), ("onnx", "int4")} <= shown
    assert all(item["predicted"]["decode_tps"] > 0 for item in both["candidates"])


def test_without_the_package_one_error_names_the_way_out(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda _: None)
    wanted = ["export", str(source), "--format", "onnx", "--quant", "int8", "-o", str(tmp_path / "out")]
    assert run_cli(wanted) == 1
    assert run_cli(["compress", str(source), "--tokens", "0", "-o", str(tmp_path / "student")]) == 1
    told = capsys.readouterr().err
    assert "error: onnx is not installed\nhint: pip install" in told
    assert "error: torch and transformers are not installed\nhint: pip install" in told
    assert not list(tmp_path.iterdir())


def test_limits_hold_and_leave_nothing(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ProofError, match="mean KL"):
        export(ExportOptions(source=str(source), format="onnx", quant="int4-128", max_kl=1e-6), tmp_path / "out")
    with pytest.raises(DoesNotFitError, match="--max-bytes"):
        export(
            ExportOptions(source=str(source), format="onnx", quant="int8", max_artifact_bytes=1000), tmp_path / "out"
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("text", "format_name"), [("ffn=Q4_K", "onnx"), ("ffn=int4-32", "gguf")])
def test_types_of_the_other_format_are_refused(text: str, format_name: str) -> None:
    from exporter.options import as_format

    with pytest.raises(UsageError):
        parse_type_override(text, as_format(format_name))


def test_a_gguf_source_gives_the_same_model(source: Path, tmp_path: Path) -> None:
    """Rows of a GGUF are in another order (rotation partners adjacent): the graph has to rotate them so."""
    made = export(ExportOptions(source=str(source), format="gguf", quant="F32", verify=False), tmp_path / "gguf")
    gguf = made.path / "model.gguf"
    quality = export(ExportOptions(source=str(gguf), format="onnx", quant="fp32"), tmp_path / "onnx").manifest.quality
    assert quality is not None
    assert quality.kl_mean < 1e-5


def test_balanced_channels_lose_less_at_the_same_size(source: Path, tmp_path: Path) -> None:
    """A model with channels as trained ones have them: a few are many times as large as their neighbours."""
    uneven = tmp_path / "uneven"
    shutil.copytree(source, uneven)
    tensors = load_file(uneven / "model.safetensors")
    for name, values in tensors.items():
        if name.endswith("norm.weight"):
            tensors[name] = np.where(np.arange(len(values)) % 24 == 5, 20 * values, values)
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            tensors[name] = np.where(np.arange(values.shape[1]) % 24 == 5, values / 20, values)
    save_file(tensors, uneven / "model.safetensors", {"format": "pt"})
    made = {}
    for quant in ("int8-32", "int8"):
        options = ExportOptions(source=str(uneven), format="onnx", quant=quant)
        made[quant] = export(options, tmp_path / quant).manifest
    plain, even = made["int8-32"], made["int8"]
    assert plain.quality is not None
    assert even.quality is not None
    assert even.quality.kl_mean < 0.5 * plain.quality.kl_mean
    assert abs(even.artifact_bytes - plain.artifact_bytes) < 8192
    model = read_onnx_model(tmp_path / "int8" / "model.onnx")
    assert model.metadata["edgelm.calibration"] == "pydoc_data.topics, first half, 2048 tokens"


def test_error_compensation_loses_less_at_the_same_size(source: Path, tmp_path: Path) -> None:
    made = {}
    for quant in ("int4", "int4-gptq"):
        table = (("token_embd", "int8-32"),)
        options = ExportOptions(source=str(source), format="onnx", quant=quant, type_overrides=table)
        made[quant] = export(options, tmp_path / quant).manifest
    plain, compensated = made["int4"], made["int4-gptq"]
    assert plain.quality is not None
    assert compensated.quality is not None
    assert compensated.quality.kl_mean < 0.9 * plain.quality.kl_mean
    sizes = [{item.name: item.size_bytes for item in made[quant].files}["model.onnx.data"] for quant in made]
    assert sizes[0] == sizes[1]
    model = read_onnx_model(tmp_path / "int4-gptq" / "model.onnx")
    assert model.metadata["edgelm.calibration"] == "pydoc_data.topics, first half, 12288 tokens"
