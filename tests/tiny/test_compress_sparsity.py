"""Zeros among weights, and pruning in stages: what goes, that it stays gone, and that nobody is promised speed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgelm.cli.app import run_cli
from edgelm.cli.compress import command
from edgelm.errors import UsageError
from edgelm.progress import SILENT
from exporter.checkpoint import open_checkpoint, open_source
from exporter.compress import decoders as decoders_module
from exporter.compress import sparsity
from exporter.compress import training as training_module
from exporter.compress.pipeline import compress
from exporter.compress.run import CompressOptions
from exporter.compress.shape import Shape, steps_between
from exporter.compress.sparsity import Masks, Pattern, choose_masks, load_masks, parse_pattern, save_masks
from exporter.reference import open_torch_model
from tests.tiny.test_compress import PowerCut, StopAfter, raising
from tests.tiny_encoders import make_tiny_bert
from tests.tiny_models import make_tiny_llama

pytestmark = [pytest.mark.tiny, pytest.mark.reference]
WINDOWS = [list(range(3, 67)), list(range(90, 154))]


@pytest.fixture(scope="module")
def teacher_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("teacher"), layers=4, ffn=96)


@pytest.fixture
def teacher(teacher_directory: Path) -> Any:
    with open_torch_model(open_checkpoint(open_source(str(teacher_directory))), SILENT, device="cpu") as model:
        return model


@pytest.fixture(autouse=True)
def short_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders_module, "EVALUATION_TOKENS", 300)


@pytest.mark.parametrize(("text", "share", "of"), [("0.5", 0.5, 0), ("2:4", 0.5, 4), ("0.25", 0.25, 0)])
def test_patterns(text: str, share: float, of: int) -> None:
    assert parse_pattern(text) == Pattern(share, of)
    assert str(parse_pattern(text)) == text


@pytest.mark.parametrize("text", ["0", "1", "1.5", "-0.1", "1:4", "half", "nan"])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="neither a share between 0 and 1 nor 2:4"):
        parse_pattern(text)


@pytest.mark.parametrize("text", ["0.5", "0.25", "2:4"])
def test_the_least_weights_of_each_row_go(teacher: Any, text: str) -> None:
    pattern = parse_pattern(text)
    masks = choose_masks(teacher, pattern, (), SILENT, by_activation=False)
    assert len(masks) == 4 * 7
    weights = dict(teacher.named_parameters())
    for name, mask in masks.items():
        rows, kept = weights[name].detach().abs().numpy(), mask.numpy()
        groups = (len(rows), -1, pattern.of or rows.shape[1])
        rows, kept = rows.reshape(groups), kept.reshape(groups)
        assert ((~kept).sum(axis=-1) == round(pattern.share * rows.shape[-1])).all()
        assert (np.where(kept, 0, rows).max(axis=-1) <= np.where(kept, rows, np.inf).min(axis=-1)).all()


def test_by_activation_a_weight_that_multiplies_nothing_goes_first(teacher: Any) -> None:
    """Neurons that are always zero: the weights that read them go, however large they are."""
    layer = teacher.model.layers[1].mlp
    layer.up_proj.weight.data[:48] = 0
    layer.down_proj.weight.data[:, :48] *= 100
    name = "model.layers.1.mlp.down_proj.weight"
    by = {
        choice: choose_masks(teacher, Pattern(0.5), WINDOWS, SILENT, by_activation=choice)[name].numpy()
        for choice in (True, False)
    }
    assert not by[True][:, :48].any()
    assert by[True][:, 48:].all()
    assert by[False][:, :48].mean() > 0.95


def test_masks_come_back_from_disk(teacher: Any, tmp_path: Path) -> None:
    masks = choose_masks(teacher, Pattern(0.3), (), SILENT, by_activation=False)
    save_masks(tmp_path / "masks.npz", masks)
    again = load_masks(tmp_path / "masks.npz", teacher)
    assert again.keys() == masks.keys()
    assert all(np.array_equal(again[name].numpy(), mask.numpy()) for name, mask in masks.items())
    found = Masks(teacher, again)
    found.apply()
    assert found.zeros == pytest.approx(0.3, abs=0.01)


class Crash:
    """A progress that ends the run in the second step of the n-th training."""

    def __init__(self, training: int) -> None:
        self.left = training

    def stage(self, name: str, *_: object, **__: object) -> Any:
        if name != "distilling":
            return SILENT.stage(name, 1)
        self.left -= 1
        return StopAfter(2, raising(PowerCut())) if self.left == 0 else SILENT.stage(name, 1)


def test_zeros_stay_zero_through_stages_and_a_kill(
    teacher_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_module, "_SAVE_EVERY_S", 0.0)
    options = CompressOptions(
        str(teacher_directory), layers=2, neurons=64, length=64, batch=4, tokens=2048, stages=2, sparsity="2:4",
        finish="Q8_0", finish_tokens=768,
    )  # fmt: skip
    whole = compress(options, tmp_path / "whole")
    for number in (1, 2):
        with pytest.raises(PowerCut):
            compress(options, tmp_path / "killed", progress=Crash(number))
    resumed = compress(options, tmp_path / "killed")
    unlike = {"elapsed_s"}
    assert resumed.record.model_dump(exclude=unlike) == whole.record.model_dump(exclude=unlike)
    assert (resumed.path / "model.safetensors").read_bytes() == (whole.path / "model.safetensors").read_bytes()
    record = whole.record
    assert [item.stage for item in record.comparisons] == [
        "pruned, stage 1 of 2", "sparsity 0.25, stage 1 of 2", "distilled, stage 1 of 2",
        "pruned, stage 2 of 2", "sparsity 2:4, stage 2 of 2", "distilled, stage 2 of 2",
        "quantised to Q8_0", "finished for Q8_0",
    ]  # fmt: skip
    assert len(record.layers_kept) == 2
    assert record.layers_kept[-1] == 3
    assert record.zeros == 0.5
    assert record.tokens == 2048 + 768
    assert any("50.0%" in item and "neither the file nor a token gets cheaper" in item for item in record.remarks)
    assert "neither the file nor a token" in (whole.path / "README.md").read_text()
    student = open_checkpoint(open_source(str(whole.path)))
    for name in student.tensors:
        if "proj" in name:
            groups = (student.load(name) == 0).reshape(-1, 4).sum(axis=1)
            assert (groups == 2).all()
    steps = [json.loads(line)["stage"] for line in (whole.path / "training.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(steps)) == ["distil-1", "distil-2", "finish"]


def test_an_encoder_takes_zeros_and_stages_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = make_tiny_bert(tmp_path / "teacher", layers=4)
    typed = ["compress", str(teacher), "--layers", "2", "--sparsity", "0.5", "--stages", "2", "--tokens", "8200"]
    assert run_cli([*typed, "--batch", "16", "--length", "64", "-o", str(tmp_path / "student"), "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["zeros"] == pytest.approx(0.5)
    assert len(document["comparisons"]) == 6
    assert len(document["layers_kept"]) == 2


def test_nobody_is_promised_speed() -> None:
    told = next(item for item in command.params if item.name == "sparsity")
    assert "No speed, no smaller file" in str(getattr(told, "help", ""))
    assert "neither the file nor a token gets cheaper" in sparsity.NO_GAIN


def test_shapes_on_the_way_are_even() -> None:
    shapes = steps_between(Shape(30, 1536, 3, 576), Shape(15, 1024, 3, 576), 3)
    assert [(item.layers, item.neurons) for item in shapes] == [(25, 1365), (20, 1194), (15, 1024)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": "3:4"}, "--sparsity 3:4"),
        ({"sparsity": "0.5", "units": "fisher"}, "--importance activation or magnitude"),
        ({"sparsity": "2:4", "neurons": 50}, r"rows of 50 \(neurons\) are no multiple of 4"),
        ({"stages": 0}, "--stages must be above zero"),
        ({"stages": 3, "tokens": 5000}, "in each of 3 stages is less than one step"),
    ],
)
def test_what_makes_no_sense_is_refused(
    teacher_directory: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    options = replace(CompressOptions(str(teacher_directory)), **change)
    with pytest.raises(UsageError, match=message):
        compress(options, tmp_path / "student")
    assert not list(tmp_path.iterdir())
