"""Layers on a GPU: memory against the plan, logits and proof against the CPU's, speeds beside llama-bench's.

    python benchmarks/gpu_offload.py a.gguf b.gguf [--parts memory,logits,speed] [--llama-bench PATH] [--profile ID]
    python benchmarks/gpu_offload.py q4_0.gguf --parts proof --reference SOURCE
    python benchmarks/gpu_offload.py q4_0.gguf --parts order --host-repack 0,1 --llama-bench PATH
    python benchmarks/gpu_offload.py 7b.gguf --parts memory,speed --shares 0.5,1 --generated-tokens 64 --seconds 120

``memory``: contexts of 512, 2048 and 8192, a quarter of the layers to all of them: what was planned, what llama.cpp
announced, what the device and NVIDIA's driver count. ``logits``: mean KL in nats over the default evaluation text, GPU
against CPU of the same file. ``speed``: prefill of 512 and decode of 128 tokens, no layer to all of them there, with
llama-bench's figures for the same number beside them, and with ``--profile ID`` (the GPU's, the machine's own is
detected or ``--host``) what was predicted. ``order`` is the same in llama-bench's own order, all prompts in a row after
one that is not counted, then tokens likewise, by our engine (``ours``; ``logits``: reading them for each token, where
``ours`` has it chosen on the GPU), by calls of llama.cpp alone (``bare``), by those that choose each token (``numpy``,
``graph``: on the GPU), and by our engine with prompts and tokens in turn, as bench has it (``turns``); each with the
CPU's weights as the file has them and rearranged for its kernels (``--host-repack``, llama-bench's ``--no-host``).
``proof`` is made when it is named: the files are artefacts of ``--reference``, and each is measured against it on the
CPU and with all layers on the GPU; does each mean KL lie in the other's interval? ``logits`` and ``proof`` compute on
the CPU, too: not for models of several GB. Without a GPU it says so and ends. A software renderer counts as one: it
proves numbers and sizes, and its speeds say nothing. Raw rows are appended to ``results/gpu_offload.jsonl`` as they
come.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_cost import PROMPT, Bare, measured
from measure import append, machine

from edgelm.errors import EdgelmError, UsageError
from edgelm.progress import SILENT
from exporter.texts import evaluation_text
from runtime.bench import BenchOptions, bench
from runtime.engine import Chunk, EngineOptions
from runtime.engines.llamacpp import load_engine, load_library
from runtime.engines.llamacpp_devices import find_devices
from runtime.gguf_header import read_gguf_header, workload_from_gguf
from runtime.gpu_memory import vram_record
from runtime.model import open_model
from runtime.offload import layered_model
from runtime.points import Point, Runner, Until
from runtime.probe import kl_divergence
from runtime.sensors import Sampler, Sensors
from targets.predict import RunSettings
from targets.profile import load_profile
from targets.split import predict_split
from targets.vram import Device, choose_device

NAME = "gpu_offload"
CONTEXTS = (512, 2048, 8192)
SHARES = "0,0.25,0.5,0.75,1"
WINDOW = 256
BENCH_TOKENS = 640
CHOSEN = 16


def note(**row: Any) -> None:
    """Show a row and keep it."""
    print(json.dumps(row), flush=True)
    append(NAME, row)


class Work:
    """What the parts share: the device, what was asked for, and the time that is left."""

    def __init__(self, device: Device, arguments: argparse.Namespace) -> None:
        self.device, self.arguments = device, arguments
        self._started = time.perf_counter()

    def is_over(self, part: str, path: Path) -> bool:
        """Whether nothing more is to begin; says so in a row."""
        seconds: float = self.arguments.seconds
        if time.perf_counter() - self._started <= seconds:
            return False
        note(part=part, file=path.name, left_out=f"after {seconds:g} s")
        return True

    def shares(self, path: Path) -> list[int]:
        """Numbers of layers to put on the GPU, the head among them."""
        most = layers_of(path)
        wanted = (float(share) for share in self.arguments.shares.split(","))
        return sorted({max(round(most * share), 1) if share else 0 for share in wanted})


def layers_of(path: Path) -> int:
    """Layers of a model, the head among them."""
    return layered_model(read_gguf_header(path), path.name).most


def memory(path: Path, work: Work) -> None:
    """Sizes of every share at every context."""
    device = work.device
    for context in CONTEXTS:
        for layers in filter(None, work.shares(path)):
            if work.is_over("memory", path):
                return
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


def logits(path: Path, work: Work) -> None:
    """How far the GPU's predictions are from the CPU's, for every share."""
    tokens: int = work.arguments.tokens
    model = open_model(path, EngineOptions(context=WINDOW))
    ids = model.text_prompt(evaluation_text(None).content[: 12 * tokens])[:tokens]
    model.close()
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW + 1, WINDOW)]
    expected = computed(path, EngineOptions(context=WINDOW, all_logits=True), windows)
    for layers in filter(None, work.shares(path)):
        if work.is_over("logits", path):
            return
        options = EngineOptions(context=WINDOW, all_logits=True, gpu_layers=layers, gpu=work.device.name)
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


def speed(path: Path, work: Work) -> None:
    """Tokens per second of every share."""
    arguments = work.arguments
    for layers in work.shares(path):
        if work.is_over("speed", path):
            return
        options = BenchOptions(
            generated_tokens=arguments.generated_tokens,
            gpu_layers=layers,
            gpu=work.device.name if layers else "",
            repetitions=arguments.repetitions,
            max_time_s=arguments.max_time,
        )
        started = time.perf_counter()
        report = bench(path, options)
        assert report.prefill_tps is not None
        assert report.decode_tps is not None
        row = {"prefill_tps": report.prefill_tps.median, "decode_tps": report.decode_tps.median, "valid": report.valid}
        row |= {"rounds": len(report.decode_tps.samples), "load_s": report.load_s}
        row["wall_s"] = round(time.perf_counter() - started, 2)
        if arguments.profile is not None and layers:
            row["predicted_decode_tps"] = predicted_tps(path, layers, arguments)
        if arguments.llama_bench is not None:
            row |= peer_speed(path, layers, arguments)
        note(part="speed", file=path.name, layers=layers, **row)


def order(path: Path, work: Work) -> None:
    """Tokens per second of every share in the order of llama-bench, for each place of the CPU's weights."""
    arguments = work.arguments
    most = layers_of(path)
    for layers in work.shares(path):
        for repacked in (bool(int(item)) for item in arguments.host_repack.split(",")):
            if work.is_over("order", path):
                return
            if repacked and layers in (0, most):
                continue  # nothing lies beside the GPU's share
            row = ordered_speed(path, layers, repacked, work)
            if arguments.llama_bench is not None:
                same = "--no-host", str(int(repacked)), "--threads", str(row["threads"])
                row |= peer_speed(path, layers, arguments, *same)
            note(part="order", file=path.name, layers=layers, host_repack=repacked, **row)


def ordered_speed(path: Path, layers: int, repacked: bool, work: Work) -> dict[str, float]:
    """Medians of each side; the sides take turns, each with all its repetitions behind one that is not counted."""
    arguments = work.arguments
    gpu = work.device.name if layers else ""
    model = open_model(path, EngineOptions(context=BENCH_TOKENS, gpu_layers=layers, gpu=gpu, host_repack=repacked))
    engine: Any = model.engine
    runner, bare = Runner(engine, model.tokenizer, Sampler(Sensors())), Bare(engine)
    sides = arguments.sides.split(",")
    chooses = engine.chooses = engine.chooses and not {"ours", "graph"}.isdisjoint(sides)
    points = Point("prefill", PROMPT), Point("decode", arguments.generated_tokens)
    samples: dict[str, list[float]] = {}

    def repeat(side: str, once: Callable[[Point], float], which: Sequence[Point] = points) -> None:
        for point in which:
            found = [once(point) for _ in range(arguments.repetitions + 1)][1:]
            samples.setdefault(f"{side}_{point.kind}_tps", []).extend(found)

    for _ in range(arguments.blocks):
        if "ours" in sides:
            repeat("ours", lambda point: measured(runner, bare, point, ours=True))
        if "logits" in sides:
            engine.chooses = False
            repeat("logits", lambda point: measured(runner, bare, point, ours=True))
            engine.chooses = chooses
        if "bare" in sides:
            repeat("bare", lambda point: measured(runner, bare, point, ours=False))
        if "numpy" in sides:
            repeat("numpy", lambda point: bare.tps(point.kind, point.tokens, 0, "numpy"), points[1:])
        if "graph" in sides:
            repeat("graph", lambda point: bare.tps(point.kind, point.tokens, 0, "graph"), points[1:])
    if "turns" in sides:
        for item in runner.run(points, Until(arguments.repetitions))[0]:
            samples[f"turns_{item.point.kind}_tps"] = item.tps
    row = {name: round(float(np.median(values)), 2) for name, values in samples.items()}
    row |= {"load_s": round(engine.info.load_s, 3), "threads": engine.info.threads_decode, "chooses": chooses}
    if chooses:
        row["chosen_gap"] = chosen_gap(engine)
    row["weights_copied_bytes"] = engine.info.buffers.get("weights_copied", 0)
    model.close()
    return row


def chosen_gap(engine: Any) -> float:
    """By how much the logits of tokens that the GPU chose lie below the best, at most: 0 where argmax and it agree or
    differ between equals. Models of ``random_gguf.py`` have many equal rows in their heads."""
    token, gaps = 1, []
    for position in range(CHOSEN):
        engine.truncate(position)
        found = engine.likeliest(Chunk(0, [token]))
        engine.truncate(position)
        row = engine.forward([Chunk(0, [token])])[0]
        gaps.append(float(row.max() - row[found]))
        token = int(row.argmax())
    return max(gaps)


def peer_speed(path: Path, layers: int, arguments: argparse.Namespace, *more: str) -> dict[str, float]:
    """llama-bench's medians for the same file and number of layers, with flash attention as here."""
    command = [str(arguments.llama_bench), "-m", str(path), "-ngl", str(layers), "-fa", "1", "-o", "json", "-p", "512"]
    command += ["-n", str(arguments.generated_tokens), "-r", str(arguments.repetitions), *more]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    found = {"prefill" if item["n_prompt"] else "decode": float(np.median(item["samples_ts"])) for item in told}
    return {f"llama_bench_{kind}_tps": value for kind, value in found.items()}


def proof(path: Path, work: Work) -> None:
    """An artefact against its unquantised source, on the CPU and with all layers on the GPU."""
    from exporter import quality  # with torch, where it is installed
    from exporter.checkpoint import open_checkpoint, open_source
    from exporter.device import Placement
    from exporter.tokenizer import prove_identity, read_tokenizer

    if work.arguments.reference is None:
        raise UsageError("the part proof needs --reference: what the files were exported from")
    checkpoint = open_checkpoint(open_source(work.arguments.reference))
    identity = prove_identity(read_tokenizer(checkpoint), path)
    found = []
    for placement in (Placement(), Placement(gpu_layers=layers_of(path), gpu=work.device.name)):
        if work.is_over("proof", path):
            return
        started = time.perf_counter()
        measured = quality.measure(path, checkpoint, identity, None, SILENT, placement=placement)
        row = measured.model_dump(exclude={"token_identity", "worst_tensors", "chat", "text_sha256"})
        note(part="proof", file=path.name, wall_s=round(time.perf_counter() - started, 2), **row)
        found.append(measured)
    cpu, gpu = found
    inside = {"cpu_in_gpu_interval": quality.within(cpu, gpu), "gpu_in_cpu_interval": quality.within(gpu, cpu)}
    note(part="proof", file=path.name, kl_mean_cpu=cpu.kl_mean, kl_mean_gpu=gpu.kl_mean, **inside)


def done(part: Callable[[Path, Work], None], path: Path, work: Work) -> bool:
    """Make a part for a file when there is time; False when it fails: the others may do."""
    name = part.__name__
    try:
        if not work.is_over(name, path):
            part(path, work)
    except EdgelmError as error:
        note(part=name, file=path.name, failed=error.message)
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--parts", default="memory,logits,speed")
    parser.add_argument("--gpu", default="")
    parser.add_argument("--shares", default=SHARES, help="of the layers; 0 is for the speed alone")
    parser.add_argument("--tokens", type=int, default=1024, help="whose logits are compared")
    parser.add_argument("--generated-tokens", type=int, default=128, help="decoded in a repetition")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--max-time", type=float, default=5.0, help="seconds after which no repetition begins")
    parser.add_argument("--reference", metavar="SOURCE", help="what the files were exported from, for the part proof")
    parser.add_argument("--sides", default="ours,logits,bare,numpy,graph,turns", help="of the part order")
    parser.add_argument("--blocks", type=int, default=2, help="of repetitions of each side in the part order")
    parser.add_argument("--host-repack", default="0", help="0, 1 or 0,1: the CPU's weights in the part order")
    parser.add_argument("--llama-bench", type=Path)
    parser.add_argument("--profile")
    parser.add_argument("--host", default="host")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing more after so long")
    arguments = parser.parse_args()
    known = {"memory": memory, "logits": logits, "speed": speed, "proof": proof, "order": order}
    parts = arguments.parts.split(",")
    if not set(parts) <= set(known):
        raise SystemExit(f"there is no part {', '.join(sorted(set(parts) - set(known)))}; there are {', '.join(known)}")
    device = choose_device(find_devices(load_library()), arguments.gpu)
    if device is None:
        print("no GPU that this build of llama.cpp can use: nothing to measure (docs/gpu.md has the builds)")
        return
    note(machine=machine(), device=device.description, backend=device.backend, total_bytes=device.total_bytes)
    work = Work(device, arguments)
    each = ((part, path) for path in arguments.files for part in parts)
    failed = [f"{part} of {path.name}" for part, path in each if not done(known[part], path, work)]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
