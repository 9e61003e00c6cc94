"""ONNX decoders from tiny random checkpoints, against transformers and against themselves."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from edgelm.bundle import TensorPlan
from edgelm.errors import CheckpointError, ContextOverflowError, EngineError, UsageError
from exporter.architectures import describe
from exporter.checkpoint import open_checkpoint, open_source
from exporter.onnx_types import parse_type
from exporter.onnx_writer import WeightSource, write_onnx
from runtime.engine import Chunk, EngineInterruptedError, EngineOptions
from runtime.engines.onnx import OnnxEngine, load_engine
from tests.tiny_models import make_tiny_llama

pytestmark = pytest.mark.tiny

TypeOf = Callable[[str], str]
OPTIONS = EngineOptions(context=512, sequences=4, threads_decode=2, threads_prefill=2, all_logits=True)


def build(source: Path, directory: Path, type_of: TypeOf) -> Path:
    """Write the ONNX model of a checkpoint with a type per matrix; norms and biases stay float32."""
    directory.mkdir(exist_ok=True)
    checkpoint = open_checkpoint(open_source(str(source)))
    description = describe(checkpoint, "onnx")
    plans = []
    for item in description.tensors:
        kind = parse_type(type_of(item.name) if len(item.shape) == 2 else "fp32")
        plans.append(
            TensorPlan(
                name=item.name,
                source_name=item.source_name,
                shape=item.shape,
                type=kind.name,
                size_bytes=kind.size_bytes(item.shape),
                reason="test",
            )
        )
    return write_onnx(directory, WeightSource(checkpoint), description, plans, context=512, threads=2)[0]


def tokens(count: int, seed: int = 0, vocabulary: int = 512) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, vocabulary, count)]


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def mean_kl(reference: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    expected, actual = log_softmax(reference), log_softmax(other)
    return float((np.exp(expected) * (expected - actual)).sum(axis=-1).mean())


def transformers_logits(source: Path, ids: list[int]) -> npt.NDArray[np.float32]:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        logits: npt.NDArray[np.float32] = model(torch.tensor([ids])).logits[0].numpy()
    return logits


SHAPES = {
    "tied": {"tied": True},
    "untied": {"tied": False},
    "one kv head": {"kv_heads": 1, "tied": False},
    "odd widths": {"hidden": 144, "heads": 9, "kv_heads": 3, "ffn": 200},
}


@pytest.fixture(params=SHAPES, ids=list(SHAPES))
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "source", **SHAPES[request.param])


@pytest.fixture
def engine(tmp_path: Path) -> OnnxEngine:
    source = make_tiny_llama(tmp_path / "source")
    return load_engine(build(source, tmp_path / "out", lambda _: "int4-32-asym"), OPTIONS)


@pytest.mark.reference
def test_float_prefill_and_decode_equal_transformers(source: Path, tmp_path: Path) -> None:
    ids = tokens(300)
    expected = transformers_logits(source, ids)
    engine = load_engine(build(source, tmp_path / "out", lambda _: "fp32"), OPTIONS)
    prefill = engine.forward([Chunk(0, ids, "all")]).copy()
    assert mean_kl(expected, prefill) < 1e-5
    engine.truncate(290)
    decoded = np.concatenate([engine.forward([Chunk(0, [token])]).copy() for token in ids[290:]])
    assert mean_kl(expected[290:], decoded) < 1e-5


@pytest.mark.reference
def test_eight_bits_stay_close_to_transformers(source: Path, tmp_path: Path) -> None:
    ids = tokens(200)
    engine = load_engine(build(source, tmp_path / "out", lambda _: "int8"), OPTIONS)
    assert mean_kl(transformers_logits(source, ids), engine.forward([Chunk(0, ids, "all")])) < 2e-3


@pytest.mark.reference
@pytest.mark.parametrize("kind", ["int4-16", "int4-32-asym", "int4-64-asym", "int4-128", "int8-128-asym", "int8-64"])
def test_every_type_computes_what_its_integers_mean(kind: str, tmp_path: Path) -> None:
    """The graph against transformers with the dequantised weights: only the kernels' 8-bit activations differ."""
    safetensors = pytest.importorskip("safetensors.numpy")
    from exporter.onnx_quantize import dequantize_rows, quantize_rows

    source = make_tiny_llama(tmp_path / "source", hidden=80, heads=5, kv_heads=1, ffn=152)
    path = build(source, tmp_path / "out", lambda _: kind)
    weights = safetensors.load_file(source / "model.safetensors")
    for name, values in weights.items():
        if values.ndim == 2:
            weights[name] = dequantize_rows(quantize_rows(values, parse_type(kind)), parse_type(kind), values.shape[1])
    safetensors.save_file(
        {name: np.ascontiguousarray(values) for name, values in weights.items()}, source / "model.safetensors"
    )
    ids = tokens(100)
    logits = load_engine(path, OPTIONS).forward([Chunk(0, ids, "all")])
    assert mean_kl(transformers_logits(source, ids), logits) < 2e-3


@pytest.mark.reference
def test_mixed_types_per_tensor(tmp_path: Path) -> None:
    source = make_tiny_llama(tmp_path / "source", tied=False)

    def type_of(name: str) -> str:
        return "fp32" if "attn_k" in name else "int8-16" if "token_embd" in name else "int8-64-asym"

    ids = tokens(100)
    logits = load_engine(build(source, tmp_path / "out", type_of), OPTIONS).forward([Chunk(0, ids, "all")])
    assert mean_kl(transformers_logits(source, ids), logits) < 2e-3


def test_heads_that_the_operator_cannot_compute_are_refused(tmp_path: Path) -> None:
    source = make_tiny_llama(tmp_path / "source", hidden=60, heads=3, kv_heads=3)
    with pytest.raises(CheckpointError, match="multiple of 8, these have 20"):
        build(source, tmp_path / "out", lambda _: "int8")


def test_graph_is_valid_and_states_its_versions(tmp_path: Path) -> None:
    path = build(make_tiny_llama(tmp_path / "source"), tmp_path / "out", lambda _: "int8")
    onnx.checker.check_model(path, full_check=False)
    model = onnx.load(path, load_external_data=False)
    assert {item.domain: item.version for item in model.opset_import} == {"": 23, "com.microsoft": 1}
    assert model.ir_version == 11
    assert {
        entry.value for item in model.graph.initializer for entry in item.external_data if entry.key == "location"
    } == {"model.onnx.data"}


def test_tied_table_is_stored_once(tmp_path: Path) -> None:
    sizes = {}
    for tied in (True, False):
        source = make_tiny_llama(tmp_path / f"source-{tied}", tied=tied)
        path = build(source, tmp_path / f"out-{tied}", lambda _: "int8")
        sizes[tied] = path.with_suffix(".onnx.data").stat().st_size
    assert sizes[False] - sizes[True] >= 512 * 64 * 9 // 8


def test_long_prompts_in_steps_equal_one_step(engine: OnnxEngine) -> None:
    ids = tokens(400)
    whole = engine.forward([Chunk(0, ids, "last")]).copy()
    for start in range(0, 400, 100):
        pieces = engine.forward([Chunk(1, ids[start : start + 100], "last")])
    assert mean_kl(whole, pieces) < 1e-4


def test_truncated_sequences_equal_fresh_ones(engine: OnnxEngine) -> None:
    first, second = tokens(60, seed=1), tokens(40, seed=2)
    engine.forward([Chunk(0, first, "none")])
    engine.truncate(20)
    assert engine.length() == 20
    continued = engine.forward([Chunk(0, second, "last")]).copy()
    fresh = engine.forward([Chunk(1, [*first[:20], *second], "last")])
    assert mean_kl(fresh, continued) < 1e-4


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 0), (2, 1), (0, 2), (1, 3, 0)])
def test_sequences_computed_together_equal_single_ones(engine: OnnxEngine, order: tuple[int, ...]) -> None:
    prompts = {sequence: tokens(10 + 7 * sequence, seed=sequence) for sequence in range(4)}
    engine.forward([Chunk(sequence, prompt, "none") for sequence, prompt in prompts.items()])
    together = engine.forward([Chunk(sequence, [sequence + 5], "last") for sequence in order]).copy()
    assert together.shape == (len(order), 512)
    for row, sequence in enumerate(order):
        engine.truncate(0, sequence)
        alone = engine.forward([Chunk(sequence, [*prompts[sequence], sequence + 5], "last")])
        assert mean_kl(alone, together[row : row + 1]) < 1e-4
    idle = set(range(4)) - set(order)
    for sequence in idle:
        alone = engine.forward([Chunk(sequence, [9], "last")]).copy()
        engine.truncate(0, sequence)
        assert mean_kl(engine.forward([Chunk(sequence, [*prompts[sequence], 9], "last")]), alone) < 1e-4


def test_prompts_and_single_tokens_in_one_call(engine: OnnxEngine) -> None:
    engine.forward([Chunk(0, tokens(5), "none"), Chunk(2, tokens(9), "none")])
    rows = engine.forward([Chunk(2, [7], "last"), Chunk(1, tokens(200), "all"), Chunk(0, [8], "none")]).copy()
    assert rows.shape == (201, 512)
    engine.truncate(0, 1)
    assert mean_kl(engine.forward([Chunk(1, tokens(200), "all")]), rows[1:]) < 1e-6
    engine.truncate(0, 2)
    assert mean_kl(engine.forward([Chunk(2, [*tokens(9), 7], "last")]), rows[:1]) < 1e-4
    assert [engine.length(sequence) for sequence in range(3)] == [6, 200, 10]


def test_full_neighbours_are_left_alone(engine: OnnxEngine) -> None:
    engine.forward([Chunk(1, tokens(512), "none"), Chunk(0, tokens(3), "none"), Chunk(2, tokens(4), "none")])
    before = engine.caches[0][0].read(1, 512).copy()
    engine.forward([Chunk(0, [1]), Chunk(2, [2])])
    np.testing.assert_array_equal(before, engine.caches[0][0].read(1, 512))


def test_context_overflow_is_refused_before_anything_is_computed(engine: OnnxEngine) -> None:
    engine.forward([Chunk(0, tokens(500), "none")])
    with pytest.raises(ContextOverflowError, match="500 tokens and cannot take 13"):
        engine.forward([Chunk(1, [3]), Chunk(0, tokens(13))])
    assert [engine.length(0), engine.length(1)] == [500, 0]
    assert engine.forward([Chunk(0, tokens(12), "last")]).shape == (1, 512)


@pytest.mark.parametrize("wrong", [-1, 512])
def test_tokens_outside_the_vocabulary_are_refused(engine: OnnxEngine, wrong: int) -> None:
    with pytest.raises(EngineError, match=f"token {wrong} is outside the vocabulary of 512"):
        engine.forward([Chunk(0, [1, wrong])])


def test_an_interrupted_sequence_is_what_it_was(engine: OnnxEngine) -> None:
    engine.forward([Chunk(0, tokens(7), "none")])
    run = engine.session.run_with_iobinding
    steps = []

    class Interrupting:
        def run_with_iobinding(self, *arguments: object) -> None:
            steps.append(1)
            if len(steps) == 2:
                engine.interrupt()
            run(*arguments)

        def io_binding(self) -> object:
            return session.io_binding()

    session, engine.session = engine.session, Interrupting()
    with pytest.raises(EngineInterruptedError):
        engine.forward([Chunk(0, tokens(400), "last")])
    engine.session = session
    assert len(steps) == 2
    assert engine.length() == 7
    engine.forward([Chunk(1, tokens(8), "none")])
    assert engine.forward([Chunk(0, tokens(5), "last")]).shape == (1, 512)


def test_a_closed_engine_refuses(engine: OnnxEngine) -> None:
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.forward([Chunk(0, [1])])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (EngineOptions(threads_decode=1, threads_prefill=2), "same threads"),
        (EngineOptions(kv_type="q8_0"), "KV cache"),
        (EngineOptions(mmap=False), "mmap"),
        (EngineOptions(context=0), "context must be at least 1"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options: EngineOptions, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        load_engine(tmp_path / "model.onnx", options)


def test_a_context_longer_than_the_rotary_table_is_refused(tmp_path: Path) -> None:
    path = build(make_tiny_llama(tmp_path / "source"), tmp_path / "out", lambda _: "int8")
    with pytest.raises(EngineError, match="can compute 1024"):
        load_engine(path, EngineOptions(context=1025))


def test_thread_choice_is_told(engine: OnnxEngine) -> None:
    assert "2 threads, " in engine.info.system
    assert engine.info.threads_decode == engine.info.threads_prefill == 2
    caches = [cache for pair in engine.caches for cache in pair]
    assert engine.info.kv_bytes == sum(prod(cache.shape) * cache.dtype.itemsize for cache in caches)
    assert engine.info.kv_type == "f32"
