"""The whole way of an encoder: exported, proven, verified, run, served, exported again from its own file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_encoder import live_embedding_server
from tiny_encoders import TEXTS, VOCABULARY, make_tiny_bert
from tiny_models import make_tiny_llama
from unigram_tokenizer import write_unigram

from edgelm.bundle import Bundle, open_bundle
from edgelm.cli.app import run_cli
from edgelm.errors import ProofError
from edgelm.progress import SILENT
from exporter.checkpoint import open_checkpoint, open_source
from exporter.embedding_quality import measure
from exporter.options import ExportOptions
from exporter.pipeline import export
from exporter.verification import verify
from runtime import offload
from runtime.embedding import open_encoder
from runtime.encoder import EncoderOptions
from runtime.engines.llamacpp import load_library
from runtime.engines.llamacpp_devices import find_devices
from targets.vram import RESERVE_BYTES, Device

pytestmark = [pytest.mark.tiny, pytest.mark.reference]
ONE = EncoderOptions(threads=1)


def exported(source: Path, destination: Path, quant: str = "Q8_0", **changes: Any) -> Bundle:
    return export(ExportOptions(str(source), target="raspberry-pi-5", quant=quant, **changes), destination)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bert(tmp_path_factory.mktemp("bert") / "model", layers=2)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported(checkpoint, tmp_path_factory.mktemp("export") / "bundle")


def edgelm(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run_cli(list(arguments))
    captured = capfd.readouterr()
    return code, captured.out, captured.err


def test_manifest_says_what_it_is_and_what_it_lost(bundle: Bundle) -> None:
    manifest = open_bundle(bundle.path).manifest
    assert manifest.encoder is not None
    assert manifest.encoder.model_dump() == {"pooling": "mean", "normalized": True, "dimensions": 64}
    assert manifest.quality is None
    quality = manifest.embedding_quality
    assert quality is not None
    assert quality.reference.startswith("transformers")
    assert quality.token_identity.identical
    assert 0.99 < quality.cosine_min <= quality.cosine_p1 <= quality.cosine_mean < 1
    assert quality.error_max < 0.05
    assert quality.nearest_agreement > 0.8
    assert manifest.plan.context.value == 64


def test_f32_is_exact_against_the_engine_itself(checkpoint: Path, bundle: Bundle, tmp_path: Path) -> None:
    made = exported(checkpoint, tmp_path / "f32", "F32", verify=False)
    source = open_checkpoint(open_source(str(checkpoint)))
    recorded = bundle.manifest.embedding_quality
    assert recorded is not None
    quality = measure(made.artifact_path, source, recorded.token_identity, None, SILENT, reference="engine")
    assert quality.reference == "llama.cpp F32"
    assert quality.cosine_min > 0.999999
    assert quality.error_max < 1e-6
    assert quality.nearest_agreement == 1


def test_verify_checks_and_proves_again(bundle: Bundle, checkpoint: Path, tmp_path: Path) -> None:
    found = verify(bundle.path, None)
    assert found.token_identity.identical
    assert found.quality is None
    again = verify(bundle.path, str(checkpoint))
    assert again.quality == bundle.manifest.embedding_quality
    other = make_tiny_bert(tmp_path / "other", layers=2, seed=7)
    with pytest.raises(ProofError, match="mean cosine is"):
        verify(bundle.path, str(other))


def test_a_proof_with_layers_says_what_computed(
    bundle: Bundle, checkpoint: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "find_devices", lambda library: ())
    monkeypatch.setattr(offload, "can_offload", lambda library: False)
    arguments = ["verify", str(bundle.path), "--reference", str(checkpoint), "--gpu-layers"]
    code, out, err = edgelm(capfd, *arguments, "auto", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["quality"].pop("computed_by") == (
        "the CPU computes all layers: this build of llama.cpp is for CPUs only"
    )
    assert found["recorded_quality"].pop("computed_by") is None
    assert found["quality"] == found["recorded_quality"]
    code, out, _ = edgelm(capfd, *arguments, "auto")
    assert code == 0
    assert "computed by" in out
    code, _, err = edgelm(capfd, *arguments, "2")
    assert (code, "2 layers were to go to a GPU" in err) == (2, True)
    small = Device("CUDA0", "a card", "CUDA", "gpu", RESERVE_BYTES + 1000, 10**10)
    monkeypatch.setattr(offload, "find_devices", lambda library: (small,))
    assert edgelm(capfd, *arguments, "2")[0] == 4


@pytest.mark.gpu
def test_a_proof_on_the_gpu_is_the_cpus_but_for_rounding(
    bundle: Bundle, checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    device = next((found for found in find_devices(load_library()) if found.is_gpu), None)
    if device is None:
        pytest.skip("no GPU that this build of llama.cpp can use (docs/gpu.md has the builds)")
    code, out, err = edgelm(
        capfd, "verify", str(bundle.path), "--reference", str(checkpoint), "--gpu-layers", "auto", "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert found["quality"]["computed_by"] == f"3 of 3 layers on {device.name} ({device.description})"
    assert found["quality"]["cosine_mean"] == pytest.approx(found["recorded_quality"]["cosine_mean"], abs=1e-4)


def test_a_file_of_its_own_is_a_source(bundle: Bundle, tmp_path: Path) -> None:
    """COPY changes no weights; the reference is then the engine, since a GGUF of a BERT is no transformers model."""
    source = shutil.copy(bundle.artifact_path, tmp_path / "source.gguf")
    again = exported(Path(source), tmp_path / "again", "COPY")
    quality = again.manifest.embedding_quality
    assert quality is not None
    assert quality.reference == "llama.cpp F32"
    assert quality.cosine_min > 0.99
    assert again.manifest.encoder == bundle.manifest.encoder
    first, second = open_encoder(bundle.path, ONE), open_encoder(again.path, ONE)
    try:
        # The bare file has all its positions, the bundle what it was tuned for; otherwise they are the same.
        assert (first.encoder.info.context, second.encoder.info.context) == (64, 96)
        assert np.array_equal(first.embed(TEXTS), second.embed(TEXTS))
    finally:
        first.close()
        second.close()


def test_run_prints_the_vector(bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    model = open_encoder(bundle.path, ONE)
    try:
        expected = model.embed(["A cat sat."])[0]
    finally:
        model.close()
    code, out, err = edgelm(capfd, "run", str(bundle.path), "A cat sat.", "--threads", "1")
    assert code == 0, err
    assert np.allclose([float(number) for number in out.split()], expected, atol=1e-4)
    assert "64 numbers, length one" in err
    code, out, _ = edgelm(capfd, "run", str(bundle.path), "A cat sat.", "--threads", "1", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["dimensions"] == len(document["embedding"]) == 64
    assert document["prompt_tokens"] > 3


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "is an encoder: it holds no chat"),
        (("text", "--temperature", "0.5"), "--temperature is for models that generate"),
        (("text", "--max-tokens", "3"), "--max-tokens is for models that generate"),
        (("text", "--system", "x"), "--system is for models that generate"),
    ],
)
def test_run_refuses_what_is_for_decoders(
    bundle: Bundle, arguments: tuple[str, ...], told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = edgelm(capfd, "run", str(bundle.path), *arguments)
    assert (code, out) == (2, "")
    assert told in err


def test_texts_that_are_too_long_are_refused_in_words(bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = edgelm(capfd, "run", str(bundle.path), "value " * 200)
    assert code == 1
    assert "the encoder takes 64" in err


def test_commands_for_decoders_say_one_sentence(bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = edgelm(capfd, "bench", str(bundle.path))
    assert (code, out) == (2, "")
    assert "is an encoder" in err
    code, _, err = edgelm(capfd, "serve", str(bundle.path), "--port", "0", "--parallel", "2")
    assert code == 2
    assert "--parallel is for models that generate" in err


def test_export_and_verify_show_cosines(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "bundle")
    arguments = ["export", str(checkpoint), "-o", output, "--quant", "Q8_0", "--target", "raspberry-pi-5"]
    code, out, err = edgelm(capfd, *arguments)
    assert code == 0, err
    assert "same nearest text" in out
    code, out, err = edgelm(capfd, "verify", output, "--json")
    assert code == 0, err
    assert json.loads(out)["recorded_quality"]["cosine_mean"] > 0.99


def test_the_served_vector_is_the_bundle_s(bundle: Bundle) -> None:
    model = open_encoder(bundle.path, ONE)
    expected = model.embed(TEXTS)
    with live_embedding_server(model) as server, server.client() as client:
        answer = client.embeddings.create(model=model.name, input=list(TEXTS))
        vectors = np.array([item.embedding for item in answer.data], np.float32)
        assert np.allclose(vectors, expected, atol=2e-3)
        assert answer.usage.prompt_tokens == sum(len(model.text_ids(text)) for text in TEXTS)


def test_a_multilingual_model(tmp_path: Path) -> None:
    """XLM-RoBERTa's shape: a unigram tokenizer with padded rows, positions behind the padding, the first token."""
    make_tiny_bert(tmp_path / "m", layers=1, pooling="cls_token")
    write_unigram(tmp_path / "m", "xlm-roberta")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "xlm-roberta", "pad_token_id": 1}))
    made = exported(tmp_path / "m", tmp_path / "bundle", "F16")
    quality = made.manifest.embedding_quality
    assert quality is not None
    assert quality.cosine_min > 0.9999
    model = open_encoder(made.path, ONE)
    try:
        assert (model.prefix, model.suffix) == ((0,), (2,))
        assert model.encoder.info.vocabulary == VOCABULARY
        assert model.encoder.info.context_trained == 94
        assert model.embed(TEXTS).shape == (4, 64)
    finally:
        model.close()


def test_a_decoder_with_a_unigram_tokenizer(tmp_path: Path) -> None:
    """Tokenizers and architectures are told apart: any family may bring this one."""
    make_tiny_llama(tmp_path / "m", layers=1, vocab=VOCABULARY)
    write_unigram(tmp_path / "m", "t5")
    made = exported(tmp_path / "m", tmp_path / "bundle", "Q8_0", verify=False)
    assert made.manifest.encoder is None
    assert verify(made.path, None).token_identity.identical
