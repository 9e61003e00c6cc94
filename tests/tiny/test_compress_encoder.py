"""Pruning and distilling tiny encoders: what is cut, what is learned, what an export makes of it, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgelm.bundle import EncoderRecord
from edgelm.cli.app import run_cli
from edgelm.errors import CheckpointError, UsageError
from edgelm.progress import SILENT
from exporter.compress import encoders as encoders_module
from exporter.compress import importance, surgery
from exporter.compress import training as training_module
from exporter.compress.data import Corpus
from exporter.compress.pipeline import compress, proposal
from exporter.compress.run import CompressOptions
from exporter.compress.shape import Shape, shape_of, wanted_shape
from exporter.compress.training import TrainingOptions
from exporter.compress.vector_training import PADDING, VectorTrainer, pooled
from exporter.embedding_quality import embedder
from exporter.options import ExportOptions
from exporter.pipeline import export
from tests.tiny.test_compress import PowerCut, StopAfter, raising
from tests.tiny_encoders import make_tiny_bert

pytestmark = [pytest.mark.tiny, pytest.mark.reference]
TEXTS = [list(range(5, 30)), list(range(40, 47)), list(range(60, 100))]
MEAN = EncoderRecord(pooling="mean", normalized=True, dimensions=64)


@pytest.fixture(scope="module")
def teacher_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bert(tmp_path_factory.mktemp("encoder"), layers=4)


def random_encoder(family: str) -> Any:
    """A model of a family with random weights, four layers of 64 channels and 96 neurons."""
    import torch
    from transformers import AutoConfig, AutoModel

    names = (
        {"dim": 64, "hidden_dim": 96, "n_layers": 4, "n_heads": 4}
        if family == "distilbert"
        else {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    )
    config = AutoConfig.for_model(family, vocab_size=300, max_position_embeddings=120, **names)
    torch.manual_seed(3)
    model = AutoModel.from_config(config).float().eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
        parameter.requires_grad_(False)
    return surgery.without_pooler(model)


def vectors(model: Any) -> Any:
    return embedder(model, MEAN)(TEXTS)


def pool(states: Any) -> Any:
    import torch

    return pooled(states, torch.ones(states.shape[:2], dtype=torch.bool), MEAN)


def cut_to(model: Any, wanted: Shape, measure: importance.Measure, depth: importance.DepthMeasure) -> Any:
    found = importance.measure(model, TEXTS, wanted, SILENT, units=measure, depth=depth, pool=pool)
    return surgery.cut(model, wanted, surgery.choose(found, shape_of(model.config), wanted))


@pytest.mark.parametrize(
    ("family", "measure", "depth"),
    [
        ("bert", "activation", "influence"),
        ("bert", "fisher", "cosine"),
        ("roberta", "magnitude", "cosine"),
        ("xlm-roberta", "activation", "cosine"),
        ("camembert", "fisher", "influence"),
        ("distilbert", "activation", "influence"),
        ("distilbert", "fisher", "cosine"),
    ],
)
def test_what_does_nothing_is_what_goes(
    family: str, measure: importance.Measure, depth: importance.DepthMeasure
) -> None:
    """A third of the neurons reach nothing and the third layer passes its input on: vectors stay as they are."""
    model = random_encoder(family)
    anatomy = surgery.ANATOMIES[family]
    layers = anatomy.layers_of(model)
    dead = list(range(0, 96, 3))
    for layer in layers:
        layer.get_submodule(anatomy.down).weight.data[:, dead] = 0
    for path in (anatomy.down, anatomy.output):
        layers[2].get_submodule(path).weight.data.zero_()
        layers[2].get_submodule(path).bias.data.zero_()
    # Norms stand behind each part: what they have normalised once they leave alone.
    norms = [module for layer in layers[1:3] for module in layer.modules() if type(module).__name__ == "LayerNorm"]
    for norm in norms:
        norm.weight.data.fill_(1)
        norm.bias.data.zero_()
    wanted = wanted_shape(shape_of(model.config), layers=3, neurons=64)
    student = cut_to(model, wanted, measure, depth)
    assert shape_of(student.config) == wanted
    assert np.abs(vectors(student) - vectors(model)).max() < 1e-4


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_padding_changes_nothing(pooling: Any) -> None:
    import torch

    model, record = random_encoder("roberta"), replace_pooling(pooling)
    windows = padded(TEXTS)
    trainer = VectorTrainer(model, model, Corpus(windows, ()), training(), Path("nowhere"), None, record)
    inputs, mask = trainer._inputs(np.arange(3))
    with torch.no_grad():
        together = pooled(model(**inputs).last_hidden_state, mask, record)
    assert np.abs(together.numpy() - embedder(model, record)(TEXTS)).max() < 1e-5


def replace_pooling(pooling: Any) -> EncoderRecord:
    return MEAN.model_copy(update={"pooling": pooling, "normalized": False})


def padded(texts: list[list[int]]) -> Any:
    windows = np.full((len(texts), max(map(len, texts))), PADDING, np.int32)
    for row, ids in zip(windows, texts, strict=True):
        row[: len(ids)] = ids
    return windows


def training(*, hidden_weight: float = 0.0, micro_batch: int = 2, save_every_s: float = 1e9) -> TrainingOptions:
    return TrainingOptions(
        steps=6, batch=4, micro_batch=micro_batch, learning_rate=2e-3, temperature=1.0, hidden_weight=hidden_weight,
        attention_weight=0.0, matched=(0, 3), seed=1, save_every_s=save_every_s,
    )  # fmt: skip


def make_trainer(directory: Path, options: TrainingOptions) -> tuple[Any, VectorTrainer]:
    rng = np.random.default_rng(3)
    texts = [rng.integers(5, 300, size).tolist() for size in (3, 40, 9, 25, 14, 60, 5, 33, 21, 8)]
    teacher = random_encoder("bert")
    student = cut_to(teacher, wanted_shape(shape_of(teacher.config), layers=2), "activation", "influence")
    return student, VectorTrainer(teacher, student, Corpus(padded(texts), ()), options, directory, None, MEAN)


@pytest.mark.parametrize("hidden_weight", [0.0, 0.5])
def test_a_run_that_was_killed_goes_on_with_the_same_numbers(tmp_path: Path, hidden_weight: float) -> None:
    whole_student, whole = make_trainer(tmp_path / "whole", training(hidden_weight=hidden_weight))
    whole.run(SILENT)
    assert whole.curve[-1].kl < whole.curve[0].kl
    _, killed = make_trainer(tmp_path / "killed", training(hidden_weight=hidden_weight, save_every_s=0))
    with pytest.raises(PowerCut):
        killed.run(Killed(3))
    student, resumed = make_trainer(tmp_path / "killed", training(hidden_weight=hidden_weight))
    resumed.run(SILENT)
    assert resumed.curve == whole.curve
    for ours, theirs in zip(student.parameters(), whole_student.parameters(), strict=True):
        assert np.array_equal(ours.detach().numpy(), theirs.detach().numpy())


class Killed:
    """A progress that ends the run after some steps of training, as a power cut does."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def stage(self, name: str, *_: object, **__: object) -> Any:
        return StopAfter(self.steps, raising(PowerCut())) if name == "distilling" else SILENT.stage(name, 1)


def test_how_many_texts_are_computed_at_once_does_not_matter(tmp_path: Path) -> None:
    curves = []
    for size in (1, 4):
        _, trainer = make_trainer(tmp_path / str(size), training(micro_batch=size))
        trainer.run(SILENT)
        curves.append([item.loss for item in trainer.curve])
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


def test_from_a_sentence_model_to_a_proven_bundle(
    teacher_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "student"
    typed = ["compress", str(teacher_directory), "--layers", "3", "--neurons", "96"]
    typed += ["--tokens", "12000", "--batch", "16", "--learning-rate", "2e-3", "-o", str(output), "--json"]
    assert run_cli([*typed, "--finish", "Q4_0", "--finish-tokens", "4000"]) == 0
    document = json.loads(capsys.readouterr().out)
    found = {item["stage"]: item["cosine_mean"] for item in document["comparisons"]}
    assert list(found) == ["pruned", "distilled", "quantised to Q4_0", "finished for Q4_0"]
    assert found["distilled"] > found["pruned"]
    assert found["finished for Q4_0"] > found["quantised to Q4_0"]
    assert document["comparisons"][0]["texts"] == 120
    card = (output / "README.md").read_text()
    assert f"{found['distilled']:.4f}" in card
    assert "same nearest passage" in card
    steps = [json.loads(line) for line in (output / "training.jsonl").read_text().splitlines()]
    assert {item["stage"] for item in steps} == {"distil", "finish"}
    assert all("distance" in item and "kl" not in item for item in steps)
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
        assert (output / name).read_bytes() == (teacher_directory / name).read_bytes()
    bundle = export(ExportOptions(source=str(output), quant="Q8_0"), tmp_path / "bundle")
    quality = bundle.manifest.embedding_quality
    assert quality is not None
    assert quality.token_identity.identical
    assert quality.cosine_mean > 0.999
    stored = export(ExportOptions(source=str(output), quant="Q4_0", verify=False), tmp_path / "stored")
    assert {item.name: item.type for item in stored.manifest.plan.tensors} == document["types"]


def test_a_compression_that_was_killed_ends_as_if_it_had_not_been(
    teacher_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_module, "_SAVE_EVERY_S", 0.0)
    options = CompressOptions(str(teacher_directory), layers=3, neurons=96, length=64, batch=16, tokens=4000)
    whole = compress(options, tmp_path / "whole")
    with pytest.raises(PowerCut):
        compress(options, tmp_path / "killed", progress=Killed(2))
    resumed = compress(options, tmp_path / "killed")
    assert resumed.record.comparisons == whole.record.comparisons
    assert (resumed.path / "training.jsonl").read_bytes() == (whole.path / "training.jsonl").read_bytes()
    assert (resumed.path / "model.safetensors").read_bytes() == (whole.path / "model.safetensors").read_bytes()


def test_texts_are_sentences_and_paragraphs() -> None:
    text = "The first one is here. And a second one.\n\nAnother paragraph of words.\n\nOf"
    words = [" ".join(map(str, piece)) for piece in encoders_module._pieces(text, WordCounter(), 8)]
    assert words == [
        "The first one is here.", "And a second one.", "The first one is here. And a second",
        "Another paragraph of words.",
    ]  # fmt: skip


def test_spans_are_of_all_lengths_and_places() -> None:
    streams = [list(range(1000)), list(range(5000, 5200))]
    spans = list(encoders_module._spans(streams, 60, 20_000, 1))
    assert spans == list(encoders_module._spans(streams, 60, 20_000, 1))
    assert all(span == list(range(span[0], span[0] + len(span))) for span in spans)
    assert {min(map(len, spans)), max(map(len, spans))} == {3, 60}
    assert 20_000 <= sum(map(len, spans)) < 20_060
    assert 0.1 < sum(span[0] >= 5000 for span in spans) / len(spans) < 0.25
    assert list(encoders_module._spans(streams, 60, -5, 1)) == []


class WordCounter:
    """A tokenizer whose ids are the words themselves."""

    def encode(self, text: str, *, add_special_tokens: bool) -> Any:
        assert not add_special_tokens
        return type("Encoding", (), {"ids": text.split()})


def test_a_dry_run_tells_the_shape(teacher_directory: Path) -> None:
    full, wanted, found, remarks = proposal(CompressOptions(str(teacher_directory), layers=2, neurons=70))
    assert (full.layers, full.neurons, wanted.layers, wanted.neurons, found) == (4, 128, 2, 70, None)
    assert any("neurons: rows of 70" in remark for remark in remarks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 32}, "--hidden does not go with an encoder"),
        ({"heads": 2}, "--heads does not go with an encoder"),
        ({"target": "host"}, "--target does not go with an encoder"),
        ({"own_share": 0.5}, "an encoder writes no text"),
        ({"temperature": 2.0}, "--temperature"),
        ({"attention_weight": 1.0}, "only --hidden-weight"),
        ({"depth": "kl"}, "--depth-by cosine is its like"),
        ({"layers": 5}, "--layers 5: the teacher has 4"),
        ({"tokens": 40}, "less than one step, 8 texts of about"),
    ],
)
def test_what_an_encoder_has_not_is_refused(
    teacher_directory: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    options = replace(CompressOptions(str(teacher_directory)), **change)
    with pytest.raises(UsageError, match=message):
        compress(options, tmp_path / "student")
    assert not list(tmp_path.iterdir())


def test_a_head_is_not_dropped_in_silence(tmp_path: Path) -> None:
    make_tiny_bert(tmp_path / "labels")
    config = json.loads((tmp_path / "labels" / "config.json").read_text())
    config["architectures"] = ["BertForSequenceClassification"]
    (tmp_path / "labels" / "config.json").write_text(json.dumps(config))
    (tmp_path / "labels" / "modules.json").unlink()
    with pytest.raises(CheckpointError, match="its head would be lost"):
        compress(CompressOptions(str(tmp_path / "labels"), layers=1), tmp_path / "student")


def test_files_outside_of_a_checkpoint_stay_where_they_are(tmp_path: Path) -> None:
    """Steps that lead elsewhere are neither read nor written."""
    teacher = make_tiny_bert(tmp_path / "models" / "teacher")
    steps = json.loads((teacher / "modules.json").read_text())
    steps[2]["path"] = "../../elsewhere"
    (teacher / "modules.json").write_text(json.dumps(steps))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("{}")
    student = tmp_path / "a" / "b" / "student"
    compress(CompressOptions(str(teacher), layers=1, tokens=0), student)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "elsewhere", "models"]
    assert [path.name for path in student.iterdir() if path.is_dir()] == ["1_Pooling"]
    steps[1]["path"] = "../../elsewhere"
    (teacher / "modules.json").write_text(json.dumps(steps))
    with pytest.raises(CheckpointError, match="which is no plain name"):
        compress(CompressOptions(str(teacher), layers=1, tokens=0), tmp_path / "other")


def test_a_wider_teacher_is_refused(teacher_directory: Path, tmp_path: Path) -> None:
    make_tiny_bert(tmp_path / "wide", hidden=128)
    options = CompressOptions(str(teacher_directory), teacher=str(tmp_path / "wide"), layers=3)
    with pytest.raises(CheckpointError, match="vectors of 128 numbers"):
        compress(options, tmp_path / "student")
