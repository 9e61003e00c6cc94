"""Layers on a GPU: memory against the plan, logits against the CPU's, speed at every share, beside llama-bench.

    python benchmarks/gpu_offload.py a.gguf b.gguf [--parts memory,logits,speed] [--llama-bench PATH] [--profile ID]

``memory``: contexts of 512, 2048 and 8192, a quarter of the layers to all of them: what was planned, what llama.cpp
announced, what the device and NVIDIA's driver count. ``logits``: mean KL in nats over the default evaluation text, GPU
against CPU of the same file. ``speed``: prefill of 512 and decode of 128 tokens, with llama-bench's figures for the
same number of layers beside them, and with ``--profile ID`` (the GPU's, the machine's own is detected or ``--host``)
what was predicted. Without a GPU it says so and ends. A software renderer counts as one: it proves numbers and sizes,
and its speeds say nothing. Raw rows are appended to ``results/gpu_offload.jsonl`` as they come.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from measure import append, machine

from edgelm.errors import EdgelmError
from exporter.texts import evaluation_text
from runtime.bench import BenchOptions, bench
from runtime.engine import Chunk, EngineOptions
from runtime.engines.llamacpp import load_engine, load_library
from runtime.engines.llamacpp_devices import find_devices
from runtime.gguf_header import read_gguf_header, workload_from_gguf
from runtime.gpu_memory import vram_record
from runtime.model import open_model
from runtime.offload import layered_model
from runtime.probe import kl_divergence
from targets.predict import RunSettings
from targets.profile import load_profile
from targets.split import predict_split
from targets.vram import Device, choose_device

NAME = "gpu_offload"
CONTEXTS = (512, 2048, 8192)
SHARES = (0.25, 0.5, 0.75, 1.0)
WINDOW = 256
BENCH_TOKENS = 640


def note(**row: Any) -> None:
    """Show a row and keep it."""
    print(json.dumps(row), flush=True)
    append(NAME, row)


def shares(path: Path) -> list[int]:
    """Numbers of layers to put on the GPU, the head among them."""
    most = layered_model(read_gguf_header(path), path.name).most
    return sorted({max(round(most * share), 1) for share in SHARES})


def memory(path: Path, device: Device) -> None:
    """Sizes of every share at every context."""
    for context in CONTEXTS:
        for layers in shares(path):
            try:
                engine = load_engine(path, EngineOptions(context=context, gpu_layers=layers, gpu=device.name))
            except EdgelmError as error:
                note(part="memory", file=path.name, context=context, layers=layers, refused=error.message)
                continue
            engine.forward([Chunk(0, list(range(64)))])  # scratch memory of kernels comes with the first batch
            record = vram_record(engine.info)
            assert record is not None
            free = next(item.free_bytes for item in find_devices(load_library()) if item.name == device.name)
            engine.close()
            off = record.predicted_bytes / record.announced_bytes - 1
            taken = record.free_before_bytes - free
            row = record.model_dump() | {"computed_taken_bytes": taken, "predicted_off": round(off, 4)}
            note(part="memory", file=path.name, context=context, layers=layers, **row)


def logits(path: Path, device: Device, tokens: int) -> None:
    """How far the GPU's predictions are from the CPU's, for every share."""
    model = open_model(path, EngineOptions(context=WINDOW))
    ids = model.text_prompt(evaluation_text(None).content[: 12 * tokens])[:tokens]
    model.close()
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW + 1, WINDOW)]
    expected = computed(path, EngineOptions(context=WINDOW, all_logits=True), windows)
    for layers in shares(path):
        options = EngineOptions(context=WINDOW, all_logits=True, gpu_layers=layers, gpu=device.name)
        found = computed(path, options, windows)
        kl = [kl_divergence(first, second) for first, second in zip(expected, found, strict=True)]
        top1 = float(np.mean(expected.argmax(axis=1) == found.argmax(axis=1)))
        figures = {"kl_mean": float(np.mean(kl)), "kl_p99": float(np.quantile(kl, 0.99)), "kl_max": max(kl)}
        note(part="logits", file=path.name, layers=layers, tokens=len(kl), top1_agreement=top1, **figures)


def computed(path: Path, options: EngineOptions, windows: list[list[int]]) -> np.ndarray[Any, Any]:
    """Logits of shape (tokens, vocabulary)."""
    engine = load_engine(path, options)
    rows = []
    for window in windows:
        engine.truncate(0)
        rows.append(engine.forward([Chunk(0, window, "all")]).copy())
    engine.close()
    return np.concatenate(rows)


def predicted_tps(path: Path, layers: int, arguments: argparse.Namespace) -> float:
    """Decode speed that the profiles promise."""
    settings = RunSettings(context=BENCH_TOKENS)
    workload = workload_from_gguf(read_gguf_header(path))
    profiles = load_profile(arguments.profile), load_profile(arguments.host)
    return predict_split(workload, *profiles, settings, layers).decode_tps


def speed(path: Path, device: Device, arguments: argparse.Namespace) -> None:
    """Tokens per second of every share and of none."""
    for layers in (0, *shares(path)):
        report = bench(path, BenchOptions(gpu_layers=layers, gpu=device.name if layers else ""))
        assert report.prefill_tps is not None
        assert report.decode_tps is not None
        row = {"prefill_tps": report.prefill_tps.median, "decode_tps": report.decode_tps.median, "valid": report.valid}
        if arguments.profile is not None and layers:
            row["predicted_decode_tps"] = predicted_tps(path, layers, arguments)
        if arguments.llama_bench is not None:
            row |= peer_speed(path, layers, arguments.llama_bench)
        note(part="speed", file=path.name, layers=layers, **row)


def peer_speed(path: Path, layers: int, peer: Path) -> dict[str, float]:
    """llama-bench's medians for the same file and number of layers, with flash attention as here."""
    command = [str(peer), "-m", str(path), "-ngl", str(layers), "-fa", "1", "-p", "512", "-n", "128", "-o", "json"]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    found = {"prefill" if item["n_prompt"] else "decode": float(np.median(item["samples_ts"])) for item in told}
    return {f"llama_bench_{kind}_tps": value for kind, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--parts", default="memory,logits,speed")
    parser.add_argument("--gpu", default="")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--llama-bench", type=Path)
    parser.add_argument("--profile")
    parser.add_argument("--host", default="host")
    arguments = parser.parse_args()
    device = choose_device(find_devices(load_library()), arguments.gpu)
    if device is None:
        print("no GPU that this build of llama.cpp can use: nothing to measure (docs/gpu.md has the builds)")
        return
    note(machine=machine(), device=device.description, backend=device.backend, total_bytes=device.total_bytes)
    for path in arguments.files:
        if "memory" in arguments.parts:
            memory(path, device)
        if "logits" in arguments.parts:
            logits(path, device, arguments.tokens)
        if "speed" in arguments.parts:
            speed(path, device, arguments)


if __name__ == "__main__":
    main()
