"""Does the engine work on this machine? Asked in a child process, so that a crash becomes a sentence.

The child loads a model, prefills and decodes a few tokens and tells what it saw as JSON. Without a model of its own
the probe writes a tiny random one whose tensors have the types that take the special kernels (repacked Q4_0, Q8_0,
k-quants): broken builds die in those. Knows nothing of how findings are shown.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from edgelm.errors import EdgelmError, EngineError, MissingDependencyError
from runtime.engine import Engine, Logits
from targets.vram import AUTO_LAYERS, Device

TIMEOUT_S = 180.0
PREFILL_TOKENS, DECODE_TOKENS = 64, 8
_HIDDEN, _FEED_FORWARD, _HEADS, _VOCABULARY = 256, 512, 4, 320
_SEED = 0


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What the child saw. ``system`` is llama.cpp's list of the CPU features that its build uses, ``devices`` what the
    build can compute on, ``gpu_backends`` whether it can use GPUs at all. ``gpu`` tells where a model ran on a GPU, and
    ``gpu_kl`` how far the last prediction of the prompt was from the CPU's, in nats."""

    model: str
    load_s: float
    prefill_tps: float
    decode_tps: float
    system: str
    versions: dict[str, str]
    devices: tuple[Device, ...] = ()
    gpu_backends: bool = False
    gpu: str = ""
    gpu_kl: float | None = None


class ProbeError(EngineError):
    """The engine crashed, hung or refused in the child process."""


_CRASHES = {
    signal.SIGSEGV: (
        "crashed with a segmentation fault",
        "builds by gcc 12 for CPUs with AMX die like this: rebuild with 'make setup', which turns AMX off",
    ),
    signal.SIGILL: (
        "used an instruction that this CPU does not have",
        "it was built for another CPU: rebuild llama-cpp-python on this machine with 'make setup'",
    ),
    signal.SIGBUS: ("could not read the mapped model file", "the file was cut short or its disk fails: copy it again"),
    signal.SIGKILL: ("was killed by the system", "most likely memory ran out: use a smaller model or context"),
    signal.SIGABRT: ("aborted", "a failed assertion inside llama.cpp: the file may be damaged, see: edgelm verify"),
}


def probe(model: Path | None = None, *, on_gpu: bool = False, timeout_s: float = TIMEOUT_S) -> ProbeResult:
    """Load, prefill and decode in a child process: ``model`` (a bundle or ``.gguf``) or a tiny random one.

    With ``on_gpu`` as much of it as fits is on a GPU, and the CPU computes the same beside it.

    Raises ``ProbeError`` with a sentence and a hint for every way in which the child can die.
    """
    with tempfile.TemporaryDirectory(prefix="edgelm-probe-") as directory:
        if model is None:
            model = Path(directory) / "tiny-random.gguf"
            write_tiny_gguf(model)
        command = [sys.executable, "-m", "runtime.probe", str(model), *(["gpu"] if on_gpu else [])]
        try:
            child = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired as error:
            raise ProbeError(
                f"the engine did not finish {DECODE_TOKENS} tokens of {model.name} in {timeout_s:g} s",
                hint="is the machine busy or swapping?",
            ) from error
    if child.returncode < 0:
        number = signal.Signals(-child.returncode)
        what, hint = _CRASHES.get(number, (f"died of {number.name}", "see the last lines of its output"))
        raise ProbeError(f"the engine {what} ({number.name}) on {model.name}{_tail(child.stderr)}", hint=hint)
    try:
        document = json.loads(child.stdout)
    except ValueError as error:
        raise ProbeError(f"the engine gave no answer on {model.name}{_tail(child.stderr)}") from error
    if "error" in document:
        raise ProbeError(document["error"], hint=document["hint"])
    devices = tuple(Device(**device) for device in document.pop("devices"))
    return ProbeResult(**document, devices=devices)


def probe_import(module: str, *, timeout_s: float = TIMEOUT_S) -> None:
    """Import a compiled package in a child process. Raises ``ProbeError`` when the child dies or refuses."""
    command = [sys.executable, "-c", f"import {module}"]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise ProbeError(f"{module} was not imported within {timeout_s:g} s", hint="is the machine busy?") from error
    if child.returncode < 0:
        number = signal.Signals(-child.returncode)
        what = _CRASHES.get(number, (f"died of {number.name}", ""))[0]
        raise ProbeError(
            f"{module} {what} ({number.name}) while it was imported", hint=f"pip install --upgrade {module}"
        )
    if child.returncode != 0:
        raise ProbeError(f"{module} cannot be imported{_tail(child.stderr)}", hint=f"pip install --upgrade {module}")


def _tail(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return f": {lines[-1].strip()}" if lines else ""


def write_tiny_gguf(path: Path, *, context: int = 512) -> None:
    """A random two-layer llama of 1.1 M parameters with a byte vocabulary.

    Its matrices are Q4_0, Q8_0 and F16. Raises ``MissingDependencyError`` without the gguf package.
    """
    try:
        import gguf
        from gguf.constants import GGMLQuantizationType as Type
        from gguf.quants import quantize
    except ImportError as error:
        raise MissingDependencyError("the gguf package is missing", hint="pip install gguf") from error
    random = np.random.default_rng(_SEED)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny random llama")
    writer.add_context_length(context)
    writer.add_embedding_length(_HIDDEN)
    writer.add_block_count(2)
    writer.add_feed_forward_length(_FEED_FORWARD)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_HEADS // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(_HIDDEN // _HEADS)
    writer.add_vocab_size(_VOCABULARY)
    add_byte_vocabulary(writer, _VOCABULARY)

    def matrix(name: str, rows: int, columns: int, kind: Type) -> None:
        values = (random.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(_HIDDEN, np.float32))

    matrix("token_embd.weight", _VOCABULARY, _HIDDEN, Type.Q8_0)
    norm("output_norm.weight")
    for layer, kind in enumerate((Type.Q4_0, Type.Q8_0)):
        prefix = f"blk.{layer}."
        norm(f"{prefix}attn_norm.weight")
        norm(f"{prefix}ffn_norm.weight")
        matrix(f"{prefix}attn_q.weight", _HIDDEN, _HIDDEN, kind)
        matrix(f"{prefix}attn_k.weight", _HIDDEN // 2, _HIDDEN, kind)
        matrix(f"{prefix}attn_v.weight", _HIDDEN // 2, _HIDDEN, Type.F16)
        matrix(f"{prefix}attn_output.weight", _HIDDEN, _HIDDEN, kind)
        matrix(f"{prefix}ffn_gate.weight", _FEED_FORWARD, _HIDDEN, kind)
        matrix(f"{prefix}ffn_up.weight", _FEED_FORWARD, _HIDDEN, kind)
        matrix(f"{prefix}ffn_down.weight", _HIDDEN, _FEED_FORWARD, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_byte_vocabulary(writer: object, size: int) -> None:
    """Byte-level BPE: one token per byte, one merge (llama.cpp wants some), special tokens, unused fillers."""
    from gguf import GGUFWriter, TokenType

    from runtime.tokenizer import byte_of_character

    assert isinstance(writer, GGUFWriter)
    by_byte = {byte: character for character, byte in byte_of_character().items()}
    tokens = [by_byte[byte] for byte in range(256)] + ["he", "<|im_start|>", "<|im_end|>"]
    types = [TokenType.NORMAL] * 257 + [TokenType.CONTROL] * 2
    fillers = size - len(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens + [f"<unused{index}>" for index in range(fillers)])
    writer.add_token_types(types + [TokenType.UNUSED] * fillers)
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    writer.add_add_bos_token(False)


def run_probe(model: Path, *, on_gpu: bool = False) -> ProbeResult:
    """What the child does: load, prefill and decode in this very process."""
    from runtime.engine import EngineOptions
    from runtime.engines import load_engine
    from runtime.model import artifact_of

    artifact, _ = artifact_of(model)
    # Of one kind everywhere, the one that predictions are of.
    options = EngineOptions(context=PREFILL_TOKENS + DECODE_TOKENS, flash_attention="on")
    wanted = replace(options, gpu_layers=AUTO_LAYERS) if on_gpu else options
    result, logits = _measured(load_engine(artifact, wanted), artifact)
    if on_gpu:
        _, expected = _measured(load_engine(artifact, options), artifact)
        result = replace(result, gpu_kl=kl_divergence(expected, logits))
    return result


def _measured(engine: Engine, artifact: Path) -> tuple[ProbeResult, Logits]:
    """Speeds of an engine, which is closed, and what it predicts behind the prompt, of shape (vocabulary,)."""
    from runtime.engine import Chunk

    info = engine.info
    prompt = np.random.default_rng(_SEED).integers(0, info.vocabulary, PREFILL_TOKENS).tolist()
    engine.forward([Chunk(0, prompt)])  # the first pass pays for pages that nobody touched yet
    engine.truncate(0)
    started = time.perf_counter()
    logits = engine.forward([Chunk(0, prompt)])
    prefilled = time.perf_counter()
    behind_prompt = logits[-1].copy()
    for _ in range(DECODE_TOKENS):
        if not np.isfinite(logits).all():
            raise EngineError(f"the engine computes NaN or infinite logits on {artifact.name}")
        logits = engine.forward([Chunk(0, [int(logits[-1].argmax())])])
    decoded = time.perf_counter()
    engine.close()
    offload = info.offload
    result = ProbeResult(
        model=artifact.name,
        load_s=info.load_s,
        prefill_tps=PREFILL_TOKENS / (prefilled - started),
        decode_tps=DECODE_TOKENS / (decoded - prefilled),
        system=info.system,
        versions=info.versions,
        devices=info.devices,
        gpu_backends=info.gpu_backends,
        gpu=offload.sentence() if offload is not None and offload.device is not None else "",
    )
    return result, behind_prompt


def kl_divergence(expected: Logits, found: Logits) -> float:
    """KL(expected || found) of two predictions, in nats, from logits of shape (vocabulary,)."""
    first, second = (values.astype(np.float64) - float(values.max()) for values in (expected, found))
    first -= np.log(np.exp(first).sum())
    second -= np.log(np.exp(second).sum())
    return float((np.exp(first) * (first - second)).sum())


if __name__ == "__main__":
    try:
        print(json.dumps(asdict(run_probe(Path(sys.argv[1]), on_gpu="gpu" in sys.argv[2:]))))
    except EdgelmError as error:
        print(json.dumps({"error": error.message, "hint": error.hint}))
