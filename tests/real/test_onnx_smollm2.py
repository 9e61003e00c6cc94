"""SmolLM2-135M as an ONNX bundle: it stays close to its source and answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgelm.bundle import Bundle
from edgelm.progress import SILENT
from exporter import quality
from exporter.checkpoint import open_checkpoint, open_source
from exporter.options import ExportOptions
from exporter.pipeline import export
from exporter.token_identity import compare_files
from exporter.tokenizer import read_tokenizer
from runtime.engine import EngineOptions
from runtime.generate import GenerationRequest, Session, generate
from runtime.model import open_model

pytestmark = [pytest.mark.real, pytest.mark.reference]


@pytest.fixture(scope="module")
def bundle(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    options = ExportOptions(source=str(smollm2_gguf), format="onnx", quant="int8", verify=False)
    return export(options, tmp_path_factory.mktemp("onnx") / "int8")


def test_it_loses_what_eight_bits_lose(bundle: Bundle, smollm2_gguf: Path) -> None:
    checkpoint = open_checkpoint(open_source(str(smollm2_gguf)))
    same = compare_files(read_tokenizer(checkpoint).tokenizer_json, bundle.path / "tokenizer.json")
    measured = quality.measure(bundle.artifact_path, checkpoint, same, None, SILENT, tokens=300)
    assert same.identical
    assert measured.kl_mean < 0.01
    assert measured.top1_agreement > 0.93


def test_it_continues_as_its_source_would(bundle: Bundle) -> None:
    model = open_model(bundle.path, EngineOptions(context=256))
    request = GenerationRequest(prompt=model.text_prompt("The capital of France is"), max_tokens=4)
    text = "".join(event.text for event in generate(Session(model.engine), model.tokenizer, request))
    model.close()
    assert "Paris" in text
