"""What the benchmarks share: run a whole command under measurement, note the machine, keep raw rows.

Figures come from the operating system's accounting of the finished process (wait4), so both sides of a comparison are
measured the same way, whatever they print about themselves.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True, slots=True)
class Run:
    """One finished process: peak RSS of the largest process in it, and bytes that reached the block layer."""

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    written_bytes: int
    stdout: str


def run(command: Sequence[str], *, environment: dict[str, str] | None = None) -> Run:
    """Run a command to its end and account for it. Raises ``SystemExit`` with its stderr when it fails."""
    started = time.perf_counter()
    # Files, not pipes: nothing has to be drained while the child runs, and wait4 accounts for this child alone.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, **(environment or {})})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall_s = time.perf_counter() - started
        out.seek(0)
        err.seek(0)
        stdout, stderr = out.read(), err.read()
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\nfailed with {process.returncode}:\n{stderr[-3000:]}")
    return Run(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, usage.ru_oublock * 512, stdout)


def machine() -> dict[str, Any]:
    """A note of the machine that the rows were taken on."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "load_1m": os.getloadavg()[0],
    }


def save(name: str, rows: Iterable[dict[str, Any]]) -> Path:
    """Write raw rows, preceded by the machine note, as JSON lines under ``results/``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        for row in [{"machine": machine()}, *rows]:
            stream.write(json.dumps(row) + "\n")
    return path


def append(name: str, row: dict[str, Any]) -> None:
    """Add one raw row to ``results/``, on disk when this returns: a run that is killed later leaves it."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def row(side: str, case: str, finished: Run) -> dict[str, Any]:
    """A raw row of one finished process."""
    fields = asdict(finished)
    fields.pop("stdout")
    return {"side": side, "case": case, **fields}


def median_of(rows: Sequence[dict[str, Any]], side: str, case: str, field: str) -> float:
    return statistics.median(item[field] for item in rows if item["side"] == side and item["case"] == case)


def edgelm(*arguments: str) -> list[str]:
    """The command line of our own tool in this interpreter's environment."""
    return [sys.executable, "-m", "edgelm", *arguments]
