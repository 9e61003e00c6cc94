"""How fast the engine's own kernels are on this machine: short runs of random models, one per type of weights.

In this room because it needs an engine; ``targets.kernels`` turns the runs into a profile. The runs happen in a child
process, so that a broken build becomes a sentence. Of what weights say, speed depends on nothing but how many scales
their blocks have, so all other bits are random and nothing is quantised. Two minutes on two cores; a busy machine gives
low figures. Types that the engine rearranges are measured as the file has them, too: beside a GPU they stay so.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelm.errors import EdgelmError, MissingDependencyError
from runtime.gguf_header import read_gguf_header, workload_from_gguf
from runtime.probe import add_byte_vocabulary
from runtime.starts import answer_of_child
from targets.bandwidth import thread_counts
from targets.kernels import KernelRun, Role
from targets.workload import TypedWeights, Workload

# All that types are chosen from, and F16: where one has kernels of its own, no neighbour tells its speed.
TYPES = ("Q8_0", "F16", "Q4_0", "Q4_K", "Q6_K", "Q5_0", "Q4_1", "IQ4_NL", "Q5_1", "Q5_K", "IQ4_XS")
SCALED_TYPE = "Q8_0"  # the type that is run behind a long text, and on every thread count
STREAMED_TYPE = "F16"  # the type that is run in every size and on every thread count: of all it waits most for memory
TIMEOUT_S = 3600.0  # two cores of a Zen 4 take 100 s; how long a small board takes is not known
PROMPT_TOKENS, GENERATED_TOKENS, PASSES, DECODE_PASSES = 128, 32, 3, 5
AS_FILED_PASSES = 3
SIZES_LAYERS = (1, 2, 3, 4)  # beside six and twelve: what a large cache keeps of a model depends on its size
LARGE_LAYERS = 12  # of a model of which a cache holds little
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
_SCALE, _BLOCKS = 0.004, 2**15
# How the logarithms of scales spread within a tensor of SmolLM2 in blocks of 32 and of 256 weights.
_SCALE_SPREAD, _LARGE_SCALE_SPREAD, _LARGE_BLOCK_BYTES = 0.3, 0.2, 64
_SIGNED_SCALES, _SECOND_SCALE = ("Q4_0", "Q5_0", "IQ4_NL", "IQ4_XS", "Q6_K"), np.float32(8)
PIECE_BYTES = 2**21
CONTEXT_TOKENS = DEEP_PROMPTS * PROMPT_TOKENS + GENERATED_TOKENS
# Random queries and keys of full size give products with a spread of 90, of which the softmax leaves one: the numbers
# around it are too small to be normal. This leaves a spread of 2, as models have it.
_ATTENTION_NORM = 0.15
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


def thin_model(kind: str, *, small: bool) -> RandomModel:
    """As many weights in rows of half the length and less, as models of 100 M parameters have them."""
    return RandomModel(kind, 10 if small else 40, 512, 1024, 8, 2)


NARROW = RandomModel("Q8_0", 32, 128, 256, 2, 2)


def measure_kernels(threads: int, available_bytes: int) -> tuple[KernelRun, ...]:
    """Runs on 1 to ``threads`` threads, in a child process.

    Raises ``EngineError`` when the child dies, hangs or refuses.
    """
    small = available_bytes < 2 * 2**30
    with tempfile.TemporaryDirectory(prefix="edgelm-kernels-") as directory:
        arguments = (directory, str(threads), str(int(small)))
        document = answer_of_child("runtime.kernels", arguments, "measuring the kernels", TIMEOUT_S)
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
    counts, every = thread_counts(threads), (SCALED_TYPE, STREAMED_TYPE)
    found: list[dict[str, Any]] = []
    for kind in TYPES:
        model = wide_model(kind, small=small)
        cases: list[tuple[Role, int]] = [("type", count) for count in counts if kind in every or count in (1, threads)]
        if kind == SCALED_TYPE:
            cases += [(role, threads) for role in _DEEP]
        cases.append(("as_filed", threads))
        found += _runs(directory, model, cases)
        found += _runs(directory, thin_model(kind, small=small), [("thin", 1)])
        if kind == STREAMED_TYPE:
            found += _runs(directory, replace(model, layers=LARGE_LAYERS), [("large", threads)])
            for layers in SIZES_LAYERS:
                found += _runs(directory, replace(model, layers=layers), [("size", count) for count in counts])
    found += _runs(directory, NARROW, [("narrow", count) for count in sorted({1, threads})])
    return found


def _runs(directory: Path, model: RandomModel, cases: Sequence[tuple[Role, int]]) -> list[dict[str, Any]]:
    """One model in several roles, each on a number of threads."""
    path = directory / f"{model.type}-{model.layers}.gguf"
    write_random_gguf(path, model)
    found = []
    workload = asdict(workload_from_gguf(read_gguf_header(path)))
    for role, threads in cases:
        if role == "as_filed" and not is_rearranged(path):
            continue
        prefill_s, decode_s = timed(path, threads, role)
        case = {"type": model.type, "threads": threads, "role": role, "workload": workload}
        found.append({**case, "prefill_s": prefill_s, "decode_s": decode_s})
    path.unlink()
    return found


def is_rearranged(path: Path) -> bool:
    """Whether the engine makes a copy of a model's weights that its kernels for this CPU are for."""
    from runtime.engine import EngineOptions
    from runtime.engines.llamacpp import load_engine

    engine = load_engine(path, EngineOptions(context=CONTEXT_TOKENS))
    copied = engine.info.buffers.get("weights_copied", 0)
    engine.close()
    return copied > path.stat().st_size / 2


def timed(path: Path, threads: int, role: Role = "type") -> tuple[float, float]:
    """Seconds per prompt token and per generated token: the middle pass of a few, after one that is not counted.

    The middle and not the best, and whole passes and not single tokens, because that is how ``bench`` measures: what
    usually disturbs a machine is part of its speed. Tokens are generated from an empty cache on; ``deep`` and
    ``plain``: behind ``DEEP_PROMPTS`` prompts, the last of which counts. ``as_filed`` has no prompts: 0 seconds.
    """
    from runtime.engine import Chunk, EngineOptions
    from runtime.engines.llamacpp import load_engine

    deep, as_filed = role in _DEEP, role == "as_filed"
    options = EngineOptions(
        context=CONTEXT_TOKENS,
        threads_decode=threads,
        threads_prefill=threads,
        batch=PROMPT_TOKENS,
        flash_attention="off" if role == "plain" else "on",
    )
    engine = load_engine(path, options, as_filed=as_filed)
    prompt = np.random.default_rng(_SEED).integers(0, _VOCABULARY, PROMPT_TOKENS).tolist()
    prefill: list[float] = [0.0, 0.0] if as_filed else []
    decode: list[float] = []
    try:
        for _ in range(0 if as_filed else 1 + (DEEP_PASSES if deep else PASSES)):
            engine.truncate(0)
            for _ in range(DEEP_PROMPTS if deep else 1):
                started = time.perf_counter()
                engine.forward([Chunk(0, prompt)])
                took_s = (time.perf_counter() - started) / PROMPT_TOKENS
            prefill.append(took_s)
        for _ in range(1 + (AS_FILED_PASSES if as_filed else DECODE_PASSES)):
            engine.truncate(DEEP_PROMPTS * PROMPT_TOKENS if deep else 0)
            started = time.perf_counter()
            for token in prompt[:GENERATED_TOKENS]:
                engine.forward([Chunk(0, [token])])
            decode.append((time.perf_counter() - started) / GENERATED_TOKENS)
    finally:
        engine.close()
    return statistics.median(prefill[1:]), statistics.median(decode[1:])


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

    def norm(name: str, weight: float = 1.0) -> None:
        writer.add_tensor(name, np.full(model.hidden, weight, np.float32))

    matrix("token_embd.weight", _VOCABULARY, model.hidden)
    norm("output_norm.weight")
    for layer in range(model.layers):
        prefix = f"blk.{layer}."
        norm(f"{prefix}attn_norm.weight", _ATTENTION_NORM)
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
    _rewrite_in_pieces(path)


def _rewrite_in_pieces(path: Path) -> None:
    """Write a file once more as exports are written, in pieces that the kernel caches in huge pages: in the small ones
    that single tensors leave, a model is read up to a tenth slower."""
    again = path.with_suffix(".again")
    with path.open("rb") as source, again.open("wb", buffering=0) as target:
        shutil.copyfileobj(source, target, PIECE_BYTES)
    again.replace(path)


def random_rows(kind: str, rows: int, row_bytes: int) -> npt.NDArray[np.uint8] | npt.NDArray[np.float16]:
    """Rows of random weights in their stored form: shape (rows, row_bytes) for block types, float16 for F16."""
    random = np.random.default_rng(_SEED)
    if kind == "F16":
        piece = (random.standard_normal(4096) * 10 * _SCALE).astype(np.float16)
        return np.resize(piece, (rows, row_bytes // 2))
    block_bytes, scales = _SCALES[kind]
    blocks = random.integers(0, 256, (_BLOCKS, block_bytes), dtype=np.uint8)
    for number, offset in enumerate(scales):
        blocks[:, offset : offset + 2] = _scales(random, kind, number).view(np.uint8)
    return np.resize(blocks, (rows, row_bytes))


def _scales(random: np.random.Generator, kind: str, number: int) -> npt.NDArray[np.float16]:
    """The first or the second scale of blocks as models have them, of shape (blocks, 1).

    The engine looks each up in a table of 256 KiB, by all 16 bits: with one value for all, generating was 9 to 15 %
    faster than with real weights (Zen 4, Q8_0, one thread), with more different ones than models have it was slower.
    The scale of a small block follows from its largest weight, and weights come as bfloat16, whose mantissas have 8
    bits. Some types keep the sign of that weight. Second scales, of what is added to a block, are larger.
    """
    large = _SCALES[kind][0] > _LARGE_BLOCK_BYTES
    spread = _LARGE_SCALE_SPREAD if large else _SCALE_SPREAD
    scales = np.exp(spread * random.standard_normal((_BLOCKS, 1))).astype(np.float32)
    if not large:
        scales = (scales.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    if kind in _SIGNED_SCALES:
        scales *= random.choice(np.array([-1.0, 1.0], np.float32), scales.shape)
    if number:
        scales *= _SECOND_SCALE if large else -_SECOND_SCALE
    found: npt.NDArray[np.float16] = (np.float32(_SCALE) * scales).astype(np.float16)
    return found


if __name__ == "__main__":
    try:
        print(json.dumps({"runs": run_all(Path(sys.argv[1]), int(sys.argv[2]), small=sys.argv[3] == "1")}))
    except EdgelmError as error:
        print(json.dumps({"error": error.message, "hint": error.hint}))
