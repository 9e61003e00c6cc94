"""Execution providers: named, checked, told, and none in silence."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from edgelm.cli.app import run_cli
from edgelm.errors import EngineError, UsageError
from exporter.options import ExportOptions
from exporter.pipeline import export
from runtime.engine import Chunk, EngineOptions
from runtime.engines import load_engine
from runtime.engines.onnx_providers import ATTENTION, CPU, CUDA, attention_device, device_inputs, installed, resolve
from runtime.settings import Asked, choose_settings
from targets.profile import load_profile, parse_profile, profile_toml
from tests.tiny.test_onnx_engine import build, tokens
from tests.tiny_models import make_tiny_llama

pytestmark = pytest.mark.tiny

OPENVINO = "OpenVINOExecutionProvider" in onnxruntime.get_available_providers()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("source"), hidden=128, ffn=256)


@pytest.fixture(scope="module")
def bundle(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "int8"
    export(ExportOptions(source=str(source), format="onnx", quant="int8-32", verify=False), path)
    return path


def logits(path: Path, providers: tuple[str, ...]) -> tuple[Any, str]:
    """A prompt, single tokens, and a prompt behind tokens that were taken back; and what the engine says of itself."""
    ids = tokens(40)
    options = EngineOptions(context=64, threads_decode=1, threads_prefill=1, all_logits=True, providers=providers)
    engine = load_engine(path, options)
    found = [engine.forward([Chunk(0, ids[:30], "all")]).copy()]
    found += [engine.forward([Chunk(0, [token], "last")]).copy() for token in ids[30:]]
    engine.truncate(20)
    found.append(engine.forward([Chunk(0, ids[20:33], "all")]).copy())
    engine.close()
    return np.concatenate(found), engine.info.system


def test_cpu_by_name(bundle: Path) -> None:
    usual, told = logits(bundle / "model.onnx", ())
    named, shares = logits(bundle / "model.onnx", ("cpu",))
    assert np.array_equal(usual, named)
    assert told.startswith("CPUExecutionProvider, 1 threads")
    count = shares.split(" ")[1]
    assert shares.startswith(f"CPU {count} of {count} nodes, 1 threads")
    assert int(count) > 20


def test_what_is_not_installed(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["run", str(bundle), "hello", "--provider", "rocm"]) == 2
    error = capsys.readouterr().err
    assert f"ONNX Runtime {onnxruntime.__version__} has no provider 'rocm' here, but cpu" in error
    assert "cuda: onnxruntime-gpu" in error
    assert run_cli(["bench", str(bundle), "-p", "8", "-n", "1", "-r", "1", "--provider", "rocm"]) == 2
    assert run_cli(["bench", str(bundle), "-p", "8", "-n", "1", "-r", "1", "--provider", "CPUExecutionProvider"]) == 0


def test_the_kind_of_attention_is_llama_cpps_choice(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("run", "bench"):
        words = ["hello"] if command == "run" else []
        assert run_cli([command, str(bundle), *words, "--flash-attention", "on"]) == 2
        assert "--flash-attention is for GGUF" in capsys.readouterr().err
        for where in ("--host-repack", "--no-host-repack"):
            assert run_cli([command, str(bundle), *words, where]) == 2
            assert "--host-repack is for GGUF" in capsys.readouterr().err


def test_names() -> None:
    runtime = SimpleNamespace(
        __version__="1",
        get_available_providers=lambda: ["CUDAExecutionProvider", "AzureExecutionProvider", "CPUExecutionProvider"],
    )
    assert installed(runtime) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert resolve(runtime, ()) == ("CPUExecutionProvider",)
    assert resolve(runtime, ("cuda", "CPU")) == installed(runtime)
    assert resolve(runtime, ("cudaexecutionprovider",)) == ("CUDAExecutionProvider",)
    for names, told in (
        (("azure",), "no provider 'azure'"),
        (("",), "no provider ''"),
        (("cuda", "CUDAExecutionProvider"), "named twice"),
        (("cpu", "cuda"), "cpu computes everything"),
    ):
        with pytest.raises(UsageError, match=told):
            resolve(runtime, names)


def test_gguf_has_none(source: Path, tmp_path: Path) -> None:
    export(ExportOptions(source=str(source), format="gguf", quant="Q8_0", verify=False), tmp_path / "gguf")
    with pytest.raises(UsageError, match=r"llama\.cpp, which has no provider cuda"):
        load_engine(tmp_path / "gguf" / "model.gguf", EngineOptions(context=64, providers=("cuda",)))


def test_list_of_the_profile(bundle: Path) -> None:
    text = profile_toml(load_profile("raspberry-pi-5")).replace(
        "\nthreads_decode", '\nonnx_providers = ["npu"]\nthreads_decode', 1
    )
    profile = parse_profile(text.encode(), "mine")
    assert profile.onnx_providers == ("npu",)
    assert parse_profile(profile_toml(profile).encode(), "again") == profile
    path = bundle.parent / "mine.toml"
    path.write_text(text)
    settings = choose_settings(bundle, str(path), Asked(64))
    assert settings.options.providers == ("npu",)
    assert settings.lines()["providers"] == "npu: the list of raspberry-pi-5"
    with pytest.raises(UsageError, match="no provider 'npu'"):
        load_engine(bundle / "model.onnx", settings.options)
    asked = choose_settings(bundle, str(path), Asked(64, providers=("cpu",)))
    assert asked.options.providers == ("cpu",)
    assert asked.lines()["providers"] == "cpu: asked for"


def session(kinds: dict[str, Counter[str]], memory: str = "Cpu") -> SimpleNamespace:
    """What a session tells of who computes what, and where it wants its one input."""

    def nodes(count: Counter[str]) -> list[SimpleNamespace]:
        return [SimpleNamespace(op_type=kind) for kind in count.elements()]

    graphs = [
        SimpleNamespace(ep_name=name, get_nodes=lambda count=count: nodes(count)) for name, count in kinds.items()
    ]
    return SimpleNamespace(
        get_provider_graph_assignment_info=lambda: graphs,
        get_inputs=lambda: [SimpleNamespace(name="input_ids")],
        get_input_memory_infos=lambda: [SimpleNamespace(name=memory)],
    )


def test_attention_of_an_unknown_provider() -> None:
    """Its caches might not be in place: wrong answers without a word."""
    left = session({CPU: Counter({ATTENTION: 2}), "QNNExecutionProvider": Counter({"Mul": 1})})
    assert attention_device(left) is None
    with pytest.raises(EngineError, match=f"QNN would compute {ATTENTION}"):
        attention_device(session({"QNNExecutionProvider": Counter({ATTENTION: 2})}))


def test_attention_on_cuda_has_its_cache_there() -> None:
    assert attention_device(session({CUDA: Counter({ATTENTION: 2}), CPU: Counter({"Shape": 1})})) == "cuda"
    with pytest.raises(EngineError, match="of some layers only"):
        attention_device(session({CUDA: Counter({ATTENTION: 1}), CPU: Counter({ATTENTION: 1})}))


def test_memory_of_devices() -> None:
    assert device_inputs(session({}, "Cuda")) == {"input_ids"}
    assert device_inputs(session({})) == frozenset()


def test_inputs_of_devices_are_bound_at_every_run(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Binding copies what a device reads: without another binding it would read the first token for ever."""
    usual, _ = logits(bundle / "model.onnx", ())
    names = frozenset({"input_ids", "logit_rows"})
    bound: list[str] = []
    binding: Any = onnxruntime.IOBinding
    bind_input = binding.bind_input

    def counted(io: Any, name: str, *place: Any) -> None:
        bound.append(name)
        bind_input(io, name, *place)

    monkeypatch.setattr("runtime.engines.onnx.device_inputs", lambda _: names)
    monkeypatch.setattr(binding, "bind_input", counted)
    again, _ = logits(bundle / "model.onnx", ("cpu",))
    assert np.array_equal(usual, again)
    assert bound.count("input_ids") == bound.count("logit_rows") > 12
    assert bound.count("seqlens_k") == 3


@pytest.mark.skipif(not OPENVINO, reason="needs onnxruntime-openvino in place of onnxruntime")
@pytest.mark.parametrize("kind", ["int8-32", "int4-32-asym"])
def test_openvino(source: Path, tmp_path: Path, kind: str) -> None:
    """With exact activations, which it computes whatever the graph says, logits are those of the CPU."""
    path = build(source, tmp_path / kind, lambda _: kind)
    model = onnx.load(path, load_external_data=False)
    levels = [item for node in model.graph.node for item in node.attribute if item.name == "accuracy_level"]
    assert levels
    for level in levels:
        level.i = 1
    path.write_bytes(model.SerializeToString())
    expected, _ = logits(path, ())
    found, told = logits(path, ("openvino", "cpu"))
    assert np.abs(found - expected).max() < 1e-4
    assert told.startswith("OpenVINO ")
    assert f"on the CPU {ATTENTION} (2)" in told
    with pytest.raises(EngineError, match="cannot load"):
        load_engine(path, EngineOptions(context=64, providers=("openvino",)))
