"""Export of a large checkpoint made on the spot: peak RSS, throughput against a plain copy of the same files, cores.

Writes a Llama of the asked shape as sharded bf16 safetensors (random weights, streamed), copies it with ``cp``, exports
it with every quantisation, all with cold page cache, and removes it again. The quality measurement is off, as it needs
the whole model in memory by its nature; token identity and hashes are in the figures.

    python benchmarks/export_scale.py --shape 8b --directory /var/tmp     # 41 GB of disk at most
    python benchmarks/export_scale.py --shape 1b
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measure import edgelm, run, save

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.tiny_models import write_tokenizer

GIB = 2**30
RSS_LIMIT_BYTES = int(1.5 * GIB)
TOKENS = 1024  # of the tokenizer; the other rows of the embedding count as unused
SHARD_BYTES = 5_000_000_000
# hidden, layers, heads, key heads, head size, feed-forward, vocabulary: Llama 3.1 8B, Llama 3.2 1B, and one to try out.
SHAPES = {
    "8b": (4096, 32, 32, 8, 128, 14336, 128256),
    "1b": (2048, 16, 32, 8, 64, 8192, 128256),
    "tiny": (512, 4, 8, 2, 64, 1536, 32000),
}


def tensors(shape: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of an untied Llama; the 1B one is tied, as its model is."""
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
    if shape != "1b":
        yield "lm_head.weight", (vocabulary, hidden)


def make_checkpoint(directory: Path, shape: str) -> int:
    """Write the checkpoint, a piece of a tensor in memory at a time; bytes of its weights."""
    hidden, layers, heads, kv_heads, head, feed_forward, vocabulary = SHAPES[shape]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocabulary, "hidden_size": hidden,
        "intermediate_size": feed_forward, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head, "hidden_act": "silu", "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": shape == "1b", "torch_dtype": "bfloat16",
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
    weight_map, total = {}, 0
    for number, held in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        total += write_shard(directory / name, held)
        weight_map |= {tensor: name for tensor, _ in held}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def write_shard(path: Path, held: list[tuple[str, tuple[int, ...]]]) -> int:
    generator = np.random.default_rng(len(held))
    header: dict[str, Any] = {}
    offset = 0
    for name, size in held:
        size_bytes = 2 * int(np.prod(size))
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [offset, offset + size_bytes]}
        offset += size_bytes
    document = json.dumps(header).encode()
    document += b" " * (-len(document) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(document)) + document)
        for _, size in held:
            left, scale = int(np.prod(size)), 1.0 if len(size) == 1 else size[-1] ** -0.5
            while left:
                values = generator.standard_normal(min(left, 2**22), dtype=np.float32) * np.float32(scale)
                stream.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
                left -= len(values)
        stream.flush()
        os.fsync(stream.fileno())
    return offset


def forget(directory: Path) -> None:
    """Drop the files' pages from the cache, so that every step reads from the disk."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measured(name: str, command: list[str], source: Path, source_bytes: int) -> dict[str, Any]:
    forget(source)
    done = run(command)
    row = {
        "step": name,
        "wall_s": done.wall_s,
        "read_mb_per_s": source_bytes / 1e6 / done.wall_s,
        "cores": done.cpu_s / done.wall_s,
        "peak_rss_bytes": done.peak_rss_bytes,
    }
    print(
        f"| {name} | {done.wall_s:.1f} | {row['read_mb_per_s']:.0f} | {row['cores']:.2f} | "
        f"{done.peak_rss_bytes / 2**20:.0f} |",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--quant", action="append", default=[], help="repeatable; default Q4_K_M and Q8_0")
    parser.add_argument("--directory", type=Path, default=Path("."), help="where there is room")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="export-scale-", dir=arguments.directory) as scratch:
        source, copy = Path(scratch) / "checkpoint", Path(scratch) / "copy"
        source.mkdir()
        source_bytes = make_checkpoint(source, arguments.shape)
        shards = len(list(source.glob("*.safetensors")))
        print(f"{arguments.shape}: {source_bytes / 1e9:.2f} GB of bf16 in {shards} files")
        print("| step | time s | source MB/s | cores | peak RSS MiB |\n|---|---|---|---|---|", flush=True)
        copy_files = ["sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', str(source), str(copy)]
        rows.append(measured("cp and sync", copy_files, source, source_bytes))
        shutil.rmtree(copy)
        for quant in arguments.quant or ["Q4_K_M", "Q8_0"]:
            bundle = Path(scratch) / "bundle"
            options = ("--quant", quant, "--target", "amd-epyc-9374f", "--no-verify", "-o", str(bundle))
            rows.append(measured(f"export {quant}", edgelm("export", str(source), *options), source, source_bytes))
            shutil.rmtree(bundle)
    for row in rows:
        row |= {"shape": arguments.shape, "source_bytes": source_bytes}
    print(f"raw rows: {save(f'export_scale_{arguments.shape}', rows)}")
    worst = max(row["peak_rss_bytes"] for row in rows)
    if worst > RSS_LIMIT_BYTES:
        sys.exit(f"error: peak RSS was {worst / 2**20:.0f} MiB, the limit is {RSS_LIMIT_BYTES / 2**20:.0f}")


if __name__ == "__main__":
    main()
