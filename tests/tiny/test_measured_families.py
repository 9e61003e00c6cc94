"""What a rounded matrix does to a model of every family, beside what its measured sensitivity says it does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgelm.bundle import TensorPlan
from edgelm.progress import SILENT
from exporter import damage, ggml, sensitivity
from exporter.architectures import available, describe, family
from exporter.architectures.base import TensorDescription
from exporter.checkpoint import Checkpoint, open_checkpoint, open_source
from exporter.gguf import write_gguf
from exporter.mixes import WeightShape, is_quantizable
from exporter.options import ExportOptions
from exporter.pipeline import export, way_of
from exporter.tokenizer import read_tokenizer
from runtime.engine import Chunk, EngineOptions
from runtime.engines.llamacpp import load_engine
from runtime.gguf_header import read_gguf_header
from tests.parity import (
    ROWS,
    VOCABULARY,
    Row,
    distance,
    known_to_transformers,
    make_checkpoint,
    write_f32,
)

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [pytest.mark.tiny, pytest.mark.reference, pytest.mark.filterwarnings("ignore")]
FIRST = [
    next(row for row in ROWS if row.model_type == name and row.change is None)
    for name in available()
    if not family(name).encoder
]
KNOWN = [row for row in FIRST if known_to_transformers(row)]  # the others with `make test-transformers5`
WINDOWS, LENGTH = 24, 64
SMALL = 1 / 40  # of a matrix: as far as an estimate to second order reaches
# Labels are drawn, and errors of one matrix at different tokens are taken for independent, though attention adds them
# up: values of a random model are off by 4. A forgotten multiplier or root of the hidden size shows by its square.
FACTOR = 6.0


def _windows() -> list[tuple[int, ...]]:
    generator = np.random.default_rng(5)
    return [tuple(generator.integers(3, VOCABULARY, LENGTH).tolist()) for _ in range(WINDOWS)]


def _noise(item: TensorDescription, checkpoint: Checkpoint) -> ggml.Floats:
    rows = damage.load_rows(checkpoint, item)
    noise = np.random.default_rng(len(item.name)).standard_normal(rows.shape).astype(np.float32)
    return noise * np.float32(SMALL * np.sqrt(np.square(rows).mean()))


class _Disturbed:
    """Adds an error to the rows of a matrix on their way into the file."""

    def __init__(self, error: ggml.Floats) -> None:
        self._error = error

    def __call__(self, rows: ggml.Floats, type_name: str, out: ggml.Bytes | None = None) -> ggml.Bytes:
        assert rows.shape == self._error.shape
        stored = np.frombuffer((rows + self._error).astype(np.float16).tobytes(), np.uint8)
        if out is None:
            return stored
        out[:] = stored
        return out


def _logits(checkpoint: Checkpoint, path: Path, disturbed: dict[str, ggml.Floats]) -> ggml.Floats:
    """Logits of the model, the disturbed matrices in F16 and all others in F32."""
    description = describe(checkpoint)
    kinds = {item.name: "F16" if item.name in disturbed else "F32" for item in description.tensors}
    plans = [
        TensorPlan(
            name=item.name,
            source_name=item.source_name,
            shape=item.shape,
            type=kinds[item.name],
            size_bytes=ggml.TYPES[kinds[item.name]].row_bytes(item.shape[-1]) * int(np.prod(item.shape[:-1])),
            reason="",
        )
        for item in description.tensors
    ]
    words = {**read_tokenizer(checkpoint).gguf_metadata, "tokenizer.ggml.pre": "smollm"}
    quantizers = {name: _Disturbed(error) for name, error in disturbed.items()}
    write_gguf(path, checkpoint, description.tensors, plans, {**description.metadata, **words}, quantizers=quantizers)
    options = EngineOptions(context=256, batch=512, kv_type="f32", all_logits=True, flash_attention="off")
    engine = load_engine(path, options)
    try:
        found = []
        for window in _windows():
            engine.truncate(0)
            found.append(engine.forward([Chunk(0, window, "all")]).copy())
    finally:
        engine.close()
    return np.concatenate(found)


@pytest.mark.parametrize("row", KNOWN, ids=lambda row: row.model_type)
def test_sensitivity_tells_what_an_error_in_each_matrix_does(row: Row, tmp_path: Path) -> None:
    make_checkpoint(row, tmp_path / "model", gain=1.0)
    checkpoint = open_checkpoint(open_source(str(tmp_path / "model")))
    assert way_of(ExportOptions(str(tmp_path / "model")), checkpoint).value == "whole"
    statistics = sensitivity.collect(checkpoint, _windows(), SILENT)
    matrices = [item for item in describe(checkpoint).tensors if is_quantizable(WeightShape(item.name, item.shape))]
    assert set(statistics) == {item.name for item in matrices}
    plain = _logits(checkpoint, tmp_path / "plain.gguf", {})
    judged = [item for item in matrices if not item.name.startswith("blk.") or item.name.startswith("blk.1.")]
    for item in judged:
        error = _noise(item, checkpoint)
        found = distance(_logits(checkpoint, tmp_path / "one.gguf", {item.name: error}), plain).kl_mean
        expected = sensitivity.damage(error, statistics[item.name])
        assert 1 / FACTOR < expected / found < FACTOR, f"{item.name}: {expected:.3g} expected, {found:.3g} found"


@pytest.mark.parametrize("row", KNOWN, ids=lambda row: row.model_type)
def test_every_family_takes_the_types_that_were_measured(
    row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path / "cache"))
    make_checkpoint(row, tmp_path / "model", gain=1.0)
    options = ExportOptions(str(tmp_path / "model"), target="raspberry-pi-5", context=256)
    plan = export(options, tmp_path / "bundle").manifest.plan
    assert plan.quant == "MIXED"
    assert plan.predicted_kl is not None
    matrices = [item for item in plan.tensors if len(item.shape) > 1 and item.type != "F32"]
    assert matrices
    assert all(item.reason.startswith("measured: KL") for item in matrices)


def test_a_matrix_is_judged_as_the_artefact_has_it(tmp_path: Path) -> None:
    """Rows reordered, transposed, taken from the middle and scaled: as the writer of the artefact does it."""
    for name in ("gpt2", "gpt_neox", "granitemoehybrid", "gemma2", "llama"):
        make_checkpoint(next(row for row in FIRST if row.model_type == name), tmp_path / name)
        checkpoint = open_checkpoint(open_source(str(tmp_path / name)))
        path = tmp_path / f"{name}.gguf"
        description = write_f32(checkpoint, path)
        stored = {item.name: item for item in read_gguf_header(path).tensors}
        data = path.read_bytes()
        for item in description.tensors:
            if is_quantizable(WeightShape(item.name, item.shape)):
                written = np.frombuffer(data, np.float32, int(np.prod(item.shape)), stored[item.name].offset)
                np.testing.assert_array_equal(damage.load_rows(checkpoint, item), written.reshape(item.shape))
