"""Time and memory of each stage of ``--quant auto``: from an empty cache, and once more from a full one.

    python benchmarks/auto_stages.py demo:smollm2 --work DIR --max-bytes 90MB
    python benchmarks/export_scale.py --shape 3b --keep DIR/3b --step make
    python benchmarks/auto_stages.py DIR/3b --work DIR --memory 12GB --calibration short.txt --results auto_stages_3b \
        --log auto_stages_3b_log

Wants a quiet machine. The limit keeps a quantised source from being taken as it stands. A stage is what a progress bar
shows; peak memory is that of the process while the stage ran (Linux sets its high-water mark back on request), that of
anonymous pages, which cannot be dropped, is sampled. Both exports are processes of their own, accounted for by the
operating system. ``--memory`` decides everything as a machine with so much free memory would; nothing enforces it.
A cache that is there is kept with ``--keep``: to go on with a run that was killed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measure import append, run, save

from edgelm.bundle import Choice
from edgelm.progress import SILENT, Stage
from edgelm.units import parse_size
from exporter import measuring_way, reference, sensitivity
from exporter.options import ExportOptions
from exporter.pipeline import export


@dataclass
class Stopwatch:
    """A progress display that notes wall and CPU seconds and the peak memory of every stage, by its name."""

    rows: dict[str, dict[str, float]] = field(default_factory=dict)
    anonymous_bytes: int = 0  # the most since a stage began
    peak_bytes: int = 0  # of all resident pages, sampled, stages or not
    log: str = ""  # name of a file of raw rows, for runs that may be killed

    @contextmanager
    def stage(self, name: str, total: int | None = None, *, unit: str = "") -> Iterator[Stage]:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark becomes what is resident now
        self.anonymous_bytes = _resident_bytes("RssAnon")
        wall, cpu = time.perf_counter(), time.process_time()
        with SILENT.stage(name, total, unit=unit) as stage:
            yield stage
        row = self.rows.setdefault(
            name, {"times": 0, "wall_s": 0.0, "cpu_s": 0.0, "peak_rss_bytes": 0, "peak_anonymous_bytes": 0}
        )
        row["times"] += 1
        row["wall_s"] += time.perf_counter() - wall
        row["cpu_s"] += time.process_time() - cpu
        row["peak_rss_bytes"] = max(row["peak_rss_bytes"], _resident_bytes("VmHWM"))
        row["peak_anonymous_bytes"] = max(row["peak_anonymous_bytes"], self.anonymous_bytes)
        if self.log:
            append(self.log, {"stage": name, "so_far": dict(row)})

    def sample(self) -> None:
        """Look at resident pages until the process ends."""
        while True:
            self.anonymous_bytes = max(self.anonymous_bytes, _resident_bytes("RssAnon"))
            self.peak_bytes = max(self.peak_bytes, _resident_bytes("VmRSS"))
            time.sleep(0.05)


def _resident_bytes(kind: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def pretend(memory_bytes: int) -> None:
    """Let everything that asks for free memory hear of so much, less what this process has taken."""

    def available() -> Choice:
        return Choice(value=max(memory_bytes - _resident_bytes("RssAnon"), 0), reason="as asked for")

    for module in (measuring_way, reference, sensitivity):
        module.available_memory = available  # type: ignore[attr-defined]


def child(arguments: argparse.Namespace) -> None:
    """One export; its stages as JSON on stdout."""
    watch = Stopwatch(log=arguments.log)
    threading.Thread(target=watch.sample, daemon=True).start()
    if arguments.memory is not None:
        pretend(arguments.memory)
    started = time.perf_counter()
    options = ExportOptions(
        arguments.source, quant=arguments.quant, format="gguf", max_artifact_bytes=arguments.max_bytes,
        calibration=arguments.calibration, verify=not arguments.no_verify,
    )  # fmt: skip
    manifest = export(options, arguments.work / "bundle", force=True, progress=watch).manifest
    quality = manifest.quality
    result = {
        "inside_s": time.perf_counter() - started,
        "artifact_bytes": manifest.artifact_bytes,
        "predicted_kl": manifest.plan.predicted_kl,
        "kl_mean": getattr(quality, "kl_mean", None),
        "reference": getattr(quality, "reference", None),
        "notes": manifest.plan.notes,
        "sampled_peak_bytes": watch.peak_bytes,
    }
    print(json.dumps({"stages": watch.rows, **result}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--work", type=Path, default=Path("auto-stages"))
    parser.add_argument("--max-bytes", type=parse_size)
    parser.add_argument("--quant", default="auto", help="a named mix for its proof alone")
    parser.add_argument("--once", action="store_true", help="leave the run with a full cache out")
    parser.add_argument("--memory", type=parse_size, help="free memory to decide for, in place of this machine's")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--keep", action="store_true", help="go on with the cache that is there")
    parser.add_argument("--results", default="auto_stages", help="name of the file of raw rows")
    parser.add_argument("--log", default="", help="name of a file of raw rows that gets every finished stage at once")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    cache = arguments.work / "cache"
    if not arguments.keep:
        shutil.rmtree(cache, ignore_errors=True)
    arguments.work.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, *sys.argv[1:], "--child"]
    rows: list[dict[str, Any]] = []
    for name in ("empty cache",) if arguments.once else ("empty cache", "full cache"):
        done = run(command, environment={**os.environ, "EDGELM_CACHE": str(cache)})
        told = json.loads(done.stdout)
        # Setting the mark back hides earlier peaks from the final accounting, too.
        peak = max(
            done.peak_rss_bytes,
            told["sampled_peak_bytes"],
            *(int(row["peak_rss_bytes"]) for row in told["stages"].values()),
        )
        whole = {"wall_s": done.wall_s, "cpu_s": done.cpu_s, "peak_rss_bytes": peak}
        rows.append({"source": Path(arguments.source).name, "run": name, **whole, **told})
        print(f"\n{name}: {done.wall_s:.1f} s, {done.cpu_s:.1f} s of CPU, peak {peak / 1e6:.0f} MB")
        print("| stage | times | seconds | CPU seconds | peak MB | anonymous MB |\n|---|---|---|---|---|---|")
        for stage, row in told["stages"].items():
            figures = f"{row['wall_s']:.1f} | {row['cpu_s']:.1f} | {row['peak_rss_bytes'] / 1e6:.0f}"
            figures += f" | {row['peak_anonymous_bytes'] / 1e6:.0f}"
            print(f"| {stage} | {row['times']} | {figures} |")
    save(arguments.results, rows)


if __name__ == "__main__":
    main()
