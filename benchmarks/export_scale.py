"""Export of a large checkpoint made on the spot: peak RSS, throughput against a plain copy of the same files, cores.

Writes a Llama of the asked shape as sharded bf16 safetensors (random weights, streamed), copies it with ``cp``, exports
it with every quantisation, all with cold page cache, and removes it again. The quality measurement is off, as it needs
the whole model in memory by its nature; token identity and hashes are in the figures. The last column is what libggml
alone takes for the same numbers on all cores, each type timed on a block in memory. Rows are added to the file of raw
rows, so that steps can be run one by one over a checkpoint that is kept.

    python benchmarks/export_scale.py --shape 8b --directory /var/tmp     # 41 GB of disk at most
    python benchmarks/export_scale.py --shape 1b
    python benchmarks/export_scale.py --shape 8b --keep /var/tmp/8b --step make
    python benchmarks/export_scale.py --shape 8b --keep /var/tmp/8b --step cp --step Q8_0
    python benchmarks/export_scale.py --shape 70b --step plan            # headers only: its weights are holes
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from measure import append, edgelm, machine, run

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from edgelm.bundle import open_bundle
from exporter import ggml
from tests.tiny_models import write_tokenizer

GIB = 2**30
RSS_LIMIT_BYTES = int(1.5 * GIB)
TOKENS = 1024  # of the tokenizer; the other rows of the embedding count as unused
SHARD_BYTES = 5_000_000_000
# hidden, layers, heads, key heads, head size, feed-forward, vocabulary: Llama 3.1 70B and 8B, 3.2 3B, a few of its
# layers, 3.2 1B, one to try out.
SHAPES = {
    "70b": (8192, 80, 64, 8, 128, 28672, 128256),
    "8b": (4096, 32, 32, 8, 128, 14336, 128256),
    "3b": (3072, 28, 24, 8, 128, 8192, 128256),
    "3b-wide": (3072, 4, 24, 8, 128, 8192, 128256),
    "1b": (2048, 16, 32, 8, 64, 8192, 128256),
    "tiny": (512, 4, 8, 2, 64, 1536, 32000),
}
TIED = ("3b", "3b-wide", "1b")
HOLLOW = ("70b",)  # nothing but headers on disk


def tensors(shape: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama; those of 1B and 3B are tied, as their models are."""
    hidden, layers, heads, kv_heads, head, feed_forward, vocabulary = SHAPES[shape]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "self_attn.q_proj.weight", (heads * head, hidden)
        yield prefix + "self_attn.k_proj.weight", (kv_heads * head, hidden)
        yield prefix + "self_attn.v_proj.weight", (kv_heads * head, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, heads * head)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "mlp.gate_proj.weight", (feed_forward, hidden)
        yield prefix + "mlp.up_proj.weight", (feed_forward, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, feed_forward)
    yield "model.norm.weight", (hidden,)
    if shape not in TIED:
        yield "lm_head.weight", (vocabulary, hidden)


def make_checkpoint(directory: Path, shape: str) -> None:
    """Write the checkpoint, a piece of a tensor in memory at a time; the index last, so that it tells a whole one."""
    hidden, layers, heads, kv_heads, head, feed_forward, vocabulary = SHAPES[shape]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocabulary, "hidden_size": hidden,
        "intermediate_size": feed_forward, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head, "hidden_act": "silu", "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": shape in TIED, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory, TOKENS)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, size in tensors(shape):
        size_bytes = 2 * int(np.prod(size))
        if filled and filled + size_bytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append((name, size))
        filled += size_bytes
    weight_map = {}
    for number, held in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_shard(directory / name, held, hollow=shape in HOLLOW)
        weight_map |= {tensor: name for tensor, _ in held}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_shard(path: Path, held: list[tuple[str, tuple[int, ...]]], *, hollow: bool) -> None:
    generator = np.random.default_rng(len(held))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # which transformers wants
    offset = 0
    for name, size in held:
        size_bytes = 2 * int(np.prod(size))
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [offset, offset + size_bytes]}
        offset += size_bytes
    document = json.dumps(header).encode()
    document += b" " * (-len(document) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(document)) + document)
        for _, size in held if not hollow else ():
            left, scale = int(np.prod(size)), 1.0 if len(size) == 1 else size[-1] ** -0.5
            while left:
                values = generator.standard_normal(min(left, 2**22), dtype=np.float32) * np.float32(scale)
                stream.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
                left -= len(values)
        stream.truncate(8 + len(document) + offset)
        stream.flush()
        os.fsync(stream.fileno())


def forget(directory: Path) -> None:
    """Drop the files' pages from the cache, so that every step reads from the disk."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@contextmanager
def places(keep: Path | None, directory: Path) -> Iterator[tuple[Path, Path]]:
    """The checkpoint's directory and one for what is made of it; only a ``keep`` outlives the run."""
    with tempfile.TemporaryDirectory(prefix="export-scale-", dir=keep.parent if keep else directory) as scratch:
        yield keep or Path(scratch) / "checkpoint", Path(scratch)


def command(step: str, source: Path, scratch: Path) -> tuple[list[str], Path]:
    """What a step runs, and what it leaves behind."""
    if step == "cp":
        copy = scratch / "copy"
        return ["sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', str(source), str(copy)], copy
    if step == "plan":
        return edgelm("plan", str(source), "--target", "amd-epyc-9374f"), scratch / "nothing"
    bundle = scratch / "bundle"
    options = ("--quant", step, "--target", "amd-epyc-9374f", "--no-verify", "-o", str(bundle))
    return edgelm("export", str(source), *options), bundle


def quantiser_s(bundle: Path) -> float:
    """Seconds of libggml's quantiser for the numbers of a bundle, on all cores."""
    elements: dict[str, int] = {}
    for tensor in open_bundle(bundle).manifest.plan.tensors:
        elements[tensor.type] = elements.get(tensor.type, 0) + int(np.prod(tensor.shape))
    return sum(count / quantised_per_s(kind) for kind, count in elements.items())


def quantised_per_s(kind: str) -> float:
    cores = os.cpu_count() or 1
    block = np.random.default_rng(1).standard_normal((512, 4096), dtype=np.float32)
    outputs = [np.empty(len(block) * ggml.TYPES[kind].row_bytes(block.shape[1]), np.uint8) for _ in range(cores)]
    with ThreadPoolExecutor(cores) as pool:
        started = time.perf_counter()
        list(pool.map(lambda out: ggml.quantize(block, kind, out), outputs))
        return cores * block.size / (time.perf_counter() - started)


def measured(step: str, source: Path, scratch: Path) -> dict[str, Any]:
    source_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    line, result = command(step, source, scratch)
    forget(source)
    done = run(line)
    row = {
        "step": step,
        "source_bytes": source_bytes,
        "wall_s": done.wall_s,
        "read_mb_per_s": source_bytes / 1e6 / done.wall_s,
        "cores": done.cpu_s / done.wall_s,
        "peak_rss_bytes": done.peak_rss_bytes,
        "result_bytes": sum(path.stat().st_size for path in result.glob("*")),
        "quantiser_s": quantiser_s(result) if step not in ("cp", "plan") else None,
    }
    shutil.rmtree(result, ignore_errors=True)
    print(
        f"| {step} | {done.wall_s:.1f} | {row['read_mb_per_s']:.0f} | {row['cores']:.2f} | "
        f"{done.peak_rss_bytes / 2**20:.0f} | {row['result_bytes'] / 1e6:.0f} | {row['quantiser_s'] or 0:.1f} |",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    steps = "make (the checkpoint, and stop), plan, cp or a quantisation; repeatable; default: cp, Q4_K_M and Q8_0"
    parser.add_argument("--step", action="append", default=[], help=steps)
    parser.add_argument("--directory", type=Path, default=Path("."), help="where there is room")
    parser.add_argument("--keep", type=Path, help="the checkpoint's directory: made where it is missing, then left")
    arguments = parser.parse_args()
    worst = 0
    with places(arguments.keep, arguments.directory) as (source, scratch):
        if not (source / "model.safetensors.index.json").exists():
            source.mkdir(exist_ok=True)
            make_checkpoint(source, arguments.shape)
        shards = [path.stat().st_size for path in source.glob("*.safetensors")]
        print(f"{arguments.shape}: {sum(shards) / 1e9:.2f} GB of bf16 in {len(shards)} files")
        if arguments.step == ["make"]:
            return
        print(
            "| step | time s | source MB/s | cores | peak RSS MiB | result MB | quantiser alone s |"
            "\n|---|---|---|---|---|---|---|",
            flush=True,
        )
        for step in arguments.step or ["cp", "Q4_K_M", "Q8_0"]:
            row = measured(step, source, scratch)
            append(f"export_scale_{arguments.shape}", {**row, "shape": arguments.shape, "machine": machine()})
            worst = max(worst, row["peak_rss_bytes"])
    if worst > RSS_LIMIT_BYTES:
        sys.exit(f"error: peak RSS was {worst / 2**20:.0f} MiB, the limit is {RSS_LIMIT_BYTES / 2**20:.0f}")


if __name__ == "__main__":
    main()
