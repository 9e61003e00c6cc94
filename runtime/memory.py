"""What a process holds in memory: by what it is backed with, and by purpose. Knows engines only by what they announce.

Linux tells exactly (``/proc/PID/smaps``, ``smaps_rollup`` and ``status``, control groups); elsewhere psutil tells what
the system knows. The split by purpose looks at the process before a model is opened, after it, and at the end.
"""

from __future__ import annotations

import os
import re
import resource
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from edgelm.report import CgroupMemory, MemoryParts
from targets.facts import ROOT, number, text_of
from targets.host import cgroup_directories

PROC_SELF = Path("/proc/self")
_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S{4} [0-9a-f]+ \S+ \d+\s*(.*)$")
_NO_LIMIT = 2**60  # version 1 writes the largest multiple of a page for "no limit"


@dataclass(frozen=True, slots=True)
class MemorySnapshot:
    """Memory of one process in bytes.

    ``anonymous_bytes`` has no file behind it (heap, KV cache, repacked weights) and can only go to swap; ``file_bytes``
    is mapped from files (weights by mmap, libraries) and can be dropped and read again. ``peak_bytes`` is the highest
    resident size since the start or the last ``reset_peak``; ``major_faults`` counts pages that had to be read from
    disk since the start. ``pss_bytes`` shares pages out among the processes that map them, None where nobody tells.
    """

    rss_bytes: int
    peak_bytes: int
    anonymous_bytes: int
    file_bytes: int
    swap_bytes: int
    major_faults: int
    pss_bytes: int | None = None


def snapshot(proc: Path = PROC_SELF) -> MemorySnapshot:
    """The memory of this process now."""
    rollup = _fields(proc / "smaps_rollup")
    status = _fields(proc / "status")
    if "VmRSS" not in status:
        return _from_psutil()
    # Kernels before 4.14 have no smaps_rollup; the counters of status are cheaper and slightly behind.
    rss = rollup.get("Rss", status["VmRSS"])
    anonymous = rollup.get("Anonymous", status.get("RssAnon", 0))
    return MemorySnapshot(
        rss_bytes=rss,
        peak_bytes=max(status.get("VmHWM", rss), rss),
        anonymous_bytes=anonymous,
        file_bytes=max(rss - anonymous, 0),
        swap_bytes=rollup.get("Swap", status.get("VmSwap", 0)),
        major_faults=resource.getrusage(resource.RUSAGE_SELF).ru_majflt,
        pss_bytes=rollup.get("Pss"),
    )


def reset_peak(proc: Path = PROC_SELF) -> bool:
    """Let ``peak_bytes`` start anew from the present size; False where the system cannot."""
    try:
        (proc / "clear_refs").write_text("5")  # proc_pid_clear_refs(5): reset the peak resident set size
    except OSError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Resident:
    """Resident bytes by what stands behind them: the model's files, other files (libraries), nothing."""

    weights_bytes: int
    libraries_bytes: int
    anonymous_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.libraries_bytes + self.anonymous_bytes


def resident(model_files: Sequence[Path], proc: Path = PROC_SELF) -> Resident | None:
    """Every mapping of the process sorted; None where the system does not tell.

    A library's own data counts as library although the pages are anonymous, so this sum equals the resident size.
    """
    names = {os.path.realpath(path) for path in model_files}
    weights = libraries = anonymous = 0
    for name, rss_bytes in _mappings(proc / "smaps"):
        if name in names:
            weights += rss_bytes
        elif name.startswith("/"):
            libraries += rss_bytes
        else:
            anonymous += rss_bytes
    return Resident(weights, libraries, anonymous) if weights + libraries + anonymous else None


def _mappings(smaps: Path) -> Iterator[tuple[str, int]]:
    """Name and resident bytes of every mapping; the name is empty for anonymous memory."""
    name = ""
    for line in _lines(smaps):
        if line.startswith("Rss:"):
            yield name, int(line.split()[1]) * 1024
        elif match := _MAPPING.match(line):
            name = match.group(1)


def resident_range(address: int, size_bytes: int, proc: Path = PROC_SELF) -> int | None:
    """Bytes of a piece of this process's memory that are in RAM (``pagemap``, bit 63: present), None if not told."""
    page = os.sysconf("SC_PAGE_SIZE")
    first, last = address // page, (address + max(size_bytes, 1) - 1) // page
    try:
        with (proc / "pagemap").open("rb") as stream:
            stream.seek(8 * first)
            entries = stream.read(8 * (last - first + 1))
    except OSError:
        return None
    present = sum(int(entry) >> 63 for (entry,) in struct.iter_unpack("<Q", entries))
    return min(present * page, size_bytes)


@runtime_checkable
class KnowsItsCache(Protocol):
    """An engine that can tell how much of its KV cache is in RAM; of others all that was reserved counts."""

    def resident_kv_bytes(self) -> int: ...


class Ledger:
    """Splits this process's memory by purpose, from looks at the steps of a model's life.

    Make it before the model is opened (with the engine's library loaded), call ``opened`` right after, ``parts`` at
    the end.
    """

    def __init__(self, proc: Path = PROC_SELF) -> None:
        self._proc = proc
        self._before = resident((), proc)
        self._opened: Resident | None = None
        self._opened_kv_bytes = 0

    def opened(self, model_files: Sequence[Path], kv_bytes: int) -> None:
        """The model is loaded and nothing was computed; ``kv_bytes`` of the cache are resident already."""
        self._opened = resident(model_files, self._proc)
        self._opened_kv_bytes = kv_bytes

    def parts(self, model_files: Sequence[Path], kv_bytes: int, announced: dict[str, int]) -> MemoryParts | None:
        """The split now, None where mappings are not told.

        ``announced`` are the engine's own figures in bytes: ``weights_copied`` for weights outside of the mapped file,
        ``compute`` for the buffers that it reserved. What anonymous memory grew by since the model was opened is
        cache and compute, as far as that much was reserved; the rest is not explained.
        """
        now, opened, before = resident(model_files, self._proc), self._opened, self._before
        if now is None or opened is None or before is None:
            return None
        loaded = opened.anonymous_bytes - before.anonymous_bytes
        copied = min(announced.get("weights_copied", 0), max(loaded - self._opened_kv_bytes, 0))
        grown = now.anonymous_bytes - opened.anonymous_bytes - (kv_bytes - self._opened_kv_bytes)
        compute = min(max(grown, 0), announced.get("compute", max(grown, 0)))
        parts = MemoryParts(
            weights_mapped_bytes=now.weights_bytes,
            weights_copied_bytes=copied,
            kv_bytes=kv_bytes,
            compute_bytes=compute,
            vocabulary_bytes=max(loaded - copied - self._opened_kv_bytes, 0),
            interpreter_bytes=before.anonymous_bytes,
            libraries_bytes=now.libraries_bytes,
            unexplained_bytes=0,
        )
        return parts.model_copy(update={"unexplained_bytes": now.total_bytes - parts.total_bytes})


def cgroup_memory(root: Path = ROOT) -> CgroupMemory | None:
    """What the innermost control group with a memory controller says, None outside of any."""
    for directory, version in cgroup_directories(root):
        v2 = version == 2
        current = number(directory / ("memory.current" if v2 else "memory.usage_in_bytes"))
        if current is None:
            continue
        limit = number(directory / ("memory.max" if v2 else "memory.limit_in_bytes"))
        peak = number(directory / ("memory.peak" if v2 else "memory.max_usage_in_bytes"))
        stat = text_of(directory / "memory.stat")
        kind: Literal[1, 2] = 2 if v2 else 1
        return CgroupMemory(
            version=kind,
            path="/" + str(directory.relative_to(root / "sys/fs/cgroup")).removeprefix("."),
            current_bytes=int(current),
            peak_bytes=None if peak is None else int(peak),
            limit_bytes=None if limit is None or limit > _NO_LIMIT else int(limit),
            anonymous_bytes=_stat(stat, "anon" if v2 else "total_rss"),
            file_bytes=_stat(stat, "file" if v2 else "total_cache"),
        )
    return None


def _stat(text: str, name: str) -> int | None:
    match = re.search(rf"^{name} (\d+)$", text, re.MULTILINE)
    return int(match.group(1)) if match else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []


def _fields(path: Path) -> dict[str, int]:
    """``Name:  123 kB`` lines as bytes."""
    fields: dict[str, int] = {}
    for line in _lines(path):
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB" and words[0].isdigit():
            fields[name] = int(words[0]) * 1024
    return fields


def _from_psutil() -> MemorySnapshot:
    import psutil

    rss = psutil.Process().memory_info().rss
    usage = resource.getrusage(resource.RUSAGE_SELF)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    private = min(psutil.Process().memory_full_info().uss, rss)
    return MemorySnapshot(rss, max(peak, rss), private, rss - private, 0, usage.ru_majflt)
