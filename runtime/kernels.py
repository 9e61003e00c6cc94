"""How fast the engine's own kernels are on this machine: short runs of random models, one per type of weights.

In this room because it needs an engine; ``targets.kernels`` turns the runs into a profile. The runs happen in a child
process, so that a broken build becomes a sentence. Speed does not depend on what weights say, so their bits are random
and nothing is quantised. A few seconds in all; a busy machine gives low figures.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgelm.errors import EdgelmError, EngineError, MissingDependencyError
from runtime.gguf_header import read_gguf_header, workload_from_gguf
from runtime.probe import add_byte_vocabulary
from targets.kernels import KernelRun

# All that types are chosen from, and F16: where one has kernels of its own, no neighbour tells its speed.
TYPES = ("Q8_0", "F16", "Q4_0", "Q4_K", "Q6_K", "Q5_0", "Q4_1", "IQ4_NL", "Q5_1", "Q5_K", "IQ4_XS")
SCALED_TYPES = TYPES[:1]  # the type that is run on every thread count
TIMEOUT_S = 600.0
PROMPT_TOKENS, GENERATED_TOKENS, PASSES = 128, 32, 3
# Bytes of a block, and where its f16 scales stand (ggml-common.h of llama.cpp): random bits there could mean infinity.
_SCALES = {
    "Q8_0": (34, (0,)),
    "Q4_0": (18, (0,)),
    "Q4_1": (20, (0, 2)),
    "Q5_0": (22, (0,)),
    "Q5_1": (24, (0, 2)),
    "IQ4_NL": (18, (0,)),
    "IQ4_XS": (136, (0,)),
    "Q4_K": (144, (0, 2)),
    "Q5_K": (176, (0, 2)),
    "Q6_K": (210, (208,)),
}
_SCALE = 0.004
_VOCABULARY = 320
_SEED = 0


@dataclass(frozen=True, slots=True)
class RandomModel:
    """Shape of a random llama whose matrices all have one type."""

    type: str
    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int


def wide_model(kind: str, *, small: bool) -> RandomModel:
    """A model of 90 M weights, which no cache of a small machine holds, or of 23 M where memory is short."""
    if small:
        return RandomModel(kind, 6, 512, 2048, 8, 2)
    return RandomModel(kind, 6, 1024, 4096, 16, 4)


NARROW = RandomModel("Q8_0", 32, 128, 256, 2, 2)


def measure_kernels(threads: int, available_bytes: int) -> tuple[KernelRun, ...]:
    """Runs on 1 to ``threads`` threads, in a child process.

    Raises ``EngineError`` when the child dies, hangs or refuses.
    """
    small = available_bytes < 2 * 2**30
    with tempfile.TemporaryDirectory(prefix="edgelm-kernels-") as directory:
        command = [sys.executable, "-m", "runtime.kernels", directory, str(threads), str(int(small))]
        try:
            child = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise EngineError(
                f"the kernels were not measured in {TIMEOUT_S:g} s", hint="is the machine busy?"
            ) from error
        try:
            document = json.loads(child.stdout)
        except ValueError as error:
            raise EngineError(
                f"measuring the kernels ended with status {child.returncode}", hint="'edgelm doctor' finds out why"
            ) from error
        if "error" in document:
            raise EngineError(document["error"], hint=document["hint"])
        return tuple(kernel_run(fields, Path(directory)) for fields in document["runs"])


def kernel_run(fields: dict[str, float | str | bool], directory: Path) -> KernelRun:
    """A run as the child told it, with the workload that its model's header states."""
    header = read_gguf_header(directory / str(fields["file"]))
    return KernelRun(
        type=str(fields["type"]),
        threads=int(fields["threads"]),
        narrow=bool(fields["narrow"]),
        workload=workload_from_gguf(header),
        prompt_tokens=PROMPT_TOKENS,
        prefill_s=float(fields["prefill_s"]),
        decode_s=float(fields["decode_s"]),
    )


def run_all(directory: Path, threads: int, *, small: bool) -> list[dict[str, float | str | bool]]:
    """What the child does. The headers of the models stay in ``directory`` for the parent to read."""
    counts = sorted({count for count in (1, 2, 4, 8, 16, 32) if count < threads} | {threads})
    found = []
    for kind in TYPES:
        path = directory / f"{kind}.gguf"
        write_random_gguf(path, wide_model(kind, small=small))
        for count in counts if kind in SCALED_TYPES else [threads]:
            prefill_s, decode_s = timed(path, count)
            found.append(_fields(path, kind, count, narrow=False, seconds=(prefill_s, decode_s)))
    narrow = directory / "narrow.gguf"
    write_random_gguf(narrow, NARROW)
    found.append(_fields(narrow, NARROW.type, threads, narrow=True, seconds=timed(narrow, threads)))
    return found


def _fields(
    path: Path, kind: str, threads: int, *, narrow: bool, seconds: tuple[float, float]
) -> dict[str, float | str | bool]:
    return {
        "file": path.name,
        "type": kind,
        "threads": threads,
        "narrow": narrow,
        "prefill_s": seconds[0],
        "decode_s": seconds[1],
    }


def timed(path: Path, threads: int) -> tuple[float, float]:
    """Seconds per prompt token and per generated token, the best of a few passes after one that is not counted."""
    from runtime.engine import Chunk, EngineOptions
    from runtime.engines.llamacpp import load_engine

    options = EngineOptions(
        context=PROMPT_TOKENS + GENERATED_TOKENS, threads_decode=threads, threads_prefill=threads, batch=PROMPT_TOKENS
    )
    engine = load_engine(path, options)
    prompt = np.random.default_rng(_SEED).integers(0, _VOCABULARY, PROMPT_TOKENS).tolist()
    prefill: list[float] = []
    decode: list[float] = []
    try:
        for _ in range(PASSES + 1):
            engine.truncate(0)
            started = time.perf_counter()
            engine.forward([Chunk(0, prompt)])
            prefill.append((time.perf_counter() - started) / PROMPT_TOKENS)
            for token in prompt[:GENERATED_TOKENS]:
                started = time.perf_counter()
                engine.forward([Chunk(0, [token])])
                decode.append(time.perf_counter() - started)
    finally:
        engine.close()
    # Prefill: the best pass. Decode: the middle of the better half, single tokens are too short to trust the fastest.
    steady = sorted(decode[GENERATED_TOKENS:])
    return min(prefill[1:]), steady[len(steady) // 4]


def write_random_gguf(path: Path, model: RandomModel) -> None:
    """Write a random llama with a byte vocabulary. Raises ``MissingDependencyError`` without the gguf package."""
    try:
        import gguf
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise MissingDependencyError("the gguf package is missing", hint="pip install gguf") from error
    kind = GGMLQuantizationType[model.type]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name(f"random {model.type}")
    writer.add_context_length(PROMPT_TOKENS + GENERATED_TOKENS)
    writer.add_embedding_length(model.hidden)
    writer.add_block_count(model.layers)
    writer.add_feed_forward_length(model.feed_forward)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    head_size = model.hidden // model.heads
    writer.add_rope_dimension_count(head_size)
    writer.add_vocab_size(_VOCABULARY)
    add_byte_vocabulary(writer, _VOCABULARY)

    def matrix(name: str, rows: int, columns: int) -> None:
        writer.add_tensor(name, random_rows(model.type, rows, columns // block * block_bytes), raw_dtype=kind)

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(model.hidden, np.float32))

    matrix("token_embd.weight", _VOCABULARY, model.hidden)
    norm("output_norm.weight")
    for layer in range(model.layers):
        prefix = f"blk.{layer}."
        norm(f"{prefix}attn_norm.weight")
        norm(f"{prefix}ffn_norm.weight")
        matrix(f"{prefix}attn_q.weight", model.hidden, model.hidden)
        matrix(f"{prefix}attn_k.weight", model.kv_heads * head_size, model.hidden)
        matrix(f"{prefix}attn_v.weight", model.kv_heads * head_size, model.hidden)
        matrix(f"{prefix}attn_output.weight", model.hidden, model.hidden)
        matrix(f"{prefix}ffn_gate.weight", model.feed_forward, model.hidden)
        matrix(f"{prefix}ffn_up.weight", model.feed_forward, model.hidden)
        matrix(f"{prefix}ffn_down.weight", model.hidden, model.feed_forward)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_rows(kind: str, rows: int, row_bytes: int) -> npt.NDArray[np.uint8] | npt.NDArray[np.float16]:
    """Rows of random weights in their stored form: shape (rows, row_bytes) for block types, float16 for F16."""
    random = np.random.default_rng(_SEED)
    if kind == "F16":
        piece = (random.standard_normal(4096) * 10 * _SCALE).astype(np.float16)
        return np.resize(piece, (rows, row_bytes // 2))
    block_bytes, scales = _SCALES[kind]
    blocks = random.integers(0, 256, (256, block_bytes), dtype=np.uint8)
    for offset in scales:
        blocks[:, offset : offset + 2] = np.frombuffer(np.float16(_SCALE).tobytes(), np.uint8)
    return np.resize(blocks, (rows, row_bytes))


if __name__ == "__main__":
    try:
        print(json.dumps({"runs": run_all(Path(sys.argv[1]), int(sys.argv[2]), small=sys.argv[3] == "1")}))
    except EdgelmError as error:
        print(json.dumps({"error": error.message, "hint": error.hint}))
