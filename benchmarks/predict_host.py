"""Predicted against measured on this machine: speed of any GGUF files on 1 and more threads, and memory.

    edgelm targets detect -o me.toml
    python benchmarks/predict_host.py ram BUNDLE BUNDLE
    python benchmarks/predict_host.py speed a.gguf b.gguf --profile me.toml --threads 1 2 --rounds 5

Speed wants a quiet machine: files and thread counts take turns in every round, and rows that ``bench`` calls spoilt
are counted apart. Memory does not: every case is a process of its own, judged by its peak resident size. Give bundles
for it: a bare GGUF runs without the tokenizer of the source, which prediction counts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from measure import edgelm, run, save

from runtime.gguf_header import read_gguf_header, workload_from_gguf
from runtime.model import artifact_of
from targets.calibration import calibration
from targets.predict import RunSettings, family_of, predict_speed, ram_parts
from targets.profile import load_profile

PROMPT, GENERATED = 512, 128
CONTEXTS = (512, 1024, 2048, 4096, 8192)
RAM_PROMPT = 512
RAM_CHILD = """
import json, sys
from pathlib import Path
from runtime.engine import EngineOptions
from runtime.generate import GenerationRequest, Session, generate
from runtime.memory import snapshot
from runtime.model import open_model
import runtime.bench
path, context, kv_type, mmap, tokens = sys.argv[1:]
model = open_model(Path(path), EngineOptions(context=int(context), kv_type=kv_type, mmap=mmap == "1"))
prompt = [index * 7919 % model.engine.info.vocabulary for index in range(int(tokens) - 8)]
for event in generate(Session(model.engine), model.tokenizer, GenerationRequest(prompt, 8)):
    pass
print(json.dumps({"peak_bytes": snapshot().peak_bytes}))
"""


def speed_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    profile = load_profile(arguments.profile)
    rows = []
    cases = list(itertools.product(arguments.models, arguments.threads))
    for number in range(arguments.rounds):
        for model, threads in cases if number % 2 == 0 else reversed(cases):
            counts = ["-p", str(PROMPT), "-n", str(GENERATED), "-r", "3", "--json"]
            limits = ["--threads", str(threads), "--threads-prefill", str(threads)]
            report = json.loads(run(edgelm("bench", str(model), *counts, *limits)).stdout)
            settings = RunSettings(
                context=PROMPT + GENERATED,
                depth=GENERATED // 2,
                prompt_tokens=PROMPT,
                threads_decode=threads,
                threads_prefill=threads,
            )
            predicted = predict_speed(workload_from_gguf(read_gguf_header(artifact_of(model)[0])), profile, settings)
            row = {"round": number, "model": model.stem, "threads": threads, "valid": report["valid"]}
            for name in ("prefill_tps", "decode_tps"):
                row |= {name: report[name]["median"], f"predicted_{name}": getattr(predicted, name)}
            rows.append(row)
    return rows


def show_speed(rows: list[dict[str, Any]]) -> None:
    print("| model | threads | prefill | predicted | error | decode | predicted | error |\n" + "|---" * 8 + "|")
    errors: dict[str, list[float]] = {"prefill_tps": [], "decode_tps": []}
    for model, threads in dict.fromkeys((row["model"], row["threads"]) for row in rows):
        same = [row for row in rows if (row["model"], row["threads"]) == (model, threads)]
        cells = [model, str(threads)]
        for name, found in errors.items():
            measured = statistics.median(row[name] for row in same)
            predicted = same[0][f"predicted_{name}"]
            found.append(100 * (predicted / measured - 1))
            cells += [f"{measured:.1f}", f"{predicted:.1f}", f"{found[-1]:+.1f} %"]
        print("| " + " | ".join(cells) + " |")
    for name, found in errors.items():
        print(f"{name}: median absolute error {statistics.median(map(abs, found)):.1f} % of {len(found)} cases")
    spoilt = sum(not row["valid"] for row in rows)
    if spoilt:
        print(f"NOT QUIET: bench calls {spoilt} of {len(rows)} runs spoilt; these figures say nothing about prediction")


def ram_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    profile = load_profile("host")
    family = family_of(profile, calibration())
    rows = []
    for model, context, kv_type, mmap in itertools.product(arguments.models, CONTEXTS, ("f16", "q8_0"), (True, False)):
        command = [sys.executable, "-c", RAM_CHILD, str(model), str(context), kv_type, str(int(mmap)), str(RAM_PROMPT)]
        child = subprocess.run(command, capture_output=True, text=True, check=True)
        settings = RunSettings(context=context, kv_type=kv_type, mmap=mmap)
        parts = ram_parts(workload_from_gguf(read_gguf_header(artifact_of(model)[0])), profile, settings, family)
        case = {"model": model.stem, "context": context, "kv_type": kv_type, "mmap": mmap}
        predicted = {"predicted_bytes": sum(parts.model_dump().values()), **parts.model_dump()}
        rows.append({**case, **json.loads(child.stdout), **predicted})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def show_ram(rows: list[dict[str, Any]]) -> None:
    print("| model | context | KV | mmap | peak MB | predicted MB | error |\n|---|---|---|---|---|---|---|")
    errors = []
    for row in rows:
        errors.append(100 * (row["predicted_bytes"] / row["peak_bytes"] - 1))
        sizes = f"{row['peak_bytes'] / 1e6:.0f} | {row['predicted_bytes'] / 1e6:.0f}"
        case = f"{row['model']} | {row['context']} | {row['kv_type']} | {'yes' if row['mmap'] else 'no'}"
        print(f"| {case} | {sizes} | {errors[-1]:+.1f} % |")
    sizes = sorted(map(abs, errors))
    inside = sum(size <= 5 for size in sizes)
    print(f"median absolute error {statistics.median(sizes):.1f} %, worst {sizes[-1]:.1f} %")
    print(f"{inside} of {len(sizes)} within 5 %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "ram"])
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--profile", default="host", help="id or file of the profile that predicts speed")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rows = speed_rows(arguments) if arguments.what == "speed" else ram_rows(arguments)
    (show_speed if arguments.what == "speed" else show_ram)(rows)
    print(f"raw rows: {save(f'predict_host_{arguments.what}', rows)}")


if __name__ == "__main__":
    main()
