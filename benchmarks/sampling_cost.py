"""What measuring costs: decode with the sensors' thread on against off, in turns on one loaded model.

    python benchmarks/sampling_cost.py BUNDLE --rounds 40

Whoever goes first alternates. States the median of the pairs' ratios with its 95 % interval. Needs a quiet machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from measure import save

from runtime.engine import EngineOptions
from runtime.model import open_model
from runtime.points import Point, Runner, Taken
from runtime.sensors import INTERVAL_S, Sampler, Sensors
from targets.significance import median_interval


def decode_tps(model: Any, tokens: int, *, interval_s: float | None) -> float:
    """One repetition, with sensors every ``interval_s`` or (None) with none at all but one reading at each end."""
    sampler = Sampler(Sensors(), interval_s or 0.0)
    point = Point("decode", tokens)
    if interval_s is None:
        taken = Taken(point)
        Runner(model.engine, model.tokenizer, sampler).once(taken)
        return taken.tps[0]
    with sampler:
        taken = Taken(point)
        Runner(model.engine, model.tokenizer, sampler).once(taken)
        return taken.tps[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=256)
    arguments = parser.parse_args()
    model = open_model(arguments.bundle, EngineOptions(context=arguments.tokens + 16))
    rows = []
    decode_tps(model, 16, interval_s=None)
    for number in range(arguments.rounds):
        row: dict[str, Any] = {"round": number, "tokens": arguments.tokens}
        sides = [("on", INTERVAL_S), ("off", None)]
        for name, interval_s in sides if number % 2 else sides[::-1]:
            row[name] = decode_tps(model, arguments.tokens, interval_s=interval_s)
        rows.append(row)
    model.close()
    ratios = [row["on"] / row["off"] for row in rows]
    print(f"decode on / off: {np.median(ratios):.4f}, 95 % interval {median_interval(ratios)}")
    print(f"raw rows: {save('sampling_cost', rows)}")


if __name__ == "__main__":
    main()
