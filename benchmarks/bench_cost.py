"""What ``edgelm bench`` measures against llama-bench's loops, in turns in one process on one loaded model.

    python benchmarks/bench_cost.py a.gguf b.gguf [--depths 0,2048] [--rounds 15] [--gpu-layers N]

Two processes differ by up to a tenth in where their memory lies; here everything but the code around llama.cpp's calls
is the same. The bare side is what llama-bench does: fill the cache to the depth, then one call for all tokens of the
prompt, or a call per token, each waited for, nothing chosen. Our side is bench's own ``Runner``, which generates.
Ratios of pairs are of tokens per second, ours over bare, with the 95 % interval of their median. Wants a quiet machine.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
from measure import append, machine

from runtime.engine import EngineOptions
from runtime.engines.llamacpp_batch import Batch
from runtime.model import open_model
from runtime.points import Point, Runner, Taken
from runtime.sensors import Sampler, Sensors
from targets.significance import median_interval

NAME = "bench_cost"
PROMPT, GENERATED = 512, 128
Chooser = Literal["nobody", "numpy", "graph"]


class Bare:
    """llama.cpp's calls on an engine's context. The engine holds nothing before and after."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._library = engine, engine._loaded.library
        self._context = engine._loaded.context
        self._memory = self._library.llama_get_memory(self._context)
        self._capacity = int(self._library.llama_n_batch(self._context))
        self._batch = Batch(self._library, self._capacity, 1)
        self._tokens = np.random.default_rng(1).integers(0, engine.info.vocabulary, 8192).tolist()

    def tps(self, kind: Literal["prefill", "decode"], count: int, depth: int, chosen_by: Chooser = "nobody") -> float:
        """Tokens per second of one repetition. Decoding goes on with fixed tokens, or with the likeliest ones, which
        numpy finds in the logits, or llama.cpp in its graph. The first repetition after another way plans anew."""
        self._engine.truncate(0)
        choice = self._engine._choice
        if chosen_by != "graph":
            choice.end()
        elif choice.sequence is None and not choice.begin(0):
            raise SystemExit("llama.cpp does not choose tokens where this model's head is")
        self._fill(0, depth)
        started = time.perf_counter()
        if kind == "prefill":
            self._fill(depth, depth + count)
        else:
            for position in range(depth, depth + count):
                self._fill(position, position + 1)
                if chosen_by == "numpy":
                    self._tokens[position + 1] = int(self._engine._view(1)[0].argmax())
                elif chosen_by == "graph":
                    self._tokens[position + 1] = choice.token()
        seconds = time.perf_counter() - started
        self._library.llama_memory_seq_rm(self._memory, 0, -1, -1)
        return count / seconds

    def _fill(self, start: int, stop: int) -> None:
        for first in range(start, stop, self._capacity):
            size = min(self._capacity, stop - first)
            for row in range(size):
                position = first + row
                self._batch.put(row, self._tokens[position], position, 0, wanted=position + 1 == stop)
            self._batch.c.n_tokens = size
            if self._library.llama_decode(self._context, self._batch.c) != 0:
                raise SystemExit("llama.cpp failed to compute")
            self._library.llama_synchronize(self._context)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--depths", default="0,2048")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--gpu-layers", type=int, default=0)
    arguments = parser.parse_args()
    depths = [int(item) for item in arguments.depths.split(",")]
    append(NAME, {"machine": machine(), "gpu_layers": arguments.gpu_layers})
    print("| model | test | ours | bare | ratio | interval |\n" + "|---" * 6 + "|")
    for path in arguments.models:
        context = max(depths) + PROMPT + GENERATED + 16
        model = open_model(path, EngineOptions(context=context, gpu_layers=arguments.gpu_layers))
        model.engine.chooses = False  # type: ignore[attr-defined]  # sides that take turns would plan anew each time
        runner, bare = Runner(model.engine, model.tokenizer, Sampler(Sensors())), Bare(model.engine)
        points = [
            Point(kind, count, depth)
            for depth in depths
            for kind, count in (("prefill", PROMPT), ("decode", GENERATED))
        ]  # fmt: skip
        rows: dict[Point, list[tuple[float, float]]] = {point: [] for point in points}
        for number in range(arguments.rounds + 1):
            for point in points:
                order = (True, False) if number % 2 else (False, True)
                found = {ours: measured(runner, bare, point, ours=ours) for ours in order}
                if number:  # the first pass warms up
                    rows[point].append((found[True], found[False]))
                    append(NAME, {"model": path.name, "test": point.name, "ours": found[True], "bare": found[False]})
        for point, pairs in rows.items():
            ratios = [one / other for one, other in pairs]
            low, high = median_interval(ratios) or (min(ratios), max(ratios))
            ours, other = (float(np.median(side)) for side in zip(*pairs, strict=True))
            print(
                f"| {path.name} | {point.name} | {ours:.1f} | {other:.1f} | {np.median(ratios):.4f} "
                f"| {low:.4f} to {high:.4f} |",
                flush=True,
            )
        model.close()


def measured(runner: Runner, bare: Bare, point: Point, *, ours: bool) -> float:
    """Tokens per second of one repetition of one side."""
    if not ours:
        return bare.tps(point.kind, point.tokens, point.depth)
    taken = Taken(point)
    runner.once(taken)
    runner.engine.truncate(0)
    runner._session.tokens.clear()
    return taken.tps[0]


if __name__ == "__main__":
    main()
