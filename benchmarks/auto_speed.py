"""Speed of ``--quant auto`` beside Q4_K_M with importance matrix: same size, not slower, how much less KL?

    make peers
    edgelm targets detect -o here.toml
    python benchmarks/auto_speed.py MODEL --target here.toml --work DIR --make
    python benchmarks/auto_speed.py MODEL --target here.toml --work DIR --rounds 9

Runs want a quiet machine, ``--make``, which makes the artefacts and measures their KL, does not. For each factor an
artefact is exported under the size of llama-quantize's Q4_K_M and under limits of decode and prefill speed of that
factor times what is predicted for Q4_K_M; then llama-bench runs all of them in turn, each round in another order, and
medians of the ratios within rounds are told with the KL of our proof. The goal: both ratios at least 0.97 and KL at
most 0.7 of the peer's.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import statistics
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

from auto_front import measured, presets, windows_of
from measure import save

from edgelm.errors import DoesNotFitError
from edgelm.progress import SILENT
from exporter import quality
from exporter.checkpoint import open_checkpoint, open_source
from exporter.options import ExportOptions
from exporter.pipeline import export, prepare
from exporter.reference import open_reference

PEER = "Q4_K_M"
LIMIT_S = 600


def artefacts(arguments: argparse.Namespace) -> dict[str, Path]:
    """The peer's and ours by factor, made where they are missing."""
    arguments.presets = [PEER]
    ((_, peer),) = presets(arguments, arguments.work)
    found = {PEER: peer}
    base = ExportOptions(str(arguments.model), target=arguments.target, quant=PEER, verify=False)
    predicted = prepare(base).plan.predicted
    for factor in arguments.factors:
        path = arguments.work / f"auto-{factor:g}"
        options = replace(
            base,
            quant="auto",
            max_artifact_bytes=peer.stat().st_size,
            min_decode_tps=(predicted.decode_tps or 0.0) * factor or None,
            min_prefill_tps=(predicted.prefill_tps or 0.0) * factor or None,
        )
        try:
            if not path.exists():
                export(options, path)
            found[f"auto x {factor:g}"] = path / "model.gguf"
        except DoesNotFitError as error:
            print(f"auto x {factor:g}: {error.message}")
    return found


def judged(arguments: argparse.Namespace, files: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Bytes and KL of every artefact, measured once."""
    held = arguments.work / "kl.json"
    known: dict[str, dict[str, Any]] = json.loads(held.read_text()) if held.exists() else {}
    missing = {name: path for name, path in files.items() if name not in known}
    if missing:
        checkpoint = open_checkpoint(open_source(str(arguments.model)))
        windows = windows_of(checkpoint, None, arguments.tokens)["documentation"]
        with open_reference(checkpoint, quality.WINDOW, "auto", SILENT) as reference:
            known |= {name: measured(path, {"documentation": (reference, windows)}) for name, path in missing.items()}
        held.write_text(json.dumps(known))
    return {name: known[name] for name in files}


def bench(arguments: argparse.Namespace, path: Path) -> tuple[float, float]:
    """(prefill, decode) tokens/s of one llama-bench call."""
    command = [str(arguments.peers / "llama-bench"), "-m", str(path), "-t", str(arguments.threads), "-o", "csv"]
    counts = ["-p", str(arguments.prompt), "-n", str(arguments.generated), "-r", "2"]
    done = subprocess.run([*command, *counts], capture_output=True, text=True, check=True, timeout=LIMIT_S)
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    prefill = next(float(row["avg_ts"]) for row in rows if row["n_gen"] == "0")
    return prefill, next(float(row["avg_ts"]) for row in rows if row["n_prompt"] == "0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peers", type=Path, default=Path(".cache/peers/build/bin"))
    parser.add_argument("--target", default="host", help="profile of this machine: its kernels decide the types")
    parser.add_argument("--make", action="store_true", help="make and judge what is missing, run nothing")
    parser.add_argument("--work", type=Path, default=Path("auto-speed"))
    parser.add_argument("--imatrix", type=Path, help="importance matrix that is there already")
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0, 1.05, 1.1, 1.2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generated", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=quality.MIN_TOKENS, help="of the KL measurement")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    files = artefacts(arguments)
    kl = judged(arguments, files)
    if arguments.make:
        return
    rows: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        names = list(files)
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            prefill, decode = bench(arguments, files[name])
            rows.append({"round": number, "artefact": name, "prefill_tps": prefill, "decode_tps": decode, **kl[name]})
        print(json.dumps(rows[-len(names) :]), flush=True)
        save("auto_speed", rows)
    print("| artefact | MB | KL | KL / peer | prefill / peer | decode / peer | goal |\n" + "|---" * 7 + "|")
    for name in files:
        ratios = {
            figure: statistics.median(
                mine[figure] / peer[figure]
                for mine in rows
                for peer in rows
                if mine["artefact"] == name and peer["artefact"] == PEER and mine["round"] == peer["round"]
            )
            for figure in ("prefill_tps", "decode_tps")
        }
        less = kl[name]["kl_documentation"] / kl[PEER]["kl_documentation"]
        met = "yes" if less <= 0.7 and min(ratios.values()) >= 0.97 else "no"
        speeds = f"{ratios['prefill_tps']:.3f} | {ratios['decode_tps']:.3f}"
        size = f"{kl[name]['bytes'] / 1e6:.1f} | {kl[name]['kl_documentation']:.5f} | {less:.2f}"
        print(f"| {name} | {size} | {speeds} | {met if name != PEER else '-'} |")


if __name__ == "__main__":
    main()
