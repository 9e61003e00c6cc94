"""One measured run: prefill, decode, time to first token, load time and memory of a model on this machine.

Everything is measured through ``generate()``, so a figure printed here is the figure a user gets. Prompts are random
but fixed tokens, as in llama-bench: speed does not depend on what a text says. Knows how to spot a spoilt run; knows
nothing of how figures are shown.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import psutil

from edgelm import __version__
from edgelm.bundle import Prediction
from edgelm.errors import UsageError
from edgelm.progress import SILENT, Progress, Stage
from edgelm.report import MemoryRecord, ModelRecord, Report, Samples, Settings
from runtime.engine import Engine, EngineOptions, KvType
from runtime.generate import GenerationRequest, Session, TokenEvent, generate
from runtime.gguf_header import read_gguf_header, workload_from_gguf
from runtime.memory import MemorySnapshot, reset_peak, snapshot, swapped_in_pages
from runtime.model import LoadedModel, open_model
from runtime.onnx_header import ELEMENT_NAMES, read_onnx_model
from runtime.tokenizer import TextTokenizer
from targets.host import detect_host, host_record
from targets.predict import RunSettings, predict
from targets.workload import Workload, workload_from_plan

_SEED = 0
_UNSTEADY = 0.25  # spread of the samples, relative to their median, beyond which a run is not believed
_FOREIGN_CORES = 0.15  # cores that other processes may take from the threads that are measured
_MAJOR_FAULTS = 32


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What to measure. Zero prompt or generated tokens leave that figure out; threads of 0 ask the host."""

    prompt_tokens: int = 512
    generated_tokens: int = 128
    repetitions: int = 5
    depth: int = 0
    threads_decode: int = 0
    threads_prefill: int = 0
    kv_type: KvType = "f16"


@dataclass(frozen=True, slots=True)
class Measured:
    """Samples of one engine: tokens per second and seconds, in the order taken."""

    prefill_tps: tuple[float, ...]
    decode_tps: tuple[float, ...]
    ttft_s: tuple[float, ...]


def summarise(values: Sequence[float]) -> Samples | None:
    """Median and 5th to 95th percentile (linear between samples) with every sample; None for no samples."""
    if not values:
        return None
    p5, median, p95 = (float(value) for value in np.percentile(values, (5, 50, 95)))
    return Samples(median=median, p5=p5, p95=p95, samples=tuple(values))


def check_options(options: BenchOptions) -> None:
    """Raise ``UsageError`` naming the option that makes no sense."""
    for name in ("prompt_tokens", "generated_tokens", "depth"):
        if getattr(options, name) < 0:
            raise UsageError(f"{name} must not be negative")
    if options.repetitions < 1:
        raise UsageError(f"repetitions must be at least 1, not {options.repetitions}")
    if options.prompt_tokens == 0 and options.generated_tokens == 0:
        raise UsageError("nothing to measure: both -p and -n are 0")


def context_needed(options: BenchOptions) -> int:
    """Tokens that the longest measured sequence holds."""
    return max(options.depth + options.prompt_tokens, max(options.depth, 1) + options.generated_tokens)


def measure(engine: Engine, tokenizer: TextTokenizer, options: BenchOptions, stage: Stage | None = None) -> Measured:
    """Run the repetitions on a loaded engine, after one run that is not counted.

    Prefill and decode take turns, so that a machine that slows down shows in both.
    """
    random = np.random.default_rng(_SEED)
    vocabulary = engine.info.vocabulary
    depth_tokens = random.integers(0, vocabulary, options.depth).tolist()
    prompt_tokens = random.integers(0, vocabulary, options.prompt_tokens).tolist()
    session = Session(engine)
    prefill_tps: list[float] = []
    decode_tps: list[float] = []
    ttft_s: list[float] = []
    for repetition in range(options.repetitions + 1):
        counted = repetition > 0
        if prompt_tokens:
            first = _prefill(session, tokenizer, depth_tokens, prompt_tokens)
            if counted and first.prefill_s:
                prefill_tps.append(len(prompt_tokens) / first.prefill_s)
                ttft_s.append(first.elapsed_s)
        if options.generated_tokens:
            count = options.generated_tokens if counted else min(options.generated_tokens, 8)
            seconds = _decode(session, tokenizer, depth_tokens or [int(random.integers(vocabulary))], count)
            if counted:
                decode_tps.append(count / seconds)
        if stage is not None:
            stage.advance()
    return Measured(tuple(prefill_tps), tuple(decode_tps), tuple(ttft_s))


def _prefill(
    session: Session, tokenizer: TextTokenizer, depth_tokens: list[int], prompt_tokens: list[int]
) -> TokenEvent:
    """The first event after computing the prompt behind ``depth_tokens``, which are not timed."""
    session.engine.truncate(0, session.sequence)
    session.tokens.clear()
    if depth_tokens:
        for _ in generate(session, tokenizer, GenerationRequest(depth_tokens, 1)):
            pass
    return next(iter(generate(session, tokenizer, GenerationRequest([*depth_tokens, *prompt_tokens], 1))))


def _decode(session: Session, tokenizer: TextTokenizer, prompt: list[int], count: int) -> float:
    """Seconds for ``count`` tokens after the first one, which belongs to the prompt."""
    times = [event.elapsed_s for event in generate(session, tokenizer, GenerationRequest(prompt, max_tokens=count + 1))]
    return times[-1] - times[0]


@dataclass(frozen=True, slots=True)
class _Machine:
    """Counters of the machine and of this process at one moment."""

    wall_s: float
    own_cpu_s: float
    all_cpu_s: float
    swapped_in: int | None
    memory: MemorySnapshot


def _machine() -> _Machine:
    busy = psutil.cpu_times()
    all_cpu_s = sum(getattr(busy, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
    return _Machine(time.perf_counter(), time.process_time(), all_cpu_s, swapped_in_pages(), snapshot())


def _disturbances(before: _Machine, after: _Machine, threads: int) -> list[str]:
    """Sentences about what spoilt the run between two moments."""
    found = []
    wall_s = max(after.wall_s - before.wall_s, 1e-9)
    foreign = (after.all_cpu_s - before.all_cpu_s - (after.own_cpu_s - before.own_cpu_s)) / wall_s
    free = (os.cpu_count() or 1) - threads
    if foreign > max(free, 0) + _FOREIGN_CORES:
        found.append(f"other processes kept {foreign:.1f} cores busy while {threads} threads were measured")
    faults = after.memory.major_faults - before.memory.major_faults
    if faults > _MAJOR_FAULTS:
        found.append(f"{faults} pages had to be read from disk during the run (major faults): memory is short")
    if before.swapped_in is not None and after.swapped_in is not None and after.swapped_in > before.swapped_in:
        found.append(f"{after.swapped_in - before.swapped_in} pages were swapped in during the run")
    if after.memory.swap_bytes:
        found.append(f"{after.memory.swap_bytes} bytes of this process are in swap")
    return found


def _unsteady(name: str, samples: Samples | None) -> list[str]:
    if samples is None or (samples.p95 - samples.p5) <= _UNSTEADY * samples.median:
        return []
    spread = (samples.p95 - samples.p5) / samples.median
    return [f"{name} varied by {spread:.0%} between repetitions (5th to 95th percentile, of the median)"]


def bench(path: Path, options: BenchOptions, progress: Progress = SILENT) -> Report:
    """Measure a bundle or a bare ``.gguf`` file.

    Raises ``UsageError`` for options that make no sense, ``BundleError`` and ``EngineError`` as loading does.
    """
    check_options(options)
    reset_peak()
    engine_options = EngineOptions(
        context=context_needed(options),
        threads_decode=options.threads_decode,
        threads_prefill=options.threads_prefill,
        kv_type=options.kv_type,
    )
    model = open_model(path, engine_options)
    try:
        with progress.stage("measuring", options.repetitions + 1, unit="runs") as stage:
            before = _machine()
            measured = measure(model.engine, model.tokenizer, options, stage)
            after = _machine()
        return _report(model, options, measured, before, after)
    finally:
        model.close()


def _report(model: LoadedModel, options: BenchOptions, measured: Measured, before: _Machine, after: _Machine) -> Report:
    info = model.engine.info
    prefill, decode, ttft = (summarise(item) for item in (measured.prefill_tps, measured.decode_tps, measured.ttft_s))
    disturbances = _disturbances(before, after, max(info.threads_decode, info.threads_prefill))
    warnings = [*disturbances, *_unsteady("prefill", prefill), *_unsteady("decode", decode)]
    return Report(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        model=_model_record(model),
        settings=Settings(
            prompt_tokens=options.prompt_tokens,
            generated_tokens=options.generated_tokens,
            repetitions=options.repetitions,
            depth=options.depth,
            context=info.context,
            threads_decode=info.threads_decode,
            threads_prefill=info.threads_prefill,
            kv_type="f32" if model.artifact.suffix == ".onnx" else options.kv_type,
        ),
        engine={"name": info.engine, "edgelm": __version__, **info.versions, "system": info.system},
        prefill_tps=prefill,
        decode_tps=decode,
        ttft_s=ttft,
        load_s=info.load_s,
        memory=MemoryRecord(
            rss_peak_bytes=after.memory.peak_bytes,
            anonymous_bytes=after.memory.anonymous_bytes,
            file_bytes=after.memory.file_bytes,
            kv_bytes=info.kv_bytes,
            weights_bytes=info.weights_bytes,
        ),
        predicted=_predicted(model, options),
        quality=model.manifest.quality if model.manifest else None,
        host=host_record(),
        valid=not warnings,
        warnings=tuple(warnings),
    )


def _model_record(model: LoadedModel) -> ModelRecord:
    info = model.engine.info
    manifest = model.manifest
    records = {record.name: record for record in manifest.files} if manifest else {}
    return ModelRecord(
        name=model.name,
        format=manifest.format if manifest else "onnx" if model.artifact.suffix == ".onnx" else "gguf",
        quant=manifest.plan.quant if manifest else _quant_of(model.artifact),
        architecture=info.architecture,
        parameters=info.parameters,
        artifact_bytes=manifest.artifact_bytes if manifest else model.artifact.stat().st_size,
        sha256=records[manifest.artifact].sha256 if manifest else None,
    )


def _quant_of(path: Path) -> str:
    """The type that holds most parameters of a bare file: what its name says may be something else."""
    if path.suffix == ".onnx":
        return _stored_as(path)
    counts: dict[str, int] = {}
    for weights in workload_from_gguf(read_gguf_header(path)).weights:
        counts[weights.type] = counts.get(weights.type, 0) + weights.parameters
    return max(counts, key=lambda name: counts[name])


def _stored_as(path: Path) -> str:
    """The element type that holds most bytes of an ONNX file."""
    held: dict[str, int] = {}
    for tensor in read_onnx_model(path).initializers:
        name = ELEMENT_NAMES.get(tensor.type, f"type {tensor.type}")
        held[name] = held.get(name, 0) + tensor.size_bytes
    return max(held, key=lambda name: held[name], default="unknown")


def _workload(model: LoadedModel) -> Workload | None:
    """From the file itself, or from the plan where the file does not tell (ONNX)."""
    if model.artifact.suffix == ".onnx":
        return workload_from_plan(model.manifest.plan) if model.manifest else None
    return workload_from_gguf(read_gguf_header(model.artifact))


def _predicted(model: LoadedModel, options: BenchOptions) -> Prediction | None:
    info = model.engine.info
    settings = RunSettings(
        context=info.context,
        depth=options.depth,
        threads_decode=info.threads_decode,
        threads_prefill=info.threads_prefill,
        prompt_tokens=max(options.prompt_tokens, 1),
        kv_type=options.kv_type,
        source_tokenizer=model.manifest is not None,
    )
    workload = _workload(model)
    return None if workload is None else predict(workload, detect_host(), settings)
