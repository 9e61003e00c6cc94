"""What the machine at hand is, and what it allows: cores, affinity, cgroup limits, memory, instruction set.

Every value comes with the reason that decided it. Everything is read under a root path, so that tests can show a
made-up ``/proc`` and ``/sys``. Fast on purpose: nothing is measured here (``bandwidth`` measures). Linux is read in
full; elsewhere psutil answers. Does not know models or engines.
"""

from __future__ import annotations

import math
import platform
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import psutil

from edgelm.bundle import Choice
from edgelm.report import HostRecord
from targets.arm import ARM_MACHINES, arm_features
from targets.facts import ROOT, cpu_list, host_notes, meminfo, number, text_of
from targets.profile import GB, Cores, Figure, Memory, Streaming, TargetProfile, board_profile

if TYPE_CHECKING:
    from targets.bandwidth import ReadBandwidth

# What one core draws and all cores sustain when nobody has measured: the low end of dual-channel DDR4 machines.
UNMEASURED_PER_CORE = 6.0 * GB
UNMEASURED_TOTAL = 16.0 * GB
UNKNOWN_GHZ = 2.0
_ISA = {
    "x86": ("avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8"),
    "arm": ("asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2", "sme"),
}
_ARM_NAMES = {"asimd": "neon", "asimddp": "dotprod", "asimdhp": "fp16"}
# Main ID Register part numbers of common cores (Arm TRMs); the name is for people only.
_ARM_PARTS = {
    "0xd03": "Cortex-A53",
    "0xd05": "Cortex-A55",
    "0xd08": "Cortex-A72",
    "0xd0b": "Cortex-A76",
    "0xd40": "Neoverse-V1",
    "0xd41": "Cortex-A78",
    "0xd42": "Cortex-A78AE",
    "0xd4f": "Neoverse-V2",
    "0xd80": "Cortex-A520",
    "0xd81": "Cortex-A720",
    "0xd85": "Cortex-X925",
    "0xd87": "Cortex-A725",
}


@dataclass(frozen=True, slots=True)
class CpuLayout:
    """Physical cores by speed. ``fast`` and ``slow`` hold one logical CPU number per physical core."""

    fast: tuple[int, ...]
    slow: tuple[int, ...]
    threads_per_core: int
    fast_ghz: float
    reason: str


@dataclass(frozen=True, slots=True)
class Limits:
    """What this process may use. ``cpus`` is the affinity mask, ``quota`` CPUs granted by the cgroup or None."""

    cpus: frozenset[int]
    quota: float | None
    quota_source: str
    memory_limit_bytes: int | None
    memory_limit_source: str
    memory_available: Choice


def detect_host(root: Path = ROOT) -> TargetProfile:
    """This machine as a profile (id ``host``), without measuring anything. Raises nothing on odd machines."""
    layout, limits, board = cpu_layout(root), read_limits(root), known_board(root)
    decode, prefill = _threads(layout, limits, board)
    total_bytes = _memory_total(root)
    isa = instruction_set(root)
    unmeasured = "assumed: nobody measured this machine; 'edgelm targets detect -o me.toml' does"
    ram_bytes = min(total_bytes, limits.memory_limit_bytes or total_bytes)
    memory = Memory(
        kind="not detected",
        variants_bytes=(ram_bytes,),
        default_bytes=ram_bytes,
        reserved_bytes=Figure(value=0, source="detected: what is free now is known"),
        effective=Figure(
            value=min(UNMEASURED_TOTAL, UNMEASURED_PER_CORE * max(int(decode.value), 2)), source=unmeasured
        ),
        per_core=Figure(value=UNMEASURED_PER_CORE, source=unmeasured),
    )
    return TargetProfile(
        id="host",
        name=board_model(root) or "this machine",
        kind="cpu",
        backend="cpu",
        kernels=kernel_family(isa),
        cpu=cpu_name(root),
        isa=isa,
        ram_bytes=ram_bytes,
        devices=board.devices if board else (),
        memory=board.memory if board else memory,
        cores=Cores(
            fast=max(len(layout.fast), 1),
            fast_ghz=Figure(value=layout.fast_ghz, source=f"detected: {layout.reason}"),
            slow=len(layout.slow),
        ),
        threads_decode=decode,
        threads_prefill=prefill,
        notes=host_notes(root),
        available=limits.memory_available,
    )


def measured(profile: TargetProfile, reading: ReadBandwidth) -> TargetProfile:
    """A detected profile with the bandwidth that was measured on it, and decode threads that follow from it."""
    source = f"measured: reading {reading.buffer_bytes // 2**20} MiB with 1 to {len(reading.by_threads)} threads"
    streaming = None
    if reading.by_size:
        sizes, rates = zip(*reading.by_size, strict=True)
        told = f"measured: reading {sizes[0] // 2**20} to {sizes[-1] // 2**20} MiB again and again"
        streaming = Streaming(sizes_bytes=sizes, rates=rates, source=told)
    shares = tuple(round(value / reading.best, 3) for value in reading.by_threads)
    memory = profile.memory.model_copy(
        update={
            "effective": Figure(value=reading.best, source=source),
            "per_core": Figure(value=reading.by_threads[0], source=source),
            "by_threads": shares,
            "streaming": streaming,
            "theoretical": None,
        }
    )
    threads = profile.threads_decode
    if reading.best_threads < int(threads.value):
        reason = f"{reading.best_threads} threads read {reading.best / GB:.1f} GB/s, more read no faster ({source})"
        threads = Choice(value=reading.best_threads, reason=reason)
    return profile.model_copy(update={"memory": memory, "threads_decode": threads})


def default_threads(root: Path = ROOT) -> tuple[Choice, Choice]:
    """Threads for decode and for prefill on this machine: min(fast cores, affinity, cgroup quota), with the reason."""
    return _threads(cpu_layout(root), read_limits(root), known_board(root))


def available_memory(root: Path = ROOT) -> Choice:
    """Bytes that a process started now can take: min(MemAvailable, what the cgroups leave), with the reason."""
    return read_limits(root).memory_available


def host_record(root: Path = ROOT) -> HostRecord:
    """This machine as a report stores it. Names no user, path or host name."""
    layout, limits = cpu_layout(root), read_limits(root)
    stated = [f"affinity: {len(limits.cpus)} CPUs"]
    if limits.quota is not None:
        stated.append(f"{limits.quota_source}: {limits.quota:g} CPUs")
    if limits.memory_limit_bytes is not None:
        stated.append(f"{limits.memory_limit_source}: {limits.memory_limit_bytes} bytes")
    return HostRecord(
        profile="host",
        cpu=cpu_name(root),
        isa=instruction_set(root),
        cores=len(layout.fast) + len(layout.slow),
        ram_bytes=_memory_total(root),
        available_ram_bytes=int(limits.memory_available.value),
        os=f"{platform.system()} {platform.release()} {platform.machine()}",
        limits=tuple(stated),
    )


def known_board(root: Path = ROOT) -> TargetProfile | None:
    """The built-in CPU profile of this very board, found by its device-tree name; None on other machines."""
    model = board_model(root)
    return board_profile(model) if model else None


def _threads(layout: CpuLayout, limits: Limits, board: TargetProfile | None) -> tuple[Choice, Choice]:
    fast = [cpu for cpu in layout.fast if cpu in limits.cpus]
    # One logical CPU per core was noted; a mask that holds only siblings or slow cores still leaves those CPUs.
    allowed = len(fast) or min(len(limits.cpus), len(layout.fast) + len(layout.slow))
    candidates = [(len(layout.fast), f"{len(layout.fast)} fast cores ({layout.reason})")]
    if allowed < len(layout.fast):
        candidates.append((allowed, f"CPU affinity allows {len(limits.cpus)} CPUs, {len(fast)} of them fast cores"))
    if limits.quota is not None:
        candidates.append((max(math.ceil(limits.quota), 1), f"{limits.quota_source} grants {limits.quota:g} CPUs"))
    return (
        _fewest(candidates, board.threads_decode if board else None),
        _fewest(candidates, board.threads_prefill if board else None),
    )


def _fewest(candidates: list[tuple[int, str]], advised: Choice | None) -> Choice:
    if advised is not None:
        candidates = [*candidates, (int(advised.value), advised.reason)]
    count, reason = min(candidates, key=lambda item: item[0])
    return Choice(value=max(count, 1), reason=reason)


def cpu_layout(root: Path = ROOT) -> CpuLayout:
    """Physical cores from sysfs topology, split into fast and slow by capacity, else by maximum clock."""
    cpus = _online_cpus(root)
    if not cpus:
        count = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
        return CpuLayout(tuple(range(count)), (), 1, _clock_ghz(root, 0), "counted by the operating system")
    cores: dict[str, int] = {}
    for cpu in cpus:
        siblings = text_of(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu)
        cores.setdefault(siblings, cpu)
    first = tuple(sorted(cores.values()))
    speed, what = _speeds(root, first)
    best = max(speed.values())
    # Cores within a fifth of the fastest are the same kind: favoured-core boost differs by less, A55/A76 by far more.
    fast = tuple(cpu for cpu in first if speed[cpu] >= 0.8 * best)
    slow = tuple(cpu for cpu in first if cpu not in fast)
    reason = f"{len(first)} physical cores, {len(cpus)} threads" + (f", {len(slow)} slower by {what}" if slow else "")
    return CpuLayout(fast, slow, max(len(cpus) // len(first), 1), _clock_ghz(root, fast[0]), reason)


def _speeds(root: Path, cpus: tuple[int, ...]) -> tuple[dict[int, float], str]:
    base = root / "sys/devices/system/cpu"
    atom = cpu_list(text_of(root / "sys/devices/cpu_atom/cpus"))
    if atom and not atom.issuperset(cpus):
        return {cpu: 0.5 if cpu in atom else 1.0 for cpu in cpus}, "kind (efficiency cores)"
    for name, what in (("cpu_capacity", "capacity"), ("cpufreq/cpuinfo_max_freq", "clock")):
        values = {cpu: number(base / f"cpu{cpu}/{name}") for cpu in cpus}
        known = {cpu: value for cpu, value in values.items() if value is not None and value > 0}
        if len(known) == len(cpus):
            return known, what
    return dict.fromkeys(cpus, 1.0), "nothing"


def _clock_ghz(root: Path, cpu: int) -> float:
    khz = number(root / f"sys/devices/system/cpu/cpu{cpu}/cpufreq/cpuinfo_max_freq")
    if khz:
        return khz / 1e6
    match = re.search(r"@\s*([\d.]+)\s*GHz", cpu_name(root)) or re.search(
        r"^cpu MHz\s*:\s*([\d.]+)", text_of(root / "proc/cpuinfo"), re.MULTILINE
    )
    if match is None:
        return UNKNOWN_GHZ
    value = float(match.group(1))
    return value if value < 100 else value / 1000


def read_limits(root: Path = ROOT) -> Limits:
    """Affinity, CPU quota and memory limits of this process, cgroup v2 or v1, the tightest of the hierarchy."""
    cpus = _affinity(root)
    quota, quota_source = None, ""
    limit, limit_source = None, ""
    total = _memory_total(root)
    free = meminfo(root).get("MemAvailable") or int(psutil.virtual_memory().available)
    available = Choice(value=free, reason=f"MemAvailable says {free / GB:.2f} GB of {total / GB:.2f} GB")
    for directory, version in cgroup_directories(root):
        granted = _quota(directory, version)
        if granted is not None and (quota is None or granted < quota):
            quota, quota_source = granted, "cgroup cpu.max" if version == 2 else "cgroup cpu.cfs_quota_us"
        bound = _memory_limit(directory, version)
        if bound is None or bound[0] >= total:
            continue
        maximum, left, name = bound
        if limit is None or maximum < limit:
            limit, limit_source = maximum, f"cgroup {name}"
        if left < free:
            free = left
            reason = f"cgroup {name} is {maximum / GB:.2f} GB and leaves {left / GB:.2f} GB"
            available = Choice(value=left, reason=reason)
    return Limits(cpus, quota, quota_source, limit, limit_source, available)


def cgroup_directories(root: Path) -> list[tuple[Path, int]]:
    """Directories of this process's cgroups from the innermost to the root, v2 and v1 controllers."""
    found: list[tuple[Path, int]] = []
    mount = root / "sys/fs/cgroup"
    for line in text_of(root / "proc/self/cgroup").splitlines():
        parts = line.split(":", 2)
        if len(parts) != 3:
            continue
        controllers, path = parts[1], PurePosixPath("/" + parts[2].strip("/"))
        bases = (
            [mount, mount / "unified"]
            if not controllers
            else [mount / name for name in (controllers, *controllers.split(","))]
        )
        wanted = not controllers or {"cpu", "memory"} & set(controllers.split(","))
        for base in bases if wanted else []:
            relatives = [path, *path.parents]
            # A container sees its own cgroup at the mount's root while the path names the host's: both are tried.
            found += [(base / str(relative).lstrip("/"), 1 if controllers else 2) for relative in relatives]
    return [item for item in dict.fromkeys(found) if item[0].is_dir()]


def _quota(directory: Path, version: int) -> float | None:
    if version == 2:
        words = text_of(directory / "cpu.max").split()
        quota, period = (words[0], words[1]) if len(words) == 2 else ("max", "1")
    else:
        quota, period = text_of(directory / "cpu.cfs_quota_us"), text_of(directory / "cpu.cfs_period_us")
    if not (quota.isdigit() and period.isdigit() and int(quota) > 0 and int(period) > 0):
        return None
    return int(quota) / int(period)


def _memory_limit(directory: Path, version: int) -> tuple[int, int, str] | None:
    """(limit, bytes left under it, file name). Inactive page cache counts as free: the kernel drops it first."""
    v2 = version == 2
    name = "memory.max" if v2 else "memory.limit_in_bytes"
    maximum = number(directory / name)
    if maximum is None:
        return None
    current = number(directory / ("memory.current" if v2 else "memory.usage_in_bytes")) or 0
    key = "inactive_file" if v2 else "total_inactive_file"
    match = re.search(rf"^{key} (\d+)$", text_of(directory / "memory.stat"), re.MULTILINE)
    inactive = int(match.group(1)) if match else 0
    return int(maximum), max(int(maximum - max(current - inactive, 0)), 0), name


def instruction_set(root: Path = ROOT, machine: str | None = None) -> tuple[str, ...]:
    """Instruction set extensions that matter here, by the names that profiles use. ``machine`` as in ``uname -m``."""
    if (machine or platform.machine()).lower() in ARM_MACHINES and (features := arm_features(root)):
        return features
    match = re.search(r"^(?:flags|Features|isa)\s*:\s*(.+)$", text_of(root / "proc/cpuinfo"), re.MULTILINE)
    if match is None:
        return ("neon", "dotprod", "fp16") if platform.machine().lower() == "arm64" else ()
    flags = set(match.group(1).lower().split())
    return tuple(_ARM_NAMES.get(flag, flag) for flag in (*_ISA["x86"], *_ISA["arm"]) if flag in flags)


def kernel_family(isa: tuple[str, ...]) -> str:
    """The kernel family of ``calibration.toml`` that llama.cpp uses with these extensions."""
    for needed, family in (
        ("i8mm", "arm-i8mm"),
        ("dotprod", "arm-dotprod"),
        ("neon", "arm-neon"),
        ("amx_int8", "x86-amx"),
        ("avx512_vnni", "x86-avx512-vnni"),
        ("avx_vnni", "x86-avx-vnni"),
        ("avx2", "x86-avx2"),
    ):
        if needed in isa:
            return family
    return "generic"


def cpu_name(root: Path = ROOT, machine: str | None = None) -> str:
    """The processor's name for people. ``machine`` as in ``uname -m``."""
    text = text_of(root / "proc/cpuinfo")
    machine = (machine or platform.machine()).lower()
    match = re.search(r"^(?:model name|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    if match and machine in ARM_MACHINES and re.search(r"^flags\s*:", text, re.MULTILINE):
        return f"{machine}, emulated on {match.group(1).strip()}"  # the file is the emulating machine's
    if match:
        return match.group(1).strip()
    parts = re.findall(r"^CPU part\s*:\s*(\S+)$", text, re.MULTILINE)
    names = [_ARM_PARTS.get(part, part) for part in dict.fromkeys(parts)]
    return " + ".join(names) or platform.processor() or platform.machine()


def board_model(root: Path = ROOT) -> str | None:
    """The board's name from the device tree, or the machine's from DMI; None when neither is told."""
    for name in ("proc/device-tree/model", "sys/firmware/devicetree/base/model", "sys/class/dmi/id/product_name"):
        text = text_of(root / name).strip("\x00 \n")
        if text and not text.lower().startswith(("system product", "to be filled", "default")):
            return text
    return None


def _affinity(root: Path) -> frozenset[int]:
    match = re.search(r"^Cpus_allowed_list:\s*(.+)$", text_of(root / "proc/self/status"), re.MULTILINE)
    listed = cpu_list(match.group(1)) if match else set()
    if listed:
        return frozenset(listed)
    return frozenset(range(psutil.cpu_count() or 1))


def _online_cpus(root: Path) -> tuple[int, ...]:
    base = root / "sys/devices/system/cpu"
    listed = cpu_list(text_of(base / "online"))
    if not listed and base.is_dir():
        names = (path.name[3:] for path in base.glob("cpu[0-9]*"))
        listed = {int(name) for name in names if name.isdigit()}
    return tuple(sorted(listed))


def _memory_total(root: Path) -> int:
    return meminfo(root).get("MemTotal") or int(psutil.virtual_memory().total)
