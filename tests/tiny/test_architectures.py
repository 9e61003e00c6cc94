"""Every family against transformers: tiny random models, exported, run in llama.cpp, logits compared."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgelm.bundle import open_bundle
from exporter.architectures import available, describe, family
from exporter.checkpoint import open_checkpoint, open_source
from exporter.options import ExportOptions
from exporter.pipeline import export
from tests.parity import ROWS, Row, make_checkpoint, measure

pytestmark = [pytest.mark.tiny, pytest.mark.reference]
DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"
GELU_TABLE = 0.01  # llama.cpp computes GELU from a table of 16-bit values


def row_named(name: str) -> Row:
    return next(row for row in ROWS if row.name == name)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.filterwarnings("ignore")
def test_logits_are_those_of_transformers(row: Row, tmp_path: Path) -> None:
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
    ["qwen2", "gemma3, text of a model that sees", "phi3", "gpt2", "gpt_neox", "llama, layers of different widths"],
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
