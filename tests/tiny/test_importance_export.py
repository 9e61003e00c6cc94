"""Importance matrices through the command line: measured, written, read again, and shared with llama.cpp's tools."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edgelm.cli.app import cli
from edgelm.errors import CheckpointError, UsageError
from exporter.imatrix_file import Entry, ImportanceFile, read_importance, write_importance
from exporter.options import ExportOptions
from exporter.pipeline import export, prepare
from tests.peers import compare, tool
from tests.tiny_models import make_tiny_llama

pytestmark = pytest.mark.tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("source") / "tiny", hidden=256, ffn=256, layers=8, vocab=512)


@pytest.fixture(scope="module")
def matrix(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("matrix") / "imatrix.gguf"
    done = CliRunner().invoke(cli, ["importance", str(model), "-o", str(path), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert (told["tokens"], told["matrices"]) == (12 * 512, 8 * 7 + 1)
    assert told["text"].startswith("pydoc_data")
    return path


def _options(model: Path, quant: str, matrix: Path | None = None) -> ExportOptions:
    return ExportOptions(str(model), quant=quant, imatrix=matrix, verify=False)


def test_rounding_by_a_file_is_rounding_by_what_was_measured(
    model: Path, matrix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("A text of my own. " * 3000)
    path = tmp_path / "own.gguf"
    done = CliRunner().invoke(cli, ["importance", str(model), "-o", str(path), "--calibration", str(text)])
    assert done.exit_code == 0, done.output
    by_text = export(
        ExportOptions(str(model), quant="Q4_K_M", calibration=text, verify=False), tmp_path / "text-weighed"
    )
    by_file = export(_options(model, "Q4_K_M", path), tmp_path / "file-weighed")
    other = export(_options(model, "Q4_K_M", matrix), tmp_path / "other")
    assert by_file.artifact_path.read_bytes() == by_text.artifact_path.read_bytes()
    assert other.artifact_path.read_bytes() != by_file.artifact_path.read_bytes()
    record = by_file.manifest.plan.calibration
    assert record is not None
    assert record.text == "importance matrix own.gguf"
    refused = CliRunner().invoke(cli, ["importance", str(model), "-o", str(path)])
    assert isinstance(refused.exception, UsageError)


def test_types_that_need_importance_can_be_had_with_it(model: Path, matrix: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="useless without an importance matrix"):
        prepare(_options(model, "IQ2_XS"))
    bundle = export(_options(model, "IQ2_XS", matrix), tmp_path / "bundle")
    assert "IQ2_XS" in bundle.manifest.plan.type_counts
    held = read_importance(matrix)
    part = {name: entry for name, entry in held.entries.items() if "ffn_up" not in name}
    write_importance(tmp_path / "part.gguf", ImportanceFile(part, held.datasets, held.chunk_count, held.chunk_size))
    with pytest.raises(UsageError, match=r"no entry for blk\.\d\.ffn_up\.weight, which IQ2_XS needs"):
        prepare(_options(model, "IQ2_XS", tmp_path / "part.gguf"))


def test_a_matrix_of_another_model_and_senseless_options_are_refused(model: Path, matrix: Path, tmp_path: Path) -> None:
    wide = {"blk.0.ffn_up.weight": Entry(np.ones((1, 64), np.float32), np.ones(1, np.float32))}
    for name, entries in (("wide.gguf", wide), ("strange.gguf", {"blk.0.nothing.weight": wide["blk.0.ffn_up.weight"]})):
        write_importance(tmp_path / name, ImportanceFile(entries))
        with pytest.raises(CheckpointError, match="of another model"):
            prepare(_options(model, "Q4_0", tmp_path / name))
    for quant, told in (("auto", "measures more"), ("F16", "--imatrix has no use here")):
        with pytest.raises(UsageError, match=told):
            prepare(_options(model, quant, matrix))
    with pytest.raises(UsageError, match="is no file"):
        prepare(_options(model, "Q4_0", tmp_path / "missing"))
    with pytest.raises(UsageError, match="two sources"):
        prepare(ExportOptions(str(model), quant="Q4_0", imatrix=matrix, calibration=matrix))
    with pytest.raises(UsageError, match="ONNX has no use"):
        prepare(ExportOptions(str(model), quant="int8", format="onnx", imatrix=matrix))


@pytest.mark.parametrize("quant", ["Q4_K_M", "Q4_0", "IQ4_XS", "IQ3_XXS", "IQ2_XS"])
def test_llama_quantize_makes_the_same_of_our_matrix(quant: str, model: Path, matrix: Path, tmp_path: Path) -> None:
    quantize = tool("llama-quantize")
    base = export(ExportOptions(str(model), quant="F32", verify=False), tmp_path / "base").artifact_path
    theirs = tmp_path / "theirs.gguf"
    command = [str(quantize), "--imatrix", str(matrix), str(base), str(theirs), quant, "2"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    ours = export(_options(model, quant, matrix), tmp_path / "ours").artifact_path
    found = compare(ours, theirs)
    assert (found.tensors, found.tensors_ours, found.tensors_theirs) == ((), (), ())


def test_a_matrix_of_llama_imatrix_is_read_in_both_formats(model: Path, tmp_path: Path) -> None:
    measure = tool("llama-imatrix")
    base = export(ExportOptions(str(model), quant="F32", verify=False), tmp_path / "base").artifact_path
    text = tmp_path / "text.txt"
    text.write_text("One text. Another text, longer than the first.\n" * 400)
    for name in ("theirs.gguf", "theirs.dat"):
        path = tmp_path / name
        command = [str(measure), "-m", str(base), "-f", str(text), "-o", str(path), "-c", "128", "--chunks", "4"]
        command += ["--output-format", path.suffix[1:]]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        bundle = export(_options(model, "Q4_0", path), tmp_path / f"by-{name}")
        assert f"rounding weighed by importance matrix {name}" in bundle.manifest.plan.notes
