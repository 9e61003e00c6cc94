"""Electrical power, from whatever tells it: RAPL, INA monitors, a Raspberry Pi 5's PMIC, a battery, NVML.

A source that meters the whole machine wins; else the parts that are metered are added up and named. Everything under
``/sys`` is read below a root path. Knows nothing of what the power is used for.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from targets.facts import ROOT, number, text_of

# ``vcgencmd pmic_read_adc`` prints "     VDD_CORE_A current(7)=1.45318000A" and "     VDD_CORE_V volt(15)=0.72000V".
_PMIC = re.compile(r"^\s*(\w+)_([AV])\b[^=\n]*=\s*([\d.]+)[AV]\s*$", re.MULTILINE)
_COMMAND_TIMEOUT_S = 2.0

Command = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Metered:
    """One source. Either it counts energy (``joules``) or it tells the power of the moment (``watts``)."""

    source: str
    covers: str
    whole_machine: bool
    slow: bool
    joules: Callable[[], float | None] | None = None
    watts: Callable[[], float | None] | None = None


def vcgencmd(argument: str) -> str:
    """What the Raspberry Pi firmware's own tool prints; empty where there is none or it fails."""
    try:
        done = subprocess.run(
            ["vcgencmd", *argument.split()],  # noqa: S607 (a distribution's own tool, wherever it keeps it)
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def no_command(_argument: str) -> str:
    """For trees that are not this machine: there is no firmware to ask."""
    return ""


def find_power(root: Path = ROOT, command: Command = vcgencmd) -> tuple[Metered, ...]:
    """The sources to add up, none where nothing is told. A whole-machine source stands alone."""
    whole = [source for source in (_ina(root), _pmic(command), _battery(root)) if source is not None]
    if whole:
        return (whole[0],)
    parts = [_rapl(root), _nvml() if root == ROOT else None]
    return tuple(source for source in parts if source is not None)


def pmic_watts(text: str) -> float | None:
    """Watts of all rails for which the PMIC tells current and voltage, None when it tells no such pair."""
    amperes: dict[str, float] = {}
    volts: dict[str, float] = {}
    for rail, unit, value in _PMIC.findall(text):
        (amperes if unit == "A" else volts)[rail] = float(value)
    rails = amperes.keys() & volts.keys()
    return sum(amperes[rail] * volts[rail] for rail in rails) if rails else None


def _pmic(command: Command) -> Metered | None:
    def watts() -> float | None:
        return pmic_watts(command("pmic_read_adc"))

    covers = "the board's rails behind the PMIC, without its losses and USB devices"
    return None if watts() is None else Metered("pmic", covers, whole_machine=True, slow=True, watts=watts)


def _ina(root: Path) -> Metered | None:
    """INA2xx and INA3221 monitors (kernel's hwmon ABI: power in microwatts, voltage in mV, current in mA)."""
    monitors = [path for path in sorted((root / "sys/class/hwmon").glob("hwmon*")) if _is_ina(path)]
    found = (source for monitor in monitors if (source := _ina_monitor(monitor)) is not None)
    return next(found, None)


def _is_ina(monitor: Path) -> bool:
    return text_of(monitor / "name").startswith("ina")


def _ina_monitor(monitor: Path) -> Metered | None:
    name, stated = text_of(monitor / "name"), monitor / "power1_input"
    if number(stated) is not None:
        covers = "what is wired behind the monitor"
        return Metered(name, covers, whole_machine=True, slow=False, watts=lambda: _scaled(stated, 1e-6))
    channels = sorted(path.name[4:-6] for path in monitor.glob("curr*_input"))
    channels = [channel for channel in channels if number(monitor / f"in{channel}_input") is not None]
    inputs = [channel for channel in channels if text_of(monitor / f"in{channel}_label") == "VDD_IN"]
    if not channels:
        return None
    covers = "the board's input" if inputs else "the rails that the monitor sees"
    chosen = tuple(inputs or channels)
    return Metered(name, covers, whole_machine=True, slow=False, watts=lambda: _channels(monitor, chosen))


def _channels(monitor: Path, channels: tuple[str, ...]) -> float | None:
    watts = 0.0
    for channel in channels:
        millivolts, milliamperes = number(monitor / f"in{channel}_input"), number(monitor / f"curr{channel}_input")
        if millivolts is None or milliamperes is None:
            return None
        watts += millivolts * milliamperes * 1e-6
    return watts


def _battery(root: Path) -> Metered | None:
    """A battery that is being discharged tells what the whole machine takes."""
    for supply in sorted((root / "sys/class/power_supply").glob("*")):
        if text_of(supply / "type") != "Battery" or text_of(supply / "status") != "Discharging":
            continue

        def watts(supply: Path = supply) -> float | None:
            if text_of(supply / "status") != "Discharging":
                return None
            stated = _scaled(supply / "power_now", 1e-6)
            current, voltage = _scaled(supply / "current_now", 1e-6), _scaled(supply / "voltage_now", 1e-6)
            return stated if stated is not None or current is None or voltage is None else current * voltage

        if watts() is not None:
            return Metered("battery", "the whole machine", whole_machine=True, slow=False, watts=watts)
    return None


def _rapl(root: Path) -> Metered | None:
    """CPU packages by their energy counters (Linux powercap); usually readable by root only."""
    packages = [
        path
        for path in sorted((root / "sys/class/powercap").glob("intel-rapl:[0-9]*"))
        if re.fullmatch(r"intel-rapl:\d+", path.name)
        and text_of(path / "name").startswith("package")
        and number(path / "energy_uj") is not None
    ]
    if not packages:
        return None
    wraps = [number(path / "max_energy_range_uj") or 2.0**32 for path in packages]
    last = [number(path / "energy_uj") or 0.0 for path in packages]
    total = [0.0]

    def joules() -> float | None:
        for index, path in enumerate(packages):
            now = number(path / "energy_uj")
            if now is None:
                return None
            step = now - last[index]
            total[0] += step if step >= 0 else step + wraps[index]
            last[index] = now
        return total[0] * 1e-6

    covers = "the CPU package" if len(packages) == 1 else f"{len(packages)} CPU packages"
    return Metered("rapl", f"{covers}, without memory modules and board", False, False, joules=joules)


def _nvml() -> Metered | None:
    """NVIDIA boards through NVML (nvmlDeviceGetPowerUsage, milliwatts)."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    count = ctypes.c_uint()
    try:
        if library.nvmlInit_v2() != 0 or library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0 or not count.value:
            return None
    except AttributeError:  # a driver without these functions
        return None
    handles = []
    for index in range(count.value):
        handle = ctypes.c_void_p()
        if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) == 0:
            handles.append(handle)

    def watts() -> float | None:
        total = 0.0
        for handle in handles:
            milliwatts = ctypes.c_uint()
            if library.nvmlDeviceGetPowerUsage(handle, ctypes.byref(milliwatts)) != 0:
                return None
            total += milliwatts.value / 1000
        return total

    return Metered("nvml", f"{len(handles)} NVIDIA boards", False, False, watts=watts) if watts() else None


def _scaled(path: Path, factor: float) -> float | None:
    value = number(path)
    return None if value is None else value * factor


class EnergyMeter:
    """Joules since it was made, over all sources; the power of moments is integrated by trapezoids."""

    def __init__(self, sources: tuple[Metered, ...]) -> None:
        self.sources = sources
        self._joules = [0.0] * len(sources)
        self._start = [source.joules() if source.joules else None for source in sources]
        self._last: list[tuple[float, float] | None] = [None] * len(sources)

    @property
    def name(self) -> str:
        return " + ".join(source.source for source in self.sources)

    @property
    def covers(self) -> str:
        return " and ".join(source.covers for source in self.sources)

    def read(self) -> float | None:
        """Joules up to now; None when there is no source or one fails."""
        if not self.sources:
            return None
        for index, source in enumerate(self.sources):
            if source.joules is not None:
                counted, start = source.joules(), self._start[index]
                if counted is None or start is None:
                    return None
                self._joules[index] = counted - start
            elif source.watts is not None:
                watts, now = source.watts(), time.perf_counter()
                if watts is None:
                    return None
                before = self._last[index]
                if before is not None:
                    self._joules[index] += (now - before[0]) * (watts + before[1]) / 2
                self._last[index] = (now, watts)
        return sum(self._joules)
