"""What it costs to read weights from small blocks of the page cache: the same file written in two ways, read in turn.

    python benchmarks/large_pages.py a.gguf b.gguf --threads 1 2

Every file is copied twice into --work: in pieces of 544 KiB, the slab of Q8_0 that exports wrote once, and in aligned
pieces of 2 MiB, as ``exporter/pieces.py`` writes now. Both copies are loaded in one process and generate tokens in
turn, so that what neighbours do meets both. Linux only: the share in huge pages comes from ``/proc/self/smaps``.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import time
from pathlib import Path
from typing import Any

from measure import append, machine

from exporter.pieces import PIECE_BYTES
from runtime.engine import Chunk, Engine, EngineOptions
from runtime.engines.llamacpp import load_engine

SLAB_BYTES = 2**19 // 32 * 34
WAYS = {"slabs": SLAB_BYTES, "pieces": PIECE_BYTES}
TOKENS = 32
NAME = "large_pages"


def copied(source: Path, target: Path, piece_bytes: int) -> Path:
    """A copy whose pages were written in pieces of that size, on disk when this returns."""
    target.unlink(missing_ok=True)
    with source.open("rb") as origin, target.open("wb", buffering=0) as copy:
        while piece := origin.read(piece_bytes):
            copy.write(piece)
        os.fsync(copy.fileno())
    return target


def huge_share(path: Path) -> float:
    """Share of the resident pages of a mapped file that lie in huge pages."""
    found = {"Rss": 0, "FilePmdMapped": 0}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path))
        elif inside and (name := line.partition(":")[0]) in found:
            found[name] += int(line.split()[1])
    return found["FilePmdMapped"] / max(found["Rss"], 1)


def token_s(engine: Engine) -> list[float]:
    engine.truncate(0)
    found = []
    for token in range(TOKENS):
        started = time.perf_counter()
        engine.forward([Chunk(0, [token])])
        found.append(time.perf_counter() - started)
    return found


def compared(source: Path, threads: int, rounds: int, work: Path) -> dict[str, Any]:
    """Milliseconds per token of both copies, and the median of the pairs' ratios."""
    paths = {way: copied(source, work / f"{way}.gguf", size).resolve() for way, size in WAYS.items()}
    options = EngineOptions(context=TOKENS, threads_decode=threads, threads_prefill=threads)
    engines = {way: load_engine(path, options) for way, path in paths.items()}
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds + 1):  # the first round is not counted
        for way in WAYS if number % 2 else reversed(WAYS):
            seconds = token_s(engines[way])
            taken[way] += [statistics.median(seconds)] if number else []
    shares = {f"huge_share_{way}": huge_share(path) for way, path in paths.items()}
    for way, engine in engines.items():
        engine.close()
        paths[way].unlink()
    pairs = [small / large for small, large in zip(taken["slabs"], taken["pieces"], strict=True)]
    medians = {f"{way}_ms": 1e3 * statistics.median(seconds) for way, seconds in taken.items()}
    name = source.parent.name if source.name == "model.gguf" else source.stem
    return {"model": name, "threads": threads, "ratio": statistics.median(pairs), "pairs": pairs, **medians, **shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path("large-pages"))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    append(NAME, {"machine": machine()})
    for model in arguments.models:
        for threads in arguments.threads:
            row = compared(model, threads, arguments.rounds, arguments.work)
            append(NAME, row)
            print({key: value for key, value in row.items() if key != "pairs"}, flush=True)


if __name__ == "__main__":
    main()
