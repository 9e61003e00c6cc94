"""Decoding with threads that spin and with threads that sleep, in turn in one process, beside neighbours.

Neighbours are busy processes of this session, of each priority that is named as COUNT:NICE (``idle`` for SCHED_IDLE).
Between sessions Linux looks at groups and not at nice; where other sessions are busy, the row tells how many threads
wanted to run, and a group of more weight keeps them off: ``setsid -w sh -c 'echo -15 > /proc/self/autogroup; ...'``.

    python benchmarks/onnx_waiting.py BUNDLE --neighbours 0:0 2:0 2:5 2:10 4:15 2:idle
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from measure import append, machine

from runtime.engine import Chunk, Engine, EngineOptions
from runtime.engines.onnx import load_engine
from runtime.waiting import ask, choose_waiting, runnable_neighbours

PROMPT = 64


def decode(engine: Engine, count: int) -> float:
    """Tokens per second behind the prompt."""
    token = 100
    started = time.perf_counter()
    for _ in range(count):
        token = int(engine.forward([Chunk(0, [token])])[0].argmax())
    elapsed_s = time.perf_counter() - started
    engine.truncate(PROMPT)
    return count / elapsed_s


def busy(priority: str) -> subprocess.Popen[bytes]:
    """A process that always wants to run."""
    first = (
        "os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))" if priority == "idle" else f"os.nice({priority})"
    )
    return subprocess.Popen([sys.executable, "-c", f"import os\n{first}\nwhile True: pass"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--neighbours", nargs="+", default=["0:0", "2:0", "2:5", "2:10", "4:15", "2:idle"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("-n", "--generated", type=int, default=24)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    options = EngineOptions(context=512, threads_decode=arguments.threads, threads_prefill=arguments.threads)
    engines: dict[str, Engine] = {}
    for name, kind in (("spin", "spin"), ("sleep", "passive")):
        ask(kind)  # type: ignore[arg-type]
        engines[name] = load_engine(arguments.bundle / "model.onnx", options)
        engines[name].forward([Chunk(0, list(range(100, 100 + PROMPT)))])
        decode(engines[name], arguments.generated)
    del os.environ["OMP_WAIT_POLICY"]
    append("onnx_waiting", {"machine": machine(), "bundle": arguments.bundle.name})
    for case in arguments.neighbours:
        count, priority = case.split(":")
        with ExitStack() as stack:
            for _ in range(int(count)):
                process = stack.enter_context(busy(priority))
                stack.callback(process.kill)
            time.sleep(0.5)
            rounds = [
                {name: decode(engines[name], arguments.generated) for name in list(engines)[:: 1 if turn % 2 else -1]}
                for turn in range(arguments.rounds)
            ]
            found, chosen = runnable_neighbours(), choose_waiting(arguments.threads, sleeps=True).kind
            counted = None if found is None else found.count
        append("onnx_waiting", {"neighbours": case, "counted": counted, "chosen": chosen, "rounds": rounds})
        ratios = sorted(turn["spin"] / turn["sleep"] for turn in rounds)
        shown = ", ".join(f"{name} {statistics.median(turn[name] for turn in rounds):.1f}" for name in engines)
        told = f"{case}: {shown} tokens/s, {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"{told}; {counted:g} wanted to run, chosen: {chosen}", flush=True)


if __name__ == "__main__":
    main()
