"""Every mix against llama.cpp's own quantiser: the same type and the same bytes for every tensor, or both refuse."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest

from edgelm.bundle import ExportPlan, TensorPlan
from edgelm.errors import UsageError
from exporter.architectures import describe
from exporter.checkpoint import Checkpoint, open_checkpoint, open_source
from exporter.gguf import write_gguf
from exporter.mixes import MIXES
from exporter.options import ExportOptions
from exporter.plan import resolve
from runtime.engines.llamacpp import load_library
from runtime.gguf_header import read_gguf_header
from targets.profile import load_profile
from tests.tiny_models import make_tiny_llama

pytestmark = pytest.mark.tiny

# rows of 96 and 256: k-quants fit the second only. 16 layers: every rule on first, last and every third layer applies.
SHAPES = {
    "narrow": {"hidden": 96, "heads": 3, "kv_heads": 1, "ffn": 256, "layers": 16, "tied": True},
    "grouped": {"hidden": 256, "heads": 8, "kv_heads": 2, "ffn": 256, "layers": 8, "tied": False, "vocab": 320},
}
# Names that llama.cpp has no dense mix for.
OWN = {"MXFP4", "NVFP4"}


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    load_library()  # the engine collects llama.cpp's log; another callback here would take it from all later tests


@pytest.fixture(scope="module", params=SHAPES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp(request.param)
    return open_checkpoint(open_source(str(make_tiny_llama(directory / "model", **SHAPES[request.param]))))


def plan_for(checkpoint: Checkpoint, quant: str) -> ExportPlan:
    return resolve(ExportOptions("here", quant=quant), checkpoint, load_profile("raspberry-pi-5"))


def write(path: Path, checkpoint: Checkpoint, plans: tuple[TensorPlan, ...]) -> Path:
    description = describe(checkpoint)
    write_gguf(path, checkpoint, description.tensors, plans, description.metadata, threads=2)
    return path


@pytest.fixture(scope="module")
def f32(source: Checkpoint) -> Path:
    return write(source.source.path.parent / "f32.gguf", source, plan_for(source, "F32").tensors)


def stored(path: Path) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of every tensor in a file."""
    content = path.read_bytes()
    tensors = read_gguf_header(path).tensors
    return {item.name: (item.type, content[item.offset : item.offset + item.size_bytes]) for item in tensors}


@pytest.mark.parametrize("name", [name for name in MIXES if name not in OWN])
def test_same_as_llama_quantize(source: Checkpoint, f32: Path, name: str, tmp_path: Path) -> None:
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = MIXES[name].file_type, 2
    theirs = tmp_path / "theirs.gguf"
    refused = llama_cpp.llama_model_quantize(str(f32).encode(), str(theirs).encode(), ctypes.byref(parameters))
    if refused:
        with pytest.raises(UsageError, match=r"importance matrix|needs rows that are multiples of"):
            plan_for(source, name)
        return
    plan = plan_for(source, name)
    ours = stored(write(tmp_path / "ours.gguf", source, plan.tensors))
    wanted = stored(theirs)
    assert {tensor: kind for tensor, (kind, _) in ours.items()} == {name: kind for name, (kind, _) in wanted.items()}
    for tensor, (_, data) in ours.items():
        assert data == wanted[tensor][1], tensor


@pytest.mark.parametrize("name", sorted(OWN))
def test_block_floats_are_read_back_by_the_gguf_package(source: Checkpoint, name: str, tmp_path: Path) -> None:
    if name == "NVFP4" and describe(source).dimensions.hidden % 64:
        with pytest.raises(UsageError, match="NVFP4 needs rows that are multiples of 64"):
            plan_for(source, name)
        return
    reader = gguf.GGUFReader(write(tmp_path / "ours.gguf", source, plan_for(source, name).tensors))
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_down.weight")
    assert tensor.tensor_type.name == name
    values = source.load("model.layers.0.mlp.down_proj.weight")
    error = gguf.quants.dequantize(tensor.data, tensor.tensor_type) - values
    assert np.mean(error**2) < 0.02 * np.mean(values**2)


def test_overrides_reach_the_file(source: Checkpoint, tmp_path: Path) -> None:
    overrides = (("ffn_down", "Q6_K"), (r"blk\.1\.attn_v", "F16"))
    plan = resolve(
        ExportOptions("here", quant="Q4_K_M", type_overrides=overrides), source, load_profile("raspberry-pi-5")
    )
    assert {item.type for item in plan.tensors if "ffn_down" in item.name} == {"Q6_K"}
    assert next(item for item in plan.tensors if item.name == "blk.1.attn_v.weight").type == "F16"
    reader = gguf.GGUFReader(write(tmp_path / "ours.gguf", source, plan.tensors))
    assert {item.name: item.type for item in plan.tensors} == {
        tensor.name: tensor.tensor_type.name for tensor in reader.tensors
    }
