"""Layers shared by a GPU and its host: what is predicted, written down before it is measured, and how far off it is.

    python benchmarks/predict_split.py predict h200-sxm-141gb host.toml --threads 16 -o predicted.jsonl
    python benchmarks/predict_split.py compare predicted.jsonl results/gpu_offload.jsonl
    python benchmarks/predict_split.py make DIRECTORY --words SMALL.gguf [--only 360m,1b] [--quants Q4_0,Q8_0]

``predict`` needs the profiles alone, the host's from ``edgelm targets detect``: a row for every model below at a
quarter, half and three quarters of its layers and all of them, with the CPU's weights as the file has them and
rearranged. ``make`` writes the models (random weights, ``random_gguf.py``), ``gpu_offload.py --parts order`` measures
them, and ``compare`` puts both side by side. 360M and 1.1B were
there when the constants were fitted, 3B and 0.5B were not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from random_gguf import BY_TOKEN, Shape, metadata_of, planned, workload_of, write

from exporter.mixes import mix_named
from runtime.gguf_header import read_gguf_header
from targets.predict import RunSettings
from targets.profile import load_profile
from targets.split import predict_split

MODELS = {
    "360m": Shape(32, 960, 2560, 15, 5, tied=True),
    "1b": Shape(22, 2048, 5632, 32, 4),
    "3b": Shape(28, 3072, 8192, 24, 8),
    "500m": Shape(24, 1024, 4864, 16, 4, tied=True),
}
QUANTS = ("Q4_0", "Q4_K_M", "Q8_0")
SHARES = (0.25, 0.5, 0.75, 1.0)
VOCABULARY = 49152
CONTEXT, DEPTH = 640, 24  # of gpu_offload.py; half of the 48 tokens that are generated
AIM_PERCENT = 20.0


def cases() -> Iterator[tuple[str, Shape, str]]:
    """Names of files, shapes and types."""
    for name, shape in MODELS.items():
        for quant in QUANTS:
            yield f"{name}-{quant}.gguf", shape, quant


def predict(told: argparse.Namespace) -> None:
    """A row for every model, number of layers and place of the CPU's weights."""
    profiles = load_profile(told.gpu), load_profile(told.host)
    settings = RunSettings(context=CONTEXT, depth=DEPTH, threads_decode=told.threads)
    with told.output.open("w", encoding="utf-8") as stream:
        for file, shape, quant in cases():
            workload = workload_of(shape, VOCABULARY, mix_named(quant))
            for share in SHARES:
                layers = round((shape.layers + 1) * share)
                for repacked in (False, True) if share < 1 else (False,):
                    found = predict_split(workload, *profiles, settings, layers, host_repack=repacked)
                    row = {"file": file, "layers": layers, "host_repack": repacked}
                    stream.write(json.dumps(row | {"decode_tps": round(found.decode_tps, 2)}) + "\n")
    print(f"{told.output}: {len(told.output.read_text(encoding='utf-8').splitlines())} predictions")


def make(told: argparse.Namespace) -> None:
    """Write the models."""
    words = read_gguf_header(told.words).metadata
    assert len(words[BY_TOKEN[0]]) == VOCABULARY
    only, quants = told.only.split(","), told.quants.split(",")
    for file, shape, quant in cases():
        if file.partition("-")[0] in only and quant in quants:
            started, mix, path = time.perf_counter(), mix_named(quant), told.directory / file
            write(path, planned(shape, VOCABULARY, mix), metadata_of(shape, mix, words, VOCABULARY, path.stem), 1)
            print(f"{file}: {path.stat().st_size / 2**20:.0f} MiB, {time.perf_counter() - started:.1f} s", flush=True)


def measured_rows(path: Path) -> dict[tuple[str, int, bool], list[dict[str, Any]]]:
    """Rows of the part ``order``, by file, layers and place of the CPU's weights."""
    found: dict[tuple[str, int, bool], list[dict[str, Any]]] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(text)
        if row.get("part") == "order":
            found.setdefault((row["file"], row["layers"], row["host_repack"]), []).append(row)
    return found


def compare(told: argparse.Namespace) -> None:
    """Predicted over measured, and how many are as near as they have to be."""
    measured = measured_rows(told.measured)
    errors: dict[bool, list[float]] = {False: [], True: []}
    print("| model | layers | rearranged | predicted | measured | ratio |\n" + "|---" * 6 + "|")
    for text in told.predicted.read_text(encoding="utf-8").splitlines():
        row = json.loads(text)
        rows = measured.get((row["file"], row["layers"], row["host_repack"]))
        if rows is None:
            continue
        tps = statistics.median(item.get("ours_decode_tps") or item["logits_decode_tps"] for item in rows)
        ratio = row["decode_tps"] / tps
        split = row["layers"] <= MODELS[row["file"].partition("-")[0]].layers
        if split:
            errors[row["host_repack"]].append(100 * abs(ratio - 1))
        figures = f"{row['decode_tps']:.1f} | {tps:.1f} | {ratio:.2f}"
        print(f"| {row['file']} | {row['layers']} | {'yes' if row['host_repack'] else 'no'} | {figures} |")
    for repacked, found in errors.items():
        if found:
            near = sum(error <= AIM_PERCENT for error in found)
            what = f"splits, {'' if repacked else 'not '}rearranged: {near} of {len(found)} within {AIM_PERCENT:g} %"
            print(f"{what}, median {statistics.median(found):.1f} %, worst {max(found):.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    part = parts.add_parser("predict")
    part.add_argument("gpu")
    part.add_argument("host")
    part.add_argument("--threads", type=int, help="of the host  [default: its profile's]")
    part.add_argument("-o", "--output", type=Path, required=True)
    part.set_defaults(does=predict)
    part = parts.add_parser("make")
    part.add_argument("directory", type=Path)
    part.add_argument("--words", type=Path, required=True)
    part.add_argument("--only", default=",".join(MODELS))
    part.add_argument("--quants", default=",".join(QUANTS))
    part.set_defaults(does=make)
    part = parts.add_parser("compare")
    part.add_argument("predicted", type=Path)
    part.add_argument("measured", type=Path)
    part.set_defaults(does=compare)
    told = parser.parse_args()
    told.does(told)


if __name__ == "__main__":
    main()
