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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelm.errors import EdgelmError, EngineError, MissingDependencyError
from runtime.gguf_header import read_gguf_header, workload_from_gguf
from runtime.probe import add_byte_vocabulary
from targets.bandwidth import thread_counts
from targets.kernels import KernelRun, Role
from targets.workload import TypedWeights, Workload

# All that types are chosen from, and F16: where one has kernels of its own, no neighbour tells its speed.
TYPES = ("Q8_0", "F16", "Q4_0", "Q4_K", "Q6_K", "Q5_0", "Q4_1", "IQ4_NL", "Q5_1", "Q5_K", "IQ4_XS")
SCALED_TYPES = TYPES[:1]  # the type that is run on every thread count
TIMEOUT_S = 600.0
PROMPT_TOKENS, GENERATED_TOKENS, PASSES = 128, 32, 3
SIZES_LAYERS = (2, 4, 8, 12, 16)  # beside the wide model's six: what a large cache keeps of a model depends on its size
LARGE_LAYERS = 12  # of the models that tell what a type costs when a cache holds less of it
DEEP_PROMPTS, DEEP_PASSES = 4, 2  # attention costs what the last of so many prompts takes longer than the first
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
CONTEXT_TOKENS = DEEP_PROMPTS * PROMPT_TOKENS + GENERATED_TOKENS
_DEEP: tuple[Role, ...] = ("deep", "plain")
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
        return tuple(kernel_run(fields) for fields in document["runs"])


def kernel_run(fields: dict[str, Any]) -> KernelRun:
    """A run as the child told it."""
    workload = fields["workload"] | {"weights": tuple(TypedWeights(**item) for item in fields["workload"]["weights"])}
    if workload["lookup"] is not None:
        workload["lookup"] = TypedWeights(**workload["lookup"])
    deep = fields["role"] in _DEEP
    return KernelRun(
        type=fields["type"],
        threads=fields["threads"],
        role=fields["role"],
        workload=Workload(**workload),
        prompt_tokens=PROMPT_TOKENS,
        prefill_s=fields["prefill_s"],
        decode_s=fields["decode_s"],
        prefill_depth=(DEEP_PROMPTS - 1) * PROMPT_TOKENS if deep else 0,
        decode_depth=(DEEP_PROMPTS * PROMPT_TOKENS if deep else 0) + GENERATED_TOKENS // 2,
    )


def run_all(directory: Path, threads: int, *, small: bool) -> list[dict[str, Any]]:
    """What the child does. Every model is written to ``directory`` and removed again: one at a time takes room."""
    counts = thread_counts(threads)
    found = []
    for kind in TYPES:
        model = wide_model(kind, small=small)
        if kind not in SCALED_TYPES:
            found += _runs(directory, model, [("type", threads)])
            found += _runs(directory, replace(model, layers=LARGE_LAYERS), [("large", threads)])
            continue
        found += _runs(
            directory, model, [*(("type", count) for count in counts), ("deep", threads), ("plain", threads)]
        )
        for layers in SIZES_LAYERS:
            found += _runs(directory, replace(model, layers=layers), [("size", count) for count in counts])
    found += _runs(directory, NARROW, [("narrow", threads)])
    return found


def _runs(directory: Path, model: RandomModel, cases: Sequence[tuple[Role, int]]) -> list[dict[str, Any]]:
    """One model in several roles, each on a number of threads."""
    path = directory / f"{model.type}-{model.layers}.gguf"
    write_random_gguf(path, model)
    found = []
    workload = asdict(workload_from_gguf(read_gguf_header(path)))
    for role, threads in cases:
        prefill_s, decode_s = timed(path, threads, deep=role in _DEEP, flash_attention=role != "plain")
        case = {"type": model.type, "threads": threads, "role": role, "workload": workload}
        found.append({**case, "prefill_s": prefill_s, "decode_s": decode_s})
    path.unlink()
    return found


def timed(path: Path, threads: int, *, deep: bool = False, flash_attention: bool = True) -> tuple[float, float]:
    """Seconds per prompt token and per generated token, the best of a few passes after one that is not counted.

    Tokens are generated from an empty cache on; ``deep``: behind ``DEEP_PROMPTS`` prompts, the last of which counts.
    """
    from runtime.engine import Chunk, EngineOptions
    from runtime.engines.llamacpp import load_engine

    options = EngineOptions(
        context=CONTEXT_TOKENS,
        threads_decode=threads,
        threads_prefill=threads,
        batch=PROMPT_TOKENS,
        flash_attention="on" if flash_attention else "off",
    )
    engine = load_engine(path, options)
    prompt = np.random.default_rng(_SEED).integers(0, _VOCABULARY, PROMPT_TOKENS).tolist()
    prefill: list[float] = []
    decode: list[float] = []
    try:
        for _ in range(1 + (DEEP_PASSES if deep else PASSES)):
            engine.truncate(0)
            for _ in range(DEEP_PROMPTS if deep else 1):
                started = time.perf_counter()
                engine.forward([Chunk(0, prompt)])
                took_s = (time.perf_counter() - started) / PROMPT_TOKENS
            prefill.append(took_s)
            if not deep:
                engine.truncate(0)
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
    writer.add_context_length(CONTEXT_TOKENS)
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
