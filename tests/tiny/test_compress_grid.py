"""Finishing on a bundle's grid: it begins with the bundle's numbers, and what was trained is what an export stores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import make_tiny_llama

from edgelm.errors import CheckpointError
from edgelm.progress import SILENT
from exporter import ggml, hub, rounding
from exporter.block_layouts import LAYOUTS
from exporter.checkpoint import Checkpoint, open_checkpoint, open_source
from exporter.compress.grid import Grid, OnGrid, fits
from exporter.compress.pipeline import compress
from exporter.compress.run import CompressOptions
from exporter.given_types import read_types
from exporter.options import ExportOptions
from exporter.pipeline import export
from exporter.safetensors_header import FINISHED, SINGLE


def _compensated(kind: str) -> tuple[np.ndarray, Grid]:
    """Rows and what compensated rounding stores of them."""
    random = np.random.default_rng(3)
    rows = random.standard_normal((40, 512)).astype(np.float32)
    inputs = random.standard_normal((800, 512)) @ (np.eye(512) + random.standard_normal((512, 512)) / 20)
    moment = (inputs.T @ inputs / 800).astype(np.float32)
    stored = rounding.quantize(rows, kind, rounding.compensation(moment))
    return rows, Grid(kind, stored.reshape(40, -1))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_parameter_begins_with_what_is_stored_and_moves_by_whole_steps(kind: str) -> None:
    import torch

    rows, grid = _compensated(kind)
    stored = ggml.dequantize(grid.stored.reshape(-1), kind, rows.size).reshape(rows.shape)
    assert np.array_equal(grid.values(), stored)
    assert np.array_equal(grid.holding(stored).values(), stored)

    parameter = torch.nn.Parameter(torch.from_numpy(rows.copy()))
    on_grid = OnGrid(grid, parameter)
    np.testing.assert_allclose(on_grid(parameter.data).numpy(), stored, rtol=1e-5, atol=1e-6)
    kept = (parameter.data.numpy() == rows).mean()
    assert 0.3 < kept < 1  # the others had gone to another step than the nearest, to make up for errors
    assert np.abs(on_grid.stored(parameter).values() - stored).max() == 0

    moved = torch.from_numpy(rows + 0.3 * np.random.default_rng(1).standard_normal(rows.shape).astype(np.float32))
    nearest = on_grid(moved).numpy()
    assert np.abs(nearest - grid.holding(moved.numpy()).values()).max() < 1e-5
    # No other number of the same block is nearer: every one is tried by moving a step up and down.
    scales, _ = grid.steps()
    step = np.repeat(scales, 16, axis=1)
    for other in (nearest + step, nearest - step):
        reachable = grid.holding(other).values()
        assert (np.abs(moved.numpy() - nearest) <= np.abs(moved.numpy() - reachable) + 1e-4).all()


@pytest.mark.parametrize("kind", LAYOUTS)
def test_what_is_trained_of_a_blocks_steps_is_stored(kind: str) -> None:
    """Numbers keep their steps while the steps of their block grow, and the file holds what training saw."""
    import torch

    rows, grid = _compensated(kind)
    parameter = torch.nn.Parameter(torch.from_numpy(rows.copy()))
    on_grid = OnGrid(grid, parameter)
    random = np.random.default_rng(5)
    for factor in on_grid.factors:
        factor.data = torch.from_numpy(random.uniform(0.9, 1.1, factor.shape).astype(np.float32))
    seen, stored = on_grid(parameter.data).numpy(), on_grid.stored(parameter)
    np.testing.assert_allclose(seen, stored.values(), rtol=1e-5, atol=1e-6)
    growth = [one / other for one, other in zip(stored.halves(), grid.halves(), strict=True)]
    for ratio, factor in zip(growth, on_grid.factors, strict=True):
        np.testing.assert_allclose(ratio, factor.data[..., 0].numpy(), rtol=1e-3)
    # With the old steps again it is the very same numbers.
    assert np.array_equal(stored.with_halves(grid.halves()).stored, grid.stored)
    assert len(on_grid.factors) == (2 if grid.steps()[1] is not None else 1)


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q4_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
def test_gradients_of_a_blocks_steps(kind: str) -> None:
    """Against the difference quotient of a linear loss, which is exact but for half precision."""
    import torch

    rows, grid = _compensated(kind)
    parameter = torch.nn.Parameter(torch.from_numpy(rows.copy()))
    on_grid = OnGrid(grid, parameter)
    slope = torch.from_numpy(np.random.default_rng(6).standard_normal(rows.shape).astype(np.float32))
    on_grid.learn(on_grid(parameter.data), slope)
    for factor in on_grid.factors:
        factor.data[3, 1] += 0.25
        higher = (on_grid(parameter.data) * slope).sum(dtype=torch.float64)
        factor.data[3, 1] -= 0.25
        lower = (on_grid(parameter.data) * slope).sum(dtype=torch.float64)
        assert float(factor.grad[3, 1]) == pytest.approx(float(higher - lower) / 0.25, rel=0.01, abs=0.02)


def test_a_block_that_goes_astray_stays_a_number() -> None:
    import torch

    rows, grid = _compensated("Q4_1")
    parameter = torch.nn.Parameter(torch.from_numpy(rows.copy()))
    on_grid = OnGrid(grid, parameter)
    begun = on_grid(parameter.data)
    for factor in on_grid.factors:
        factor.data[0, :] = 0
        factor.data[1, :] = 1e9
    on_grid.learn(on_grid(parameter.data), torch.ones_like(parameter.data))
    assert all(bool(torch.isfinite(factor.grad).all()) for factor in on_grid.factors)
    values = on_grid.stored(parameter).values()
    np.testing.assert_allclose(values[0], begun[0] / 4, rtol=2e-3, atol=1e-3)
    np.testing.assert_allclose(values[1], begun[1] * 4, rtol=2e-3, atol=1e-3)


def test_a_killed_finish_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    """The widths of blocks are part of the state."""
    import torch

    from exporter.compress.data import Corpus
    from exporter.compress.fake_quant import FakeQuantizer
    from exporter.compress.training import Trainer, TrainingOptions
    from exporter.reference import open_torch_model

    directory, name = tmp_path / "student", "model.layers.0.mlp.up_proj.weight"
    make_tiny_llama(directory, layers=1, hidden=64, heads=4, kv_heads=2, ffn=96)
    corpus = Corpus(np.random.default_rng(3).integers(3, 300, (12, 24)).astype(np.int32), ())
    options = TrainingOptions(
        steps=6, batch=4, micro_batch=2, learning_rate=1e-3, temperature=1.0, hidden_weight=0, attention_weight=0,
        matched=(), seed=1, save_every_s=0,
    )  # fmt: skip

    def trainer(state: str, stop: int | None = None) -> tuple[Trainer, FakeQuantizer]:
        checkpoint = open_checkpoint(open_source(str(directory)))
        with open_torch_model(checkpoint, SILENT, device="cpu") as teacher:
            pass
        with open_torch_model(checkpoint, SILENT, device="cpu") as model:
            weight = dict(model.named_parameters())[name].detach().float().numpy()
        grid = Grid("Q4_1", ggml.quantize(weight, "Q4_1").reshape(len(weight), -1))
        quantizer = FakeQuantizer(model, {name: "Q4_1"}, {name: grid})
        found = Trainer(teacher, model, corpus, options, tmp_path / state, quantizer)

        def killed() -> None:
            if stop is not None and len(found.curve) == stop:
                raise KeyboardInterrupt

        found.after_step = killed
        return found, quantizer

    whole, quantizer = trainer("whole")
    whole.run(SILENT)
    assert all(not torch.equal(item, torch.ones_like(item)) for item in quantizer.factors().values())
    first, _ = trainer("killed", stop=3)
    with pytest.raises(KeyboardInterrupt):
        first.run(SILENT)
    second, resumed = trainer("killed")
    second.run(SILENT)
    assert second.curve == whole.curve
    for (label, ours), theirs in zip(resumed.factors().items(), quantizer.factors().values(), strict=True):
        assert torch.equal(ours, theirs), label
    assert np.array_equal(resumed.settle()[name].stored, quantizer.settle()[name].stored)


def test_another_models_grid_is_not_taken() -> None:
    rows, grid = _compensated("Q4_K")
    other = np.random.default_rng(9).standard_normal(rows.shape).astype(np.float32)
    assert fits(grid, rows)
    assert not fits(grid, other)
    assert not fits(grid, np.ascontiguousarray(rows[:, :256]))
    assert not fits(grid, rows + np.float32(0.5) * other)  # trained on for long


@pytest.fixture
def short_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.compress.decoders.EVALUATION_TOKENS", 400)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("grid") / "student"
    make_tiny_llama(directory, layers=2, hidden=256, heads=4, kv_heads=2, ffn=512, tied=True)
    return directory


def _options(student: Path, bundle: Path, **changes: Any) -> CompressOptions:
    return CompressOptions(
        str(student), length=64, batch=4, tokens=0, finish=str(bundle), finish_tokens=1024, learning_rate=4e-4,
        **changes,
    )  # fmt: skip


def _artifact(directory: Path) -> Checkpoint:
    return open_checkpoint(open_source(str(directory / "model.gguf")))


def _bundle(student: Path, destination: Path) -> Path:
    """Rounded with compensation, as types chosen by damage are."""
    text = destination.with_suffix(".txt")
    text.write_text(" ".join(f"word{number} of the text" for number in range(3000)))
    given = ExportOptions(
        source=str(student), verify=False, quant="Q4_0", calibration=text,
        type_overrides=(("ffn_down", "Q5_K"), ("attn_v", "Q8_0"), ("attn_k", "Q3_K")),
    )  # fmt: skip
    return export(given, destination).path


@pytest.mark.usefixtures("short_comparisons")
def test_finishing_goes_on_from_a_bundle_and_is_stored_as_trained(student: Path, tmp_path: Path) -> None:
    bundle = _bundle(student, tmp_path / "bundle")
    finished = compress(_options(student, bundle), tmp_path / "finished")
    stages = {item.stage: item.kl_mean for item in finished.record.comparisons if item.text != "own"}  # type: ignore[union-attr]
    begun, ended = (next(kl for stage, kl in stages.items() if word in stage) for word in ("quantised", "finished"))
    assert 0 < ended < begun
    assert finished.record.remarks[-1] == "15 of 15 quantised matrices were finished from the numbers of the bundle"

    again = export(
        ExportOptions(source=str(finished.path), verify=False, types=read_types(finished.path)), tmp_path / "again"
    )
    weights, first, last = open_checkpoint(open_source(str(finished.path))), _artifact(bundle), _artifact(again.path)
    assert {item.type for item in weights.finished.values()} == {"Q4_0", "Q5_K", "Q8_0", "Q6_K", "Q3_K"}
    gate, down = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.down_proj.weight"
    for name, source in (("blk.1.ffn_gate.weight", gate), ("blk.1.ffn_down.weight", down)):
        assert np.array_equal(last.load(name), weights.load(source))
        assert 0.99 < np.corrcoef(last.load(name).ravel(), first.load(name).ravel())[0, 1] < 1
    # Query rows change places on the way: the stored ones, too. Q3_K has no steps here and stays as it was.
    query = weights.load("model.layers.0.self_attn.q_proj.weight")
    assert sorted(map(bytes, last.load("blk.0.attn_q.weight"))) == sorted(map(bytes, query))
    assert not np.array_equal(last.load("blk.0.attn_q.weight"), query)
    assert last.tensors["blk.0.attn_k.weight"].type == "Q3_K"
    assert np.array_equal(last.load("blk.0.attn_k.weight"), first.load("blk.0.attn_k.weight"))
    assert [item.type for item in first.tensors.values()] == [item.type for item in last.tensors.values()]


@pytest.mark.usefixtures("short_comparisons")
def test_zeros_stay_zero_whether_their_grid_has_one_or_not(student: Path, tmp_path: Path) -> None:
    """Q4_0 has a zero and is finished from the bundle's numbers, Q5_K has none and is not."""
    sparse = compress(CompressOptions(str(student), length=64, batch=4, tokens=0, sparsity="0.5"), tmp_path / "sparse")
    bundle = _bundle(sparse.path, tmp_path / "bundle")  # ffn_down is Q5_K there, attn_k Q3_K
    finished = compress(_options(sparse.path, bundle, sparsity="0.5"), tmp_path / "finished")
    weights = open_checkpoint(open_source(str(finished.path)))
    down, up = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"
    assert up in weights.finished
    assert down not in weights.finished
    for name in (down, up, "model.layers.1.self_attn.k_proj.weight"):
        assert (weights.load(name) == 0).mean() == pytest.approx(0.5, abs=0.1), name
    assert finished.record.zeros is not None
    assert finished.record.zeros >= 0.5
    assert "11 of 15 quantised matrices were finished from the numbers of the bundle" in finished.record.remarks


@pytest.mark.usefixtures("short_comparisons")
def test_weights_that_were_changed_afterwards_are_refused(student: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    bundle = _bundle(student, tmp_path / "bundle")
    finished = compress(_options(student, bundle), tmp_path / "finished").path
    name = "model.layers.1.mlp.down_proj.weight"
    weights = load_file(finished / "model.safetensors")
    weights[name][3, 5] += 1
    save_file(weights, finished / "model.safetensors", metadata={"format": "pt"})
    given = ExportOptions(source=str(finished), verify=False, types=read_types(finished))
    with pytest.raises(CheckpointError, match=r"down_proj\.weight was changed after it was finished for Q5_K"):
        export(given, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    other = export(replace(given, types=None, quant="Q8_0"), tmp_path / "other")  # stored as no type of it
    assert {item.type for item in _artifact(other.path).tensors.values()} == {"Q8_0", "F32"}
    (finished / FINISHED).unlink()
    assert export(given, tmp_path / "again").path.exists()


@pytest.mark.usefixtures("short_comparisons")
def test_a_table_that_lost_tokens_is_quantised_anew(student: Path, tmp_path: Path) -> None:
    bundle = _bundle(student, tmp_path / "bundle")
    finished = compress(_options(student, bundle, vocabulary=300), tmp_path / "finished").path
    weights = open_checkpoint(open_source(str(finished)))
    assert "model.embed_tokens.weight" not in weights.finished
    assert "model.layers.0.mlp.up_proj.weight" in weights.finished
    export(ExportOptions(source=str(finished), verify=False, types=read_types(finished)), tmp_path / "again")


@pytest.mark.parametrize("name", ["Q4_0/model.layers.9.x", "Q9/model.norm.weight", "model.norm.weight"])
def test_stored_tensors_of_another_model_are_refused(student: Path, tmp_path: Path, name: str) -> None:
    import shutil

    from safetensors.numpy import save_file

    copy = tmp_path / "copy"
    shutil.copytree(student, copy)
    save_file({name: np.zeros((256, 144), dtype=np.uint8)}, copy / FINISHED)
    with pytest.raises(CheckpointError, match="is no tensor of the weights beside it"):
        open_checkpoint(open_source(str(copy)))


def test_a_hub_gives_what_a_student_is_stored_as_along_with_its_weights(tmp_path: Path) -> None:
    listed: dict[str, Any] = {SINGLE: None, FINISHED: None, "config.json": None}
    assert hub._weight_files("org/student", tmp_path, listed) == [SINGLE, FINISHED]
    del listed[FINISHED]
    assert hub._weight_files("org/student", tmp_path, listed) == [SINGLE]
