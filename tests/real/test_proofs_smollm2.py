"""The proofs on a real model: SmolLM2-135M unquantised in the engine against transformers in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
from artifacts import write_artifact

from edgelm.bundle import TokenIdentity
from edgelm.progress import SILENT
from exporter.checkpoint import open_checkpoint, open_source
from exporter.quality import measure
from exporter.tokenizer import load_tokenizer, prove_identity
from runtime.gguf_header import GGUFStrings, read_gguf_header, workload_from_gguf

pytestmark = pytest.mark.real


def test_header_agrees_with_the_reference_reader(smollm2_gguf: Path) -> None:
    import gguf

    header, reader = read_gguf_header(smollm2_gguf), gguf.GGUFReader(smollm2_gguf)
    assert [(item.name, item.type, item.offset, item.size_bytes) for item in header.tensors] == [
        (item.name, item.tensor_type.name, item.data_offset, item.n_bytes) for item in reader.tensors
    ]
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type", "llama.block_count"):
        value = header.metadata[key]
        assert (list(value) if isinstance(value, GGUFStrings) or hasattr(value, "dtype") else value) == (
            reader.fields[key].contents()
        )
    assert workload_from_gguf(header).parameters == 134_515_008


def test_tokens_are_identical_on_the_hard_corpus(smollm2_gguf: Path) -> None:
    source = load_tokenizer(open_checkpoint(open_source(str(smollm2_gguf))), SILENT)
    identity = prove_identity(source, smollm2_gguf)
    assert identity.identical, identity.first_difference
    assert identity.tokens > 5000


@pytest.mark.reference
def test_unquantised_engine_equals_transformers(smollm2_gguf: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(open_source(str(smollm2_gguf)))
    artifact = write_artifact(checkpoint, tmp_path / "f32.gguf", "F32")
    quality = measure(
        artifact,
        checkpoint,
        TokenIdentity(identical=True, texts=1, tokens=1),
        None,
        SILENT,
        reference="transformers",
        tokens=500,
    )
    assert quality.tokens >= 500
    assert quality.kl_mean < 1e-4
    assert quality.ppl == pytest.approx(quality.ppl_reference, rel=1e-3)
