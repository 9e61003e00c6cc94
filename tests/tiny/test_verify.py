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
