"""Facts of made-up machines, and the reading speed of real storage."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from edgelm.errors import ProfileError
from targets.facts import cpu_list, host_notes
from targets.storage import measure_storage


def put(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_caches_are_told_with_their_sharers(tmp_path: Path) -> None:
    base = "sys/devices/system/cpu/cpu0/cache/"
    for index, (level, kind, size, shared) in enumerate(
        (("1", "Data", "48K", "0"), ("1", "Instruction", "32K", "0"), ("3", "Unified", "12288K", "0-3"))
    ):
        for name, text in (("level", level), ("type", kind), ("size", size), ("shared_cpu_list", shared)):
            put(tmp_path, f"{base}index{index}/{name}", text)
    assert any(note == "caches: L1 48 KiB, L3 12 MiB for 4 CPUs" for note in host_notes(tmp_path))


def test_graphics_processors_are_named_once(tmp_path: Path) -> None:
    put(tmp_path, "proc/driver/nvidia/gpus/0000:01:00.0/information", "Model: \t NVIDIA RTX 4070\nIRQ: 5\n")
    put(tmp_path, "sys/class/drm/card0/device/vendor", "0x10de\n")
    put(tmp_path, "sys/class/drm/card1/device/vendor", "0x1002\n")
    put(tmp_path, "sys/class/drm/card1/device/device", "0x744c\n")
    put(tmp_path, "sys/class/drm/card1/device/mem_info_vram_total", f"{24 * 10**9}\n")
    put(tmp_path, "sys/class/drm/card1-DP-1/device/vendor", "0x1002\n")
    put(tmp_path, "usr/share/vulkan/icd.d/radeon_icd.x86_64.json", "{}")
    notes = [note for note in host_notes(tmp_path) if "GPU" in note or "Vulkan" in note]
    assert notes == ["NVIDIA GPU: NVIDIA RTX 4070", "AMD GPU: device 0x744c, 24 GB of VRAM", "Vulkan drivers: radeon"]


def test_compressed_swap_is_told_from_disk(tmp_path: Path) -> None:
    put(tmp_path, "proc/meminfo", "SwapTotal:  1000000 kB\n")
    put(tmp_path, "proc/swaps", "Filename Type Size Used Priority\n/dev/zram0 partition 1 0 100\n")
    assert any("on zram" in note and "hardly shrink" in note for note in host_notes(tmp_path))


def test_an_empty_machine_has_nothing_to_tell(tmp_path: Path) -> None:
    assert [note for note in host_notes(tmp_path) if not note.startswith(("memory pages", "Apple"))] == []


@pytest.mark.parametrize(("text", "cpus"), [("0-2,5", {0, 1, 2, 5}), ("", set()), ("x,1-", set()), ("7", {7})])
def test_lists_of_cpus(text: str, cpus: set[int]) -> None:
    assert cpu_list(text) == cpus


def test_storage_is_read_past_the_cache_or_refused(tmp_path: Path) -> None:
    with contextlib.suppress(ProfileError):  # a memory file system has no storage to measure
        assert measure_storage(tmp_path, size_bytes=2**22) > 1e5
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ProfileError, match="cannot measure the storage"):
        measure_storage(tmp_path / "nowhere")
