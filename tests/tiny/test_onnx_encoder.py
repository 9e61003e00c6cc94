"""An encoder in ONNX: exported through optimum, proven, the same vectors from engine, ``run`` and server."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from fake_encoder import live_embedding_server
from tiny_encoders import TEXTS, make_tiny_bert

from edgelm.bundle import Bundle, EmbeddingQuality, open_bundle
from edgelm.cli.app import run_cli
from edgelm.errors import BundleError, ContextOverflowError, EngineError, UsageError
from edgelm.progress import SILENT
from exporter.checkpoint import open_checkpoint, open_source
from exporter.options import ExportOptions
from exporter.pipeline import choices, export, prepare
from exporter.verification import verify
from runtime.embedding import LoadedEncoder, open_encoder
from runtime.encoder import EncoderOptions

pytestmark = [pytest.mark.tiny, pytest.mark.reference]
ONE = EncoderOptions(threads=1)


def options(source: Path, quant: str, form: str = "onnx") -> ExportOptions:
    assert form in ("onnx", "auto")
    return ExportOptions(str(source), target="raspberry-pi-5", format="onnx" if form == "onnx" else "auto", quant=quant)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bert(tmp_path_factory.mktemp("bert") / "model", layers=2)


@pytest.fixture(scope="module")
def bundles(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    directory = tmp_path_factory.mktemp("export")
    return {name: export(options(checkpoint, name), directory / name) for name in ("fp32", "int8", "int8-32")}


@pytest.fixture
def model(bundles: dict[str, Bundle]) -> LoadedEncoder:
    return open_encoder(bundles["fp32"].path, ONE)


def proof(bundle: Bundle) -> EmbeddingQuality:
    quality = open_bundle(bundle.path).manifest.embedding_quality
    assert quality is not None
    assert quality.reference.startswith("transformers")
    assert quality.token_identity.identical
    return quality


@pytest.mark.parametrize(("quant", "least", "most"), [("fp32", 0.99999, 1.0), ("int8", 0.98, 1), ("int8-32", 0.999, 1)])
def test_the_proof_is_what_the_type_allows(bundles: dict[str, Bundle], quant: str, least: float, most: float) -> None:
    quality = proof(bundles[quant])
    assert least < quality.cosine_min <= quality.cosine_mean <= most
    if quant == "fp32":
        assert quality.error_max < 1e-5
        assert quality.nearest_agreement == 1


def test_the_files_are_what_they_say(bundles: dict[str, Bundle]) -> None:
    operators = {}
    for name, bundle in bundles.items():
        onnx.checker.check_model(str(bundle.artifact_path))
        graph = onnx.load(str(bundle.artifact_path)).graph
        operators[name] = {node.op_type for node in graph.node}
        assert [item.name for item in graph.output] == ["last_hidden_state"]
        assert verify(bundle.path, None).token_identity.identical
        planned, stored = bundle.manifest.plan.artifact_bytes, bundle.manifest.artifact_bytes
        assert 0.5 * stored < planned < 2 * stored + 2**18
    assert not operators["fp32"] & {"MatMulNBits", "MatMulInteger", "GatherBlockQuantized"}
    assert {"MatMulInteger", "DynamicQuantizeLinear", "GatherBlockQuantized"} <= operators["int8"]
    assert {"MatMulNBits", "GatherBlockQuantized"} <= operators["int8-32"]
    sizes = {name: bundle.manifest.artifact_bytes for name, bundle in bundles.items()}
    assert sizes["int8"] < 0.5 * sizes["fp32"]
    assert sizes["int8-32"] < 0.5 * sizes["fp32"]


def test_vectors_are_those_of_transformers(model: LoadedEncoder, checkpoint: Path) -> None:
    import torch
    import transformers

    original = transformers.AutoModel.from_pretrained(checkpoint).eval()
    try:
        for text, vector in zip(TEXTS, model.embed(TEXTS), strict=True):
            with torch.inference_mode():
                states = original(torch.tensor([model.text_ids(text)])).last_hidden_state[0].numpy()
            expected = states.mean(axis=0)
            assert float(vector @ expected) / np.linalg.norm(expected) > 0.99999
    finally:
        model.close()


def test_padding_changes_nothing(model: LoadedEncoder) -> None:
    ids = [model.text_ids(text) for text in (TEXTS[3], TEXTS[2], TEXTS[0])]
    try:
        together = model.encoder.encode(ids)
        for row, one in enumerate(ids):
            assert np.allclose(model.encoder.encode([one])[0], together[row], atol=1e-5)
        assert model.encoder.encode([]).shape == (0, 64)
        with pytest.raises(ContextOverflowError):
            model.encoder.encode([[5] * 65])
        with pytest.raises(EngineError, match="outside the vocabulary"):
            model.encoder.encode([[600]])
        with pytest.raises(EngineError, match="has no tokens"):
            model.encoder.encode([[]])
    finally:
        model.close()
    with pytest.raises(EngineError, match="closed"):
        model.encoder.encode(ids)


def test_gguf_and_onnx_agree(checkpoint: Path, model: LoadedEncoder, tmp_path: Path) -> None:
    made = export(ExportOptions(str(checkpoint), target="raspberry-pi-5", quant="F32", verify=False), tmp_path / "gguf")
    other = open_encoder(made.path, ONE)
    try:
        assert np.einsum("ij,ij->i", other.embed(TEXTS), model.embed(TEXTS)).min() > 0.99999
    finally:
        other.close()
        model.close()


@pytest.mark.parametrize("kind", ["cls_token", "lasttoken"])
def test_other_ways_to_pool(tmp_path: Path, kind: str) -> None:
    source = make_tiny_bert(tmp_path / "m", layers=1, pooling=kind)
    assert proof(export(options(source, "fp32"), tmp_path / "b")).cosine_min > 0.99999


def test_the_served_vector_is_the_bundle_s(bundles: dict[str, Bundle]) -> None:
    model = open_encoder(bundles["int8-32"].path, ONE)
    expected = model.embed(TEXTS)
    with live_embedding_server(model) as server, server.client() as client:
        answer = client.embeddings.create(model=model.name, input=list(TEXTS))
        vectors = np.array([item.embedding for item in answer.data], np.float32)
        assert np.allclose(vectors, expected, atol=2e-3)


def test_run_prints_the_vector(bundles: dict[str, Bundle], capfd: pytest.CaptureFixture[str]) -> None:
    code = run_cli(["run", str(bundles["fp32"].path), TEXTS[0], "--threads", "1", "--json"])
    captured = capfd.readouterr()
    assert code == 0, captured.err
    document = json.loads(captured.out)
    assert document["dimensions"] == len(document["embedding"]) == 64


def test_plan_shows_both_formats(checkpoint: Path) -> None:
    _, found, chosen, _ = choices(options(checkpoint, "auto", "auto"), SILENT)
    shown = {(item.plan.format, item.plan.quant) for item in found}
    assert {("gguf", "Q8_0"), ("onnx", "int8-32"), ("onnx", "int8")} <= shown
    assert chosen is not None
    assert chosen.plan.format == "gguf"
    assert prepare(options(checkpoint, "auto")).plan.quant in ("int8-32", "int8")


def test_what_cannot_be_is_refused(checkpoint: Path, bundles: dict[str, Bundle], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no quantisation of encoders"):
        prepare(options(checkpoint, "Q8_0"))
    with pytest.raises(UsageError, match="--type is for decoders"):
        prepare(ExportOptions(str(checkpoint), format="onnx", quant="int8", type_overrides=(("ffn", "int8-32"),)))
    with pytest.raises(EngineError, match="has 96 positions"):
        open_encoder(bundles["fp32"].path, EncoderOptions(context=97))
    with pytest.raises(UsageError, match="mmap"):
        open_encoder(bundles["fp32"].path, EncoderOptions(mmap=False))
    assert open_checkpoint(open_source(str(checkpoint))).architecture == "bert"


def test_a_hostile_file_is_refused(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    """Not found by hashes: whoever makes a bundle writes those too."""
    from runtime.engines.onnx_encoder import load_encoder

    source = bundles["fp32"].artifact_path
    model = onnx.load(str(source), load_external_data=False)
    path = tmp_path / "model.onnx"
    os.link(source.with_name("model.onnx.data"), tmp_path / "model.onnx.data")
    path.write_bytes(source.read_bytes())
    with pytest.raises(BundleError, match="hard link"):
        load_encoder(path, ONE)
    large = next(item for item in model.graph.initializer if item.external_data)
    next(entry for entry in large.external_data if entry.key == "location").value = "../secret"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match="not a plain file name"):
        load_encoder(path, ONE)
    (tmp_path / "model.onnx.data").unlink()
    shutil.copy(source.with_name("model.onnx.data"), tmp_path)
    model = onnx.load(str(source), load_external_data=False)
    next(item for item in model.metadata_props if item.key == "edgelm.pooling").value = "max"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match="does not say how its vectors are pooled"):
        load_encoder(path, ONE)
