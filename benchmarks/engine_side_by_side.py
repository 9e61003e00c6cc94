"""Decode and prefill of our engine against llama-bench on the same files, in turn, same threads.

Needs ``make peers`` and GGUF files (any bundle's ``model.gguf``). Both sides keep weights in huge pages, ours by
itself, llama-bench by a setting of glibc; ``--small-pages`` gives neither any. Without that, which is faster depends on
the memory that a process happens to get.

    python benchmarks/engine_side_by_side.py a.gguf b.gguf --peers .cache/peers --rounds 15 --depths 0,2048
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measure import edgelm, run, save

PROMPT, GENERATED = 512, 128


# What a side finds in its environment, with huge pages and without.
PAGES = {
    "huge": {"edgelm": {}, "llama-bench": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}},
    "small": {"edgelm": {"EDGELM_HUGE_PAGES": "off"}, "llama-bench": {}},
}


@contextmanager
def surroundings(settings: dict[str, str]) -> Iterator[None]:
    """The environment with ``settings``, for the processes that are started meanwhile."""
    os.environ.update(settings)
    try:
        yield
    finally:
        for name in settings:
            del os.environ[name]


def ours(model: Path, depth: int, threads: int, repetitions: int) -> dict[str, float]:
    counts = ["-p", str(PROMPT), "-n", str(GENERATED), "-r", str(repetitions), "--depth", str(depth)]
    # Both sides wait for their threads as libgomp does by itself.
    limits = ["--threads", str(threads), "--threads-prefill", str(threads), "--no-history", "--json"]
    same = ["--flash-attention", "on"]  # as llama-bench has it, whatever is faster here
    report = json.loads(run(edgelm("bench", str(model), *counts, *limits, *same)).stdout)
    return {"prefill_tps": report["prefill_tps"]["median"], "decode_tps": report["decode_tps"]["median"]}


def llama_bench(binary: Path, model: Path, depth: int, threads: int, repetitions: int) -> dict[str, float]:
    counts = ["-p", str(PROMPT), "-n", str(GENERATED), "-r", str(repetitions), "-t", str(threads), "-d", str(depth)]
    entries = json.loads(run([str(binary), "-m", str(model), *counts, "-fa", "1", "-o", "json"]).stdout)
    rates = {("prefill_tps" if entry["n_prompt"] else "decode_tps"): entry["samples_ts"] for entry in entries}
    return {name: statistics.median(samples) for name, samples in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--peers", type=Path, default=Path(".cache/peers"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repetitions", type=int, default=1, help="inside one process; its median is one sample")
    parser.add_argument("--depths", default="0")
    parser.add_argument("--small-pages", dest="pages", action="store_const", const="small", default="huge")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    binary = arguments.peers / "build" / "bin" / "llama-bench"
    if not binary.exists():
        binary = arguments.peers / "bin" / "llama-bench"
    threads, repetitions = arguments.threads, arguments.repetitions
    cases = [(model, depth) for model in arguments.models for depth in map(int, arguments.depths.split(","))]
    names = case_names(arguments.models)
    rows: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        for model, depth in cases:
            # Who goes first alternates, so that a drifting machine favours neither.
            for side in ("edgelm", "llama-bench") if number % 2 else ("llama-bench", "edgelm"):
                with surroundings(PAGES[arguments.pages][side]):
                    rates = (
                        ours(model, depth, threads, repetitions)
                        if side == "edgelm"
                        else llama_bench(binary, model, depth, threads, repetitions)
                    )
                facts = {"model": f"{names[model]} @ d{depth}", "pages": arguments.pages, "threads": threads}
                rows.append({"round": number, "side": side, **facts, **rates})
        path = save("engine_side_by_side", rows)
    summarise(rows, [f"{names[model]} @ d{depth}" for model, depth in cases])
    print(f"raw rows: {path}")


def case_names(models: list[Path]) -> dict[Path, str]:
    """Short names; files of bundles are all called the same, so their directories are taken."""
    stems = [model.stem for model in models]
    return {model: model.stem if stems.count(model.stem) == 1 else model.parent.name for model in models}


def summarise(rows: list[dict[str, Any]], models: list[str]) -> None:
    """Medians of each side, and the median of the ratios pair by pair."""
    print("| model | prefill ours | prefill llama-bench | ratio | decode ours | decode llama-bench | ratio |")
    print("|---|---|---|---|---|---|---|")
    for model in models:
        cells = [model]
        for field in ("prefill_tps", "decode_tps"):
            sides = [
                [item[field] for item in rows if item["side"] == side and item["model"] == model]
                for side in ("edgelm", "llama-bench")
            ]
            ratio = statistics.median(mine / other for mine, other in zip(*sides, strict=True))
            cells += [f"{statistics.median(side):.1f}" for side in sides] + [f"{ratio:.3f}"]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
