"""``edgelm verify`` on real bundles of a tiny model: good ones pass, every kind of damage is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_models import make_tiny_llama

from edgelm.bundle import file_record, read_manifest, write_manifest
from edgelm.cli.app import run_cli
from exporter.options import ExportOptions
from exporter.pipeline import export
from runtime import offload
from runtime.engines.llamacpp import load_library
from targets.vram import RESERVE_BYTES, Device

pytestmark = pytest.mark.tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("source") / "model", layers=1)


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "bundle"
    export(ExportOptions(source=str(source), quant="Q8_0", verify=False), path)
    return path


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "bundle"))


def renew_hashes(bundle: Path) -> None:
    """What someone does who tampers with care."""
    manifest = read_manifest(bundle)
    files = tuple(file_record(bundle / record.name) for record in manifest.files)
    write_manifest(bundle, manifest.model_copy(update={"files": files}))


def test_good_bundle(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["verify", str(bundle), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["token_identity"]["identical"] is True
    assert document["artifact_bytes"] == (bundle / "model.gguf").stat().st_size
    assert document["quality"] is None
    assert run_cli(["verify", str(bundle)]) == 0
    assert "identical on" in capsys.readouterr().out


def test_changed_byte(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (bundle / "model.gguf").open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x55")
    assert run_cli(["verify", str(bundle)]) == 1
    assert "does not match its SHA-256" in capsys.readouterr().err


def test_header_that_is_broken_under_right_hashes(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (bundle / "model.gguf").open("r+b") as stream:
        stream.seek(8)
        stream.write(b"\xff" * 8)
    renew_hashes(bundle)
    assert run_cli(["verify", str(bundle)]) == 1
    assert "is not a valid GGUF file" in capsys.readouterr().err


def test_other_artifact_under_right_hashes(bundle: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = export(ExportOptions(source=str(source), quant="F16", verify=False), bundle.parent / "other")
    shutil.copy(other.artifact_path, bundle / "model.gguf")
    renew_hashes(bundle)
    assert run_cli(["verify", str(bundle)]) == 1
    assert "is not what its manifest plans" in capsys.readouterr().err


def test_other_tokenizer_under_right_hashes(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = bundle / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"individual_digits": true', '"individual_digits": false'))
    document = json.loads(path.read_text(encoding="utf-8"))
    document["model"]["merges"].insert(0, ["1", "2"])
    document["model"]["vocab"] = {
        ("12" if index == 400 else token): index for token, index in document["model"]["vocab"].items()
    }
    document["model"]["merges"] = document["model"]["merges"][:40]
    path.write_text(json.dumps(document), encoding="utf-8")
    renew_hashes(bundle)
    assert run_cli(["verify", str(bundle)]) == 3
    assert "do not give the same token ids" in capsys.readouterr().err


@pytest.mark.reference
def test_reference_proves_all_again(
    bundle: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(["verify", str(bundle), "--reference", str(source), "--json"]) == 0
    quality = json.loads(capsys.readouterr().out)["quality"]
    assert quality["tokens"] >= 2000
    assert 0 < quality["kl_mean"] < 0.05


def test_reference_of_another_tokenizer_fails(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_tiny_llama(tmp_path / "other", layers=1, vocab=600)
    assert run_cli(["verify", str(bundle), "--reference", str(other)]) == 3
    assert "do not give the same token ids" in capsys.readouterr().err


@pytest.mark.reference
def test_a_bundle_talks_as_its_source(
    bundle: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    assert run_cli(["verify", str(bundle), "--eval", str(bundle / "tokenizer.json")]) == 2
    assert "--eval needs --reference" in capsys.readouterr().err
    text = tmp_path / "mine.txt"
    text.write_text("".join(f"Sentence number {number} of a text of my own.\n" for number in range(2000)))
    assert run_cli(["verify", str(bundle), "--reference", str(source), "--eval", str(text), "--json"]) == 0
    quality = json.loads(capsys.readouterr().out)["quality"]
    assert quality["text"] == "mine.txt"
    assert quality["kl_p90"] is not None
    chat = quality["chat"]
    assert chat["compared_with"].startswith("transformers")
    assert chat["conversations"] >= 4
    assert 0 < chat["answer_tokens"] <= 160
    assert chat["stopped"] in (True, False)
    template = bundle / "chat_template.jinja"
    template.write_text(template.read_text() + "{{ ' ' }}")
    renew_hashes(bundle)
    assert run_cli(["verify", str(bundle), "--reference", str(source)]) == 3
    assert "renders" in capsys.readouterr().err


# -- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--gpu-layers", "auto"], 2, "--gpu-layers needs --reference"),
        (["--gpu", "CUDA0"], 2, "--gpu needs --gpu-layers"),
        (["--gpu-layers", "many", "--reference", "nowhere"], 2, "neither auto nor a number of layers"),
        (["--gpu-layers", "1", "--reference", "nowhere"], 2, "1 layers were to go to a GPU: this build"),
        (["--gpu-layers", "auto", "--gpu", "CUDA9", "--reference", "nowhere"], 2, "sees no GPU 'CUDA9'"),
    ],
)
def test_a_gpu_that_cannot_be_is_refused_before_anything_is_read(
    bundle: Path,
    arguments: list[str],
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(offload, "find_devices", lambda library: ())
    monkeypatch.setattr(offload, "can_offload", lambda library: False)
    assert run_cli(["verify", str(bundle), *arguments]) == code
    assert said in capsys.readouterr().err


def test_more_than_a_gpu_holds_is_refused_with_what_fits(
    bundle: Path, source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Device("CUDA0", "a card", "CUDA", "gpu", RESERVE_BYTES + 1000, 10**10)
    monkeypatch.setattr(offload, "find_devices", lambda library: (small,))
    assert run_cli(["verify", str(bundle), "--reference", str(source), "--gpu-layers", "2"]) == 4
    assert "hint: use --gpu-layers 0" in capsys.readouterr().err


def test_layers_are_for_gguf(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = export(ExportOptions(source=str(source), format="onnx", quant="fp32", verify=False), tmp_path / "onnx")
    arguments = ["verify", str(made.path), "--reference", str(source), "--gpu-layers", "auto"]
    assert run_cli(arguments) == 2
    assert "is an ONNX model: --gpu-layers and --gpu are for GGUF" in capsys.readouterr().err


@pytest.mark.reference
def test_a_proof_without_a_gpu_says_that_the_cpu_computed(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "find_devices", lambda library: ())
    monkeypatch.setattr(offload, "can_offload", lambda library: False)
    made = str(export(ExportOptions(source=str(source), quant="Q8_0"), tmp_path / "proven").path)
    assert run_cli(["verify", made, "--reference", str(source), "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert (plain["quality"]["computed_by"], plain["within_recorded_interval"]) == (None, True)
    arguments = ["verify", made, "--reference", str(source), "--gpu-layers", "auto"]
    assert run_cli([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["quality"]["computed_by"] == "the CPU computes all layers: this build of llama.cpp is for CPUs only"
    assert found["quality"]["kl_mean"] == plain["quality"]["kl_mean"]
    assert run_cli(arguments) == 0
    assert "the mean KL of now is inside the recorded 95 % interval" in " ".join(capsys.readouterr().out.split())


@pytest.mark.gpu
@pytest.mark.reference
def test_a_proof_on_the_gpu_is_the_cpus_but_for_rounding(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = next((item for item in offload.find_devices(load_library()) if item.is_gpu), None)
    if device is None:
        pytest.skip("no GPU that this build of llama.cpp can use (docs/gpu.md has the builds)")
    made = export(ExportOptions(source=str(source), quant="Q8_0"), tmp_path / "proven")
    arguments = ["verify", str(made.path), "--reference", str(source), "--gpu-layers", "99", "--gpu", device.name]
    assert run_cli([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["quality"]["computed_by"] == f"2 of 2 layers on {device.name} ({device.description})"
    assert found["quality"]["kl_mean"] == pytest.approx(found["recorded_quality"]["kl_mean"], abs=1e-3)
    assert found["within_recorded_interval"] in (True, False)
