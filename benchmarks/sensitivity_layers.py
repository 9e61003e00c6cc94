"""Time and memory of measuring a large model's sensitivity layer by layer, step by step: forward, head, backward.

    python benchmarks/export_scale.py --shape 3b --keep DIR/3b --step make
    python benchmarks/sensitivity_layers.py DIR/3b --store DIR/store --windows 2

Windows are random tokens: neither time nor memory depends on what is read. Each step's row is on disk before the next
one begins, and a run that was killed goes on in the same store. Memory is what the process has when a step ends, and
its high-water mark so far (Linux).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from measure import append, machine

from edgelm.progress import Stage
from exporter.checkpoint import open_checkpoint, open_source
from exporter.sensitivity_layers import collect_by_layers
from exporter.statistics_store import StatisticsStore

RESULTS = "sensitivity_layers"
TOKENS = 1000  # of the vocabulary that windows are drawn from
WINDOW = 512


@dataclass
class Steps:
    """A progress display that keeps a row of every step."""

    source: str
    windows: int
    reached: int = 0
    began: float = field(default_factory=time.perf_counter)
    cpu_s: float = field(default_factory=time.process_time)

    @contextmanager
    def stage(self, name: str, total: int | None = None, *, unit: str = "") -> Iterator[Stage]:
        """Any stage: there is one."""
        append(RESULTS, {"machine": machine(), "source": self.source, "windows": self.windows, "steps": total})
        yield self

    def advance(self, amount: int = 1) -> None:
        """A step is done; its row."""
        self.reached += amount
        now, cpu_s = time.perf_counter(), time.process_time()
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        memory = {name: int(status[key].split()[0]) * 1024 for name, key in KEYS.items()}
        row = {"step": self.reached, "done_before": amount > 1, "wall_s": now - self.began, "cpu_s": cpu_s - self.cpu_s}
        append(RESULTS, {**row, **memory})
        self.began, self.cpu_s = now, cpu_s

    def tell(self, text: str) -> None:
        """Nothing is shown."""


KEYS = {"peak_rss_bytes": "VmHWM", "anonymous_bytes": "RssAnon", "mapped_bytes": "RssFile"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--store", type=Path, required=True, help="where statistics go: some gigabytes")
    parser.add_argument("--windows", type=int, default=2)
    arguments = parser.parse_args()
    arguments.store.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(1)
    windows = [tuple(generator.integers(3, TOKENS, WINDOW).tolist()) for _ in range(arguments.windows)]
    steps = Steps(arguments.source.name, arguments.windows)
    collect_by_layers(
        open_checkpoint(open_source(str(arguments.source))), windows, StatisticsStore(arguments.store), steps
    )
    stored = sum(path.stat().st_size for path in arguments.store.iterdir())
    append(RESULTS, {"stored_bytes": stored, "files": len(list(arguments.store.iterdir()))})


if __name__ == "__main__":
    main()
