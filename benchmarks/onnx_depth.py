"""Our ONNX engine beside optimum's ``ORTModelForCausalLM`` at growing depths of the context, in one process, in turn.

Optimum takes every key and value into a graph and a new copy out of it with every token; ours appends in place. So
what is measured is decode behind 128, 1,024, ... tokens, and the prompt that leads from one depth to the next, which
both read in steps (ours as it always does, optimum in those of ``--step``, as its cache allows). Exports of optimum are
those that ``onnx_side_by_side.py --work`` keeps; ours are bundles whose ``--context`` reaches the depth.

    python benchmarks/onnx_side_by_side.py DIRECTORY --work WORK --rounds 0
    edgelm export DIRECTORY --format onnx --quant fp32 --context 8192 -o WORK/deep-fp32
    python benchmarks/onnx_depth.py WORK/deep-fp32 WORK/optimum-fp32 --depths 128 1024 2048 4096 7000
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from measure import append, machine
from optimum.onnxruntime import ORTModelForCausalLM

from runtime.engine import Chunk, EngineOptions
from runtime.engines.onnx import load_engine
from runtime.waiting import ask


class Ours:
    """EdgeLM's engine."""

    def __init__(self, bundle: Path, context: int, threads: int, *, spin: bool) -> None:
        options = EngineOptions(context=context, threads_decode=threads, threads_prefill=threads)
        if spin:  # told here and not by the shell: torch's threads would spin as well
            ask("spin")
        self._engine = load_engine(bundle / "model.onnx", options)
        self.told = self._engine.info.system
        self._depth = 0

    def read(self, tokens: list[int]) -> None:
        """Go on from the depth reached so far."""
        self._engine.forward([Chunk(0, tokens)])
        self._depth += len(tokens)

    def forget(self) -> None:
        """Begin anew."""
        self._engine.truncate(0)
        self._depth = 0

    def decode(self, count: int) -> float:
        """Tokens per second behind the depth, which stays."""
        token = 100
        started = time.perf_counter()
        for _ in range(count):
            token = int(self._engine.forward([Chunk(0, [token])])[0].argmax())
        elapsed_s = time.perf_counter() - started
        self._engine.truncate(self._depth)
        return count / elapsed_s


class Optimum:
    """Its model class over its own export."""

    def __init__(self, folder: Path, threads: int, step: int, *, binding: bool) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        torch.set_num_threads(1)  # it only takes a largest value; its own threads would be in the way of both sides
        self._model = ORTModelForCausalLM.from_pretrained(folder, session_options=options, use_io_binding=binding)
        self._past: Any = None
        self._depth, self._step = 0, step

    def _forward(self, tokens: list[int], past: Any, depth: int) -> Any:
        mask = torch.ones((1, depth + len(tokens)), dtype=torch.int64)
        positions = torch.arange(depth, depth + len(tokens))[None]
        return self._model(
            input_ids=torch.tensor([tokens]),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=past,
            use_cache=True,
        )

    def read(self, tokens: list[int]) -> None:
        """Go on from the depth reached so far."""
        for start in range(0, len(tokens), self._step):
            piece = tokens[start : start + self._step]
            self._past = self._forward(piece, self._past, self._depth).past_key_values
            self._depth += len(piece)

    def forget(self) -> None:
        """Begin anew."""
        self._past, self._depth = None, 0

    def decode(self, count: int) -> float:
        """Tokens per second behind the depth, which stays: what is held is never written to."""
        token, past = 100, self._past
        started = time.perf_counter()
        for index in range(count):
            answer = self._forward([token], past, self._depth + index)
            past, token = answer.past_key_values, int(answer.logits[0, -1].argmax())
        return count / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("folder", type=Path, help="optimum's export")
    parser.add_argument("--depths", type=int, nargs="+", default=[128, 1024, 2048, 4096, 7000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-n", "--generated", type=int, default=12)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--step", type=int, default=128, help="tokens of a prompt that optimum reads at once")
    parser.add_argument("--binding", action="store_true", help="let optimum use its IOBinding")
    parser.add_argument("--spin", action="store_true", help="let our threads spin, as optimum's do, whatever else runs")
    arguments = parser.parse_args()
    deepest = max(arguments.depths)
    sides: dict[str, Ours | Optimum] = {
        "ours": Ours(arguments.bundle, deepest + arguments.generated + 8, arguments.threads, spin=arguments.spin),
        "optimum": Optimum(arguments.folder, arguments.threads, arguments.step, binding=arguments.binding),
    }
    case = {"bundle": arguments.bundle.name, "folder": arguments.folder.name}
    case |= {"generated": arguments.generated, "step": arguments.step, "binding": arguments.binding}
    append("onnx_depth", {"machine": machine(), **case, "threads": arguments.threads})
    tokens = [100 + (7 * index) % 1000 for index in range(deepest)]
    for side in sides.values():  # the first steps of a session allocate
        side.read(tokens[:128])
        side.decode(2)
        side.forget()
    before = 0
    for number, depth in enumerate(sorted(arguments.depths)):
        prompt = {}
        for name in list(sides)[:: 1 if number % 2 else -1]:
            started = time.perf_counter()
            sides[name].read(tokens[before:depth])
            prompt[name] = (depth - before) / (time.perf_counter() - started)
            sides[name].decode(2)
        decode = [
            {name: sides[name].decode(arguments.generated) for name in list(sides)[:: 1 if turn % 2 else -1]}
            for turn in range(arguments.rounds)
        ]
        row = {**case, "depth": depth, "from": before, "prompt": prompt, "decode": decode}
        append("onnx_depth", {**row, "load_1m": os.getloadavg()[0]})
        ratios = sorted(turn["ours"] / turn["optimum"] for turn in decode)
        shown = ", ".join(f"{name} {statistics.median(turn[name] for turn in decode):.1f}" for name in sides)
        told = f"depth {depth}: decode {shown} tokens/s, {statistics.median(ratios):.2f} ({ratios[0]:.2f} to "
        told += f"{ratios[-1]:.2f}); prompt from {before}: {prompt['ours']:.0f}, {prompt['optimum']:.0f}, "
        print(f"{told}{prompt['ours'] / prompt['optimum']:.2f}", flush=True)
        before = depth


if __name__ == "__main__":
    main()
