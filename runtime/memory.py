"""What this process holds in memory, split by what it is backed with. Knows nothing of models.

Linux tells exactly (``/proc/self/smaps_rollup`` and ``status``); elsewhere psutil tells what the system knows.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

PROC_SELF = Path("/proc/self")


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


def swapped_in_pages(vmstat: Path = Path("/proc/vmstat")) -> int | None:
    """Pages read back from swap by the whole machine since it booted, None where the system does not tell."""
    for line in _lines(vmstat):
        name, _, count = line.partition(" ")
        if name == "pswpin":
            return int(count)
    return None


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
