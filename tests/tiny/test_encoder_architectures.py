"""Every encoder family against transformers: tiny random models, exported, run in llama.cpp, vectors compared."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from exporter.architectures import available, family, module_name
from tests.encoder_parity import ENCODER_ROWS, EncoderRow, measure_encoder

pytestmark = [pytest.mark.tiny, pytest.mark.reference]
DOCUMENT = Path(__file__).parents[2] / "docs" / "encoders.md"


@pytest.mark.parametrize("row", ENCODER_ROWS, ids=lambda row: row.name)
@pytest.mark.filterwarnings("ignore")
def test_vectors_are_those_of_transformers(row: EncoderRow, tmp_path: Path) -> None:
    found = measure_encoder(row, tmp_path)
    assert found.architecture == "bert"
    assert found.engine.cosine_loss < 1e-5
    assert found.engine.error_max < 2e-3
    assert found.plain.cosine_loss < 2e-6
    assert found.plain.error_max < 1e-3
    assert found.alike < 0.95  # vectors that are all alike would agree with anything


def test_every_encoder_has_a_row() -> None:
    encoders = {name for name in available() if family(name).encoder}
    assert {module_name(row.model_type) for row in ENCODER_ROWS} == encoders


def test_document_has_every_row_and_no_other() -> None:
    rows = re.findall(r"^\| ([^|]+?) \| ([^|]+?) \| ", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert [row for row in rows if row[0] != "model"] == [(row.name, row.model_type) for row in ENCODER_ROWS]
