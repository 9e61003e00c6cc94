"""Pruning and distilling on tiny models: what is cut, what is learned, what a kill leaves, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgelm.bundle import Choice
from edgelm.cli.app import run_cli
from edgelm.errors import CheckpointError, DoesNotFitError, EngineError, UsageError
from edgelm.progress import SILENT
from exporter import ggml
from exporter.checkpoint import open_checkpoint, open_source
from exporter.compress import decoders as decoders_module
from exporter.compress import importance, surgery
from exporter.compress import training as training_module
from exporter.compress.data import Corpus, batches
from exporter.compress.pipeline import compress, proposal
from exporter.compress.run import CompressOptions
from exporter.compress.shape import Shape, shape_of, wanted_shape
from exporter.compress.training import Trainer, TrainingOptions, training_bytes
from exporter.given_types import read_types
from exporter.options import ExportOptions
from exporter.pipeline import export
from exporter.reference import open_torch_model
from exporter.token_identity import open_tokenizer
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
    with open_torch_model(open_checkpoint(open_source(str(teacher_directory))), SILENT, device="cpu") as model:
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


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_family_is_cut_by_its_own_axes(family: str) -> None:
    """With an output table of its own, biases (qwen2) and norms of heads (qwen3); what goes reaches nothing."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family, vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    dead = list(range(0, 96, 3))
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[:, dead] = 0
        layer.self_attn.o_proj.weight.data[:, :32] = 0
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    wanted = wanted_shape(shape_of(config), layers=2, neurons=64, heads=1)
    student = cut_to(model, wanted)
    assert shape_of(student.config) == wanted
    assert student.lm_head.weight.data_ptr() != student.model.embed_tokens.weight.data_ptr()
    assert np.abs(logits(student).numpy() - logits(model).numpy()).max() < 1e-4


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


def test_ctrl_c_before_the_first_step_leaves_nothing_in_the_way(
    teacher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, trainer = make_trainer(teacher, tmp_path, training(steps=2))
    monkeypatch.setattr(student, "forward", lambda *_, **__: raising(KeyboardInterrupt())())
    with pytest.raises(KeyboardInterrupt):
        trainer.run(SILENT)
    _, again = make_trainer(teacher, tmp_path, training(steps=2))
    again.run(SILENT)
    assert [item.step for item in again.curve] == [1, 2]


def test_ctrl_c_in_the_middle_of_an_update_keeps_the_state_before_it(teacher: Any, tmp_path: Path) -> None:
    _, whole = make_trainer(teacher, tmp_path / "whole", training())
    whole.run(SILENT)
    _, killed = make_trainer(teacher, tmp_path / "killed", training(save_every_s=0))
    optimizer = killed._state.optimizer
    update = optimizer.step

    def interrupted() -> None:
        update()
        if len(killed.curve) == 3:
            raise KeyboardInterrupt

    optimizer.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        killed.run(SILENT)
    _, resumed = make_trainer(teacher, tmp_path / "killed", training())
    resumed.run(SILENT)
    assert resumed.curve == whole.curve


def test_gradients_that_are_no_numbers_do_not_reach_the_weights(teacher: Any, tmp_path: Path) -> None:
    student, trainer = make_trainer(teacher, tmp_path, training(save_every_s=0))
    student.model.norm.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(EngineError, match="step 1") as raised:
        trainer.run(SILENT)
    assert raised.value.hint == "start again with a lower --learning-rate"
    assert all(np.isfinite(item.detach().numpy()).all() for item in student.parameters())


def test_a_state_that_is_damaged_is_named(teacher: Any, tmp_path: Path) -> None:
    _, trainer = make_trainer(teacher, tmp_path, training(steps=2))
    trainer.run(SILENT)
    next(tmp_path.glob("*.safetensors")).write_bytes(b"half of it")
    _, again = make_trainer(teacher, tmp_path, training(steps=3))
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
        again.run(SILENT)


def test_a_micro_batch_that_memory_cannot_hold_is_refused_before_the_first_step(
    teacher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, trainer = make_trainer(teacher, tmp_path, training())
    fixed, each = training_bytes(student, 24)
    for room, hint in ((fixed + 1.5 * each, "--micro-batch 1"), (fixed + 0.5 * each, "a shorter --length")):
        monkeypatch.setattr(training_module, "available_memory", lambda room=room: Choice(value=room, reason="free"))
        with pytest.raises(DoesNotFitError, match="2 sequences of 24 tokens") as raised:
            trainer.run(SILENT)
        assert hint in (raised.value.hint or "")
    assert trainer.curve == ()


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
        ({"own_tokens": 1000}, "none are asked for"),
        ({"tokens": -1}, "--tokens"),
        ({"min_decode_tps": 5.0}, "--target"),
        ({"target": "host", "heads": 2}, "none of --layers, --neurons, --heads and --hidden"),
        ({"tokens": 100}, "less than one step"),
        ({"finish": "auto"}, "measured on a student that is there"),
        ({"finish": "Q99"}, "'Q99' is no quantisation"),
        ({"hidden": 32, "hidden_weight": 1.0}, "the teacher's have 64 numbers, the student's 32"),
        ({"hidden": 32, "attention_weight": 1.0}, "the teacher's have 64 numbers, the student's 32"),
        ({"teacher": "elsewhere", "hidden_weight": 1.0}, "another --teacher has none"),
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


@pytest.fixture
def short_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where figures are not what is looked at."""
    monkeypatch.setattr(decoders_module, "EVALUATION_TOKENS", 300)


class Crash:
    """A progress that ends the run in the second step of the n-th training."""

    def __init__(self, training: int) -> None:
        self.left = training

    def stage(self, name: str, *_: object, **__: object) -> Any:
        if name != "distilling":
            return SILENT.stage(name, 1)
        self.left -= 1
        return StopAfter(2, raising(PowerCut())) if self.left == 0 else SILENT.stage(name, 1)


@pytest.mark.usefixtures("short_comparisons")
def test_a_compression_killed_in_either_training_ends_as_if_it_had_not_been(
    teacher_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_module, "_SAVE_EVERY_S", 0.0)
    options = CompressOptions(
        str(teacher_directory), layers=3, neurons=70, length=64, batch=4, tokens=1024, own_share=0.5, finish="Q8_0",
        finish_tokens=768,
    )  # fmt: skip
    whole = compress(options, tmp_path / "whole")
    for training_number in (1, 2):
        with pytest.raises(PowerCut):
            compress(options, tmp_path / "killed", progress=Crash(training_number))
        assert (tmp_path / ".killed.training" / "comparisons.json").is_file()
    assert len(list((tmp_path / ".killed.training").glob("*/state.json"))) == 2
    resumed = compress(options, tmp_path / "killed")
    unlike = {"elapsed_s"}
    assert resumed.record.model_dump(exclude=unlike) == whole.record.model_dump(exclude=unlike)
    assert resumed.record.tokens == 1024 + 768
    assert any("neurons: rows of 70" in remark for remark in resumed.record.remarks)
    for name in ("model.safetensors", "training.jsonl"):
        assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes()
    steps = [json.loads(line) for line in (whole.path / "training.jsonl").read_text().splitlines()]
    assert [item["stage"] for item in steps] == ["distil"] * 4 + ["finish"] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


@pytest.mark.usefixtures("short_comparisons")
def test_a_state_is_its_runs_own(teacher_directory: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Some words to learn from, and again some words. " * 200)
    options = CompressOptions(
        str(teacher_directory), layers=3, length=64, batch=4, tokens=1024, texts=(text,), own_share=0.5
    )
    with pytest.raises(PowerCut):
        compress(options, tmp_path / "student", progress=Crash(1))
    kept = sorted((tmp_path / ".student.training").iterdir())
    assert "own_words.npy" in [path.name for path in kept]
    for other in (replace(options, seed=1), replace(options, layers=2)):
        with pytest.raises(UsageError, match="other settings or files"):
            compress(other, tmp_path / "student")
    content = text.read_text()
    text.write_text(content + "More.")
    with pytest.raises(UsageError, match="other settings or files"):
        compress(options, tmp_path / "student")
    assert sorted((tmp_path / ".student.training").iterdir()) == kept
    text.write_text(content)
    slower = compress(replace(options, learning_rate=1e-5, micro_batch=1), tmp_path / "student")
    assert slower.record.settings["learning_rate"] == 1e-5


def stored_as(bundle: Any) -> dict[str, str]:
    return {item.name: item.type for item in bundle.manifest.plan.tensors}


@pytest.mark.usefixtures("short_comparisons")
def test_an_export_stores_exactly_what_a_student_was_finished_for(tmp_path: Path) -> None:
    """By the name of the mix, by the student's record, and by the types of another bundle."""
    import torch

    from exporter.compress.fake_quant import quantized

    teacher_directory, student = tmp_path / "teacher", tmp_path / "student"
    make_tiny_llama(teacher_directory, layers=3, hidden=256, heads=4, kv_heads=2, ffn=512, tied=False)
    options = CompressOptions(
        str(teacher_directory), layers=2, neurons=256, length=64, batch=4, tokens=0, finish="Q4_K_M", finish_tokens=512
    )
    types = compress(options, student).record.types
    assert types is not None
    assert len(set(types.values())) > 2
    plain = ExportOptions(source=str(student), verify=False)
    named = export(replace(plain, quant="Q4_K_M"), tmp_path / "named")
    taken = export(replace(plain, types=read_types(student)), tmp_path / "taken")
    assert stored_as(named) == stored_as(taken) == types
    artefacts = [open_checkpoint(open_source(str(item.path / "model.gguf"))) for item in (named, taken)]
    name = "blk.1.ffn_down.weight"
    source = open_checkpoint(open_source(str(student))).load("model.layers.1.mlp.down_proj.weight")
    expected = quantized(torch.from_numpy(source), types[name]).numpy()
    for artefact in artefacts:
        assert np.array_equal(artefact.load(name), expected)

    mixed = export(
        replace(plain, quant="Q4_0", type_overrides=(("ffn_down", "Q8_0"), ("attn_v", "Q5_K"))), tmp_path / "mixed"
    )
    again = CompressOptions(
        str(student), teacher=str(teacher_directory), length=64, batch=4, tokens=0, finish=str(mixed.path),
        finish_tokens=512, own_share=0.5,
    )  # fmt: skip
    finished = compress(again, tmp_path / "finished")
    assert finished.record.types == stored_as(mixed)
    assert "the teacher's own words" in {item.text for item in finished.record.comparisons}
    assert (finished.record.shape_teacher, finished.record.shape_source) == (
        "3 layers, 512 neurons, 2 KV heads, width 256",
        "2 layers, 256 neurons, 2 KV heads, width 256",
    )
    bundle = export(replace(plain, source=str(finished.path), types=read_types(mixed.path)), tmp_path / "bundle")
    assert stored_as(bundle) == stored_as(mixed)


def test_types_of_another_model_are_not_taken(teacher_directory: Path, tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "smaller", layers=2)
    bundle = export(ExportOptions(source=str(tmp_path / "smaller"), quant="Q8_0", verify=False), tmp_path / "bundle")
    types = read_types(bundle.path)
    with pytest.raises(UsageError, match=r"of another model: blk\.2.*no type is given"):
        export(ExportOptions(source=str(teacher_directory), types=types), tmp_path / "other")
    wide = tuple((name, "Q4_K" if "ffn_down" in name else kind) for name, kind in types)
    with pytest.raises(UsageError, match="have 128 numbers, Q4_K stores blocks of 256"):
        export(ExportOptions(source=str(tmp_path / "smaller"), types=wide), tmp_path / "other")
    with pytest.raises(UsageError, match="neither --quant nor --type"):
        export(ExportOptions(source=str(tmp_path / "smaller"), quant="Q8_0", types=types), tmp_path / "other")
    for directory, message in ((teacher_directory, "neither a bundle nor a student"), (tmp_path, "names no types")):
        with pytest.raises(UsageError, match=message):
            read_types(directory)


@pytest.mark.usefixtures("short_comparisons")
def test_a_gguf_file_can_teach(teacher_directory: Path, tmp_path: Path) -> None:
    """Its tokenizer and ends of text come from metadata; the student predicts as the pruned checkpoint does."""
    bundle = export(ExportOptions(source=str(teacher_directory), quant="F32", verify=False), tmp_path / "teacher")
    students = {}
    for name, source in (("gguf", bundle.path / "model.gguf"), ("directory", teacher_directory)):
        options = CompressOptions(str(source), layers=3, neurons=64, tokens=0, length=64)
        students[name] = compress(options, tmp_path / name)
    config = json.loads((tmp_path / "gguf" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert students["gguf"].record.layers_kept == students["directory"].record.layers_kept
    found = [item.record.comparisons[0].kl_mean for item in students.values()]
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    again = export(ExportOptions(source=str(tmp_path / "gguf"), quant="Q8_0", verify=False), tmp_path / "bundle")
    ids = [
        open_tokenizer((item.path / "tokenizer.json").read_text(), "tokenizer.json").encode("Prüfe 12.5%, bitte!").ids
        for item in (bundle, again)
    ]
    assert ids[0] == ids[1]
    assert (again.path / "chat_template.jinja").read_text() == (bundle.path / "chat_template.jinja").read_text()
