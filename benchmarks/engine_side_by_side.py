"""Decode and prefill of our engine against llama-bench on the same files, in turn, same threads.

Needs ``make peers`` and GGUF files (any bundle's ``model.gguf``).

    python benchmarks/engine_side_by_side.py a.gguf b.gguf --peers .cache/peers --rounds 15
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

from measure import edgelm, run, save

PROMPT, GENERATED = 512, 128


def ours(model: Path, threads: int, repetitions: int) -> dict[str, float]:
    counts = ["-p", str(PROMPT), "-n", str(GENERATED), "-r", str(repetitions)]
    limits = ["--threads", str(threads), "--threads-prefill", str(threads), "--json"]
    report = json.loads(run(edgelm("bench", str(model), *counts, *limits)).stdout)
    return {"prefill_tps": report["prefill_tps"]["median"], "decode_tps": report["decode_tps"]["median"]}


def llama_bench(binary: Path, model: Path, threads: int, repetitions: int) -> dict[str, float]:
    counts = ["-p", str(PROMPT), "-n", str(GENERATED), "-r", str(repetitions), "-t", str(threads)]
    entries = json.loads(run([str(binary), "-m", str(model), *counts, "-fa", "1", "-o", "json"]).stdout)
    rates = {("prefill_tps" if entry["n_prompt"] else "decode_tps"): entry["samples_ts"] for entry in entries}
    return {name: statistics.median(samples) for name, samples in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--peers", type=Path, default=Path(".cache/peers"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repetitions", type=int, default=1, help="inside one process; its median is one sample")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    binary = arguments.peers / "build" / "bin" / "llama-bench"
    rows: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        for model in arguments.models:
            # Who goes first alternates, so that a drifting machine favours neither.
            for side in ("edgelm", "llama-bench") if number % 2 else ("llama-bench", "edgelm"):
                rates = (
                    ours(model, arguments.threads, arguments.repetitions)
                    if side == "edgelm"
                    else llama_bench(binary, model, arguments.threads, arguments.repetitions)
                )
                rows.append({"round": number, "model": model.stem, "side": side, "threads": arguments.threads, **rates})
        path = save("engine_side_by_side", rows)
    summarise(rows, [model.stem for model in arguments.models])
    print(f"raw rows: {path}")


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
