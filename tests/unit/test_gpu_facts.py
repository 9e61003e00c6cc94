"""What is told of GPUs: the kernel's against the engine's, the driver's sizes, the report's lines, builds for them."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from fake_engine import FakeEngine

from runtime import gpu_memory
from runtime.gpu_memory import device_records, parse_process_bytes, process_vram_bytes, vram_record
from runtime.shortfall import gpu_findings
from targets.facts import SeenGpu, seen_gpus
from targets.vram import NOTHING, Device, OffloadPlan, VramParts

CPU = Device("CPU", "a processor", "CPU", "cpu", 10**10, 10**10)
CARD = Device("CUDA0", "a card", "CUDA", "gpu", 7 * 10**9, 8 * 10**9)
SEEN = SeenGpu("NVIDIA", "NVIDIA GPU: NVIDIA RTX 4070")


def put(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_a_jetson_has_a_gpu_though_no_card_is_shown(tmp_path: Path) -> None:
    assert [gpu.vendor for gpu in seen_gpus(tmp_path)] in ([], ["Apple"])
    put(tmp_path, "proc/device-tree/model", "NVIDIA Jetson Orin Nano Developer Kit\0")
    (gpu, *_) = seen_gpus(tmp_path)
    assert gpu.vendor == "NVIDIA"
    assert "Jetson Orin Nano Developer Kit, memory is shared" in gpu.sentence


def test_an_idle_gpu_is_a_warning_with_the_recipe() -> None:
    (finding,) = gpu_findings([SEEN], [CPU], gpu_backends=False)
    assert (finding.name, finding.status) == ("gpu", "warning")
    assert finding.detail.startswith("NVIDIA GPU: NVIDIA RTX 4070, and the engine's build is for CPUs only")
    assert "for cuda" in str(finding.hint)
    assert "docs/gpu.md" in str(finding.hint)
    (amd,) = gpu_findings([SeenGpu("AMD", "AMD GPU: x")], [CPU], gpu_backends=False)
    assert "for vulkan" in str(amd.hint)


def test_a_gpu_that_the_build_cannot_find_is_a_warning() -> None:
    (finding,) = gpu_findings([SEEN], [CPU], gpu_backends=True)
    assert finding.status == "warning"
    assert "does not see" in finding.detail
    assert "driver" in str(finding.hint)


def test_a_usable_gpu_is_told_with_its_memory() -> None:
    (finding,) = gpu_findings([SEEN], [CPU, CARD], gpu_backends=True)
    assert (finding.status, finding.detail) == ("ok", "the engine can use CUDA0 (a card): 7 GB of 8 GB free")


def test_without_a_gpu_there_is_one_sentence_and_no_warning() -> None:
    (finding,) = gpu_findings([], [CPU], gpu_backends=False)
    assert (finding.status, finding.hint) == ("ok", None)
    assert finding.detail == "none seen on this machine, the engine's build is for CPUs: the CPU computes everything"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("41, 300\n42, 1024\n", 2**30),
        ("42, 100\n42, 24\n", 124 * 2**20),
        ("42, [N/A]\n", None),
        ("41, 300\n", None),
        ("No running processes found\n", None),
        ("", None),
    ],
)
def test_the_drivers_table_of_processes(text: str, expected: int | None) -> None:
    assert parse_process_bytes(text, 42) == expected


def test_a_machine_without_nvidias_tool_tells_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert process_vram_bytes(42) is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '42, 5'\n", encoding="ascii")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert process_vram_bytes(42) == 5 * 2**20
    tool.write_text("#!/bin/sh\nexit 9\n", encoding="ascii")
    assert process_vram_bytes(42) is None


def test_a_record_of_what_lies_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_memory, "process_vram_bytes", lambda pid: None)
    info = FakeEngine().info
    assert vram_record(info) is None
    assert vram_record(replace(info, offload=OffloadPlan(0, 3, None, NOTHING, "asked for"))) is None
    plan = OffloadPlan(3, 3, CARD, VramParts(100, 20, 5), "all fit")
    buffers = {"vram_weights": 101, "vram_kv": 20, "vram_compute": 6, "kv": 7}
    after = replace(CARD, free_bytes=CARD.free_bytes - 500)
    record = vram_record(replace(info, offload=plan, buffers=buffers, devices=(CPU, after)))
    assert record is not None
    assert (record.announced_bytes, record.predicted_bytes) == (127, 125)
    assert record.free_before_bytes - record.free_loaded_bytes == 500
    assert record.process_bytes is None
    assert [item.kind for item in device_records(replace(info, devices=(CPU, CARD)))] == ["cpu", "gpu"]


@pytest.fixture
def wheel_script() -> Iterator[ModuleType]:
    folder = str(Path(__file__).resolve().parents[2] / "scripts")
    sys.path.insert(0, folder)
    yield importlib.import_module("build_llama_wheel")
    sys.path.remove(folder)


def test_a_build_for_the_cpu_asks_for_nothing_of_gpus(wheel_script: ModuleType) -> None:
    assert wheel_script.defines_for("none", None) == wheel_script.CMAKE_DEFINES
    words = ("CUDA", "HIP", "VULKAN", "METAL")
    assert not any(word in name for name in wheel_script.CMAKE_DEFINES for word in words)


def test_every_build_is_a_wheel_of_its_own(wheel_script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel_script.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(wheel_script, "vulkan_headers", lambda: None)
    asked: list[tuple[str, Any]] = [("none", None), ("cuda", None), ("cuda", "89"), ("rocm", None), ("vulkan", None)]
    keys = {
        wheel_script.cache_key("llama-cpp-python==1", wheel_script.defines_for(*choice), "", "gcc", ["avx2"])
        for choice in asked
    }
    assert len(keys) == len(asked)
    assert wheel_script.defines_for("cuda", "89")["CMAKE_CUDA_ARCHITECTURES"] == "89"
    with pytest.raises(SystemExit, match="is for --gpu cuda"):
        wheel_script.defines_for("vulkan", "89")


def test_a_missing_compiler_for_gpus_is_named(wheel_script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel_script, "shutil", SimpleNamespace(which=lambda name: None))
    with pytest.raises(SystemExit, match=r"needs nvcc\nhint: install it, NVIDIA's CUDA toolkit"):
        wheel_script.defines_for("cuda", None)


def test_vulkan_headers_that_are_too_old_are_refused_at_once(
    wheel_script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(wheel_script.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setenv("VULKAN_SDK", str(tmp_path))
    text = "#define VK_HEADER_VERSION {}\n"
    text += "#define VK_HEADER_VERSION_COMPLETE VK_MAKE_API_VERSION(0, 1, 3, VK_HEADER_VERSION)\n"
    put(tmp_path, "include/vulkan/vulkan_core.h", text.format(239))
    assert wheel_script.vulkan_headers() == (1, 3, 239)
    with pytest.raises(SystemExit, match=r"1\.3\.272 or newer, here are 1\.3\.239"):
        wheel_script.defines_for("vulkan", None)
    put(tmp_path, "include/vulkan/vulkan_core.h", text.format(290))
    assert wheel_script.defines_for("vulkan", None)["GGML_VULKAN"] == "ON"


def test_no_install_for_a_cpu_names_a_package_for_gpus() -> None:
    root = Path(__file__).resolve().parents[2]
    named = "\n".join((root / name).read_text(encoding="utf-8") for name in ("constraints.txt", "pyproject.toml"))
    named += (root / "constraints-transformers5.txt").read_text(encoding="utf-8")
    packages = re.findall(r"^\s*\"?([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:==|>=|<|~=|\"|$)", named, re.MULTILINE)
    assert {"llama-cpp-python", "onnxruntime", "torch"} <= set(packages)
    for_gpus = re.compile(r"nvidia|cuda|cupy|triton|rocm|onnxruntime-|torch-")
    assert [name for name in packages if for_gpus.search(name)] == []
