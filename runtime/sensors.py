"""What the machine says of itself while something is measured: temperature, clocks, throttling, other load, power.

``Sensors`` reads once, ``Sampler`` reads in a thread that sleeps in between; a reading costs well under a millisecond
of CPU. Kernel files are read below a root path, so that tests can show made-up trees. What a machine does not tell is
None. Knows nothing of models, and judges nothing: ``conditions`` does.
"""

from __future__ import annotations

import os
import re
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from runtime.power import Command, EnergyMeter, find_power, no_command, vcgencmd
from targets.facts import ROOT, cpu_list, number, text_of
from targets.host import cgroup_directories

INTERVAL_S = 0.5
SLOW_INTERVAL_S = 5.0  # between two questions to the firmware's tool, each of which starts a process
_CPU_ZONES = ("cpu", "x86_pkg", "soc", "package", "tctl", "coretemp", "k10temp", "core")
# Raspberry Pi firmware, "get_throttled": bits 0 to 3 now, 16 to 19 since boot.
THROTTLE_FLAGS = ("under-voltage", "frequency capped", "throttled", "soft temperature limit")


@dataclass(frozen=True, slots=True)
class Throttle:
    """Flags that hold now, and that held since boot (None: nobody tells)."""

    now: tuple[str, ...]
    since_boot: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Reading:
    """Everything at one moment. Counters count since boot or process start; ``pressure_s`` is PSI's "some" total."""

    at_s: float
    temperature_c: float | None
    clock_mhz: float | None
    throttle: Throttle | None
    throttle_events: int | None
    busy_s: float | None
    stolen_s: float | None
    own_cpu_s: float
    runnable: int | None
    load_1m: float | None
    pressure_s: dict[str, float]
    quota_held_s: float | None
    swapped_in_pages: int | None
    major_faults: int
    available_bytes: int | None
    energy_j: float | None


def decode_throttled(value: int) -> Throttle:
    """The firmware's bit field: what holds now in the low half, what held since boot in the high half."""
    now = tuple(name for bit, name in enumerate(THROTTLE_FLAGS) if value >> bit & 1)
    since = tuple(name for bit, name in enumerate(THROTTLE_FLAGS) if value >> (16 + bit) & 1)
    return Throttle(now, since)


class Sensors:
    """Finds what there is once, then reads it as often as asked. ``command`` runs ``vcgencmd`` with one argument."""

    def __init__(self, root: Path = ROOT, command: Command | None = None) -> None:
        self._root = root
        self._command = command or (vcgencmd if root == ROOT else no_command)
        names = ("stat", "vmstat", "loadavg", "meminfo", "pressure/cpu", "pressure/memory", "pressure/io")
        self._proc = {name: root / "proc" / name for name in names}
        self.zone, self._temperature = _temperature_source(root)
        cpus = root / "sys/devices/system/cpu"
        online = cpu_list(text_of(cpus / "online")) or set(range(os.cpu_count() or 1))
        self._clocks = [cpus / f"cpu{cpu}/cpufreq/scaling_cur_freq" for cpu in sorted(online)]
        self._clocks = [path for path in self._clocks if number(path) is not None]
        self.governor = text_of(cpus / "cpu0/cpufreq/scaling_governor") or None
        limits = [number(path.parent / "cpuinfo_max_freq") for path in self._clocks]
        self.clock_limit_mhz = max((khz / 1000 for khz in limits if khz), default=None)
        platform = root / "sys/devices/platform"
        self._throttled_files = [
            *platform.glob("*/*firmware/get_throttled"),  # soc/soc:firmware
            *platform.glob("*/*/*firmware/get_throttled"),  # the same one bus further down
        ]
        self._throttle_counts = sorted(cpus.glob("cpu*/thermal_throttle/*_throttle_count"))
        self._cpu_stats = [
            path for directory, _ in cgroup_directories(root) if (path := directory / "cpu.stat").exists()
        ]
        self.has_firmware = self._command("get_throttled") != ""
        self._firmware_at_s = -SLOW_INTERVAL_S
        self._firmware: Throttle | None = None
        self.meter = EnergyMeter(find_power(root, self._command))
        self._slow_power = any(source.slow for source in self.meter.sources)
        self._power_at_s = -SLOW_INTERVAL_S
        self._energy: float | None = None

    def read(self, *, thorough: bool = False) -> Reading:
        """One reading; ``thorough`` asks the firmware's tool even if it was asked a moment ago."""
        now = time.perf_counter()
        busy, stolen, runnable = self._cpu_times()
        vmstat = text_of(self._proc["vmstat"])
        load = text_of(self._proc["loadavg"]).split()
        return Reading(
            at_s=now,
            temperature_c=self._temperature(),
            clock_mhz=self._clock_mhz(),
            throttle=self._throttle(now, thorough=thorough),
            throttle_events=self._throttle_events(),
            busy_s=busy,
            stolen_s=stolen,
            own_cpu_s=time.process_time(),
            runnable=runnable,
            load_1m=float(load[0]) if load else None,
            pressure_s=self._pressure(),
            quota_held_s=self._quota_held_s(),
            swapped_in_pages=_counter(vmstat, "pswpin"),
            major_faults=resource.getrusage(resource.RUSAGE_SELF).ru_majflt,
            available_bytes=self._available_bytes(),
            energy_j=self._energy_j(now, thorough=thorough),
        )

    def _clock_mhz(self) -> float | None:
        """Of the fastest core: idle cores slow down, and those that compute are what counts."""
        return max((khz / 1000 for path in self._clocks if (khz := number(path)) is not None), default=None)

    def _throttle(self, now: float, *, thorough: bool) -> Throttle | None:
        """The kernel's file tells the present at no cost, the firmware's tool also what was since boot.

        The kernel clears the firmware's sticky bits whenever it looks (drivers/firmware/raspberrypi.c sends a mask of
        0xffff), so in its file a missing sticky bit proves nothing: then the past counts as unknown.
        """
        if self.has_firmware and (thorough or now - self._firmware_at_s >= SLOW_INTERVAL_S):
            self._firmware_at_s = now
            match = re.search(r"throttled=0x([0-9a-fA-F]+)", self._command("get_throttled"))
            self._firmware = decode_throttled(int(match.group(1), 16)) if match else None
        text = text_of(self._throttled_files[0]) if self._throttled_files else ""
        if not re.fullmatch(r"(0x)?[0-9a-fA-F]{1,8}", text):
            return self._firmware
        seen = decode_throttled(int(text, 16))
        since = self._firmware.since_boot if self._firmware else None
        return Throttle(seen.now, tuple(dict.fromkeys((*(since or ()), *(seen.since_boot or ())))) or since)

    def _throttle_events(self) -> int | None:
        """How often x86 CPUs were slowed down because of heat, over all of them."""
        counts = [count for path in self._throttle_counts if (count := number(path)) is not None]
        return int(sum(counts)) if counts else None

    def _cpu_times(self) -> tuple[float | None, float | None, int | None]:
        """Seconds that all CPUs computed, seconds stolen by a hypervisor, processes that want to run now."""
        text = text_of(self._proc["stat"])
        words = text.partition("\n")[0].split()
        runnable = _counter(text, "procs_running")
        if len(words) < 8 or words[0] != "cpu":
            return None, None, runnable
        ticks = [int(word) for word in words[1:]] + [0]
        hertz = os.sysconf("SC_CLK_TCK")
        user, nice, system, _idle, _iowait, irq, softirq, stolen = ticks[:8]
        return (user + nice + system + irq + softirq) / hertz, stolen / hertz, runnable

    def _pressure(self) -> dict[str, float]:
        found = {}
        for kind in ("cpu", "memory", "io"):
            match = re.search(r"^some .*total=(\d+)", text_of(self._proc[f"pressure/{kind}"]), re.MULTILINE)
            if match:
                found[kind] = int(match.group(1)) / 1e6
        return found

    def _quota_held_s(self) -> float | None:
        """Seconds that CPU quotas held this process's groups back; the hardest-hit group of the hierarchy counts."""
        held = []
        for path in self._cpu_stats:
            text = text_of(path)
            micro, nano = _counter(text, "throttled_usec"), _counter(text, "throttled_time")
            if micro is not None:
                held.append(micro / 1e6)
            elif nano is not None:
                held.append(nano / 1e9)
        return max(held, default=None)

    def _available_bytes(self) -> int | None:
        match = re.search(r"^MemAvailable:\s+(\d+) kB", text_of(self._proc["meminfo"]), re.MULTILINE)
        return int(match.group(1)) * 1024 if match else None

    def _energy_j(self, now: float, *, thorough: bool) -> float | None:
        if self._slow_power and not thorough and now - self._power_at_s < SLOW_INTERVAL_S:
            return self._energy
        self._power_at_s = now
        self._energy = self.meter.read()
        return self._energy


def _counter(text: str, name: str) -> int | None:
    match = re.search(rf"^{name} (\d+)", text, re.MULTILINE)
    return int(match.group(1)) if match else None


def _temperature_source(root: Path) -> tuple[str | None, Callable[[], float | None]]:
    """The zone that is about the CPU by its name, else the hottest one; with a function that reads it in Celsius."""
    zones = {
        text_of(path.parent / "type"): path for path in sorted((root / "sys/class/thermal").glob("thermal_zone*/temp"))
    }
    for monitor in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        zones.setdefault(text_of(monitor / "name"), monitor / "temp1_input")
    readable = {name: path for name, path in zones.items() if name and _celsius(path) is not None}
    for key in _CPU_ZONES:
        for name, path in readable.items():
            if key in name.lower():
                return name, lambda path=path: _celsius(path)
    if not readable:
        return None, lambda: None
    name = max(readable, key=lambda item: _celsius(readable[item]) or 0.0)
    return name, lambda: _celsius(readable[name])


def _celsius(path: Path) -> float | None:
    text = text_of(path)
    return int(text) / 1000 if re.fullmatch(r"-?\d+", text) else None


class Sampler:
    """Reads the sensors every ``interval_s`` in a thread of its own, and whenever ``mark`` is called.

    ``with Sampler(sensors) as sampler: ...``; the first and the last reading are thorough. An ``interval_s`` of 0
    samples at marks only.
    """

    def __init__(self, sensors: Sensors, interval_s: float = INTERVAL_S) -> None:
        self.sensors = sensors
        self.interval_s = interval_s
        self._readings: list[Reading] = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Sampler:
        self.mark(thorough=True)
        if self.interval_s > 0:
            self._thread = threading.Thread(target=self._sample, name="sensors", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        self.mark(thorough=True)

    def mark(self, *, thorough: bool = False) -> Reading:
        """A reading now, kept with the others."""
        with self._lock:
            reading = self.sensors.read(thorough=thorough)
            self._readings.append(reading)
        return reading

    def between(self, start: Reading, end: Reading) -> list[Reading]:
        """The readings from ``start`` to ``end``, both included."""
        with self._lock:
            return [reading for reading in self._readings if start.at_s <= reading.at_s <= end.at_s]

    @property
    def readings(self) -> list[Reading]:
        with self._lock:
            return list(self._readings)

    def _sample(self) -> None:
        while not self._stopped.wait(self.interval_s):
            self.mark()
