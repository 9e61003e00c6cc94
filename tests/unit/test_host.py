"""Host detection on made-up machines: fake /proc and /sys trees under a temporary root."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from targets.bandwidth import ForeignLoad, ReadBandwidth, every_count, measure_read_bandwidth, thread_counts
from targets.host import (
    available_memory,
    cpu_layout,
    cpu_name,
    default_threads,
    detect_host,
    host_record,
    instruction_set,
    kernel_family,
    measured,
)
from targets.profile import parse_profile, profile_toml

GIB_KIB = 2**20


class Machine:
    """Writes kernel files under a root."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def memory(self, total_gib: float, available_gib: float) -> None:
        self.put(
            "proc/meminfo",
            f"MemTotal:       {round(total_gib * GIB_KIB)} kB\nMemAvailable:   {round(available_gib * GIB_KIB)} kB\n",
        )

    def cpus(self, siblings: list[str], khz: list[int], allowed: str) -> None:
        self.put("sys/devices/system/cpu/online", f"0-{len(siblings) - 1}\n")
        for cpu, (names, clock) in enumerate(zip(siblings, khz, strict=True)):
            self.put(f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", names)
            self.put(f"sys/devices/system/cpu/cpu{cpu}/cpufreq/cpuinfo_max_freq", f"{clock}\n")
        self.put("proc/self/status", f"Name:\tx\nCpus_allowed_list:\t{allowed}\n")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    fake = Machine(tmp_path)
    fake.memory(8, 6)
    fake.put("proc/cpuinfo", "model name\t: Test CPU @ 2.00GHz\nflags\t\t: fpu avx avx2 fma f16c\n")
    fake.cpus([str(n) for n in range(4)], [2_000_000] * 4, "0-3")
    return fake


def test_siblings_and_slow_cores_are_not_threads(machine: Machine) -> None:
    # 2 performance cores with two threads each, 2 efficiency cores
    machine.cpus(["0-1", "0-1", "2-3", "2-3", "4", "5"], [5_000_000] * 4 + [3_600_000] * 2, "0-5")
    layout = cpu_layout(machine.root)
    assert (layout.fast, layout.slow) == ((0, 2), (4, 5))
    assert layout.fast_ghz == 5.0
    decode, prefill = default_threads(machine.root)
    assert (decode.value, prefill.value) == (2, 2)
    assert "2 fast cores" in decode.reason
    assert "2 slower by clock" in decode.reason


def test_capacity_decides_on_arm(machine: Machine) -> None:
    machine.cpus([str(n) for n in range(8)], [1_800_000] * 4 + [2_400_000] * 4, "0-7")
    for cpu in range(8):
        machine.put(f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity", "1024" if cpu >= 4 else "381")
    assert cpu_layout(machine.root).fast == (4, 5, 6, 7)


def test_affinity_limits_and_is_named(machine: Machine) -> None:
    machine.cpus([str(n) for n in range(4)], [2_000_000] * 4, "1,3")
    decode, _ = default_threads(machine.root)
    assert decode.value == 2
    assert "affinity" in decode.reason


@pytest.mark.parametrize(("quota", "threads"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 4)])
def test_a_cgroup_quota_is_rounded_up_and_named(machine: Machine, quota: str, threads: int) -> None:
    machine.put("proc/self/cgroup", "0::/box\n")
    machine.put("sys/fs/cgroup/box/cpu.max", quota)
    decode, _ = default_threads(machine.root)
    assert decode.value == threads
    assert ("cpu.max" in decode.reason) == (threads < 4)


def test_the_tightest_cgroup_of_the_hierarchy_counts(machine: Machine) -> None:
    machine.put("proc/self/cgroup", "0::/pod/box\n")
    machine.put("sys/fs/cgroup/pod/cpu.max", "100000 100000")
    machine.put("sys/fs/cgroup/pod/box/cpu.max", "300000 100000")
    assert default_threads(machine.root)[0].value == 1


def test_page_cache_in_a_cgroup_is_free_memory(machine: Machine) -> None:
    mib = 2**20
    machine.put("proc/self/cgroup", "0::/\n")
    machine.put("sys/fs/cgroup/memory.max", str(512 * mib))
    machine.put("sys/fs/cgroup/memory.current", str(400 * mib))
    machine.put("sys/fs/cgroup/memory.stat", f"anon 1\ninactive_file {300 * mib}\nactive_file 7\n")
    choice = available_memory(machine.root)
    assert choice.value == 412 * mib
    assert "memory.max" in choice.reason
    profile = detect_host(machine.root)
    assert profile.usable_ram_bytes == 412 * mib
    assert profile.ram_bytes == 512 * mib
    assert any("memory.max" in limit for limit in host_record(machine.root).limits)


def test_cgroup_version_1_is_read_too(machine: Machine) -> None:
    mib = 2**20
    machine.put("proc/self/cgroup", "4:memory:/box\n2:cpu,cpuacct:/box\n")
    machine.put("sys/fs/cgroup/memory/box/memory.limit_in_bytes", str(256 * mib))
    machine.put("sys/fs/cgroup/memory/box/memory.usage_in_bytes", str(56 * mib))
    machine.put("sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us", "100000")
    machine.put("sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us", "100000")
    assert available_memory(machine.root).value == 200 * mib
    assert default_threads(machine.root)[0].value == 1


def test_without_limits_mem_available_decides(machine: Machine) -> None:
    machine.put("proc/self/cgroup", "0::/\n")
    machine.put("sys/fs/cgroup/memory.max", "max")
    choice = available_memory(machine.root)
    assert choice.value == 6 * 2**30
    assert "MemAvailable" in choice.reason


def test_a_known_board_brings_its_own_advice(machine: Machine) -> None:
    machine.put("proc/device-tree/model", "Raspberry Pi 5 Model B Rev 1.0\x00")
    machine.put("proc/cpuinfo", "Features\t: fp asimd asimdhp asimddp\nCPU part\t: 0xd0b\n")
    machine.cpus([str(n) for n in range(4)], [2_400_000] * 4, "0-3")
    profile = detect_host(machine.root)
    assert (profile.threads_decode.value, profile.threads_prefill.value) == (2, 4)
    assert profile.kernels == "arm-dotprod"
    assert profile.cpu == "Cortex-A76"
    assert profile.memory.by_threads


@pytest.mark.parametrize(
    ("flags", "family"),
    [
        ("flags\t: avx2 fma avx512f avx512_vnni", "x86-avx512-vnni"),
        ("flags\t: avx2 fma avx512f avx512_vnni amx_int8", "x86-amx"),
        ("flags\t: avx2 fma avx_vnni", "x86-avx-vnni"),
        ("flags\t: avx2 fma", "x86-avx2"),
        ("flags\t: sse4_1", "generic"),
        ("Features\t: asimd asimddp i8mm", "arm-i8mm"),
        ("Features\t: asimd", "arm-neon"),
    ],
)
def test_the_instruction_set_names_the_kernels(machine: Machine, flags: str, family: str) -> None:
    machine.put("proc/cpuinfo", flags + "\n")
    assert kernel_family(instruction_set(machine.root)) == family


@pytest.mark.parametrize(
    ("hwcap", "hwcap2", "features"),
    [
        (0x8FF, 0, ("neon",)),  # Cortex-A72
        (0x119FFF, 0, ("neon", "dotprod", "fp16")),  # Cortex-A76
        (0x119FFF | 1 << 22, 1 << 1 | 1 << 13 | 1 << 14, ("neon", "dotprod", "fp16", "i8mm", "bf16", "sve", "sve2")),
    ],
)
def test_an_arm_processor_is_known_by_what_the_kernel_grants(
    machine: Machine, hwcap: int, hwcap2: int, features: tuple[str, ...]
) -> None:
    # Under emulation /proc/cpuinfo is the file of the machine beneath, as this one of an x86 processor.
    vector = struct.pack("<8Q", 16, hwcap, 6, 4096, 26, hwcap2, 0, 0)
    machine.put("proc/self/auxv", "")
    (machine.root / "proc/self/auxv").write_bytes(vector)
    assert instruction_set(machine.root, "aarch64") == features
    assert cpu_name(machine.root, "aarch64") == "aarch64, emulated on Test CPU @ 2.00GHz"
    assert instruction_set(machine.root, "x86_64") == ("avx", "avx2", "fma", "f16c")
    assert cpu_name(machine.root, "x86_64") == "Test CPU @ 2.00GHz"


def test_garbage_in_kernel_files_is_survived(machine: Machine) -> None:
    for name in (
        "proc/self/cgroup",
        "proc/self/status",
        "proc/cpuinfo",
        "proc/self/auxv",
        "sys/devices/system/cpu/online",
        "sys/devices/system/cpu/cpu0/cpu_capacity",
        "sys/fs/cgroup/memory.max",
    ):
        machine.put(name, "\x00::-1-\n:::9999999999999,\xff\n")
    assert detect_host(machine.root).threads_decode.value >= 1


def test_this_machine_is_described() -> None:
    profile = detect_host()
    assert profile.id == "host"
    assert 0 < profile.usable_ram_bytes <= profile.ram_bytes
    again = parse_profile(profile_toml(profile).encode(), "host")
    assert again.cores == profile.cores
    assert host_record().cores >= 1


def test_a_measured_bandwidth_becomes_the_profile(machine: Machine) -> None:
    reading = ReadBandwidth((6e9, 10e9, 9e9, 8e9), 2**29)
    profile = measured(detect_host(machine.root), reading)
    assert profile.memory.effective is not None
    assert profile.memory.effective.value == 10e9
    assert profile.memory.by_threads == (0.6, 1.0, 0.9, 0.8)
    assert profile.threads_decode.value == 2
    assert "10.0 GB/s" in profile.threads_decode.reason


def test_bandwidth_is_measured_for_every_thread_count() -> None:
    reading = measure_read_bandwidth(2, buffer_bytes=2**22, seconds=0.01)
    assert len(reading.by_threads) == 2
    assert reading.best >= min(reading.by_threads) > 0
    # No size fits below so small an array: the array itself remains.
    assert [size for size, _ in reading.by_size] == [2**22]
    assert all(len(rates) == 2 and min(rates) > 0 for _, rates in reading.by_size)


def test_counts_between_the_measured_ones_are_filled() -> None:
    assert [thread_counts(threads) for threads in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]
    assert every_count({1: 10.0, 2: 18.0, 4: 30.0}) == (10.0, 18.0, 24.0, 30.0)


def test_foreign_load_counts_others_and_not_this_process() -> None:
    code = "import time\nend = time.monotonic() + 30\nprint('up', flush=True)\nwhile time.monotonic() < end: pass"
    load = ForeignLoad()
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    own = load.share()
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "up\n"
            used = psutil.Process(other.pid)
            load = ForeignLoad()
            before = sum(used.cpu_times()[:2])
            while (taken := sum(used.cpu_times()[:2]) - before) < 0.5:
                time.sleep(0.05)
            elapsed = time.monotonic() - load._started
            # At least this one; other processes of the machine may add to it.
            assert load.share() >= 0.8 * taken / elapsed / (psutil.cpu_count() or 1)
        finally:
            other.kill()
    assert 0 <= own <= 1
