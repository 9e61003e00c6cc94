"""From what the sensors read to what a report says: the conditions of a run, and the labels of a spoilt one.

Every threshold stands here with its reason. Knows sensors' readings; neither models nor how labels are shown.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgelm.report import ConditionsRecord, Label, PowerRecord, Samples, Span
from runtime.sensors import Reading, Sensors

UNSTEADY = 0.25  # spread of the samples, relative to their median, beyond which a run is not believed
FOREIGN_CORES = 0.15  # cores that other processes may take from the threads that are measured
MAJOR_FAULTS = 32  # a library's page now and then is no shortage
QUOTA_SHARE = 0.02  # time held back by a quota: below it, single periods at the edge
STOLEN_SHARE = 0.03  # CPU time taken by a hypervisor, per CPU second that was used
TICK_S = 0.03  # the kernel counts CPU time in ticks of 10 ms on each CPU: less than this is rounding
CLOCK_DROP = 0.10  # between the first and the last third of a run; boost steps are smaller
_LEAST_READINGS = 9  # for thirds that mean anything


@dataclass(frozen=True, slots=True)
class Window:
    """Readings of something that was measured on ``threads`` threads, in one piece or several.

    A piece holds the readings from its beginning to its end; counters are added up over the pieces.
    """

    pieces: Sequence[Sequence[Reading]]
    threads: int
    usable_cpus: int

    @property
    def readings(self) -> list[Reading]:
        return [reading for piece in self.pieces for reading in piece]

    @property
    def seconds(self) -> float:
        return max(sum(piece[-1].at_s - piece[0].at_s for piece in self.pieces), 1e-9)

    def counted(self, counter: Callable[[Reading], float | None]) -> float | None:
        """How far a counter went; None where it is not told."""
        total = 0.0
        for piece in self.pieces:
            before, after = counter(piece[0]), counter(piece[-1])
            if before is None or after is None:
                return None
            total += after - before
        return total


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def foreign_cores(window: Window) -> float | None:
    """CPU seconds of everybody else per second; interrupts included, time stolen by a hypervisor not."""
    foreign = window.counted(lambda reading: None if reading.busy_s is None else reading.busy_s - reading.own_cpu_s)
    return None if foreign is None else max(foreign / window.seconds, 0.0)


def stolen_share(window: Window) -> float | None:
    """Time that a hypervisor kept for others while our CPUs wanted to run, per second and thread."""
    stolen = window.counted(lambda reading: reading.stolen_s)
    return None if stolen is None else max(stolen, 0.0) / (window.seconds * max(window.threads, 1))


def quota_share(window: Window) -> float | None:
    """Share of the time in which a CPU quota held this process's group back."""
    held = window.counted(lambda reading: reading.quota_held_s)
    return None if held is None else min(max(held, 0.0) / window.seconds, 1.0)


def power_w(window: Window) -> float | None:
    """Mean watts, None where nobody meters or the window is too short for a slow source."""
    joules = window.counted(lambda reading: reading.energy_j)
    return joules / window.seconds if joules and joules > 0 else None


def labels_of(window: Window) -> tuple[Label, ...]:
    """What spoilt the window, worst cause first; nothing for a clean one."""
    found = [*_throttled(window), *_clock(window), *_other_load(window), *_memory(window)]
    return tuple(found)


def _throttled(window: Window) -> list[Label]:
    seen: set[str] = set()
    for piece in window.pieces:
        seen |= {flag for reading in piece if reading.throttle for flag in reading.throttle.now}
        before, after = piece[0].throttle, piece[-1].throttle
        if before and after and before.since_boot is not None and after.since_boot is not None:
            seen |= set(after.since_boot) - set(before.since_boot)
    found = []
    if seen:
        hottest = max((reading.temperature_c or 0.0 for reading in window.readings), default=0.0)
        heat = f" at up to {hottest:.0f} C" if hottest else ""
        found.append(Label(kind="throttled", reason=f"the firmware reports {', '.join(sorted(seen))}{heat}"))
    events = window.counted(lambda reading: reading.throttle_events)
    if events:
        found.append(Label(kind="throttled", reason=f"the CPU slowed itself down because of heat {events:.0f} times"))
    return found


def _clock(window: Window) -> list[Label]:
    clocks = [reading.clock_mhz for reading in window.readings if reading.clock_mhz is not None]
    if len(clocks) < _LEAST_READINGS:
        return []
    third = len(clocks) // 3
    first, last = statistics.median(clocks[:third]), statistics.median(clocks[-third:])
    if last >= (1 - CLOCK_DROP) * first:
        return []
    return [Label(kind="clock", reason=f"the clock fell from {first:.0f} to {last:.0f} MHz during the run")]


def _other_load(window: Window) -> list[Label]:
    found = []
    held = quota_share(window)
    if held is not None and held > QUOTA_SHARE:
        found.append(Label(kind="quota", reason=f"a CPU quota held the process back for {held:.0%} of the time"))
    foreign = foreign_cores(window)
    free = max(window.usable_cpus - window.threads, 0)
    if foreign is not None and (foreign - free - FOREIGN_CORES) * window.seconds > TICK_S:
        reason = f"other processes kept {foreign:.1f} cores busy while {window.threads} threads were measured"
        found.append(Label(kind="busy", reason=reason))
    stolen = stolen_share(window)
    if stolen is not None and stolen > STOLEN_SHARE:
        found.append(
            Label(kind="stolen", reason=f"the hypervisor took {stolen:.0%} of the CPU time for other machines")
        )
    return found


def _memory(window: Window) -> list[Label]:
    found = []
    pages, faults = swapped_in(window), major_faults(window)
    if pages:
        found.append(Label(kind="swapped", reason=f"{pages} pages were swapped in during the run"))
    if faults > MAJOR_FAULTS:
        reason = f"{faults} pages had to be read from disk during the run (major faults): memory is short"
        found.append(Label(kind="paged", reason=reason))
    return found


def unsteady(name: str, samples: Samples | None) -> tuple[Label, ...]:
    """A label when repetitions of one figure lie too far apart."""
    if samples is None or (samples.p95 - samples.p5) <= UNSTEADY * samples.median:
        return ()
    spread = (samples.p95 - samples.p5) / samples.median
    reason = f"{name} varied by {spread:.0%} between repetitions (5th to 95th percentile, of the median)"
    return (Label(kind="unsteady", reason=reason),)


def merged(groups: Sequence[Sequence[Label]]) -> tuple[Label, ...]:
    """The labels of several windows, each kind of trouble once, in the words of the window that had it first."""
    found: dict[str, Label] = {}
    for labels in groups:
        for label in labels:
            # Unsteady figures are different troubles; the same quota seen in ten windows is one.
            found.setdefault(label.reason if label.kind in ("unsteady", "throttled") else label.kind, label)
    return tuple(found.values())


def conditions_of(window: Window, sensors: Sensors, interval_s: float) -> ConditionsRecord:
    """What a report keeps of all readings."""
    readings = window.readings
    throttle = [reading.throttle for reading in readings if reading.throttle is not None]
    since = readings[-1].throttle.since_boot if readings[-1].throttle else None
    pressure = {}
    for kind in readings[0].pressure_s:
        waited = window.counted(lambda reading, kind=kind: reading.pressure_s.get(kind))  # type: ignore[misc]
        if waited is not None:
            pressure[kind] = waited / window.seconds
    return ConditionsRecord(
        readings=len(readings),
        interval_s=interval_s,
        seconds=window.seconds,
        governor=sensors.governor,
        temperature_c=_span([reading.temperature_c for reading in readings]),
        temperature_zone=sensors.zone,
        clock_mhz=_span([reading.clock_mhz for reading in readings]),
        clock_limit_mhz=sensors.clock_limit_mhz,
        throttled=tuple(dict.fromkeys(flag for item in throttle for flag in item.now)) if throttle else None,
        throttled_since_boot=since,
        load_1m=readings[0].load_1m,
        foreign_cores=foreign_cores(window),
        stolen_share=stolen_share(window),
        runnable=_span([reading.runnable for reading in readings]),
        pressure=pressure,
        quota_share=quota_share(window),
        power=_power(window, sensors),
    )


def _power(window: Window, sensors: Sensors) -> PowerRecord | None:
    mean = power_w(window)
    if mean is None:
        return None
    meter = sensors.meter
    return PowerRecord(source=meter.name, covers=meter.covers, mean_w=mean, energy_j=mean * window.seconds)


def _span(values: Sequence[float | int | None]) -> Span | None:
    known = [float(value) for value in values if value is not None]
    return Span(least=min(known), median=statistics.median(known), most=max(known)) if known else None


def swapped_in(window: Window) -> int | None:
    """Pages that the whole machine read back from swap."""
    pages = window.counted(lambda reading: reading.swapped_in_pages)
    return None if pages is None else int(pages)


def major_faults(window: Window) -> int:
    """Pages of this process that had to be read from disk."""
    return int(window.counted(lambda reading: reading.major_faults) or 0)


def available_low(window: Window) -> int | None:
    """The least MemAvailable that was read."""
    return min((item.available_bytes for item in window.readings if item.available_bytes is not None), default=None)
