"""What ``serve --in-process`` saves: memory of one process that serves against that of server and engine apart.

    python benchmarks/serve_memory.py MODEL --rounds 5

Both forms in turn, each ready and after one answer; USS (pages that no other process has) and PSS of all processes of
the server from ``smaps_rollup``. Rows go to ``results/serve_memory.jsonl``. Needs no quiet machine.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import psutil
from measure import save
from soak import serving

KINDS = ("uss", "pss")


def measured(model: Path, form: str) -> dict[str, Any]:
    """One server's memory in bytes, after one answer."""
    with serving(model, *(["--in-process"] if form == "in-process" else [])) as server:
        server.answer()
        root = psutil.Process(server.process.pid)
        processes = [root, *root.children(recursive=True)]
        taken = [process.memory_full_info() for process in processes]
    row: dict[str, Any] = {"form": form, "processes": len(processes)}
    return row | {f"{kind}_bytes": sum(getattr(one, kind) for one in taken) for kind in KINDS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rows = [
        measured(arguments.model, form) for _ in range(arguments.rounds) for form in ("two processes", "in-process")
    ]
    for kind in KINDS:
        sizes = {
            form: statistics.median(row[f"{kind}_bytes"] for row in rows if row["form"] == form) / 1e6
            for form in ("two processes", "in-process")
        }
        two, one = sizes.values()
        print(f"{kind.upper()}: two processes {two:.0f} MB, in-process {one:.0f} MB, saved {two - one:.0f} MB")
    print(save("serve_memory", rows))


if __name__ == "__main__":
    main()
