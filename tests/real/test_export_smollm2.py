"""SmolLM2-135M from its GGUF: requantised bit for bit as llama.cpp does it, or copied without a change."""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp
import pytest

from exporter.mixes import mix_named
from exporter.options import ExportOptions
from exporter.pipeline import export
from runtime.engines.llamacpp import load_library
from runtime.gguf_header import read_gguf_header

pytestmark = pytest.mark.real


@pytest.fixture(autouse=True)
def _quiet() -> None:
    load_library()  # the engine collects llama.cpp's log; another callback here would take it from all later tests


def stored(path: Path) -> dict[str, tuple[str, bytes]]:
    content = path.read_bytes()
    tensors = read_gguf_header(path).tensors
    return {item.name: (item.type, content[item.offset : item.offset + item.size_bytes]) for item in tensors}


@pytest.mark.parametrize("quant", ["Q4_0", "Q8_0", "Q4_K_M"])
def test_same_tensors_as_llama_quantize(smollm2_gguf: Path, tmp_path: Path, quant: str) -> None:
    options = ExportOptions("demo:smollm2", target="raspberry-pi-5", quant=quant, verify=False)
    bundle = export(options, tmp_path / "bundle")
    assert bundle.manifest.source.location == "demo:smollm2"
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread, parameters.allow_requantize = mix_named(quant).file_type, 2, True
    theirs = tmp_path / "theirs.gguf"
    source = str(smollm2_gguf).encode()
    assert llama_cpp.llama_model_quantize(source, str(theirs).encode(), ctypes.byref(parameters)) == 0
    ours, wanted = stored(bundle.artifact_path), stored(theirs)
    assert {name: kind for name, (kind, _) in ours.items()} == {name: kind for name, (kind, _) in wanted.items()}
    assert [name for name in ours if ours[name][1] != wanted[name][1]] == []


def test_copy_keeps_every_byte_and_key(smollm2_gguf: Path, tmp_path: Path) -> None:
    options = ExportOptions("demo:smollm2", target="raspberry-pi-5", verify=False)
    bundle = export(options, tmp_path / "bundle")
    assert bundle.manifest.plan.quant == "COPY"
    assert stored(bundle.artifact_path) == stored(smollm2_gguf)
    before, after = read_gguf_header(smollm2_gguf).metadata, read_gguf_header(bundle.artifact_path).metadata
    assert set(after) == set(before)
    for key, value in before.items():
        kept = after[key]
        assert list(kept) == list(value) if hasattr(value, "__len__") else kept == value, key
