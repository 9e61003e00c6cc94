"""Layers on a GPU: against the CPU's logits, the plan's sizes and the commands' words; and what a machine without says.

Tests marked ``gpu`` need a build of llama.cpp with a backend for GPUs and a device for it. A software renderer is one,
too: ``LLAMA_CPP_LIB_PATH`` names the libraries of a Vulkan build, ``GGML_VK_VISIBLE_DEVICES=0`` lets it use lavapipe.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_engine import wait_until
from live_server import running_server

from edgelm.bundle import Choice
from edgelm.cli.app import run_cli
from edgelm.errors import DoesNotFitError, EngineError, UsageError
from runtime import bench, offload
from runtime.doctor import GPU_KL_LIMIT
from runtime.engine import Chunk, EngineOptions, Logits
from runtime.engines.llamacpp import LlamaCppEngine, load_engine, load_library
from runtime.engines.llamacpp_devices import buffer_name, can_offload, find_devices, place_layers
from runtime.generate import GenerationRequest, Session, answer, generate
from runtime.gguf_header import read_gguf_header
from runtime.model import check_memory, open_model
from runtime.offload import layered_model, offload_of, repacked_bytes, room_of
from runtime.probe import kl_divergence, probe
from runtime.server.metrics import Metrics
from runtime.server.serving import make_backend
from targets.vram import AUTO_LAYERS, RESERVE_BYTES, Device, vram_parts

pytestmark = pytest.mark.tiny

TOKENS = [int(token) for token in np.random.default_rng(1).integers(0, 320, 150)]
OPTIONS = EngineOptions(context=256, sequences=2, batch=64, all_logits=True, threads_decode=1, threads_prefill=1)
ALL = 3  # two layers and the head
# Mean KL in nats, GPU against CPU of one artefact: the limit for Q8_0 and F16 is 1e-3, this one holds Q4_0 as well.
KL_LIMIT = 1e-3
NO_GPU = "no GPU that this build of llama.cpp can use (docs/gpu.md has the builds)"


@pytest.fixture(scope="module")
def gpu() -> Device:
    device = next((device for device in find_devices(load_library()) if device.is_gpu), None)
    if device is None:
        pytest.skip(NO_GPU)
    return device


@pytest.fixture(scope="module")
def expected(gguf: Path) -> Logits:
    """What the CPU computes, of shape (tokens, vocabulary)."""
    engine = load_engine(gguf, OPTIONS)
    try:
        return engine.forward([Chunk(0, TOKENS, "all")]).copy()
    finally:
        engine.close()


def loaded(gguf: Path, layers: int) -> LlamaCppEngine:
    return load_engine(gguf, EngineOptions(**{**_fields(OPTIONS), "gpu_layers": layers}))


def _fields(options: EngineOptions) -> dict[str, object]:
    return {name: getattr(options, name) for name in options.__dataclass_fields__}


@pytest.fixture(scope="module")
def engine(gguf: Path, gpu: Device) -> Iterator[LlamaCppEngine]:
    """All of the model on the GPU."""
    engine = loaded(gguf, AUTO_LAYERS)
    yield engine
    engine.close()


def edgelm(*arguments: str, capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command in this process."""
    capfd.readouterr()
    code = run_cli(list(arguments))
    out, err = capfd.readouterr()
    return code, out, err


def mean_kl(expected: Logits, found: Logits) -> float:
    return float(np.mean([kl_divergence(first, second) for first, second in zip(expected, found, strict=True)]))


# -- everywhere ----------------------------------------------------------------------------------------------------


def test_the_devices_of_a_build_are_told() -> None:
    devices = find_devices(load_library())
    cpus = [device for device in devices if device.kind == "cpu"]
    assert len(cpus) == 1
    assert cpus[0].total_bytes > 0
    assert any(device.is_gpu for device in devices) <= can_offload(load_library())


def test_a_header_gives_layers_head_and_cache(gguf: Path) -> None:
    header = read_gguf_header(gguf)
    model = layered_model(header, "tiny")
    table = next(tensor for tensor in header.tensors if tensor.name == "token_embd.weight")
    assert sum(model.layers) + model.head_bytes == sum(tensor.size_bytes for tensor in header.tensors)
    assert model.tied_bytes == table.size_bytes
    assert model.head_bytes == table.size_bytes + 256 * 4
    assert (model.kv_elements, model.feed_forward, model.most) == ((256, 256), 512, ALL)
    assert model.widest_bytes == 512 * 256 // 32 * 34


def test_without_a_gpu_auto_is_the_cpu_and_a_number_is_an_error(
    gguf: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cpus = tuple(device for device in find_devices(load_library()) if not device.is_gpu)
    monkeypatch.setattr(offload, "find_devices", lambda library: cpus)
    monkeypatch.setattr(offload, "can_offload", lambda library: False)
    engine = loaded(gguf, AUTO_LAYERS)
    plan = engine.info.offload
    assert plan is not None
    assert (plan.gpu_layers, plan.most, plan.device) == (0, ALL, None)
    assert plan.reason == "this build of llama.cpp is for CPUs only"
    assert not any(name.startswith("vram") for name in engine.info.buffers)
    engine.close()
    with pytest.raises(UsageError, match="2 layers were to go to a GPU") as caught:
        loaded(gguf, 2)
    assert "docs/gpu.md" in str(caught.value.hint)
    code, _, err = edgelm("run", str(gguf), "hello", "--raw", "--gpu-layers", "2", capfd=capfd)
    assert code == 2
    assert "2 layers were to go to a GPU" in err
    code, _, err = edgelm("run", str(gguf), "hello", "--raw", "--gpu", "CUDA0", capfd=capfd)
    assert code == 2
    assert "no GPU 'CUDA0'" in err
    for where in ("--host-repack", "--no-host-repack"):
        code, _, err = edgelm("run", str(gguf), "hello", "--raw", where, capfd=capfd)
        assert code == 2
        assert "weights that stay with the CPU beside a GPU; the CPU computes all layers: this build" in err


def test_the_plan_tells_what_becomes_of_weights_that_stay(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load_engine(gguf, EngineOptions(context=64))
    alone = engine.info
    engine.close()
    card = Device("CUDA0", "a card", "CUDA", "gpu", 10**10, 10**10)
    monkeypatch.setattr(offload, "find_devices", lambda library: (card,))
    header = read_gguf_header(gguf)
    layers = layered_model(header, "tiny").layers
    for wanted, count, words, copied in (
        (True, 2, "the others are rearranged for the CPU", layers[0]),
        (True, 1, "the others are rearranged for the CPU", sum(layers)),
        (False, 2, "the others stay as the file has them", 0),
        (True, ALL, "no layer stays with the CPU", 0),
    ):
        options = EngineOptions(context=64, gpu_layers=count, host_repack=wanted)
        plan = offload_of(load_library(), header, options, "tiny")
        assert words in plan.sentence()
        assert repacked_bytes(header, options, plan) == copied
        assert plan.host_repack == (copied > 0)
        assert bench._engine_record(replace(alone, offload=plan)).host_repack == (copied > 0)
    assert bench._engine_record(alone).host_repack is None
    plan = offload_of(load_library(), header, EngineOptions(context=64, gpu_layers=2), "tiny")
    assert "others" not in plan.sentence()
    monkeypatch.setattr("runtime.model.memory_for_model", lambda: Choice(value=1, reason="for this test"))
    with pytest.raises(DoesNotFitError, match=r"[kM]B once more, rearranged; for this test"):
        open_model(gguf, EngineOptions(context=64, gpu_layers=2, host_repack=True))
    read = EngineOptions(context=64, gpu_layers=2, host_repack=True, mmap=False)
    assert repacked_bytes(header, read, offload_of(load_library(), header, read, "tiny")) == 0, "no map, no second copy"


def test_what_rearranging_breaks_rearranging_mends(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = read_gguf_header(gguf)
    options = EngineOptions(context=512, host_repack=True)
    monkeypatch.setattr("runtime.model.memory_for_model", lambda: Choice(value=2**27, reason="for this test"))
    check_memory(gguf, header, options)
    for copied_bytes, hint in (
        (2**27, "leave out --host-repack"),
        (2**27 - 2**26 - gguf.stat().st_size - 2**18, "leave out --host-repack, or use --context 256"),
    ):
        with pytest.raises(DoesNotFitError, match="once more, rearranged") as caught:
            check_memory(gguf, header, options, copied_bytes=copied_bytes)
        assert caught.value.hint == hint
    with pytest.raises(DoesNotFitError) as caught:
        check_memory(gguf, header, options, beside_bytes=2**27, copied_bytes=2**20)
    assert "--host-repack" not in str(caught.value.hint)


@pytest.mark.parametrize("text", ["many", "-2", "1.5", ""])
def test_what_is_no_number_of_layers_is_refused(gguf: Path, text: str, capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = edgelm("bench", str(gguf), "--gpu-layers", text, capfd=capfd)
    assert code == 2
    assert "neither auto nor a number of layers" in err


def test_a_gpu_that_is_gone_is_no_silent_run_on_the_cpu(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Device("CUDA7", "a card", "CUDA", "gpu", 10**10, 10**10)
    monkeypatch.setattr(offload, "find_devices", lambda library: (gone,))
    with pytest.raises(EngineError, match="CUDA7 is no longer there"):
        loaded(gguf, 1)
    library = load_library()
    parameters = library.llama_model_default_params()
    place_layers(library, parameters, None, 5)
    assert (parameters.n_gpu_layers, bool(parameters.devices)) == (0, True)


def test_more_than_a_gpu_holds_exits_4(
    gguf: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = layered_model(read_gguf_header(gguf), "tiny")
    room = room_of(EngineOptions(context=512))
    free = RESERVE_BYTES + vram_parts(model, room, 1).total_bytes - 1
    small = Device("CUDA0", "a card", "CUDA", "gpu", free, 10**10)
    monkeypatch.setattr(offload, "find_devices", lambda library: (small,))
    with pytest.raises(DoesNotFitError, match="3 of 3 layers"):
        load_engine(gguf, EngineOptions(context=512, gpu_layers=99))
    code, _, err = edgelm("run", str(gguf), "hello", "--raw", "--context", "512", "--gpu-layers", "2", capfd=capfd)
    assert code == 4
    assert "hint: use --gpu-layers 0, or a shorter --context" in err


def test_buffers_count_where_they_lie() -> None:
    card = Device("CUDA0", "a card", "CUDA", "gpu", 1, 1)
    assert buffer_name("CUDA0", "model", card) == "vram_weights"
    assert buffer_name("CUDA0", "KV", card) == "vram_kv"
    assert buffer_name("CUDA0", "compute", card) == "vram_compute"
    assert buffer_name("CUDA_Host", "compute", card) is None
    assert buffer_name("CPU_Mapped", "model", card) is None
    assert buffer_name("CUDA0", "model", None) is None
    assert buffer_name("MTL0_Private", "KV", Device("MTL0", "", "MTL", "igpu", 1, 1)) == "vram_kv"


# -- with a GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("layers", [1, 2, ALL])
def test_logits_are_those_of_the_cpu(gguf: Path, gpu: Device, expected: Logits, layers: int) -> None:
    engine = loaded(gguf, layers)
    found = engine.forward([Chunk(0, TOKENS, "all")])
    assert mean_kl(expected, found) < KL_LIMIT
    stepped = [engine.forward([Chunk(1, [token])])[-1].copy() for token in TOKENS[:20]]
    assert mean_kl(expected[:20], np.stack(stepped)) < KL_LIMIT
    engine.close()


@pytest.mark.gpu
@pytest.mark.parametrize("layers", [1, 2, ALL])
def test_buffers_are_as_planned(gguf: Path, gpu: Device, layers: int) -> None:
    engine = loaded(gguf, layers)
    plan, buffers = engine.info.offload, engine.info.buffers
    assert plan is not None
    assert (plan.gpu_layers, plan.device is not None and plan.device.name) == (layers, gpu.name)
    assert buffers["vram_weights"] == pytest.approx(plan.parts.weights_bytes, rel=0.05)  # announced in 0.01 MiB
    assert buffers.get("vram_kv", 0) == plan.parts.kv_bytes
    assert engine.resident_kv_bytes() == engine.info.kv_bytes - plan.parts.kv_bytes
    if layers == ALL:
        assert buffers["vram_compute"] == pytest.approx(plan.parts.compute_bytes, rel=0.05)
    engine.close()


@pytest.mark.gpu
def test_sequences_are_cut_and_copied_there(engine: LlamaCppEngine, expected: Logits) -> None:
    engine.truncate(0, 0)
    engine.truncate(0, 1)
    engine.forward([Chunk(0, TOKENS[:40])])
    engine.truncate(30, 0)
    again = engine.forward([Chunk(0, TOKENS[30:40], "all")]).copy()
    assert mean_kl(expected[30:40], again) < KL_LIMIT
    engine.copy_prefix(0, 1, 25)
    copied = engine.forward([Chunk(1, TOKENS[25:40], "all")]).copy()
    assert mean_kl(expected[25:40], copied) < KL_LIMIT
    both = engine.forward([Chunk(0, TOKENS[40:41]), Chunk(1, TOKENS[40:41])])
    assert mean_kl(np.stack([expected[40]] * 2), both) < KL_LIMIT


@pytest.mark.gpu
def test_a_sequence_is_taken_out_put_back_and_shortened_in_its_middle(engine: LlamaCppEngine, gguf: Path) -> None:
    cpu = load_engine(gguf, OPTIONS)
    ends = []
    for computing in (cpu, engine):
        computing.truncate(0, 0)
        computing.truncate(0, 1)
        computing.forward([Chunk(0, TOKENS[:60])])
        kept = computing.state(0)
        computing.restore(kept, 60, 1)
        restored = computing.forward([Chunk(1, TOKENS[60:61])])[-1].copy()
        assert computing.discard(10, 30, 0)
        ends.append((restored, computing.forward([Chunk(0, TOKENS[60:61])])[-1].copy()))
    cpu.close()
    for expected, found in zip(*ends, strict=True):
        assert kl_divergence(expected, found) < 2 * KL_LIMIT


@pytest.mark.gpu
def test_answers_are_the_same_and_a_prefix_is_kept(gguf: Path, gpu: Device) -> None:
    texts, cached = [], []
    for layers in (0, AUTO_LAYERS):
        model = open_model(gguf, EngineOptions(context=256, gpu_layers=layers))
        session = Session(model.engine)
        for length in (60, 80):
            request = GenerationRequest(TOKENS[:length], 12)
            result = answer(generate(session, model.tokenizer, request), length, lambda text: None)
            texts.append(result.text)
            cached.append(result.cached_tokens)
        model.close()
    assert texts[:2] == texts[2:]
    assert cached[:2] == cached[2:]
    assert cached[1] >= 59


@pytest.mark.gpu
def test_a_server_answers_from_there(gguf: Path, gpu: Device) -> None:
    arguments = {"model": "tiny", "prompt": "hello", "max_tokens": 8, "temperature": 0}
    texts, vram = [], []
    for layers in (0, AUTO_LAYERS):
        metrics = Metrics()
        options = EngineOptions(context=256, gpu_layers=layers)
        backend = make_backend(gguf, options, metrics, in_process=False)
        with running_server(backend, metrics) as server:
            assert wait_until(lambda: backend.state == "ready", 30)  # noqa: B023 (asked before the next turn)
            # A software renderer compiles every kernel at its first use.
            request = urllib.request.Request(f"{server.url}/v1/completions", json.dumps(arguments).encode())
            request.add_header("Content-Type", "application/json")
            with urllib.request.urlopen(request, timeout=180) as reply:
                texts.append(json.loads(reply.read())["choices"][0]["text"])
            with urllib.request.urlopen(f"{server.url}/status", timeout=60) as reply:
                vram.append(json.loads(reply.read())["vram"])
    assert texts[0] == texts[1]
    assert vram[0] == []
    assert [(use["device"], use["gpu_layers"]) for use in vram[1]] == [(gpu.name, ALL)]
    assert vram[1][0]["announced_bytes"] > 0
    assert vram[1][0]["free_bytes"] is None or 0 < vram[1][0]["free_bytes"] <= vram[1][0]["total_bytes"]


@pytest.mark.gpu
def test_a_report_tells_what_lies_there(gguf: Path, gpu: Device, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ("bench", str(gguf), "-p", "32", "-n", "8", "-r", "2", "--json", "--no-history", "--gpu-layers", "2")
    code, out, err = edgelm(*arguments, capfd=capfd)
    assert code == 0, err
    report = json.loads(out)
    engine, vram = report["engine"], report["memory"]["vram"]
    assert (engine["gpu"], engine["gpu_layers"], engine["layers"]) == (gpu.name, 2, ALL)
    assert gpu.name in [device["name"] for device in engine["devices"]]
    assert vram["device"] == gpu.name
    assert min(vram["weights_bytes"], vram["kv_bytes"], vram["compute_bytes"]) > 0
    assert report["predicted"] is None
    parts = report["memory"]["parts"]
    # llama.cpp announces sizes in hundredths of MiB.
    assert parts["kv_bytes"] == pytest.approx(report["memory"]["kv_bytes"] - vram["kv_bytes"], abs=2**14)


@pytest.mark.gpu
def test_doctor_compares_it_with_the_cpu(gpu: Device) -> None:
    result = probe(on_gpu=True)
    assert gpu.name in result.gpu
    assert result.gpu_kl is not None
    assert result.gpu_kl < GPU_KL_LIMIT
