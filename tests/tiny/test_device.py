"""Where torch computes: what is refused without a GPU, and that everything asked of one stays on it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgelm.cli.app import run_cli
from edgelm.errors import DoesNotFitError, MissingDependencyError
from edgelm.progress import SILENT
from exporter import device as devices
from exporter import onnx_moments, sensitivity
from exporter.checkpoint import open_checkpoint, open_source
from exporter.compress import importance, surgery, writing
from exporter.compress.data import Corpus
from exporter.compress.divergence import divergence
from exporter.compress.pipeline import compress
from exporter.compress.run import CompressOptions
from exporter.compress.shape import shape_of, wanted_shape
from exporter.compress.training import Trainer, TrainingOptions
from exporter.device import DeviceChoice, memory_errors, resolve_device, rounded_products
from exporter.reference import TransformersModel, open_reference
from tests.tiny_models import make_tiny_llama

pytestmark = [pytest.mark.tiny, pytest.mark.reference]
VOCABULARY = 300


@pytest.fixture
def model() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, max_position_embeddings=128,
        attn_implementation="sdpa",
    )  # fmt: skip
    built = LlamaForCausalLM(config).float().eval()
    for parameter in built.parameters():
        parameter.requires_grad_(False)
    return built


# --- without a GPU


@pytest.mark.parametrize("isa", [("avx2", "amx_int8"), ("avx2",)])
def test_training_rounds_factors_where_the_cpu_has_units_for_it(
    model: Any, isa: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def gradient() -> Any:
        weight = model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
        ids = torch.arange(64).reshape(2, 32)
        torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), ids.flatten()).backward()
        found, weight.grad = weight.grad.clone(), None
        return found

    products = torch.backends.mkldnn.matmul
    before, exact = products.fp32_precision, gradient()
    monkeypatch.setattr(devices, "instruction_set", lambda: isa)
    with rounded_products(torch.device("cpu")):
        assert products.fp32_precision == ("bf16" if "amx_int8" in isa else before)
        assert float((gradient() - exact).norm() / exact.norm()) < 0.02
    assert products.fp32_precision == before
    assert torch.equal(gradient(), exact)


def test_a_cpu_build_of_torch_is_named_when_a_gpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(MissingDependencyError, match="is a CPU build") as raised:
        resolve_device("cuda")
    assert "--device cpu" in (raised.value.hint or "")
    chosen = resolve_device("auto")
    assert (chosen.value, "CPU build" in chosen.reason) == ("cpu", True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(MissingDependencyError, match="sees no GPU here"):
        resolve_device("cuda")


def test_a_gpu_that_is_too_small_is_left_alone_or_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A small one")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**31))
    assert resolve_device("auto", 2**29).value == "cuda"
    chosen = resolve_device("auto", 2**31)
    assert (chosen.value, "A small one" in chosen.reason) == ("cpu", True)
    assert resolve_device("cpu").value == "cpu"
    with pytest.raises(DoesNotFitError, match=r"2\.15 GB are needed on A small one, 1\.07 GB are free"):
        resolve_device("cuda", 2**31)


def test_only_lack_of_memory_becomes_an_error_of_ours() -> None:
    with pytest.raises(DoesNotFitError, match="too small for a thing"), memory_errors("a thing", "take less"):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with pytest.raises(RuntimeError, match="something else"), memory_errors("a thing", "take less"):
        raise RuntimeError("something else")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["verify", "nowhere", "--device", "cpu"], "--device needs --reference"),
        (["plan", "nowhere", "--device", "cpu"], "--device need --measure"),
        (["export", "nowhere", "--dry-run", "--no-verify", "--quant", "Q8_0", "--device", "cpu"], "no use here"),
    ],
)
def test_a_device_that_nothing_would_use_is_refused(
    typed: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(typed) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "typed",
    [
        ["verify", "nowhere", "--reference", "nowhere"],
        ["plan", "nowhere", "--measure"],
        ["export", "nowhere", "-o", "bundle"],
    ],
)
def test_a_gpu_that_is_not_there_is_said_before_anything_is_read(
    typed: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_cli([*typed, "--device", "cuda"]) == 1
    told = capsys.readouterr().err
    assert "--device cuda: " in told
    assert "use --device cpu" in " ".join(told.split())


# --- what is asked of a device stays there: the meta device refuses to meet tensors of another, as a GPU does


@pytest.fixture
def meta_model(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    import torch
    import transformers.masking_utils

    # Both look at values, or at a device's autocast, which a device without memory does not have.
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", lambda *_: None)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    return model.to("meta")


def test_a_student_is_cut_and_trained_where_its_teacher_is(model: Any, meta_model: Any, tmp_path: Path) -> None:
    full = shape_of(model.config)
    wanted = wanted_shape(full, layers=2, neurons=64)
    order = importance.Importance((0, 1, 2), *_scores(full))
    student = surgery.cut(meta_model, wanted, surgery.choose(order, full, wanted))
    tensors = [*student.parameters(), *student.buffers()]
    assert {item.device.type for item in tensors} == {"meta"}
    options = TrainingOptions(
        steps=2, batch=4, micro_batch=2, learning_rate=1e-3, temperature=2.0, hidden_weight=1.0, attention_weight=1.0,
        matched=(1, 2), seed=0,
    )  # fmt: skip
    corpus = Corpus(np.arange(4 * 32, dtype=np.int32).reshape(4, 32), ())
    trainer = Trainer(meta_model, student, corpus, options, tmp_path)
    with pytest.raises(RuntimeError, match="item"):  # the loss is read last, which has no value there
        trainer._gradients(np.arange(4))
    assert all(item.grad is not None and item.grad.device.type == "meta" for item in student.parameters())


def test_sensitivity_is_measured_where_the_model_is(meta_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch, "bincount", lambda ids, minlength: torch.zeros(minlength, device=ids.device))
    names = {
        "blk.1.ffn_up.weight": "model.layers.1.mlp.up_proj",
        "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj",
    }
    modules = {name: (meta_model.get_submodule(place), slice(None)) for name, place in names.items()}
    run = sensitivity.Pass(meta_model, sensitivity.Collector(modules), "token_embd.weight")
    with SILENT.stage("measuring", 1) as stage:
        run.over([range(3, 35), range(60, 92)], stage)
    sums = [*run.collector.sums.values(), run.head_sums]
    tensors = [item for one in sums for item in (one.squares, one.moment, one.weight, one.rows)]
    assert {item.device.type for item in (*tensors, run.lookup_counts, run.lookup_squares)} == {"meta"}
    assert [one.tokens for one in sums] == [64, 64, 64]


def test_hidden_states_go_through_the_layers_where_they_are(meta_model: Any) -> None:
    text = onnx_moments.CalibrationWindows((tuple(range(3, 35)),), "a text")
    passed: list[None] = []
    reader = onnx_moments._Reader(meta_model, None, text, lambda: passed.append(None))  # type: ignore[arg-type]
    reader._look_at_calls()
    reader._states = [reader._embedded(ids) for ids in reader._ids]
    for index in range(3):
        assert reader._pass(index, ()) == {}
    assert {state.device.type for state in reader._states} == {"meta"}


def test_logits_are_copied_to_the_host_and_nothing_else_is(meta_model: Any) -> None:
    scoring = TransformersModel(meta_model, "5")
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
        scoring.append([3, 4, 5])
    assert scoring._cache.get_seq_length() == 3
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
        scoring.append([6])
    assert scoring._cache.get_seq_length() == 4


def _scores(full: Any) -> tuple[Any, Any, Any]:
    import torch

    shapes = ((full.layers, full.neurons), (full.layers, full.kv_heads), (full.hidden,))
    neurons, heads, hidden = (torch.rand(shape, dtype=torch.float64) for shape in shapes)
    return neurons, heads, hidden


# --- the gradient of a divergence


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_gradient_that_is_written_down_is_that_of_autograd(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from torch.nn.functional import kl_div, log_softmax

    monkeypatch.setattr("exporter.compress.divergence._BLOCK", 40 * 3)  # blocks of three positions
    generator = torch.Generator().manual_seed(1)
    teacher, student = (torch.randn(2, 5, 40, generator=generator) * 3 for _ in range(2))
    expected, found = student.clone().requires_grad_(True), student.clone().requires_grad_(True)
    terms = (log_softmax(item / temperature, dim=-1) for item in (expected, teacher))
    wanted = kl_div(*terms, log_target=True, reduction="sum") / 10
    got = divergence(teacher, found, temperature)
    assert float(got.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    (wanted * 3).backward()
    (got * 3).backward()
    assert expected.grad is not None
    assert found.grad is not None
    assert torch.allclose(found.grad, expected.grad, rtol=1e-5, atol=1e-8)


# --- the teacher's own words


def test_reserved_room_holds_what_a_growing_cache_holds(model: Any) -> None:
    import torch

    ids = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))
    cache = writing.reserved_cache(model, 12)
    with torch.inference_mode():
        cuts = (ids[:, :5], ids[:, 5:6], ids[:, 6:])
        parts = [model(part, past_key_values=cache, use_cache=True).logits for part in cuts]
        expected = model(ids, use_cache=False).logits
    assert cache.get_seq_length() == 12
    assert np.abs(torch.cat(parts, dim=1).numpy() - expected.numpy()).max() < 1e-5


def test_words_go_on_after_the_batches_that_are_on_disk(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_CPU_BATCH", 4)
    whole = writing.own_words(model, 10, 16, 7, writing.starts((), 16), tmp_path / "whole", SILENT)
    assert whole.shape == (10, 16)
    assert len({tuple(row) for row in whole.tolist()}) == 10
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == ["0.npy", "4.npy", "8.npy"]
    (tmp_path / "whole" / "4.npy").rename(tmp_path / "4.npy")
    (tmp_path / "whole" / "8.npy").unlink()
    assert np.array_equal(
        writing.own_words(model, 10, 16, 7, writing.starts((), 16), tmp_path / "whole", SILENT), whole
    )
    assert not np.array_equal(
        writing.own_words(model, 10, 16, 8, writing.starts((), 16), tmp_path / "other", SILENT), whole
    )


def test_a_user_s_turn_is_opened_and_cool_words_are_the_likely_ones(model: Any, tmp_path: Path) -> None:
    kinds = writing.starts((5, 6, 7), 12)
    assert [bool(kind.opening) for kind in kinds] == [False, True, False, True]
    assert not any(kind.opening for kind in writing.starts((5, 6, 7), 6))
    assert writing.told(kinds) == "half of them conversations, temperatures 1, 0.7"
    rows = writing.own_words(model, 8, 12, 7, kinds, tmp_path / "warm", SILENT)
    assert (rows[1::2, :3] == (5, 6, 7)).all()
    assert len({tuple(row) for row in rows[1::2, 3:].tolist()}) == 4
    cold = [writing.Start((5, 6, 7), 1e-6)]
    rows = writing.own_words(model, 2, 12, 7, cold, tmp_path / "cold", SILENT)
    assert np.array_equal(rows[0], rows[1])


def test_a_batch_that_does_not_fit_is_halved(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def refuse_more_than_three(_module: Any, arguments: tuple[Any, ...]) -> None:
        tried.append(len(arguments[0]))
        if tried[-1] > 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model.register_forward_pre_hook(refuse_more_than_three)
    assert len(writing.own_words(model, 6, 8, 7, writing.starts((), 16), tmp_path, SILENT)) == 6
    assert tried == [6, *[3] * 14]


# --- on a GPU


@pytest.fixture
def tiny_directory(tmp_path: Path) -> Path:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU here")
    directory = tmp_path / "model"
    directory.mkdir()
    make_tiny_llama(directory, layers=4, hidden=64, heads=4, kv_heads=2, ffn=96)
    return directory


def test_a_gpu_tells_what_a_cpu_tells(tiny_directory: Path) -> None:
    checkpoint = open_checkpoint(open_source(str(tiny_directory)))
    windows = [list(range(3, 67)), list(range(90, 154))]
    devices: tuple[DeviceChoice, ...] = ("cpu", "cuda")
    one, other = (sensitivity.collect(checkpoint, windows, SILENT, device=device) for device in devices)
    for name, item in one.items():
        for field in ("input_squares", "moment", "row_weights", "lookup_weights"):
            expected, found = getattr(item, field), getattr(other[name], field)
            if expected is not None:
                assert np.linalg.norm(found - expected) <= 0.02 * np.linalg.norm(expected), (name, field)
    logits = []
    for device in devices:
        with open_reference(checkpoint, 64, "transformers", SILENT, device=device) as reference:
            logits.append(np.array(reference.append(windows[0])))
            assert reference.name.endswith("float32") == (device == "cpu")
    assert np.abs(logits[0] - logits[1]).max() < 1e-3


def test_a_student_is_distilled_and_finished_on_a_gpu(tiny_directory: Path, tmp_path: Path) -> None:
    options = CompressOptions(
        str(tiny_directory), layers=3, neurons=64, length=64, batch=8, tokens=8192, own_share=0.5, learning_rate=1e-3,
        finish="Q8_0", finish_tokens=1024, device="cuda",
    )  # fmt: skip
    found = {item.stage: item.kl_mean for item in compress(options, tmp_path / "student").record.comparisons}
    assert found["distilled"] < found["pruned"]
    assert found["finished for Q8_0"] < found["pruned"]
