"""Both engines in one process give what each gives alone, also where both want the CPU's matrix tiles (AMX)."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_models import make_tiny_llama

from exporter.options import ExportOptions
from exporter.pipeline import export
from runtime import tiles
from runtime.engine import Chunk, Engine, EngineOptions
from runtime.engines.llamacpp import load_engine
from runtime.model import artifact_of
from runtime.tiles import apart

pytestmark = pytest.mark.tiny
ROOT = Path(__file__).resolve().parents[2]
TOKENS = [index * 37 % 300 for index in range(64)]
# In a process of its own: without ONNX Runtime, and because what is wrong ends the process.
WITH_TORCH = """
import sys
import numpy as np
from runtime.engine import Chunk, EngineOptions
from runtime.engines.llamacpp import load_engine

path, tokens = sys.argv[1], [index * 37 % 300 for index in range(64)]
from pathlib import Path
engine = load_engine(Path(path), EngineOptions(context=128, all_logits=True, threads_decode=1, threads_prefill=1))
before = engine.forward([Chunk(0, tokens, "all")]).copy()
import torch
torch.set_num_threads(1)
torch.backends.mkldnn.matmul.fp32_precision = "bf16"
for _ in range(2):
    factor = torch.randn(512, 512)
    factor @ factor
    engine.truncate(0)
    np.testing.assert_allclose(engine.forward([Chunk(0, tokens, "all")]), before, atol=1e-4)
assert "onnxruntime" not in sys.modules
"""


def logits(engine: Engine) -> np.ndarray:
    engine.truncate(0)
    return engine.forward([Chunk(0, TOKENS, "all")]).copy()


def eight_bit_product() -> Callable[[], object]:
    """A product of 8-bit numbers as dynamic int8 exports compute it, for which ONNX Runtime sets shapes of tiles."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(0).integers(-127, 127, (512, 512)).astype(np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [64, 512])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [64, 512])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 10
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # the calling thread computes
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    inputs = {"x": np.random.default_rng(1).integers(0, 255, (64, 512)).astype(np.uint8)}
    return lambda: session.run(None, inputs)


@pytest.mark.reference
def test_a_prompt_after_the_other_engine_is_what_it_was_before(tmp_path: Path) -> None:
    source = make_tiny_llama(tmp_path / "model", hidden=256, ffn=512)
    export(ExportOptions(source=str(source), quant="Q8_0", verify=False), tmp_path / "bundle")
    options = EngineOptions(context=128, all_logits=True, threads_decode=1, threads_prefill=1)
    engine = load_engine(artifact_of(tmp_path / "bundle")[0], options)
    before = logits(engine)
    multiply = eight_bit_product()
    expected = multiply()
    for _ in range(2):
        np.testing.assert_allclose(logits(engine), before, atol=1e-4)
        np.testing.assert_array_equal(multiply(), expected)
    engine.close()


@pytest.mark.reference
def test_a_prompt_after_products_of_torch_is_what_it_was_before(tmp_path: Path) -> None:
    source = make_tiny_llama(tmp_path / "model", hidden=256, ffn=512)
    export(ExportOptions(source=str(source), quant="Q8_0", verify=False), tmp_path / "bundle")
    command = [sys.executable, "-c", WITH_TORCH, str(artifact_of(tmp_path / "bundle")[0])]
    child = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert child.returncode == 0, child.stderr


def test_calls_go_apart_only_where_tiles_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "has_tiles", lambda: False)
    assert apart(threading.get_ident) == threading.get_ident()
    monkeypatch.setattr(tiles, "has_tiles", lambda: True)
    monkeypatch.setitem(sys.modules, "onnxruntime", sys)
    elsewhere = apart(threading.get_ident)
    assert elsewhere != threading.get_ident()
    assert apart(threading.get_ident) == elsewhere
    with pytest.raises(ZeroDivisionError):
        apart(divmod, 1, 0)
