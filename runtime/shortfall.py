"""Why a machine may be slower than it should be: causes that can be seen, each with a way out.

Used by ``doctor``. Reads kernel files below a root path and what the sensors say; measures only what it is given.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runtime.features import BUILD_NAMES, build_flags, has_blas, used_and_idle
from runtime.sensors import Reading, Sensors
from targets.facts import ROOT, SeenGpu, text_of
from targets.host import cpu_layout, read_limits
from targets.vram import RECIPE, Device

Status = Literal["ok", "note", "warning", "broken"]

SHORTFALL = 0.7  # of the expected speed: predictions are right within 30 % for three quarters of the machines
SLOW_STORAGE = 100e6  # bytes per second: an SD card; an eMMC or SSD reads faster
_WAIT_S = 0.3


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. ``broken`` means that models cannot be run as things are."""

    name: str
    status: Status
    detail: str
    hint: str | None = None


def build_findings(isa: tuple[str, ...], system: str) -> list[Finding]:
    """The CPU's extensions and a BLAS against what llama.cpp's build names in its system information.

    AMX only earns a note: it is turned off where compilers break it, and prefill without it is slower, not wrong.
    """
    used, idle = used_and_idle(isa, system)
    missing = tuple(feature for feature in idle if not feature.startswith("amx"))
    found = []
    if missing:
        detail = f"the CPU has {', '.join(missing)}, which the engine's build does not use"
        found.append(
            Finding("cpu features", "warning", detail, "rebuild llama-cpp-python on this machine with 'make setup'")
        )
    else:
        found.append(Finding("cpu features", "ok", f"the engine's build uses {', '.join(used) or 'no extension'}"))
    if any(feature.startswith("amx") for feature in isa) and BUILD_NAMES["amx_int8"] not in build_flags(system):
        hint = "a build by clang, or by gcc 13 or newer, may use it"
        found.append(Finding("amx", "note", "the CPU has AMX and the build does not use it: prefill is slower", hint))
    if has_blas(system):
        detail = "the build multiplies long prompts through BLAS: quantised kernels of its own are usually faster"
        found.append(Finding("blas", "note", detail, "compare with a build without GGML_BLAS"))
    return found


_BUILDS = {"NVIDIA": "cuda", "AMD": "vulkan", "Intel": "vulkan", "Apple": "metal"}


def gpu_findings(seen: Sequence[SeenGpu], devices: Sequence[Device], *, gpu_backends: bool) -> list[Finding]:
    """The graphics processors that the kernel shows against those that llama.cpp's build can use."""
    usable = [device for device in devices if device.is_gpu]
    if usable:
        return [Finding("gpu", "ok", f"the engine can use {device.sentence()}") for device in usable]
    if not seen:
        why = "the engine's build could use one" if gpu_backends else "the engine's build is for CPUs"
        return [Finding("gpu", "ok", f"none seen on this machine, {why}: the CPU computes everything")]
    if gpu_backends:
        why, hint = (
            "which the engine's build does not see",
            "is its driver installed, and is it passed into the container?",
        )
        return [Finding("gpu", "warning", f"{gpu.sentence}, {why}", hint) for gpu in seen]
    why = "and the engine's build is for CPUs only: it stays idle"
    builds = {gpu: f"build llama-cpp-python for {_BUILDS[gpu.vendor]}: {RECIPE}" for gpu in seen}
    return [Finding("gpu", "warning", f"{gpu.sentence}, {why}", hint) for gpu, hint in builds.items()]


def causes(sensors: Sensors | None = None, root: Path = ROOT) -> list[Finding]:
    """What can be seen of the machine now that slows models down. Waits a moment to see what moves."""
    sensors = sensors or Sensors(root)
    before = sensors.read(thorough=True)
    time.sleep(_WAIT_S)
    after = sensors.read(thorough=True)
    return [*_heat(sensors, before, after), *_quota(before, after, root), *_smt(root), *_huge_pages(root)]


def _heat(sensors: Sensors, before: Reading, after: Reading) -> Iterator[Finding]:
    governor = sensors.governor
    if governor in ("powersave", "conservative", "userspace"):
        hint = "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
        yield Finding("governor", "warning", f"the governor is '{governor}': clocks stay low", hint)
    state = after.throttle
    if state is not None and state.now:
        detail = f"the firmware reports {', '.join(state.now)}"
        power = "under-voltage" in state.now
        hint = "use the board's own power supply and a short cable" if power else "cool the board: heat sink or fan"
        yield Finding("throttling", "warning", detail, hint)
    elif state is not None and state.since_boot:
        detail = f"since boot the firmware has reported {', '.join(state.since_boot)}"
        yield Finding("throttling", "note", detail, "it will again under load: check cooling and power supply")
    elif state is not None:
        since = "" if state.since_boot is None else ", nor since boot"
        yield Finding("throttling", "ok", f"the firmware holds nothing back now{since}")
    if after.temperature_c is not None:
        hot = after.temperature_c >= 80
        way_out = "cool it: boards slow down from 80 to 85 C" if hot else None
        detail = f"{after.temperature_c:.0f} C ({sensors.zone})"
        yield Finding("temperature", "warning" if hot else "ok", detail, way_out)
    if after.clock_mhz is not None and sensors.clock_limit_mhz:
        yield Finding("clock", "ok", f"{after.clock_mhz:.0f} of {sensors.clock_limit_mhz:.0f} MHz now")
    if before.stolen_s is not None and after.stolen_s is not None and after.stolen_s - before.stolen_s > 0.05 * _WAIT_S:
        share = (after.stolen_s - before.stolen_s) / (after.at_s - before.at_s)
        hint = "a shared virtual machine is no place for figures"
        yield Finding("hypervisor", "warning", f"other machines took {share:.0%} of a CPU just now", hint)


def _quota(before: Reading, after: Reading, root: Path) -> Iterator[Finding]:
    limits = read_limits(root)
    if limits.quota is None:
        return
    held = after.quota_held_s
    detail = f"{limits.quota_source} grants {limits.quota:g} CPUs"
    if held is not None and held > (before.quota_held_s or 0.0):
        detail += ", and it held this group back just now"
    hint = "raise it (docker run --cpus, systemd CPUQuota=), or use that many threads"
    yield Finding("cpu quota", "warning", detail, hint)


def _smt(root: Path) -> Iterator[Finding]:
    layout = cpu_layout(root)
    if layout.threads_per_core > 1:
        cores = len(layout.fast) + len(layout.slow)
        detail = f"{layout.threads_per_core} hardware threads share each of {cores} cores"
        hint = f"--threads {len(layout.fast)} at most: siblings share one multiplier"
        yield Finding("smt", "note", detail, hint)


def _huge_pages(root: Path) -> Iterator[Finding]:
    text = text_of(root / "sys/kernel/mm/transparent_hugepage/enabled")
    match = re.search(r"\[(\w+)\]", text)
    if match is not None and match.group(1) == "never":
        hint = "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
        yield Finding("huge pages", "note", "transparent huge pages are off: more address translation per token", hint)


def storage_finding(read_bytes_per_s: float, weights_bytes: int) -> Finding:
    """Whether loading, and paging when memory is short, wait for the disk."""
    rate = f"{read_bytes_per_s / 1e6:.0f} MB/s, a cold start reads {weights_bytes / read_bytes_per_s:.1f} s"
    if read_bytes_per_s < SLOW_STORAGE:
        return Finding("storage", "warning", f"reads {rate}", "keep models on an SSD or USB 3 drive, not on an SD card")
    return Finding("storage", "ok", f"reads {rate}")


def speed_finding(name: str, measured_tps: float, expected_tps: float, target: str, seen: list[str]) -> Finding:
    """A measured speed against the expected one; ``seen`` names findings that would explain a shortfall."""
    share = measured_tps / expected_tps
    detail = f"{measured_tps:.1f} tok/s measured, {expected_tps:.1f} expected of {target} ({share:.0%})"
    if share >= SHORTFALL:
        return Finding(name, "ok", detail)
    if seen:
        return Finding(name, "warning", detail, f"possible causes found: {', '.join(seen)}")
    hint = "nothing that explains it was seen; 'edgelm bench --threads auto' tries other thread counts"
    return Finding(name, "warning", detail, hint)
