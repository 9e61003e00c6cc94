"""What a running server shows of itself: for Prometheus as gauges, for the page as one small document.

Reads when it is asked, at most twice a second, and tells nothing that is not known. Knows how backends and the machine
are asked; not what they do, nor any word of a client.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from runtime.gpu_memory import VramUse
from runtime.memory import MemorySnapshot, snapshot
from runtime.sensors import THROTTLE_FLAGS, Reading, Sensors
from runtime.server.metrics import Gauge, Metrics
from runtime.server.worker import KvUse, State

FRESH_S = 0.5
"""Reading the split of a large process walks all its pages; many readers share one reading."""
_KINDS = ("rss", "pss", "anonymous", "file", "swap", "peak")


class Shown(Protocol):
    """What of a backend is shown."""

    @property
    def state(self) -> State: ...
    @property
    def running(self) -> int: ...
    @property
    def queued(self) -> int: ...
    @property
    def kv(self) -> KvUse | None:
        """Use of the KV cache, None where there is none."""
        ...

    @property
    def engine_pids(self) -> tuple[int, ...]:
        """Processes of engines; none for an engine in the server's own."""
        ...

    def vram(self) -> tuple[VramUse, ...]:
        """What its models have on GPUs; nothing where none takes part."""
        ...


@dataclass(frozen=True, slots=True)
class _Look:
    """Memory of the server and of its engines' processes together, and the machine's state."""

    at_s: float
    server: MemorySnapshot
    engine: MemorySnapshot | None
    machine: Reading
    major_faults: int
    vram: tuple[VramUse, ...]


class Figures:
    """Shows one backend. Thread-safe; reading takes milliseconds of a thread, so not in the event loop."""

    def __init__(self, backend: Shown, metrics: Metrics, sensors: Sensors | None = None) -> None:
        self._backend = backend
        self._sensors = sensors or Sensors()
        self._metrics = metrics
        self._lock = threading.Lock()
        self._last: _Look | None = None
        metrics.gauges(self._gauges)

    def document(self) -> dict[str, Any]:
        """For ``GET /status``: sizes in bytes, times in seconds, counters since the start; null for what nobody knows.

        ``time_s`` is a clock that never jumps: two documents tell the rates between them.
        """
        backend, reading, metrics = self._backend, self._read(), self._metrics
        kv, machine = backend.kv, reading.machine
        return {
            "time_s": time.monotonic(),
            "state": backend.state,
            "requests": {"running": backend.running, "queued": backend.queued},
            "tokens": {
                "prefill": int(metrics.total(metrics.prefill_tokens)),
                "cached": int(metrics.total(metrics.cached_tokens)),
                "decode": int(metrics.total(metrics.decode_tokens)),
            },
            "kv": None if kv is None else asdict(kv),
            "memory": {
                "server": _split(reading.server),
                "engine": None if reading.engine is None else _split(reading.engine),
                "available_bytes": machine.available_bytes,
            },
            "vram": [{**asdict(use), "used_bytes": use.used_bytes} for use in reading.vram],
            "machine": {
                "temperature_c": machine.temperature_c,
                "clock_mhz": machine.clock_mhz,
                "throttled": None if machine.throttle is None else list(machine.throttle.now),
                "major_faults": reading.major_faults,
                "swapped_in_pages": machine.swapped_in_pages,
            },
            "engine_deaths": int(metrics.total(metrics.engine_deaths)),
        }

    def _read(self) -> _Look:
        with self._lock:
            if self._last is None or time.monotonic() - self._last.at_s > FRESH_S:
                self._last = self._read_anew()
            return self._last

    def _read_anew(self) -> _Look:
        engines = [found for pid in self._backend.engine_pids if (found := _of_process(pid)) is not None]
        server = snapshot()
        return _Look(
            at_s=time.monotonic(),
            server=server,
            engine=_together(engines) if engines else None,
            machine=self._sensors.read(),
            major_faults=server.major_faults + sum(engine.major_faults for engine in engines),
            vram=self._backend.vram(),
        )

    def _gauges(self) -> Iterator[Gauge]:
        backend, reading = self._backend, self._read()
        yield Gauge("edgelm_requests_running", "Requests that are computed", backend.running)
        yield Gauge("edgelm_requests_queued", "Requests that wait for their turn", backend.queued)
        yield Gauge("edgelm_engine_ready", "1 when the engine answers", backend.state == "ready")
        for process, memory in (("server", reading.server), ("engine", reading.engine)):
            for kind in _KINDS if memory is not None else ():
                size = getattr(memory, f"{kind}_bytes")
                if size is not None:
                    text = "Memory by process and kind; without an engine's process its memory is the server's"
                    yield Gauge("edgelm_memory_bytes", text, size, (("process", process), ("kind", kind)))
        kv = backend.kv
        if kv is not None:
            yield Gauge("edgelm_kv_tokens", "Tokens kept in the KV cache, of running requests and earlier", kv.tokens)
            yield Gauge("edgelm_kv_capacity_tokens", "Tokens that the KV cache has room for", kv.capacity_tokens)
            yield Gauge("edgelm_kv_bytes", "Memory set aside for the KV cache", kv.reserved_bytes)
        text = "Pages that server and engine had to read from disk since they started"
        yield Gauge("edgelm_major_faults", text, reading.major_faults)
        yield from _vram_gauges(reading.vram)
        yield from _machine_gauges(reading.machine)


def _vram_gauges(uses: tuple[VramUse, ...]) -> Iterator[Gauge]:
    """Of every model what it has on its GPU, and of every GPU once what is taken and free there."""
    for use in uses:
        place = (("device", use.device), ("model", use.model))
        for kind, size in (("planned", use.planned_bytes), ("announced", use.announced_bytes)):
            text = "Memory of a GPU for one model, as planned and as the engine announced it"
            yield Gauge("edgelm_vram_bytes", text, size, (*place, ("kind", kind)))
        for kind, layers in (("gpu", use.gpu_layers), ("all", use.layers)):
            text = "Layers of a model on a GPU and in all, the head counted as one"
            yield Gauge("edgelm_model_layers", text, layers, (*place, ("kind", kind)))
    for use in {use.device: use for use in uses}.values():
        for kind, told in (("used", use.used_bytes), ("free", use.free_bytes), ("total", use.total_bytes)):
            if told is not None:
                text = "Memory of a GPU that holds layers, as its driver tells it; other programs' use is in it"
                labels = (("device", use.device), ("description", use.description), ("kind", kind))
                yield Gauge("edgelm_device_memory_bytes", text, told, labels)


def _machine_gauges(machine: Reading) -> Iterator[Gauge]:
    known = {
        "edgelm_available_memory_bytes": ("Memory that the machine can still give", machine.available_bytes),
        "edgelm_swapped_in_pages": ("Pages read back from swap since the machine booted", machine.swapped_in_pages),
        "edgelm_temperature_celsius": ("Temperature of the CPU", machine.temperature_c),
        "edgelm_clock_megahertz": ("Clock of the fastest core", machine.clock_mhz),
        "edgelm_throttle_events": ("How often the CPU was slowed down by heat", machine.throttle_events),
    }
    for name, (text, value) in known.items():
        if value is not None:
            yield Gauge(name, text, value)
    if machine.throttle is not None:
        text = "1 while the board's firmware slows it down for this reason"
        for flag in THROTTLE_FLAGS:
            yield Gauge("edgelm_throttled", text, flag in machine.throttle.now, (("reason", flag),))


def _split(memory: MemorySnapshot) -> dict[str, int | None]:
    return {f"{kind}_bytes": getattr(memory, f"{kind}_bytes") for kind in _KINDS}


def _of_process(pid: int) -> MemorySnapshot | None:
    """Memory of another process, None when it is gone or the system does not tell."""
    proc = Path(f"/proc/{pid}")
    try:
        # proc_pid_stat(5): fields after the name in parentheses, which may hold spaces; majflt is the 12th of all.
        faults = int((proc / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[9])
        memory = snapshot(proc)
        os.stat(proc)  # it was there all the time, so it was not this process that told
    except (OSError, IndexError, ValueError):
        return None
    return MemorySnapshot(**{**asdict(memory), "major_faults": faults})


def _together(parts: list[MemorySnapshot]) -> MemorySnapshot:
    sums: dict[str, Any] = {}
    for name in asdict(parts[0]):
        values = [getattr(part, name) for part in parts]
        sums[name] = None if None in values else sum(values)
    return MemorySnapshot(**sums)
