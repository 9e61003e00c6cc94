"""Time and memory of each stage of ``--quant auto``: from an empty cache, and once more from a full one.

    python benchmarks/auto_stages.py demo:smollm2 --work DIR --max-bytes 90MB

Wants a quiet machine. The limit keeps a quantised source from being taken as it stands. A stage is what a progress bar
shows; peak memory is that of the process while the stage ran (Linux sets its high-water mark back on request). Both
exports are processes of their own, accounted for by the operating system.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measure import run, save

from edgelm.progress import SILENT, Stage
from edgelm.units import parse_size
from exporter.options import ExportOptions
from exporter.pipeline import export


@dataclass
class Stopwatch:
    """A progress display that notes wall and CPU seconds and the peak memory of every stage, by its name."""

    rows: dict[str, dict[str, float]] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, total: int | None = None, *, unit: str = "") -> Iterator[Stage]:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark becomes what is resident now
        wall, cpu = time.perf_counter(), time.process_time()
        with SILENT.stage(name, total, unit=unit) as stage:
            yield stage
        row = self.rows.setdefault(name, {"times": 0, "wall_s": 0.0, "cpu_s": 0.0, "peak_rss_bytes": 0})
        row["times"] += 1
        row["wall_s"] += time.perf_counter() - wall
        row["cpu_s"] += time.process_time() - cpu
        row["peak_rss_bytes"] = max(row["peak_rss_bytes"], _peak_bytes())


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def child(source: str, output: Path, max_bytes: int | None) -> None:
    """One export; its stages as JSON on stdout."""
    watch = Stopwatch()
    started = time.perf_counter()
    options = ExportOptions(source, quant="auto", format="gguf", max_artifact_bytes=max_bytes)
    manifest = export(options, output, force=True, progress=watch).manifest
    quality = manifest.quality
    result = {
        "inside_s": time.perf_counter() - started,
        "artifact_bytes": manifest.artifact_bytes,
        "predicted_kl": manifest.plan.predicted_kl,
        "kl_mean": getattr(quality, "kl_mean", None),
    }
    print(json.dumps({"stages": watch.rows, **result}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--work", type=Path, default=Path("auto-stages"))
    parser.add_argument("--max-bytes", type=parse_size)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.source, arguments.work / "bundle", arguments.max_bytes)
        return
    cache = arguments.work / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    arguments.work.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, arguments.source, "--work", str(arguments.work), "--child"]
    if arguments.max_bytes is not None:
        command += ["--max-bytes", str(arguments.max_bytes)]
    rows: list[dict[str, Any]] = []
    for name in ("empty cache", "full cache"):
        done = run(command, environment={**os.environ, "EDGELM_CACHE": str(cache)})
        told = json.loads(done.stdout)
        # Setting the mark back hides earlier peaks from the final accounting, too.
        peak = max(done.peak_rss_bytes, *(int(row["peak_rss_bytes"]) for row in told["stages"].values()))
        whole = {"wall_s": done.wall_s, "cpu_s": done.cpu_s, "peak_rss_bytes": peak}
        rows.append({"source": arguments.source, "run": name, **whole, **told})
        print(f"\n{name}: {done.wall_s:.1f} s, {done.cpu_s:.1f} s of CPU, peak {peak / 1e6:.0f} MB")
        print("| stage | times | seconds | CPU seconds | peak MB |\n|---|---|---|---|---|")
        for stage, row in told["stages"].items():
            figures = f"{row['wall_s']:.1f} | {row['cpu_s']:.1f} | {row['peak_rss_bytes'] / 1e6:.0f}"
            print(f"| {stage} | {row['times']} | {figures} |")
    save("auto_stages", rows)


if __name__ == "__main__":
    main()
