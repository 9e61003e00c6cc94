"""The whole export on tiny random models: what a bundle holds, and that failures leave nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import gguf
import pytest

from edgelm.bundle import Quality, TokenIdentity, open_bundle
from edgelm.cli.app import run_cli
from edgelm.errors import BundleError, CheckpointError, DoesNotFitError, EdgelmError, ProofError, UsageError
from exporter import pipeline
from exporter.device import ON_CPU, Placement
from exporter.options import ExportOptions
from exporter.pipeline import export
from tests.tiny_models import make_tiny_llama

pytestmark = pytest.mark.tiny
ROOT = Path(__file__).parents[2]
TARGET = "raspberry-pi-5"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("source") / "tiny-llama", hidden=64, vocab=512)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty directory; what stays in it after a failure was left behind."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def options(source: Path | str, **changes: Any) -> ExportOptions:
    return ExportOptions(str(source), **{"target": TARGET, "quant": "Q8_0", "verify": False, **changes})


def test_bundle_holds_what_the_manifest_says(model: Path, place: Path) -> None:
    bundle = export(options(model, quant="Q4_0"), place / "bundle")
    assert open_bundle(place / "bundle").manifest == bundle.manifest
    files = {record.name for record in bundle.manifest.files}
    assert files == {"model.gguf", "tokenizer.json", "chat_template.jinja", "generation_config.json"}
    assert {path.name for path in bundle.path.iterdir()} == files | {"manifest.json"}
    assert [path.name for path in place.iterdir()] == ["bundle"]
    manifest = bundle.manifest
    assert manifest.name == "tiny-llama-Q4_0"
    assert [record.name for record in manifest.source.files] == ["config.json", "model.safetensors"]
    assert str(model.parent) not in (bundle.path / "manifest.json").read_text()
    reader = gguf.GGUFReader(bundle.artifact_path)
    assert {tensor.name: tensor.tensor_type.name for tensor in reader.tensors} == {
        item.name: item.type for item in manifest.plan.tensors
    }
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_0
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == 512
    assert abs(bundle.artifact_path.stat().st_size / manifest.plan.artifact_bytes - 1) < 0.1


def test_proof_is_in_the_manifest(model: Path, place: Path) -> None:
    bundle = export(options(model, verify=True), place / "bundle")
    quality = bundle.manifest.quality
    assert quality is not None
    assert quality.token_identity.identical
    assert 0 <= quality.kl_mean < 0.05
    assert quality.tokens >= 2000
    assert quality.chat is not None
    assert quality.chat.answer_tokens > 0


def measured(monkeypatch: pytest.MonkeyPatch, kl_mean: float) -> list[Any]:
    """Let the quality room answer at once; what it was asked is in the list."""
    asked: list[Any] = []

    def measure(
        artifact: Path, checkpoint: Any, identity: TokenIdentity, evaluation: Path | None, _: Any, placement: Placement
    ) -> Quality:
        assert placement == ON_CPU
        asked.append((artifact.name, evaluation))
        return Quality(
            reference="transformers",
            text="t",
            text_sha256="0" * 64,
            tokens=2000,
            kl_mean=kl_mean,
            kl_p99=1.0,
            kl_max=1.0,
            top1_agreement=1.0,
            ppl=2.0,
            ppl_reference=2.0,
            token_identity=identity,
        )

    monkeypatch.setattr(pipeline.quality, "measure", measure)
    return asked


def test_quality_limit_missed_keeps_the_earlier_bundle(
    model: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = measured(monkeypatch, kl_mean=0.5)
    text = place.parent / "text.txt"
    text.write_text("x")
    export(options(model, verify=True, evaluation=text, max_kl=0.5), place / "bundle")
    assert asked == [("model.gguf", text)]
    before = (place / "bundle" / "manifest.json").read_bytes()
    with pytest.raises(ProofError, match=r"mean KL is 0\.5000 .* --max-kl is 0\.4") as caught:
        export(options(model, quant="Q2_K", verify=True, max_kl=0.4), place / "bundle", force=True)
    assert caught.value.exit_code == 3
    assert (place / "bundle" / "manifest.json").read_bytes() == before
    assert [path.name for path in place.iterdir()] == ["bundle"]


def test_other_tokens_are_no_bundle(model: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    differs = TokenIdentity(identical=False, texts=1, tokens=1, first_difference="'12' is [1, 2], not [12]")
    monkeypatch.setattr(pipeline.tokenizer, "prove_identity", lambda *arguments: differs)
    with pytest.raises(ProofError, match="'12' is"):
        export(options(model), place / "bundle")
    assert not list(place.iterdir())


def truncated(model: Path, directory: Path) -> Path:
    shutil.copytree(model, directory)
    with (directory / "model.safetensors").open("r+b") as stream:
        stream.truncate(1000)
    return directory


def unknown(model: Path, directory: Path) -> Path:
    shutil.copytree(model, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "mamba3"}))
    return directory


@pytest.mark.parametrize(
    ("case", "kind", "message"),
    [
        ("missing", CheckpointError, "does not exist"),
        ("empty", CheckpointError, "not a checkpoint"),
        ("truncated", CheckpointError, "is truncated"),
        ("unknown", CheckpointError, "'mamba3', which is not supported"),
        ("quant", UsageError, "'Q99' is no quantisation"),
        ("importance", UsageError, "useless without an importance matrix"),
        ("type", UsageError, "fits no tensor"),
        ("context", UsageError, "more than the 1024 tokens"),
        ("max-bytes", DoesNotFitError, "--max-bytes is 1 kB"),
        ("max-ram", DoesNotFitError, "--max-ram is 1 kB"),
        ("decode", DoesNotFitError, "--min-decode-tps is 1e"),
    ],
)
def test_bad_input_is_one_error_and_leaves_nothing(
    model: Path, tmp_path: Path, place: Path, case: str, kind: type[EdgelmError], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    sources = {"missing": tmp_path / "missing", "empty": tmp_path / "empty"}
    if case in ("truncated", "unknown"):
        sources[case] = {"truncated": truncated, "unknown": unknown}[case](model, tmp_path / case)
    changes: dict[str, dict[str, Any]] = {
        "quant": {"quant": "Q99"},
        "importance": {"quant": "IQ1_S", "type_overrides": (("ffn_down", "IQ2_XXS"),)},
        "type": {"type_overrides": (("no_such_tensor", "Q6_K"),)},
        "context": {"context": 4096},
        "max-bytes": {"max_artifact_bytes": 1000},
        "max-ram": {"max_ram_bytes": 1000},
        "decode": {"min_decode_tps": 1e9},
    }
    source = sources.get(case, model)
    if case == "importance":
        source = make_tiny_llama(tmp_path / "wide", hidden=256, ffn=256, layers=1)
    with pytest.raises(kind, match=message) as caught:
        export(options(source, **changes.get(case, {})), place / "bundle")
    assert caught.value.hint
    assert not list(place.iterdir())


def test_existing_output_needs_force(model: Path, place: Path) -> None:
    first = export(options(model), place / "bundle")
    with pytest.raises(BundleError, match="exists"):
        export(options(model, quant="Q4_0"), place / "bundle")
    assert open_bundle(place / "bundle").manifest == first.manifest
    second = export(options(model, quant="Q4_0"), place / "bundle", force=True)
    assert open_bundle(place / "bundle").manifest == second.manifest
    (place / "other").mkdir()
    (place / "other" / "precious.txt").write_text("mine")
    with pytest.raises(BundleError, match="not a bundle"):
        export(options(model), place / "other", force=True)


def child(script: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def test_full_disk_leaves_nothing(model: Path, place: Path) -> None:
    limited = child(
        """
        import resource, sys
        from edgelm.cli.app import run_cli
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))
        sys.exit(run_cli(sys.argv[1:]))
        """,
        *("export", str(model), "--target", TARGET, "--quant", "F32", "--no-verify", "-o", str(place / "bundle")),
    )
    with limited:
        _, errors = limited.communicate(timeout=120)
    assert limited.returncode == 1
    assert "error: no room left while writing model.gguf" in errors
    assert "Traceback" not in errors
    assert not list(place.iterdir())


def test_ctrl_c_in_the_middle_leaves_nothing(model: Path, place: Path) -> None:
    """The quantiser is slowed down, not replaced, so that the signal comes while workers write."""
    slowed = child(
        """
        import signal, sys, time
        from edgelm.cli.app import run_cli
        from exporter import ggml
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent may have had it ignored
        quantize = ggml.quantize
        def slowly(*arguments):
            print("quantising", flush=True)
            time.sleep(0.2)
            return quantize(*arguments)
        ggml.quantize = slowly
        sys.exit(run_cli(sys.argv[1:]))
        """,
        *("export", str(model), "--target", TARGET, "--quant", "Q8_0", "--no-verify", "-o", str(place / "bundle")),
    )
    with slowed:
        assert slowed.stdout is not None
        assert slowed.stdout.readline().startswith("quantising")
        assert list(place.iterdir())  # the staging directory
        sent = time.monotonic()
        os.kill(slowed.pid, signal.SIGINT)
        _, errors = slowed.communicate(timeout=60)
    assert slowed.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert not list(place.iterdir())
    assert time.monotonic() - sent < 30


def test_command_line(model: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", str(model), "--target", TARGET, "--quant", "q4_k_m", "--json"]
    assert run_cli([*arguments, "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["quant"] == "Q4_K_M"
    assert len(planned["plan"]["tensors"]) == 20
    assert not list(place.iterdir())
    assert run_cli([*arguments, "--no-verify", "-o", str(place / "bundle")]) == 0
    result = json.loads(capsys.readouterr().out)
    wanted = "bundle format quant bits_per_weight artifact_bytes tensor_types predicted quality elapsed_s"
    assert {*wanted.split(), "peak_rss_bytes"} <= set(result)
    assert {"ram_bytes", "prefill_tps", "decode_tps"} <= set(result["predicted"])
    assert result["artifact_bytes"] == (place / "bundle" / "model.gguf").stat().st_size
    assert result["tensor_types"] == planned["tensor_types"]
    assert run_cli(["export", str(model), "--no-verify", "--max-kl", "1", "-o", str(place / "b")]) == 2
    assert run_cli(["export", str(model)]) == 2
    assert run_cli(["export", str(model), "--format", "tflite", "-o", str(place / "b")]) == 2
    assert run_cli(["export", str(model), "--max-bytes", "1kB", "-o", str(place / "b")]) == 4


def test_human_output(
    model: Path, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch, kl_mean=0.1234)
    export_arguments = ["export", str(model), "--target", TARGET, "--quant", "Q4_K_M", "-o", str(place / "bundle")]
    assert run_cli(export_arguments) == 0
    output = capsys.readouterr().out
    for expected in ("Q4_K_M", "bits per weight", "Q5_0", "expected decode", "0.1234 mean", "perplexity"):
        assert expected in output


def test_plan_command_reads_headers_only(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights replaced by a hole of the same size: nothing that plans would notice."""
    shutil.copytree(model, tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    with path.open("wb") as stream:
        stream.write(content[:header])
        stream.truncate(len(content))
    assert run_cli(["plan", str(tmp_path / "m"), "--target", TARGET, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["target"] == TARGET
    assert document["chosen"]["quant"] in {row["quant"] for row in document["candidates"]}
    keys = "format quant bits_per_weight artifact_bytes predicted fits reason"
    assert all(set(keys.split()) <= set(row) for row in document["candidates"])
    assert run_cli(["plan", str(tmp_path / "m"), "--target", TARGET]) == 0
    assert "auto: " in capsys.readouterr().out
    assert run_cli(["plan", str(tmp_path / "m"), "--target", TARGET, "--max-ram", "1MB"]) == 4
