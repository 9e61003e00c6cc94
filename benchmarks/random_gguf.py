"""A GGUF model of a size that nobody has to download: real shapes and types, random weights, written in seconds.

    python benchmarks/random_gguf.py OUT.gguf --words SMALL.gguf [--quant Q4_K_M] [--ffn 14336 --kv-heads 8]

The shape is a llama of 7B unless told otherwise; which tensor gets which type is the mix's, as in an export. Vocabulary
and template are those of ``--words``, any GGUF of a llama; ``--vocabulary`` cuts or fills them. For every type and row
length one tile of ``TILE_ROWS`` random rows (normal, 0.02) is quantised and repeated, each tensor from another row on;
norms are 1. Blocks are valid and logits finite, sizes those of a real model of this shape; what it says means nothing.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgelm.bundle import TensorPlan
from edgelm.errors import BundleError, EdgelmError, UsageError
from edgelm.units import format_bytes
from exporter import ggml
from exporter.gguf import check_room, write_errors, write_head
from exporter.gguf_header import padded
from exporter.mixes import Mix, WeightShape, mix_named, tensor_types
from runtime.gguf_header import GGUFStrings, read_gguf_header
from targets.workload import TypedWeights, Workload

ARCHITECTURE = "llama"
TILE_ROWS = 512
SPREAD = 0.02  # of the weights
WRITTEN_BYTES = 2**25  # at once, at least
WORDS = "tokenizer."
BY_TOKEN = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores")
UNUSED = 5  # llama.cpp's type of a token that no text has


@dataclass(frozen=True, slots=True)
class Shape:
    """A llama: ``feed_forward`` is the inner size of its layers, ``kv_heads`` how many of ``heads`` have own keys."""

    layers: int = 32
    hidden: int = 4096
    feed_forward: int = 11008
    heads: int = 32
    kv_heads: int = 32
    context: int = 8192
    tied: bool = False

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads


def tensor_shapes(shape: Shape, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and row-major shapes in the order of the file."""
    hidden, inner, keys = shape.hidden, shape.feed_forward, shape.kv_heads * shape.head_size
    yield "token_embd.weight", (vocabulary, hidden)
    yield "output_norm.weight", (hidden,)
    if not shape.tied:
        yield "output.weight", (vocabulary, hidden)
    for layer in range(shape.layers):
        for name, size in (
            ("attn_norm", (hidden,)), ("attn_q", (hidden, hidden)), ("attn_k", (keys, hidden)),
            ("attn_v", (keys, hidden)), ("attn_output", (hidden, hidden)), ("ffn_norm", (hidden,)),
            ("ffn_gate", (inner, hidden)), ("ffn_up", (inner, hidden)), ("ffn_down", (hidden, inner)),
        ):  # fmt: skip
            yield f"blk.{layer}.{name}.weight", size


def planned(shape: Shape, vocabulary: int, mix: Mix) -> list[TensorPlan]:
    """Type and size of every tensor."""
    weights = [WeightShape(name, size) for name, size in tensor_shapes(shape, vocabulary)]
    types = tensor_types(mix, weights, layers=shape.layers, heads=shape.heads, kv_heads=shape.kv_heads)
    plans = []
    for weight in weights:
        kind, reason = types[weight.name].type, types[weight.name].reason
        size_bytes = ggml.TYPES[kind].row_bytes(weight.columns) * math.prod(weight.shape[:-1])
        plans.append(
            TensorPlan(
                name=weight.name, source_name="", shape=weight.shape, type=kind, size_bytes=size_bytes, reason=reason
            )
        )
    return plans


def workload_of(shape: Shape, vocabulary: int, mix: Mix) -> Workload:
    """What a device has to do for such a model, without writing it; ``file_bytes`` lacks the header."""
    sums: dict[str, list[int]] = {}
    lookup = None
    plans = planned(shape, vocabulary, mix)
    for plan in plans:
        counts = math.prod(plan.shape), plan.size_bytes, math.prod(plan.shape[:-1])
        if plan.name == "token_embd.weight" and not shape.tied:
            lookup = TypedWeights(plan.type, *counts)
            continue
        sums[plan.type] = [first + second for first, second in zip(sums.get(plan.type, (0, 0, 0)), counts, strict=True)]
    return Workload(
        format="gguf",
        architecture=ARCHITECTURE,
        parameters=sum(math.prod(plan.shape) for plan in plans),
        file_bytes=sum(plan.size_bytes for plan in plans),
        weights=tuple(TypedWeights(kind, *counts) for kind, counts in sums.items()),
        lookup=lookup,
        layers=shape.layers,
        hidden=shape.hidden,
        vocabulary=vocabulary,
        kv_elements_per_token=2 * shape.layers * shape.kv_heads * shape.head_size,
        heads=shape.heads,
    )


def metadata_of(shape: Shape, mix: Mix, words: Mapping[str, Any], vocabulary: int, name: str) -> dict[str, Any]:
    """All keys of the header, ``words`` being those of the file that lends its vocabulary."""
    numbers = {
        "block_count": shape.layers,
        "context_length": shape.context,
        "embedding_length": shape.hidden,
        "feed_forward_length": shape.feed_forward,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": shape.head_size,
        "rope.freq_base": 10000.0,
        "vocab_size": vocabulary,
    }
    lent = {key: _fitted(key, value, vocabulary) for key, value in words.items() if key.startswith(WORDS)}
    own = {f"{ARCHITECTURE}.{key}": value for key, value in numbers.items()}
    return {"general.name": name, "general.file_type": mix.file_type, **own, **lent}


def _fitted(key: str, value: Any, vocabulary: int) -> Any:
    """An array with an entry for each token cut or filled to their number, anything else as it is."""
    items = list(value) if isinstance(value, GGUFStrings) else value
    if key not in BY_TOKEN or len(items) == vocabulary:
        return items
    missing = range(len(items), vocabulary)
    if key == BY_TOKEN[0]:
        return [*items[:vocabulary], *(f"<|unused {number}|>" for number in missing)]
    return [*items[:vocabulary].tolist(), *(UNUSED if key == BY_TOKEN[1] else 0.0 for _ in missing)]


def write(path: Path, plans: Sequence[TensorPlan], metadata: Mapping[str, Any], seed: int) -> None:
    """Write the file. Raises ``BundleError`` when there is no room for it."""
    check_room(path.parent, sum(plan.size_bytes for plan in plans))
    random = np.random.default_rng(seed)
    tiles: dict[tuple[str, int], ggml.Bytes] = {}
    position = write_head(path, ARCHITECTURE, metadata, plans)
    with write_errors(path), path.open("r+b") as stream:
        for plan in plans:
            stream.seek(position)
            if len(plan.shape) == 1:
                stream.write(np.ones(plan.shape, np.float32).tobytes())
            else:
                key = plan.type, plan.shape[-1]
                if key not in tiles:
                    tiles[key] = tile(*key, random)
                _repeat(stream, tiles[key], plan, int(random.integers(TILE_ROWS)))
            position = padded(position + plan.size_bytes)


def tile(kind: str, columns: int, random: np.random.Generator) -> ggml.Bytes:
    """``TILE_ROWS`` rows of random weights as bytes of a type, of shape (rows, bytes of a row), several times over."""
    rows = (random.standard_normal((TILE_ROWS, columns), np.float32) * np.float32(SPREAD)).astype(np.float32)
    importance = np.ones(columns, np.float32) if ggml.TYPES[kind].requires_importance else None
    data = ggml.quantize(rows, kind, importance=importance).reshape(TILE_ROWS, -1)
    if not ggml.is_valid(data, kind):
        raise BundleError(f"libggml made no numbers of {kind}")
    return np.tile(data, (1 + math.ceil(WRITTEN_BYTES / data.nbytes), 1))


def _repeat(stream: Any, rows: ggml.Bytes, plan: TensorPlan, first: int) -> None:
    """The rows of a matrix: the tile's from ``first`` on, again and again."""
    whole = len(rows) - TILE_ROWS
    left = math.prod(plan.shape[:-1])
    while left:
        count = min(left, whole)
        stream.write(rows[first : first + count].data)
        left -= count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--words", type=Path, required=True, help="a GGUF whose vocabulary and template are taken")
    parser.add_argument("--quant", default="Q4_K_M", help="any mix of edgelm export")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, help="heads with keys of their own  [default: all]")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, help="tokens, instead of as many as --words has")
    parser.add_argument("--tied", action="store_true", help="the table of the tokens is the head, too")
    parser.add_argument("--seed", type=int, default=1)
    told = parser.parse_args()
    shape = Shape(told.layers, told.hidden, told.ffn, told.heads, told.kv_heads or told.heads, told.context, told.tied)
    try:
        if shape.hidden % shape.heads or shape.heads % shape.kv_heads:
            raise UsageError(f"{shape.hidden} numbers, {shape.heads} heads and {shape.kv_heads} of keys do not divide")
        mix, words = mix_named(told.quant), read_gguf_header(told.words).metadata
        vocabulary = told.vocabulary or len(words.get(BY_TOKEN[0], ()))
        plans = planned(shape, vocabulary, mix)
        started = time.perf_counter()
        write(told.path, plans, metadata_of(shape, mix, words, vocabulary, told.path.stem), told.seed)
    except EdgelmError as error:
        raise SystemExit(f"{error.message}{f' ({error.hint})' if error.hint else ''}") from None
    types = [plan.type for plan in plans]
    counts = ", ".join(f"{types.count(kind)} {kind}" for kind in dict.fromkeys(types))
    parameters = sum(math.prod(plan.shape) for plan in plans)
    size = format_bytes(told.path.stat().st_size)
    print(f"{told.path}: {parameters / 1e9:.2f}B, {size}, {counts}, {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
