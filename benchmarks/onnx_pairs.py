"""Our ONNX engine and onnxruntime-genai in one process, in turn: their ratio, whatever the machine does meanwhile.

Separate processes of the same thing differ by 10 to 30 % on a virtual machine; rounds in one process share its memory
layout and its minutes. Run by an interpreter that has onnxruntime-genai and what EdgeLM's runtime needs (click, jinja2,
psutil, pydantic, llguidance, tokenizers). Bundles and folders are those that ``onnx_side_by_side.py --work`` keeps. An
engine of ours is NAME=BUNDLE, with :VARIABLE=VALUE behind it for the environment that it is loaded in.

    PYTHONPATH=. PYTHON benchmarks/onnx_pairs.py WORK/genai-fp32 ours=WORK/bundle-onnx-fp32 \
        passive=WORK/bundle-onnx-fp32:OMP_WAIT_POLICY=passive --rounds 7
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measure import append, machine

from runtime.engine import Chunk, EngineOptions
from runtime.engines.onnx import load_engine

Rates = tuple[float, float]


def ours(name: str, wanted: str, prompt: list[int], generated: int) -> Callable[[], Rates]:
    """Tokens per second of a prompt and of decoding behind it, by our engine."""
    bundle, *variables = wanted.split(":")
    changed = dict(variable.split("=", 1) for variable in variables)
    os.environ.update(changed)
    engine = load_engine(Path(bundle) / "model.onnx", EngineOptions(context=len(prompt) + generated + 8))
    for key in changed:
        del os.environ[key]
    print(f"{name}: {engine.info.system}, {engine.info.huge_page_bytes / 2**20:.0f} MiB in huge pages")

    def measured() -> Rates:
        engine.truncate(0)
        started = time.perf_counter()
        token = int(engine.forward([Chunk(0, prompt)])[0].argmax())
        between = time.perf_counter()
        for _ in range(generated):
            token = int(engine.forward([Chunk(0, [token])])[0].argmax())
        return len(prompt) / (between - started), generated / (time.perf_counter() - between)

    return measured


def genai(folder: str, prompt: list[int], generated: int) -> Callable[[], Rates]:
    """The same by onnxruntime-genai's generator."""
    import onnxruntime_genai as og

    model: Any = og.Model(folder)
    length = len(prompt) + generated + 1

    def measured() -> Rates:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, parameters)
        started = time.perf_counter()
        generator.append_tokens(np.asarray([prompt], np.int32))
        generator.generate_next_token()
        between = time.perf_counter()
        for _ in range(generated):
            generator.generate_next_token()
        return len(prompt) / (between - started), generated / (time.perf_counter() - between)

    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", help="a model in genai's form")
    parser.add_argument("sides", nargs="+", metavar="NAME=BUNDLE[:VARIABLE=VALUE...]")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("-p", "--prompt", type=int, default=256)
    parser.add_argument("-n", "--generated", type=int, default=64)
    arguments = parser.parse_args()
    prompt = [100 + (7 * step) % 1000 for step in range(arguments.prompt)]
    sides = {}
    for text in arguments.sides:
        name, wanted = text.split("=", 1)
        sides[name] = ours(name, wanted, prompt, arguments.generated)
    sides["genai"] = genai(arguments.folder, prompt, arguments.generated)  # last: our huge pages are not for it
    for measured in sides.values():
        measured()
    shown = [
        f"{name}={'/'.join(Path(wanted).parts[-2:])}"
        for name, wanted in (side.split("=", 1) for side in arguments.sides)
    ]
    case = {"sides": shown, "prompt": arguments.prompt, "generated": arguments.generated}
    append("onnx_pairs", {"machine": machine(), **case})
    rounds: list[dict[str, Rates]] = []
    for number in range(arguments.rounds):
        order = list(sides) if number % 2 else list(sides)[::-1]
        rounds.append({name: sides[name]() for name in order})
        append("onnx_pairs", {"round": number, "rates": rounds[-1], "load_1m": os.getloadavg()[0]})
    for index, what in enumerate(("prompt", "decode")):
        for name in sides:
            ratios = sorted(row[name][index] / row["genai"][index] for row in rounds)
            told = f"{what} {name}: {statistics.median(row[name][index] for row in rounds):.1f} tokens/s, over genai's "
            print(f"{told}{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")


if __name__ == "__main__":
    main()
