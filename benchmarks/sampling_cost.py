"""What measuring costs: decode with the sensors' thread on against off, in turns on one loaded model.

    python benchmarks/sampling_cost.py BUNDLE --rounds 200

Whoever goes first alternates. States the median of the pairs' ratios with its 95 % interval, which needs a quiet
machine and many pairs (one pair scatters by 7 %), and what the sensors' thread itself used of a CPU, which needs
neither: as long as it is below 1 %, so is what it can take from threads that compute.
"""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import save

from runtime.engine import EngineOptions
from runtime.model import open_model
from runtime.points import Point, Runner, Taken
from runtime.sensors import INTERVAL_S, Sampler, Sensors
from targets.significance import median_interval


def decode_tps(model: Any, tokens: int, *, interval_s: float | None) -> tuple[float, float]:
    """One repetition, with sensors every ``interval_s`` or (None) with none at all but one reading at each end: tokens
    per second, and the share of a CPU that the sensors' thread used."""
    sampler = Sampler(Sensors(), interval_s or 0.0)
    point = Point("decode", tokens)
    if interval_s is None:
        taken = Taken(point)
        Runner(model.engine, model.tokenizer, sampler).once(taken)
        return taken.tps[0], 0.0
    with sampler:
        taken = Taken(point)
        started_s = time.perf_counter()
        Runner(model.engine, model.tokenizer, sampler).once(taken)
        return taken.tps[0], sensors_cpu_s() / (time.perf_counter() - started_s)


def sensors_cpu_s() -> float:
    """Seconds of CPU that the sensors' thread has used: the kernel counts them in nanoseconds."""
    thread = next(thread for thread in threading.enumerate() if thread.name == "sensors")
    return int(Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text(encoding="ascii").split()[0]) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args()
    model = open_model(arguments.bundle, EngineOptions(context=arguments.tokens + 16))
    rows = []
    decode_tps(model, 16, interval_s=None)
    for number in range(arguments.rounds):
        row: dict[str, Any] = {"round": number, "tokens": arguments.tokens}
        sides = [("on", INTERVAL_S), ("off", None)]
        for name, interval_s in sides if number % 2 else sides[::-1]:
            row[name], share = decode_tps(model, arguments.tokens, interval_s=interval_s)
            if interval_s is not None:
                row["sensors_cpu_share"] = share
        rows.append(row)
    model.close()
    ratios = [row["on"] / row["off"] for row in rows]
    print(f"decode on / off: {np.median(ratios):.4f}, 95 % interval {median_interval(ratios)}")
    print(f"the sensors' thread: {np.mean([row['sensors_cpu_share'] for row in rows]):.4f} of a CPU")
    print(f"raw rows: {save('sampling_cost', rows)}")


if __name__ == "__main__":
    main()
