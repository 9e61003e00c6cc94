"""Every family as ONNX against transformers, and what graphs cannot express."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgelm.errors import CheckpointError, UsageError
from edgelm.progress import SILENT
from exporter import onnx_graph
from exporter.architectures import available, describe, family
from exporter.checkpoint import open_checkpoint, open_source
from exporter.onnx_layout import structure_of
from exporter.options import ExportOptions
from exporter.pipeline import choices, export, prepare
from exporter.verification import verify
from runtime.engine import Chunk, EngineOptions
from runtime.engines.onnx import load_engine
from runtime.onnx_header import read_onnx_model, stored_bytes
from tests.onnx_parity import CALM, ONNX_ROWS, REFUSED, engine_logits, measure, write_model
from tests.parity import ROWS, VOCABULARY, Row, distance, known_to_transformers, make_checkpoint, transformers_logits

pytestmark = [pytest.mark.tiny, pytest.mark.reference]
NORMED_BEHIND = ("olmo2", "olmo3", "exaone4")  # attention and network: brings every rounding back to full size
DOCUMENT = Path(__file__).parents[2] / "docs" / "onnx-architectures.md"


def row_named(name: str) -> Row:
    return next(row for row in (*ONNX_ROWS, *ROWS) if row.name == name)


@pytest.mark.parametrize("row", ONNX_ROWS, ids=lambda row: row.name)
@pytest.mark.filterwarnings("ignore")
def test_logits_are_those_of_transformers(row: Row, tmp_path: Path) -> None:
    if not known_to_transformers(row):
        pytest.skip(f"transformers 4 does not know {row.model_type}: make test-transformers5")
    found = measure(row, tmp_path)
    assert found.prefill < 1e-8
    assert found.decode < 1e-8
    assert found.logit_error_max < 1e-3
    assert found.int8_initial < 2e-3
    assert found.int8_calm < (3e-3 if row.model_type in NORMED_BEHIND else 2e-3)
    assert found.spread > 0.5
    model = onnx.load(tmp_path / "calm" / "int8" / "model.onnx", load_external_data=False)
    assert {item.domain: item.version for item in model.opset_import} == {"": 23, "com.microsoft": 1}
    assert model.ir_version == 11


@pytest.mark.parametrize("name", ["olmo2", "olmo2, tied", "olmo3, yarn rotation", "exaone4"])
@pytest.mark.filterwarnings("ignore")
def test_blocks_of_16_are_enough_where_norms_stand_behind(name: str, tmp_path: Path) -> None:
    row = row_named(name)
    model = make_checkpoint(row, tmp_path / "model", gain=CALM)
    context, length = max(zip(row.contexts, row.lengths, strict=True))
    tokens = np.random.default_rng(1).integers(3, VOCABULARY, length).tolist()
    path = write_model(open_checkpoint(open_source(str(tmp_path / "model"))), tmp_path / "out", "int8-16", context)
    expected = transformers_logits(model, tokens)
    assert distance(engine_logits(path, tokens, context)[0], expected).kl_mean < 2e-3


def test_every_family_has_a_row() -> None:
    decoders = {name for name in available() if not family(name).encoder}
    assert {row.model_type for row in ONNX_ROWS} | {row_named(name).model_type for name in REFUSED} == decoders


def test_document_has_every_row_and_no_other() -> None:
    rows = re.findall(r"^\| ([^|]+?) \| ([^|]+?) \| ", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert [row for row in rows if row[0] != "model"] == [(row.name, row.model_type) for row in ONNX_ROWS]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_a_graph_cannot_express_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    make_checkpoint(row_named(name), tmp_path / "model")
    with pytest.raises(CheckpointError, match=REFUSED[name]):
        export(ExportOptions(str(tmp_path / "model"), format="onnx", quant="int8"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")
def test_gguf_files_of_other_architectures_are_refused(tmp_path: Path) -> None:
    make_checkpoint(row_named("qwen2"), tmp_path / "model")
    checkpoint = open_checkpoint(open_source(str(tmp_path / "model")))
    nameless = replace(describe(checkpoint), structure=None)
    with pytest.raises(CheckpointError, match="'qwen2' does not say how its parts are joined"):
        structure_of(nameless)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["gemma3_text", "smollm3", "gpt2"])
def test_sequences_and_truncation(name: str, tmp_path: Path) -> None:
    """Windows, layers without rotation and learned positions, with several sequences of other lengths side by side."""
    make_checkpoint(row_named(name), tmp_path / "model")
    path = write_model(open_checkpoint(open_source(str(tmp_path / "model"))), tmp_path / "out", "fp32", 256)
    options = EngineOptions(context=256, sequences=3, threads_decode=2, threads_prefill=2)
    engine = load_engine(path, options)
    prompts = [[(7 * step + 11 * length) % VOCABULARY for step in range(length)] for length in (150, 3, 70)]
    engine.forward([Chunk(sequence, prompt, "none") for sequence, prompt in enumerate(prompts)])
    together = engine.forward([Chunk(sequence, [5 + sequence]) for sequence in range(3)]).copy()
    for sequence, prompt in enumerate(prompts):
        engine.truncate(0, sequence)
        alone = engine.forward([Chunk(sequence, [*prompt, 5 + sequence])])
        assert abs(alone[0] - together[sequence]).max() < 1e-4
    engine.truncate(100, 0)
    again = engine.forward([Chunk(0, [*prompts[0][100:], 5])])
    assert abs(again[0] - together[0]).max() < 1e-4
    engine.close()


@pytest.mark.parametrize("name", ["phi", "gemma2", "qwen2, yarn rotation, tied"])
@pytest.mark.parametrize("quant", ["fp32", "int8-32", "int4-32-asym", "fp16"])
@pytest.mark.filterwarnings("ignore")
def test_an_output_matrix_in_pieces_gives_the_same_logits(
    name: str, quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(row_named(name), tmp_path / "model")
    checkpoint = open_checkpoint(open_source(str(tmp_path / "model")))
    tokens = list(range(3, 40))
    whole = write_model(checkpoint, tmp_path / "whole", quant, 64)
    monkeypatch.setattr(onnx_graph, "_PIECE_BYTES", 2**12)
    pieces = write_model(checkpoint, tmp_path / "pieces", quant, 64)
    assert (tmp_path / "pieces" / "model.onnx.data").read_bytes() == (
        tmp_path / "whole" / "model.onnx.data"
    ).read_bytes()
    graph = onnx.load(pieces, load_external_data=False).graph
    heads = [node for node in graph.node if node.output[0].startswith("logits.") and "head." in "".join(node.input)]
    if quant == "fp16":  # for GPUs: one product
        assert heads == []
    else:
        assert len(heads) > 1
    found = [read_onnx_model(path).initializers for path in (whole, pieces)]
    assert stored_bytes(found[0]) == stored_bytes(found[1])
    for one, other in zip(engine_logits(whole, tokens, 64), engine_logits(pieces, tokens, 64), strict=True):
        assert abs(one - other).max() < 1e-5


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "phi3, long rotation, part of a head"])
@pytest.mark.filterwarnings("ignore")
def test_whole_export_of_a_family(name: str, tmp_path: Path) -> None:
    make_checkpoint(row_named(name), tmp_path / "model")
    options = ExportOptions(str(tmp_path / "model"), format="onnx", quant="fp32", context=256)
    quality = export(options, tmp_path / "bundle").manifest.quality
    assert quality is not None
    assert quality.reference.startswith("transformers")
    assert quality.kl_mean < 1e-5
    verify(tmp_path / "bundle", None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("row", "changes", "reason"),
    [
        ("smollm3, other layers without rotation", {}, "as GGUF it cannot be"),
        ("mistral, window", {"context": 200}, "llama.cpp computes 48 tokens of this model and --context asks for 200"),
        ("llama", {"quant": "int4"}, "int4 is a quantisation of ONNX models only"),
    ],
)
def test_auto_is_onnx_where_gguf_cannot_be(row: str, changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    make_checkpoint(row_named(row), tmp_path / "model")
    options = ExportOptions(str(tmp_path / "model"), target="raspberry-pi-5", **changes)
    plan = prepare(options, headers_only=True).plan
    assert plan.format == "onnx"
    assert any(note.startswith(f"format auto: ONNX, since {reason}") for note in plan.notes)
    _, found, chosen, error = choices(options, SILENT, measure=False)
    assert error is None
    assert chosen is not None
    assert reason in chosen.reason
    assert {item.plan.format for item in found} == {"onnx"}


@pytest.mark.filterwarnings("ignore")
def test_auto_is_gguf_where_nothing_speaks_against_it(tmp_path: Path) -> None:
    make_checkpoint(row_named("mistral, window"), tmp_path / "model")
    plain = ExportOptions(str(tmp_path / "model"), target="raspberry-pi-5", quant="Q8_0")
    for options in (plain, replace(plain, quant="auto", context=40)):
        _, _, chosen, _ = choices(options, SILENT, measure=False)
        assert chosen is not None
        assert chosen.plan.format == "gguf"
        assert "format auto" not in chosen.reason
    with pytest.raises(UsageError, match="Q99"):
        prepare(replace(plain, quant="Q99"), headers_only=True)
