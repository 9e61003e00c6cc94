"""Every family against transformers: tiny random models, exported, run in llama.cpp, logits compared."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from edgelm.bundle import open_bundle
from edgelm.errors import EngineError
from exporter.architectures import available, describe, family
from exporter.checkpoint import open_checkpoint, open_source
from exporter.options import ExportOptions
from exporter.pipeline import export
from runtime.engine import Chunk, EngineOptions
from runtime.engines.llamacpp import load_engine
from tests.parity import (
    ROWS,
    VOCABULARY,
    Row,
    distance,
    known_to_transformers,
    make_checkpoint,
    measure,
    transformers_logits,
    write_f32,
)

pytestmark = [pytest.mark.tiny, pytest.mark.reference]
DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"
GELU_TABLE = 0.01  # llama.cpp computes GELU from a table of 16-bit values


def row_named(name: str) -> Row:
    return next(row for row in ROWS if row.name == name)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.filterwarnings("ignore")
def test_logits_are_those_of_transformers(row: Row, tmp_path: Path) -> None:
    if not known_to_transformers(row):
        pytest.skip(f"transformers 4 does not know {row.model_type}: make test-transformers5")
    found = measure(row, tmp_path)
    assert found.engine.kl_mean < 1e-4
    assert found.engine.logit_error_max < 0.1
    structure = describe(open_checkpoint(open_source(str(tmp_path / "model")))).structure
    assert structure is not None
    exact = structure.activation == "silu"
    assert found.plain.kl_mean < (1e-9 if exact else 1e-5)
    assert found.plain.logit_error_max < (1e-3 if exact else 2 * GELU_TABLE)
    assert found.spread > 0.5  # flat logits would agree with anything


def test_every_decoder_has_a_row() -> None:
    assert {row.model_type for row in ROWS} == {name for name in available() if not family(name).encoder}


def test_document_has_every_row_and_no_other() -> None:
    rows = re.findall(r"^\| ([^|]+?) \| ([^|]+?) \| ", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert [row for row in rows if row[0] != "model"] == [(row.name, row.model_type) for row in ROWS]


@pytest.mark.parametrize(
    "name",
    [
        *(
            "qwen2",
            "gemma3, text of a model that sees",
            "phi3",
            "gpt2",
            "gpt_neox",
            "llama, layers of different widths",
        ),
        *("phi", "nemotron", "cohere2", "lfm2", "mistral3, text of a model that sees"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_whole_export_of_a_family(name: str, tmp_path: Path) -> None:
    make_checkpoint(row_named(name), tmp_path / "model")
    options = ExportOptions(str(tmp_path / "model"), target="raspberry-pi-5", quant="Q8_0", context=256)
    manifest = export(options, tmp_path / "bundle").manifest
    assert open_bundle(tmp_path / "bundle").manifest == manifest
    assert manifest.quality is not None
    assert manifest.quality.token_identity.identical
    uneven = "different widths" in name  # transformers cannot load these
    assert manifest.quality.reference.startswith("llama.cpp" if uneven else "transformers")
    assert ("deci" in " ".join(manifest.plan.notes)) == uneven
    assert manifest.quality.kl_mean < 0.05


@pytest.mark.filterwarnings("ignore")
def test_convolutions_go_on_where_they_stopped_and_forget_all_or_nothing(tmp_path: Path) -> None:
    model = make_checkpoint(row_named("lfm2"), tmp_path / "model")
    path = tmp_path / "model.gguf"
    described = write_f32(open_checkpoint(open_source(str(tmp_path / "model"))), path)
    assert described.dimensions.kv_heads_total == 2
    assert describe(open_checkpoint(open_source(str(path)))).dimensions == described.dimensions
    tokens = np.random.default_rng(5).integers(3, VOCABULARY, 40).tolist()
    theirs = transformers_logits(model, tokens)
    engine = load_engine(path, EngineOptions(context=64, sequences=2, kv_type="f32", threads_decode=2))
    try:
        assert not engine.info.truncates
        for sequence in (1, 0):  # in pieces, then one by one, and another sequence between
            rows = [engine.forward([Chunk(sequence, piece)])[0].copy() for piece in (tokens[:17], tokens[17:30])]
            rows += [engine.forward([Chunk(sequence, [token])])[0].copy() for token in tokens[30:]]
            assert distance(np.stack(rows), theirs[[16, *range(29, 40)]]).kl_mean < 1e-4
        with pytest.raises(EngineError, match="architecture lfm2 cannot be truncated to 20 tokens"):
            engine.truncate(20, 1)
        assert engine.length(1) == 0
        assert distance(engine.forward([Chunk(1, tokens)]).copy(), theirs[-1:]).kl_mean < 1e-4
    finally:
        engine.close()


@pytest.mark.filterwarnings("ignore")
def test_a_family_that_transformers_does_not_know_is_proven_by_the_engine(tmp_path: Path) -> None:
    make_checkpoint(row_named("llama"), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    plain = {key: value for key, value in json.loads(path.read_text()).items() if not key.startswith("rope_")}
    row = row_named("ministral3")
    changed = {"model_type": row.model_type, "rope_parameters": row.config["rope_parameters"]}
    path.write_text(json.dumps({**plain, **changed, "architectures": ["Ministral3ForCausalLM"]}))
    options = ExportOptions(str(tmp_path / "model"), target="raspberry-pi-5", quant="Q8_0", context=256)
    quality = export(options, tmp_path / "bundle").manifest.quality
    assert quality is not None
    assert quality.reference.startswith("transformers" if known_to_transformers(row) else "llama.cpp F32")
    assert quality.kl_mean < 0.05
