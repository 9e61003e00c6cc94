"""Predicted against measured on this machine: speed of any GGUF files on 1 and more threads, and memory.

    python benchmarks/predict_host.py ram BUNDLE BUNDLE
    python benchmarks/predict_host.py ram a.gguf --plain
    python benchmarks/predict_host.py speed MODEL MODEL --types Q4_0 Q4_K_M Q5_K_M Q6_K Q8_0 F16 --work DIR
    python benchmarks/predict_host.py speed a.gguf b.gguf --profile me.toml --threads 1 2 --rounds 5

With --types the models are sources, exported to DIR in every type first, where DIR has them not yet. Without --profile
this machine is detected and measured before every round, because what neighbours leave of a virtual machine's memory
changes within minutes; the profile is kept among the rows. Rounds are added to those that results/NAME.jsonl has
already, so they can be run one at a time (--rounds 1), and --rounds 0 shows what is there. Every file is written anew
before it is measured, as it is when it was just exported.

Speed wants a quiet machine: every second round takes the cases from the back, and rows that ``bench`` calls spoilt are
counted apart. Memory does not: every case is a process of its own, judged by its peak resident size. Without flash
attention (--plain, rows of their own) the whole context is filled: scores take more the more there is of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from large_pages import copied
from measure import RESULTS, append, edgelm, machine, run, save

from edgelm.bundle import MANIFEST_NAME, open_bundle
from exporter.pieces import PIECE_BYTES
from runtime.gguf_header import read_gguf_header, workload_from_gguf
from runtime.model import artifact_of
from targets.calibration import calibration
from targets.predict import RunSettings, family_of, predict_speed, ram_parts
from targets.profile import TargetProfile, load_profile

PROMPT, GENERATED = 512, 128
CONTEXTS = (512, 1024, 2048, 4096, 8192)
RAM_PROMPT = 512
RAM_NAME, SPEED_NAME = "predict_host_ram", "predict_host_speed"
SPEEDS = ("prefill_tps", "decode_tps")
RAM_CHILD = """
import json, sys
from pathlib import Path
from runtime.engine import EngineOptions
from runtime.generate import GenerationRequest, Session, generate
from runtime.memory import snapshot
from runtime.model import open_model
import runtime.bench
path, context, kv_type, mmap, tokens, kind = sys.argv[1:]
options = EngineOptions(context=int(context), kv_type=kv_type, mmap=mmap == "1", flash_attention=kind)
model = open_model(Path(path), options)
prompt = [index * 7919 % model.engine.info.vocabulary for index in range(int(tokens) - 8)]
for event in generate(Session(model.engine), model.tokenizer, GenerationRequest(prompt, 8)):
    pass
print(json.dumps({"peak_bytes": snapshot().peak_bytes}))
"""


def exported(arguments: argparse.Namespace) -> list[Path]:
    """Bundles of all models in all types, made where they are missing."""
    found = []
    for model, kind in itertools.product(arguments.models, arguments.types):
        path = arguments.work / f"{model.name}-{kind}"
        if not path.exists():
            run(edgelm("export", str(model), "-o", str(path), "--quant", kind, "--no-verify"))
        found.append(path)
    return found


def speed_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the rounds asked for, each behind a detection of its own, and read all rows that the file then has."""
    if arguments.types:
        arguments.models = exported(arguments)
    path = RESULTS / f"{arguments.name}.jsonl"
    for _ in range(arguments.rounds):
        before = [row.get("detection", -1) for row in read_rows(path)]
        number = 1 + max(before, default=-1)
        append(arguments.name, {"machine": machine(), "detection": number} | detected(arguments, number))
        profile = load_profile(arguments.profile or str(arguments.work / f"host-{number}.toml"))
        cases = list(itertools.product(arguments.models, arguments.threads))
        for model, threads in cases if number % 2 == 0 else reversed(cases):
            append(arguments.name, {"detection": number} | speed_row(arguments, model, threads, profile))
    return [row for row in read_rows(path) if "detection" in row and "model" in row]


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def detected(arguments: argparse.Namespace, number: int) -> dict[str, Any]:
    """The profile of a round for its raw rows; this machine is detected where none was given."""
    if arguments.profile is not None:
        return {"profile": arguments.profile}
    path, started = arguments.work / f"host-{number}.toml", time.perf_counter()
    run(edgelm("targets", "detect", "-o", str(path)))
    return {"detect_s": time.perf_counter() - started, "profile": path.read_text()}


def speed_row(arguments: argparse.Namespace, model: Path, threads: int, profile: TargetProfile) -> dict[str, Any]:
    """One model on some threads: measured, and predicted from the profile of the round."""
    rewritten(artifact_of(model)[0])
    prompt, generated = arguments.prompt, arguments.generated
    counts = ["-p", str(prompt), "-n", str(generated), "-r", str(arguments.repetitions), "--json"]
    limits = ["--threads", str(threads), "--threads-prefill", str(threads)]
    report = json.loads(run(edgelm("bench", str(model), *counts, *limits)).stdout)
    settings = RunSettings(
        context=prompt + generated,
        depth=generated // 2,
        prompt_tokens=prompt,
        threads_decode=threads,
        threads_prefill=threads,
        flash_attention=report["engine"]["flash_attention"] is not False,
    )
    predicted = predict_speed(workload_from_gguf(read_gguf_header(artifact_of(model)[0])), profile, settings)
    row = {"model": name_of(model), "threads": threads, "valid": report["valid"]}
    for name in SPEEDS:
        row |= {name: report[name]["median"], f"predicted_{name}": getattr(predicted, name)}
    return row


def rewritten(path: Path) -> None:
    """Write a file anew as exports do. A kernel that drops pages which nobody used for minutes reads them back in small
    blocks, and decode is up to 15 % slower until the file is written or read as a whole again."""
    again = copied(path, path.with_suffix(".again"), PIECE_BYTES)
    if again.stat().st_size != path.stat().st_size:
        raise SystemExit(f"{again} is shorter than {path}: is the disk full?")
    again.replace(path)


def show_speed(rows: list[dict[str, Any]]) -> None:
    """By case the medians over all rounds; below them the errors of every prediction beside its own round, and of the
    first round's prediction beside all rounds."""
    print("| model | threads | prefill | error | decode | error |\n" + "|---" * 6 + "|")
    first = min(row["detection"] for row in rows)
    alone: dict[str, list[float]] = {name: [] for name in SPEEDS}
    by_case: dict[str, list[float]] = {name: [] for name in SPEEDS}
    for model, threads in dict.fromkeys((row["model"], row["threads"]) for row in rows):
        same = [row for row in rows if (row["model"], row["threads"]) == (model, threads)]
        cells = [model, str(threads)]
        for name in SPEEDS:
            measured = statistics.median(row[name] for row in same)
            by_case[name].append(statistics.median(error(row, name) for row in same))
            once = [row[f"predicted_{name}"] for row in same if row["detection"] == first]
            alone[name] += [100 * (value / measured - 1) for value in once]
            cells += [f"{measured:.1f}", f"{by_case[name][-1]:+.1f} %"]
        print("| " + " | ".join(cells) + " |")
    for name in SPEEDS:
        each, cases = sized(error(row, name) for row in rows), sized(by_case[name])
        print(f"{name}, detection before every round: median absolute error {each} predictions, {cases} cases")
        print(f"{name}, first detection beside the medians of all rounds: {sized(alone[name])} cases")
    spoilt = sum(not row["valid"] for row in rows)
    if spoilt:
        print(f"NOT QUIET: bench calls {spoilt} of {len(rows)} runs spoilt; they are counted all the same")


def error(row: dict[str, Any], name: str) -> float:
    """Per cent that a prediction is above what its round measured."""
    return float(100 * (row[f"predicted_{name}"] / row[name] - 1))


def sized(errors: Iterable[float]) -> str:
    sizes = [abs(item) for item in errors]
    return f"{statistics.median(sizes):.1f} % of {len(sizes)}"


def name_of(model: Path) -> str:
    """The bundle's own name, or that of the file with what it is."""
    if (model / MANIFEST_NAME).is_file():
        return open_bundle(model, check_hashes=False).manifest.name
    return f"{model.stem} (bare GGUF)"


def ram_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    profile = load_profile("host")
    family = family_of(profile, calibration())
    rows = []
    types = ("f16",) if arguments.plain else ("f16", "q8_0")
    cases = itertools.product(arguments.models, arguments.contexts, types, (True, False))
    for model, context, kv_type, mmap in cases:
        tokens, kind = (context, "off") if arguments.plain else (RAM_PROMPT, "on")
        command = [
            sys.executable,
            "-c",
            RAM_CHILD,
            str(model),
            str(context),
            kv_type,
            str(int(mmap)),
            str(tokens),
            kind,
        ]
        child = subprocess.run(command, capture_output=True, text=True, check=True)
        settings = RunSettings(
            context=context,
            kv_type=kv_type,
            mmap=mmap,
            source_tokenizer=model.is_dir(),
            flash_attention=not arguments.plain,
        )
        parts = ram_parts(workload_from_gguf(read_gguf_header(artifact_of(model)[0])), profile, settings, family)
        case = {"model": name_of(model), "context": context, "kv_type": kv_type, "mmap": mmap}
        predicted = {"predicted_bytes": sum(parts.model_dump().values()), **parts.model_dump()}
        rows.append({**case, **json.loads(child.stdout), **predicted})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        save(arguments.name, rows)
    return rows


def ram_name(arguments: argparse.Namespace) -> str:
    return f"{RAM_NAME}_plain" if arguments.plain else RAM_NAME


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
    parser.add_argument("--profile", help="id or file of the profile that predicts speed; else: detect")
    parser.add_argument("--types", nargs="*", default=(), help="the models are sources: export them in these first")
    parser.add_argument("--work", type=Path, default=Path("predict-host"), help="where exports and profile are kept")
    parser.add_argument("--prompt", type=int, default=PROMPT)
    parser.add_argument("--generated", type=int, default=GENERATED)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="for ram")
    parser.add_argument("--plain", action="store_true", help="for ram: without flash attention")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", help="of the file of raw rows in results/: speed adds to it, ram writes it anew")
    arguments = parser.parse_args()
    arguments.name = arguments.name or (SPEED_NAME if arguments.what == "speed" else ram_name(arguments))
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.what == "speed":
        show_speed(speed_rows(arguments))
    else:
        show_ram(ram_rows(arguments))


if __name__ == "__main__":
    main()
