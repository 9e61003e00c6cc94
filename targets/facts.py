"""Facts about a machine that change speed or memory and that no number of a profile holds: as sentences, with values.

Caches, GPUs, governor, swap and zram, page size. Read from kernel files under a root, as ``host`` does; also holds the
small readers of such files that both share. Measures nothing.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from edgelm.units import format_bytes

_GPU_MODEL = re.compile(r"^Model:\s*(.+)$", re.MULTILINE)
_VENDORS = {"0x1002": "AMD", "0x8086": "Intel", "0x10de": "NVIDIA"}
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
_USUAL_PAGE = 4096
_TEXT_LIMIT, _TEXT_PIECE = 2**20, 2**14
ROOT = Path("/")


def host_notes(root: Path = ROOT) -> tuple[str, ...]:
    """What is worth knowing about this machine, one sentence each; nothing where nothing is told."""
    return (*_governor(root), *_swap(root), *_caches(root), *_page_size(), *_gpus(root))


def _governor(root: Path) -> list[str]:
    governor = text_of(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if not governor or governor == "performance":
        return []
    return [f"CPU governor is '{governor}': the clock follows the load, 'performance' gives steadier figures"]


def _swap(root: Path) -> list[str]:
    swap = meminfo(root).get("SwapTotal", 0)
    if not swap:
        return []
    lines = text_of(root / "proc/swaps").splitlines()[1:]
    kinds = {"zram" if "zram" in line else "disk" for line in lines}
    note = f"swap: {format_bytes(swap)} on {' and '.join(sorted(kinds)) or 'unknown'}"
    if "zram" in kinds:
        note += ": compressed memory, quantised weights hardly shrink in it"
    return [note]


def _caches(root: Path) -> list[str]:
    """Caches of the first CPU, with how many CPUs share each."""
    found = []
    for index in sorted((root / "sys/devices/system/cpu/cpu0/cache").glob("index[0-9]*")):
        level, kind, size = (text_of(index / name) for name in ("level", "type", "size"))
        match = re.fullmatch(r"(\d{1,9})([KMG])", size)
        if not match or kind == "Instruction" or not level.isdigit():
            continue
        size_bytes = int(match.group(1)) * _UNITS[match.group(2)]
        sharers = len(cpu_list(text_of(index / "shared_cpu_list")))
        shared = f" for {sharers} CPUs" if sharers > 1 else ""
        shown = f"{size_bytes >> 20} MiB" if size_bytes % 2**20 == 0 else f"{size_bytes >> 10} KiB"
        found.append(f"L{level} {shown}{shared}")
    return [f"caches: {', '.join(found)}"] if found else []


def _page_size() -> list[str]:
    size = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else _USUAL_PAGE
    return [] if size == _USUAL_PAGE else [f"memory pages have {size // 1024} KiB: mapped files take a little more"]


@dataclass(frozen=True, slots=True)
class SeenGpu:
    """A graphics processor that the kernel shows, whatever the engine was built for. ``sentence`` is for people."""

    vendor: str
    sentence: str


def seen_gpus(root: Path = ROOT) -> tuple[SeenGpu, ...]:
    """The graphics processors of this machine, as far as the kernel shows them."""
    nvidia = sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    names = [match.group(1).strip() for path in nvidia if (match := _GPU_MODEL.search(text_of(path)))]
    found = [SeenGpu("NVIDIA", f"NVIDIA GPU: {name}") for name in names]
    board = text_of(root / "proc/device-tree/model").rstrip("\0")
    if "Jetson" in board and not names:
        found.append(SeenGpu("NVIDIA", f"NVIDIA GPU: that of {board}, memory is shared with the CPU"))
    for card in sorted((root / "sys/class/drm").glob("card[0-9]*")):
        vendor = _VENDORS.get(text_of(card / "device/vendor"))
        if vendor is None or "-" in card.name or (vendor == "NVIDIA" and nvidia):
            continue
        name = text_of(card / "device/product_name") or f"device {text_of(card / 'device/device')}"
        vram = number(card / "device/mem_info_vram_total")
        size = f", {format_bytes(vram)} of VRAM" if vram else ""
        found.append(SeenGpu(vendor, f"{vendor} GPU: {name}{size}"))
    if sys.platform == "darwin" and platform.machine() == "arm64":
        found.append(SeenGpu("Apple", "Apple GPU: llama.cpp uses it through Metal, memory is shared with the CPU"))
    return tuple(found)


def _gpus(root: Path) -> list[str]:
    """Graphics processors and drivers for them. Only their presence: whether the engine was built for them is
    ``edgelm doctor``'s business."""
    notes = [gpu.sentence for gpu in seen_gpus(root)]
    drivers = sorted(
        path.stem.removesuffix(".x86_64").removesuffix(".aarch64").removesuffix("_icd")
        for folder in ("usr/share/vulkan/icd.d", "etc/vulkan/icd.d")
        for path in (root / folder).glob("*.json")
    )
    if drivers:
        notes.append(f"Vulkan drivers: {', '.join(dict.fromkeys(drivers))}")
    return notes


def cpu_list(text: str) -> set[int]:
    """CPU numbers of a kernel list such as ``0-3,8``; what is no number or range is left out."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part.strip())
        if match:
            cpus.update(range(int(match.group(1)), int(match.group(2) or match.group(1)) + 1))
    return cpus


def meminfo(root: Path) -> dict[str, int]:
    """``/proc/meminfo`` in bytes."""
    found = re.findall(r"^(\w+):\s+(\d+) kB$", text_of(root / "proc/meminfo"), re.MULTILINE)
    return {name: int(kib) * 1024 for name, kib in found}


def number(path: Path) -> float | None:
    """A kernel file that holds one number, None when it does not."""
    text = text_of(path)
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else None


def text_of(path: Path) -> str:
    """A small kernel file as text, empty when it is not there or not readable."""
    # The sensors come here ten times for a reading, beside what is measured. One read of _TEXT_LIMIT bytes would make
    # room for all of them first: memory that the kernel maps, and takes away again on every core.
    pieces: list[bytes] = []
    room = _TEXT_LIMIT
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            while room and (piece := os.read(descriptor, min(room, _TEXT_PIECE))):
                pieces.append(piece)
                room -= len(piece)
        finally:
            os.close(descriptor)
    except OSError:
        return ""
    return b"".join(pieces).decode("utf-8", errors="replace").strip()
