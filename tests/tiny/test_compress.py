"""Pruning and distilling on tiny models: what is cut, what is learned, what a kill leaves, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgelm.cli.app import run_cli
from edgelm.errors import CheckpointError, DoesNotFitError, EngineError, UsageError
from edgelm.progress import SILENT
from exporter import ggml
from exporter.checkpoint import open_checkpoint, open_source
from exporter.compress import importance, surgery
from exporter.compress.data import Corpus, batches
from exporter.compress.pipeline import CompressOptions, compress, proposal
from exporter.compress.shape import Shape, shape_of, wanted_shape
from exporter.compress.training import Trainer, TrainingOptions
from exporter.options import ExportOptions
from exporter.pipeline import export
from exporter.reference import open_torch_model
from tests.tiny_models import make_tiny_llama

pytestmark = [pytest.mark.tiny, pytest.mark.reference]
WINDOWS = [list(range(3, 67)), list(range(90, 154))]


@pytest.fixture(scope="module")
def teacher_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("teacher")
    make_tiny_llama(directory, layers=4, hidden=64, heads=4, kv_heads=2, ffn=96)
    return directory


@pytest.fixture
def teacher(teacher_directory: Path) -> Any:
    with open_torch_model(open_checkpoint(open_source(str(teacher_directory))), SILENT) as model:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        return model


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(torch.tensor([WINDOWS[0]]), use_cache=False).logits[0]


def cut_to(model: Any, wanted: Shape, measure: importance.Measure = "activation") -> Any:
    found = importance.measure(model, WINDOWS, wanted, SILENT, units=measure)
    return surgery.cut(model, wanted, surgery.choose(found, shape_of(model.config), wanted))


def test_a_cut_that_removes_nothing_changes_nothing(teacher: Any) -> None:
    student = cut_to(teacher, shape_of(teacher.config))
    assert np.array_equal(logits(student).numpy(), logits(teacher).numpy())


@pytest.mark.parametrize("measure", ["activation", "fisher", "magnitude"])
def test_units_that_do_nothing_are_what_goes(teacher: Any, measure: importance.Measure) -> None:
    """A third of the neurons and one head reach nothing: the pruned model has to compute the same."""
    dead = [index for index in range(96) if index % 3 == 1]
    for layer in teacher.model.layers:
        layer.mlp.down_proj.weight.data[:, dead] = 0
        layer.self_attn.o_proj.weight.data[:, 32:] = 0  # query heads 2 and 3: the second head of keys
    wanted = wanted_shape(shape_of(teacher.config), neurons=96 - len(dead), heads=1)
    student = cut_to(teacher, wanted, measure)
    assert shape_of(student.config) == wanted
    assert student.config.num_attention_heads == 2
    assert np.abs(logits(student).numpy() - logits(teacher).numpy()).max() < 1e-4


@pytest.mark.parametrize("depth", ["influence", "kl"])
def test_layers_that_pass_their_input_on_go_first(teacher: Any, depth: importance.DepthMeasure) -> None:
    for index in (1, 2):
        teacher.model.layers[index].mlp.down_proj.weight.data.zero_()
        teacher.model.layers[index].self_attn.o_proj.weight.data.zero_()
    wanted = wanted_shape(shape_of(teacher.config), layers=2)
    found = importance.measure(teacher, WINDOWS, wanted, SILENT, depth=depth)
    kept = surgery.choose(found, shape_of(teacher.config), wanted)
    assert kept.layers == (0, 3)
    student = surgery.cut(teacher, wanted, kept)
    assert np.abs(logits(student).numpy() - logits(teacher).numpy()).max() < 1e-4


def test_a_narrower_width_keeps_the_channels_that_matter(teacher: Any) -> None:
    student = cut_to(teacher, wanted_shape(shape_of(teacher.config), hidden=48))
    assert student.config.hidden_size == 48
    assert student.model.embed_tokens.weight.shape[1] == 48
    assert student.config.head_dim == 16
    assert np.isfinite(logits(student).numpy()).all()


def test_a_tensor_that_is_not_known_is_refused(teacher: Any) -> None:
    import torch

    teacher.model.layers[0].self_attn.register_parameter("extra", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(CheckpointError, match=r"self_attn\.extra"):
        cut_to(teacher, wanted_shape(shape_of(teacher.config), layers=3))


# --- training


def training(steps: int = 6, *, rate: float = 3e-3, save_every_s: float = 1e9) -> TrainingOptions:
    return TrainingOptions(
        steps=steps, batch=4, micro_batch=2, learning_rate=rate, temperature=1.0, hidden_weight=0.5,
        attention_weight=0.5, matched=(0, 3), seed=1, save_every_s=save_every_s,
    )  # fmt: skip


def make_trainer(teacher: Any, directory: Path, options: TrainingOptions) -> tuple[Any, Trainer]:
    rng = np.random.default_rng(3)
    corpus = Corpus(rng.integers(3, 300, (12, 24)).astype(np.int32), ())
    student = cut_to(teacher, wanted_shape(shape_of(teacher.config), layers=2))
    return student, Trainer(teacher, student, corpus, options, directory)


class StopAfter:
    """A progress that kills the run after some steps, as Ctrl-C or a signal would."""

    def __init__(self, steps: int, kill: Callable[[], None]) -> None:
        self.left, self.kill = steps, kill

    def stage(self, *_: object, **__: object) -> StopAfter:
        return self

    def __enter__(self) -> StopAfter:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def tell(self, _: str) -> None:
        self.left -= 1
        if self.left == 0:
            self.kill()

    def advance(self, amount: int = 1) -> None:
        return None


def raising(error: BaseException) -> Callable[[], None]:
    def kill() -> None:
        raise error

    return kill


class PowerCut(BaseException):
    """Nobody catches it, so nothing is saved on the way out."""


@pytest.mark.parametrize("kind", [KeyboardInterrupt, PowerCut])
def test_a_run_that_was_killed_goes_on_with_the_same_numbers(
    teacher: Any, tmp_path: Path, kind: type[BaseException]
) -> None:
    whole_student, whole = make_trainer(teacher, tmp_path / "whole", training())
    whole.run(SILENT)
    assert whole.curve[-1].kl < whole.curve[0].kl
    _, killed = make_trainer(teacher, tmp_path / "killed", training(save_every_s=0))
    with pytest.raises(kind):
        killed.run(StopAfter(3, raising(kind())))
    student, resumed = make_trainer(teacher, tmp_path / "killed", training())
    resumed.run(SILENT)
    assert resumed.curve == whole.curve
    for (name, ours), (_, theirs) in zip(student.named_parameters(), whole_student.named_parameters(), strict=True):
        assert np.array_equal(ours.detach().numpy(), theirs.detach().numpy()), name


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(teacher: Any, tmp_path: Path) -> None:
    student, trainer = make_trainer(teacher, tmp_path, training(save_every_s=0))
    poison = StopAfter(2, lambda: student.model.norm.weight.data.fill_(float("nan")))
    with pytest.raises(EngineError, match="step 3") as raised:
        trainer.run(poison)
    assert str(tmp_path) in (raised.value.hint or "")
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["step"] == 2 or state["step"] == 1
    assert np.isfinite([item["kl"] for item in state["curve"]]).all()


def test_memory_that_is_too_small_names_what_would_fit(
    teacher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, trainer = make_trainer(teacher, tmp_path, training())

    def exhausted(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(student, "forward", exhausted)
    with pytest.raises(DoesNotFitError) as raised:
        trainer.run(SILENT)
    assert "2 sequences of 24 tokens" in raised.value.message
    assert "--micro-batch 1" in (raised.value.hint or "")


def test_every_window_comes_once_in_each_pass() -> None:
    order = batches(10, 4, seed=5, first_step=0)
    seen = np.concatenate([next(order) for _ in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    later = batches(10, 4, seed=5, first_step=3)
    assert np.array_equal(next(later), seen[12:16])


# --- the whole way


def typed(source: Path, *more: str) -> list[str]:
    return ["compress", str(source), "--length", "64", "--batch", "4", "--micro-batch", "4", *more]


def test_from_teacher_to_a_proven_bundle(
    teacher_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "student"
    options = ("--layers", "3", "--neurons", "64", "--tokens", "1024", "--own-share", "0.5")
    finish = ("--finish", "Q8_0", "--finish-tokens", "256", "--learning-rate", "1e-3")
    assert run_cli(typed(teacher_directory, *options, *finish, "-o", str(output), "--json")) == 0
    document = json.loads(capsys.readouterr().out)
    stages = [(item["stage"], item["text"].split()[0]) for item in document["comparisons"]]
    assert [stage for stage, _ in stages][::2] == ["pruned", "distilled", "quantised to Q8_0", "finished for Q8_0"]
    pruned, distilled = document["comparisons"][1], document["comparisons"][3]
    assert distilled["kl_mean"] < pruned["kl_mean"]
    assert document["layers_kept"][-1] == 3
    card = (output / "README.md").read_text()
    assert document["data_sha256"] in card
    assert "finished for Q8_0" in card
    assert not list(tmp_path.glob(".*"))
    bundle = export(ExportOptions(source=str(output), target="laptop", quant="Q8_0"), tmp_path / "bundle")
    quality = bundle.manifest.quality
    assert quality is not None
    assert quality.token_identity.identical
    assert quality.kl_mean < 0.05


def test_what_is_trained_for_is_what_an_export_stores(teacher: Any) -> None:
    import torch

    from exporter.compress.fake_quant import FakeQuantizer

    name = "model.layers.0.mlp.gate_proj.weight"
    weight = dict(teacher.named_parameters())[name]
    own = weight.detach().clone()
    with FakeQuantizer(teacher, {name: "Q4_0"}).applied():
        inside = weight.detach().clone()
    raw = ggml.quantize(own.numpy(), "Q4_0")
    assert np.array_equal(inside.numpy(), ggml.dequantize(raw, "Q4_0", own.numel()).reshape(own.shape))
    assert torch.equal(weight, own)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 9}, "--layers 9: the teacher has 4"),
        ({"neurons": 200}, "--neurons 200: the teacher has 96"),
        ({"heads": 3}, "2 heads share one head of keys"),
        ({"own_share": 1.5}, "from 0 to 1"),
        ({"tokens": -1}, "--tokens"),
        ({"min_decode_tps": 5.0}, "--target"),
    ],
)
def test_what_makes_no_sense_is_refused(
    teacher_directory: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    options = replace(CompressOptions(str(teacher_directory)), **change)
    with pytest.raises(UsageError, match=message):
        compress(options, tmp_path / "student")
    assert not list(tmp_path.iterdir())


def test_other_tokens_cannot_teach(teacher_directory: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    make_tiny_llama(other, vocab=400)
    options = CompressOptions(str(teacher_directory), teacher=str(other))
    with pytest.raises(CheckpointError, match="different tokenizers: they differ from token"):
        compress(options, tmp_path / "student")


def test_a_text_without_a_window_is_refused(teacher_directory: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short")
    with pytest.raises(UsageError, match="nothing to learn from"):
        compress(CompressOptions(str(teacher_directory), texts=(text,), layers=3), tmp_path / "student")
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_a_target_chooses_the_largest_shape_that_meets_the_limits(teacher_directory: Path) -> None:
    free = CompressOptions(str(teacher_directory), target="raspberry-pi-4-2gb", quant="Q8_0")
    full, wanted, found, _ = proposal(free)
    assert found is not None
    assert wanted.layers == full.layers
    limit = int(found.plan.artifact_bytes * 0.9)
    _, smaller, chosen, _ = proposal(replace(free, max_artifact_bytes=limit))
    assert chosen is not None
    assert chosen.plan.artifact_bytes <= limit
    assert (smaller.layers, smaller.neurons) < (wanted.layers, wanted.neurons)
    with pytest.raises(DoesNotFitError, match="the nearest"):
        proposal(replace(free, max_artifact_bytes=1000))
