"""Quality of real artefacts of tiny random models, measured against transformers and against the engine itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from artifacts import write_artifact
from tiny_models import make_tiny_llama

from edgelm.bundle import TokenIdentity
from edgelm.errors import CheckpointError
from edgelm.progress import SILENT
from exporter.checkpoint import Checkpoint, open_checkpoint, open_source
from exporter.quality import measure

pytestmark = pytest.mark.tiny

IDENTITY = TokenIdentity(identical=True, texts=1, tokens=1)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = make_tiny_llama(tmp_path_factory.mktemp("tied"), dtype="bfloat16")
    return open_checkpoint(open_source(str(directory)))


@pytest.fixture(scope="module")
def f32(tied: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(tied, tmp_path_factory.mktemp("f32") / "model.gguf", "F32")


def test_unquantised_artefact_loses_nothing_against_the_engine(tied: Checkpoint, f32: Path) -> None:
    quality = measure(f32, tied, IDENTITY, None, SILENT, reference="engine", tokens=400)
    assert quality.reference == "llama.cpp F32"
    assert quality.text == "pydoc_data.topics, second half"
    assert quality.tokens >= 400
    assert quality.kl_mean < 1e-6  # the artefact keeps its cache in f16, the reference in f32
    assert quality.top1_agreement > 0.99
    assert quality.ppl == pytest.approx(quality.ppl_reference, rel=1e-3)


def test_quantised_artefact_loses_what_it_loses(tied: Checkpoint, tmp_path: Path) -> None:
    measured = [
        measure(
            write_artifact(tied, tmp_path / f"{quant}.gguf", quant),
            tied,
            IDENTITY,
            None,
            SILENT,
            reference="engine",
            tokens=400,
        )
        for quant in ("Q8_0", "Q4_0")
    ]
    assert 1e-6 < measured[0].kl_mean < measured[1].kl_mean
    assert measured[1].kl_mean > 1e-3
    assert all(item.kl_mean < item.kl_p99 <= item.kl_max for item in measured)
    assert measured[1].top1_agreement < measured[0].top1_agreement < 1


@pytest.mark.reference
@pytest.mark.parametrize("untied", [False, True])
def test_unquantised_artefact_equals_transformers(tmp_path: Path, untied: bool) -> None:
    directory = make_tiny_llama(tmp_path / "model", tied=not untied, heads=4, kv_heads=1, layers=3)
    checkpoint = open_checkpoint(open_source(str(directory)))
    artifact = write_artifact(checkpoint, tmp_path / "model.gguf", "F32")
    quality = measure(artifact, checkpoint, IDENTITY, None, SILENT, reference="transformers", tokens=500)
    assert quality.reference.startswith("transformers ")
    assert quality.tokens >= 500
    assert quality.kl_mean < 1e-5
    # The way back: the same weights read from the GGUF into transformers give the same figures.
    from_gguf = open_checkpoint(open_source(str(artifact)))
    again = measure(artifact, from_gguf, IDENTITY, None, SILENT, reference="transformers", tokens=500)
    assert again.ppl_reference == pytest.approx(quality.ppl_reference, rel=1e-6)


def test_reference_that_is_impossible_says_why(tied: Checkpoint, f32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="torch is not installed"):
        measure(f32, tied, IDENTITY, None, SILENT, reference="transformers", tokens=100)
    quality = measure(f32, tied, IDENTITY, None, SILENT, tokens=100)
    assert quality.reference == "llama.cpp F32"


def test_nothing_is_left_on_disk(tied: Checkpoint, f32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    measure(f32, tied, IDENTITY, None, SILENT, reference="engine", tokens=100)
    assert list(tmp_path.iterdir()) == []
