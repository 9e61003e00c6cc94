"""Graphs that compute with float16: against transformers, in every way of the engine, and what of it is refused.

The CPU computes them too, by casts to float32 where it has no kernel: which is how they are proven where no GPU is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from edgelm.bundle import open_bundle
from edgelm.cli.app import run_cli
from edgelm.errors import CheckpointError, UsageError
from exporter.architectures import describe
from exporter.checkpoint import open_checkpoint, open_source
from exporter.onnx_plan import recipe_named, tensor_plans
from exporter.onnx_types import parse_type
from exporter.options import ExportOptions
from exporter.pipeline import export
from exporter.verification import verify
from runtime.engine import Chunk, EngineOptions, Logits
from runtime.engines import onnx as onnx_engine
from runtime.engines.onnx import OnnxEngine, load_engine
from runtime.engines.onnx_cache import DeviceCache
from runtime.settings import Asked, choose_settings
from tests.onnx_parity import CALM, DECODED, ONNX_ROWS, engine_logits, write_model
from tests.parity import VOCABULARY, distance, known_to_transformers, make_checkpoint, transformers_logits
from tests.tiny.test_onnx_engine import mean_kl, tokens
from tests.tiny_models import make_tiny_llama

pytestmark = pytest.mark.tiny

OPTIONS = EngineOptions(context=512, sequences=3, threads_decode=2, threads_prefill=2, all_logits=True)

# Of each way in which a graph is drawn one: windows and soft-caps, norms of heads, rotation before attention, learned
# positions, factors of embeddings, scales that grow with positions, parallel parts, joined matrices.
FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "olmo2",
    "smollm3",
    "ministral3",
    "nemotron",
    "cohere2",
    "gpt_neox",
    "starcoder2, window",
)
BY_NAME = {row.name: row for row in ONNX_ROWS}


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    row = BY_NAME[name]
    if not known_to_transformers(row):
        pytest.skip(f"transformers 4 does not know {row.model_type}: make test-transformers5")
    model = make_checkpoint(row, tmp_path / "model", gain=CALM)
    context, length = max(zip(row.contexts, row.lengths, strict=True))
    ids = np.random.default_rng(1).integers(3, VOCABULARY, length).tolist()
    theirs = transformers_logits(model, ids)
    path = write_model(open_checkpoint(open_source(str(tmp_path / "model"))), tmp_path / "fp16", "fp16", context)
    prompt, decoded = engine_logits(path, ids, context)
    assert 1e-9 < distance(prompt, theirs).kl_mean < 1e-4
    assert distance(decoded, theirs[-DECODED:]).kl_mean < 1e-4
    graph = onnx.load(path, load_external_data=False).graph
    floats = {item.data_type for item in graph.initializer} - {TensorProto.INT64}
    # What grows with positions is computed in float32.
    assert floats == {TensorProto.FLOAT16} or {item.name for item in graph.initializer if item.data_type == 1} <= {
        "sharpness.one",
        "sharpness.growth",
        "logits.cap",
        "logits.inverse_cap",
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("source"), hidden=128, ffn=256)


class Load(Protocol):
    """Writes and loads a model of a recipe."""

    def __call__(self, quant: str, *providers: str) -> OnnxEngine: ...


def written(source: Path, directory: Path, quant: str) -> Path:
    return write_model(open_checkpoint(open_source(str(source))), directory, quant, 512)


def answers(engine: OnnxEngine) -> Logits:
    """Prompts, single tokens of several sequences, what comes behind tokens taken back, and behind a state put back."""
    found = [
        engine.forward([Chunk(0, tokens(150), "all")]).copy(),
        engine.forward([Chunk(2, tokens(9), "last")]).copy(),
    ]
    found += [engine.forward([Chunk(0, [5]), Chunk(2, [6])]).copy() for _ in range(3)]
    engine.truncate(100)
    found.append(engine.forward([Chunk(0, tokens(30, seed=3), "all")]).copy())
    kept = engine.state(0).copy()
    engine.restore(kept, 130, 1)
    found.append(engine.forward([Chunk(1, [7])]).copy())
    return np.concatenate(found)


@pytest.fixture
def engine_of(source: Path, tmp_path: Path) -> Iterator[Load]:
    engines: list[OnnxEngine] = []

    def load(quant: str, *providers: str) -> OnnxEngine:
        path = written(source, tmp_path / f"{quant}-{len(engines)}", quant)
        options = replace(OPTIONS, providers=providers)
        engines.append(load_engine(path, options))
        return engines[-1]

    yield load
    for engine in engines:
        engine.close()


@pytest.mark.parametrize(("quant", "limit"), [("fp16", 1e-5), ("int8-fp16", 2e-5), ("int4-fp16", 1e-4)])
def test_float16_adds_little_to_what_a_type_loses(engine_of: Load, quant: str, limit: float) -> None:
    """Of 4 and 8 bits, beside the same integers in a float32 graph with exact activations."""
    half = engine_of(quant)
    same = engine_of("fp32" if quant == "fp16" else {"int8-fp16": "int8-32", "int4-fp16": "int4"}[quant])
    expected = answers(same)
    found = answers(half)
    # Kernels of float32 graphs round activations to 8 bits, which alone is some 1e-4.
    assert 0 < mean_kl(expected, found) < (limit if quant == "fp16" else 1e-3)
    assert found.dtype == np.float32
    assert (half.info.kv_type, same.info.kv_type) == ("f16", "f32")
    assert 2 * half.info.kv_bytes == same.info.kv_bytes
    assert half.info.kv_bytes == sum(prod(cache.shape) * 2 for pair in half.caches for cache in pair)
    assert half.info.weights_bytes < same.info.weights_bytes


def test_a_cache_in_memory_of_a_device_is_the_same_cache(engine_of: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is the CPU here, by the way that a GPU's memory goes: allocated, bound and read by ONNX Runtime."""
    expected = answers(engine_of("fp16"))
    monkeypatch.setattr(onnx_engine, "attention_device", lambda session: "cpu")
    engine = engine_of("fp16", "cpu")
    assert all(isinstance(cache, DeviceCache) for pair in engine.caches for cache in pair)
    assert np.array_equal(expected, answers(engine))
    assert engine.resident_kv_bytes() == 0


def test_a_whole_export(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    halves, floats = tmp_path / "fp16", tmp_path / "fp32"
    for directory in (halves, floats):
        export(ExportOptions(str(source), format="onnx", quant=directory.name, context=256), directory)
    manifest = open_bundle(halves).manifest
    assert manifest.quality is not None
    assert manifest.quality.kl_mean < 1e-3
    assert {item.type for item in manifest.plan.tensors} == {"fp16"}
    assert abs(manifest.artifact_bytes - manifest.plan.artifact_bytes) < 0.1 * manifest.artifact_bytes
    assert manifest.plan.bits_per_weight == pytest.approx(16)
    assert verify(halves, str(source)).quality is not None
    assert choose_settings(halves, "auto", Asked(256)).lines()["kv_type"].startswith("f16")
    assert choose_settings(floats, "auto", Asked(256)).lines()["kv_type"].startswith("f32")
    capsys.readouterr()
    assert run_cli(["run", str(halves), "hello", "--raw", "--max-tokens", "2"]) == 0
    assert run_cli(["bench", str(halves), "-p", "8", "-n", "2", "-r", "1", "--json", "--no-history"]) == 0
    assert '"kv_type": "f16"' in capsys.readouterr().out


def test_cuda_is_asked_for_what_it_has(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = EngineOptions(context=64, providers=("cuda",))
    path = written(source, tmp_path / "out", "fp32")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(UsageError, match="has no provider 'cuda' here") as caught:
            load_engine(written(source, tmp_path / "half", "fp16"), options)
        assert "cuda: onnxruntime-gpu" in str(caught.value.hint)
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    with pytest.raises(UsageError, match="computes with float32, for which ONNX Runtime's CUDA has no attention"):
        load_engine(path, options)


@pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="needs onnxruntime-gpu and a GPU"
)
@pytest.mark.parametrize("quant", ["fp16", "int4-fp16"])
def test_cuda_computes_what_the_cpu_computes(source: Path, tmp_path: Path, quant: str) -> None:
    path = written(source, tmp_path / "out", quant)
    found = []
    for providers in (("cpu",), ("cuda", "cpu")):
        engine = load_engine(path, replace(OPTIONS, providers=providers))
        found.append(answers(engine))
        on_device = all(isinstance(cache, DeviceCache) for pair in engine.caches for cache in pair)
        assert on_device is (providers[0] == "cuda")
        engine.close()
    assert mean_kl(*found) < 1e-3


def test_one_graph_computes_with_one_type(source: Path) -> None:
    description = describe(open_checkpoint(open_source(str(source))), "onnx")
    types = {
        item.name: item.type for item in tensor_plans(description, recipe_named("int4-fp16"), [("attn_v", "int8-64")])
    }
    assert types["blk.0.attn_v.weight"] == "int8-64-fp16"
    assert types["blk.0.ffn_up.weight"] == "int4-32-asym-fp16"
    assert types["output_norm.weight"] == "fp16"
    for quant, kind in (("int4", "int8-64-fp16"), ("int4", "fp16"), ("int4-fp16", "fp32")):
        with pytest.raises(UsageError, match="a graph computes with float16 or float32"):
            tensor_plans(description, recipe_named(quant), [("attn_v", kind)])


def test_names() -> None:
    assert recipe_named("fp16").body == parse_type("fp16") == parse_type("fp32").halved
    assert not recipe_named("int8-fp16").reads_text
    assert recipe_named("int4-mixed-gptq-fp16").calibrated
    assert recipe_named("int4-64-fp16").name == "int4-64-fp16"
    assert recipe_named("INT8-128-ASYM-FP16").tables.name == "int8-128-asym-fp16"
    for name in ("fp16-fp16", "fp32-fp16", "int4-fp32", "fp16-asym"):
        with pytest.raises(UsageError, match="is no quantisation of ONNX models") as caught:
            recipe_named(name)
        assert "-fp16" in str(caught.value.hint)


def test_numbers_beyond_float16_are_refused_by_name(source: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    copy = tmp_path / "copy"
    copy.mkdir()
    for file in source.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (weights,) = copy.glob("*.safetensors")
    arrays = dict(load_file(weights))
    name = next(name for name in arrays if name.endswith("down_proj.weight"))
    arrays[name] = arrays[name].copy()
    arrays[name][0, 0] = 70000
    save_file(arrays, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"ffn_down.*beyond 65504, which float16 cannot hold"):
        written(copy, tmp_path / "out", "fp16")
