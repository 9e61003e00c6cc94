"""One measured run: speed at every point of a sweep, starts, memory by purpose, and the conditions it was taken under.

Opens the model, lets ``points`` measure, and puts everything into a ``Report``. A run that something spoilt is
labelled with the reason, never averaged away. Knows nothing of how figures are shown.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

from edgelm import __version__
from edgelm.bundle import MANIFEST_NAME, Prediction, file_record
from edgelm.errors import UsageError
from edgelm.progress import SILENT, Progress
from edgelm.report import (
    EngineRecord,
    Label,
    Measurement,
    MemoryRecord,
    ModelRecord,
    Report,
    Settings,
    StartRecord,
    SustainedRecord,
)
from runtime.attention import ON
from runtime.conditions import (
    Window,
    available_low,
    conditions_of,
    labels_of,
    major_faults,
    merged,
    swapped_in,
    usable_cpus,
)
from runtime.engine import EngineInfo, EngineOptions, FlashAttention, KvType
from runtime.engines import load_library
from runtime.features import has_blas, used_and_idle
from runtime.gguf_header import read_gguf_header, workload_from_gguf
from runtime.gpu_memory import device_records, vram_record
from runtime.memory import KnowsItsCache, Ledger, cgroup_memory, reset_peak, snapshot
from runtime.model import LoadedModel, artifact_of, open_model
from runtime.onnx_header import ELEMENT_NAMES, read_onnx_model
from runtime.page_cache import cached_share
from runtime.points import AUTO_MOST, GUESSED_DEPTH, SEED, Point, Runner, StoppedBy, Until, measurement, sustained
from runtime.sensors import INTERVAL_S, Sampler, Sensors
from runtime.starts import cold_start, model_files
from targets.host import default_threads, detect_host, host_record
from targets.predict import RunSettings, predict
from targets.workload import Workload, workload_from_plan

_MOST_POINTS = 256


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What to measure; every combination of prompts or generated tokens, depths, sequences and threads is a point.

    Zero prompt or generated tokens leave that figure out; threads of 0 ask the host. ``repetitions`` of 0 repeat until
    the medians are known to 2 % (5 to 100 times), ``max_time_s`` bounds that. ``sustained_s`` adds a long run of
    decoding, ``cold`` a start without page cache. ``interval_s`` is the sensors' (0: only around repetitions).
    ``lookup``, ``draft``, ``providers``, ``gpu_layers``, ``gpu``, ``host_repack`` and ``flash_attention`` are
    those of ``EngineOptions``: with the first two, single sequences continue a fixed text.
    """

    prompts: tuple[int, ...] = (512,)
    generated_tokens: int = 128
    depths: tuple[int, ...] = (0,)
    sequences: tuple[int, ...] = (1,)
    threads_decode: tuple[int, ...] = (0,)
    threads_prefill: int = 0
    kv_type: KvType = "f16"
    lookup: bool = False
    draft: str = ""
    providers: tuple[str, ...] = ()
    gpu_layers: int = 0
    gpu: str = ""
    host_repack: bool | None = None
    flash_attention: FlashAttention = "auto"
    repetitions: int = 5
    max_time_s: float | None = None
    sustained_s: float = 0.0
    cold: bool = False
    interval_s: float = INTERVAL_S


def check_options(options: BenchOptions) -> None:
    """Raise ``UsageError`` naming the option that makes no sense."""
    for name in ("prompts", "depths", "sequences", "threads_decode"):
        values: tuple[int, ...] = getattr(options, name)
        if not values:
            raise UsageError(f"{name} is empty")
        if min(values) < (1 if name == "sequences" else 0):
            raise UsageError(f"{name} must not hold {min(values)}")
    if options.generated_tokens < 0 or options.sustained_s < 0 or options.repetitions < 0:
        raise UsageError("generated_tokens, repetitions and sustained_s must not be negative")
    if options.max_time_s is not None and options.max_time_s <= 0:
        raise UsageError("max_time_s must be above 0")
    if not points_of(options):
        raise UsageError("nothing to measure: both -p and -n are 0")
    if len(points_of(options)) * len(options.threads_decode) > _MOST_POINTS:
        raise UsageError(f"more than {_MOST_POINTS} points", hint="measure fewer prompts, depths or thread counts")
    if options.sustained_s and not options.generated_tokens:
        raise UsageError("a sustained run decodes: -n must be above 0")
    if guesses(options) and not options.generated_tokens:
        raise UsageError("guesses are for decoding: -n must be above 0")
    if guesses(options) and max(options.sequences) > 1:
        raise UsageError(
            "guesses are measured with one sequence", hint="leave out --sequences, or --lookup and --draft"
        )


def guesses(options: BenchOptions) -> bool:
    """Whether decoding is speculative."""
    return options.lookup or bool(options.draft)


def points_of(options: BenchOptions) -> tuple[Point, ...]:
    """The points of the sweep on one number of threads, in the order of llama-bench: by depth, prefill first."""
    found = []
    for depth in options.depths:
        found += [Point("prefill", tokens, depth) for tokens in options.prompts if tokens]
        if options.generated_tokens:
            behind = max(depth, GUESSED_DEPTH) if guesses(options) else depth
            found += [Point("decode", options.generated_tokens, behind, count) for count in options.sequences]
    return tuple(dict.fromkeys(found))


def context_needed(options: BenchOptions) -> int:
    """Tokens that the longest measured sequence holds."""
    depth = max(options.depths)
    behind = max(depth, GUESSED_DEPTH if guesses(options) else 1)
    return max(depth + max(options.prompts), behind + options.generated_tokens)


@dataclass(slots=True)
class _Run:
    """What was gathered, while the threads of a sweep take turns."""

    measurements: list[Measurement] = field(default_factory=list)
    labels: list[Sequence[Label]] = field(default_factory=list)
    starts: list[StartRecord] = field(default_factory=list)
    sustained: SustainedRecord | None = None
    stopped_by: StoppedBy = "count"


@dataclass(frozen=True, slots=True)
class _Place:
    """The model to measure, found but not opened."""

    path: Path
    artifact: Path
    record_sha256: str | None
    bundle_sha256: str | None


def bench(path: Path, options: BenchOptions, progress: Progress = SILENT, sensors: Sensors | None = None) -> Report:
    """Measure a bundle or a bare ``.gguf`` file.

    ``sensors`` are this machine's unless others are given. Ctrl-C ends the measuring and labels the report; before
    anything was measured it is raised. Raises ``UsageError`` for options that make no sense, ``BundleError`` and
    ``EngineError`` as loading does.
    """
    check_options(options)
    place = _place(path, progress)
    sensors = sensors or Sensors()
    run = _Run()
    if options.cold:
        with progress.stage("cold start"):
            prompt = next((tokens for tokens in options.prompts if tokens), 0)
            engine_options = _engine_options(options, options.threads_decode[0])
            run.starts.append(cold_start(path, place.artifact, engine_options, prompt))
    report: Report | None = None
    for threads in options.threads_decode:
        if run.stopped_by == "interrupt":
            break
        found = _on_threads(place, options, threads, run, sensors, progress)
        report = report or found
    assert report is not None
    return _completed(report, run)


def _place(path: Path, progress: Progress) -> _Place:
    artifact, bundle = artifact_of(path, check_hashes=False)
    if bundle is not None:
        records = {record.name: record for record in bundle.manifest.files}
        manifest = hashlib.sha256((bundle.path / MANIFEST_NAME).read_bytes()).hexdigest()
        return _Place(path, artifact, records[bundle.manifest.artifact].sha256, manifest)
    if artifact.suffix != ".gguf" or not artifact.is_file():
        return _Place(path, artifact, None, None)
    with progress.stage("hashing"):
        return _Place(path, artifact, file_record(artifact).sha256, None)


def _engine_options(options: BenchOptions, threads: int) -> EngineOptions:
    return EngineOptions(
        context=context_needed(options),
        sequences=max(options.sequences),
        threads_decode=threads,
        threads_prefill=options.threads_prefill or threads,
        kv_type=options.kv_type,
        lookup=options.lookup,
        draft=options.draft,
        providers=options.providers,
        gpu_layers=options.gpu_layers,
        gpu=options.gpu,
        host_repack=options.host_repack,
        flash_attention=options.flash_attention,
    )


def _on_threads(
    place: _Place, options: BenchOptions, threads: int, run: _Run, sensors: Sensors, progress: Progress
) -> Report:
    """Open the model with these threads, measure all points, and report them alone."""
    reset_peak()
    load_library(place.artifact)
    files = model_files(place.artifact)
    cached = cached_share(files)
    ledger = Ledger()
    opened_s = time.perf_counter()
    model = open_model(place.path, _engine_options(options, threads))
    opened_s = time.perf_counter() - opened_s
    try:
        ledger.opened(files, _kv_bytes(model))
        points = points_of(options)
        with Sampler(sensors, options.interval_s) as sampler:
            runner = Runner(model.engine, model.tokenizer, sampler, model.speculation)
            prompt = next((tokens for tokens in options.prompts if tokens), 0)
            first_token_s = runner.first_token_s(prompt) if prompt else None
            run.starts.append(_start(model, opened_s, first_token_s, cached))
            origin = sampler.mark()
            rounds = 1 + (options.repetitions or AUTO_MOST)
            until = Until(options.repetitions, options.max_time_s and origin.at_s + options.max_time_s)
            with progress.stage(_stage_name(options, threads), rounds * len(points), unit="runs") as stage:
                taken, run.stopped_by = runner.run(points, until, stage)
            if options.sustained_s and run.sustained is None and run.stopped_by != "interrupt":
                with progress.stage("sustained", unit="points") as stage:
                    run.sustained = sustained(runner, options.sustained_s, options.generated_tokens, stage)
            memory = _memory(model, ledger, files)
        info = model.engine.info
        measured = [
            (item, info.threads_prefill if item.point.kind == "prefill" else info.threads_decode) for item in taken
        ]
        found = [item for each, count in measured if (item := measurement(each, count, origin.at_s)) is not None]
        if not found:
            raise KeyboardInterrupt
        run.measurements += found
        readings = [reading for reading in sampler.readings if reading.at_s >= origin.at_s]
        window = Window([readings], max(info.threads_decode, info.threads_prefill), usable_cpus())
        run.labels += [item.labels for item in found]
        run.labels.append(labels_of(window))
        if snapshot().swap_bytes:
            reason = f"{snapshot().swap_bytes} bytes of this process are in swap"
            run.labels.append((Label(kind="swapped", reason=reason),))
        memory = memory.model_copy(
            update={
                "available_low_bytes": available_low(window),
                "major_faults": major_faults(window),
                "swapped_in_pages": swapped_in(window),
            }
        )
        report = _report(model, place, options, found, memory)
        return report.model_copy(update={"conditions": conditions_of(window, sensors, options.interval_s)})
    finally:
        model.close()


def _stage_name(options: BenchOptions, threads: int) -> str:
    return f"measuring, {threads} threads" if len(options.threads_decode) > 1 else "measuring"


def _kv_bytes(model: LoadedModel) -> int:
    """Bytes of the cache that are in RAM."""
    engine = model.engine
    return engine.resident_kv_bytes() if isinstance(engine, KnowsItsCache) else engine.info.kv_bytes


def _start(model: LoadedModel, open_s: float, first_token_s: float | None, cached: float | None) -> StartRecord:
    note = "" if cached is None or cached > 0.95 else f"{cached:.0%} of the files were in the page cache"
    load_s = model.engine.info.load_s
    return StartRecord(
        kind="warm", open_s=open_s, load_s=load_s, first_token_s=first_token_s, cached_share=cached, note=note
    )


def _memory(model: LoadedModel, ledger: Ledger, files: Sequence[Path]) -> MemoryRecord:
    info, now = model.engine.info, snapshot()
    return MemoryRecord(
        rss_peak_bytes=now.peak_bytes,
        anonymous_bytes=now.anonymous_bytes,
        file_bytes=now.file_bytes,
        kv_bytes=info.kv_bytes,
        weights_bytes=info.weights_bytes,
        rss_steady_bytes=now.rss_bytes,
        pss_bytes=now.pss_bytes,
        swap_bytes=now.swap_bytes,
        parts=ledger.parts(files, _kv_bytes(model), info.buffers),
        cgroup=cgroup_memory(),
        vram=vram_record(info),
    )


def _first(found: Sequence[Measurement], kind: str) -> Measurement | None:
    return next((item for item in found if item.kind == kind), None)


def _report(
    model: LoadedModel, place: _Place, options: BenchOptions, found: Sequence[Measurement], memory: MemoryRecord
) -> Report:
    """What was measured on one number of threads, without labels and conditions."""
    info = model.engine.info
    prefill, decode = _first(found, "prefill"), _first(found, "decode")
    return Report(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        model=_model_record(model, place),
        settings=_settings(options, info, found),
        engine=_engine_record(info),
        prefill_tps=prefill.tps if prefill else None,
        decode_tps=decode.tps if decode else None,
        ttft_s=prefill.ttft_s if prefill else None,
        load_s=info.load_s,
        memory=memory,
        predicted=_predicted(model, options),
        quality=model.manifest.quality if model.manifest else None,
        host=host_record(),
        valid=True,
        warnings=(),
    )


def _settings(options: BenchOptions, info: EngineInfo, found: Sequence[Measurement]) -> Settings:
    decode, _ = default_threads()
    asked = options.threads_decode[0] or options.threads_prefill
    return Settings(
        prompt_tokens=next((tokens for tokens in options.prompts if tokens), 0),
        generated_tokens=options.generated_tokens,
        repetitions=max(len(item.tps.samples) for item in found),
        depth=options.depths[0],
        context=info.context,
        threads_decode=info.threads_decode,
        threads_prefill=info.threads_prefill,
        kv_type=info.kv_type or options.kv_type,
        threads_reason="asked for" if asked else decode.reason,
        affinity=tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else (),
        sequences=options.sequences[0],
        seed=SEED,
        lookup=options.lookup,
        draft=Path(options.draft).name if options.draft else None,
    )


def _engine_record(info: EngineInfo) -> EngineRecord:
    """llama.cpp names the CPU features of its build; ONNX Runtime chooses kernels at run time and names none."""
    used: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    offload, attention = info.offload, info.attention
    names_features = info.engine == "llama.cpp"
    if names_features:
        used, idle = used_and_idle(host_record().isa, info.system)
    return EngineRecord(
        name=info.engine,
        versions={"edgelm": __version__, **info.versions},
        system=info.system,
        features_used=used,
        features_idle=idle,
        blas=has_blas(info.system) if names_features else None,
        waiting=info.waiting,
        waiting_reason=info.waiting_reason,
        huge_page_bytes=info.huge_page_bytes,
        devices=device_records(info),
        gpu=None if offload is None or offload.device is None else offload.device.name,
        gpu_layers=None if offload is None else offload.gpu_layers,
        layers=None if offload is None else offload.most,
        offload_reason="" if offload is None else offload.reason,
        host_repack=None if offload is None or offload.device is None else offload.host_repack,
        flash_attention=None if attention is None else attention.value == ON,
        attention_reason="" if attention is None else attention.reason,
    )


def _completed(report: Report, run: _Run) -> Report:
    """The report of the first threads with everything that was gathered on all of them."""
    labels = merged(run.labels)
    if run.stopped_by == "interrupt":
        labels = (*labels, Label(kind="interrupted", reason="the run was interrupted before it was complete"))
    notes = [f"{item.kind} start: {item.note}" for item in run.starts if item.note]
    if run.sustained is not None and run.sustained.change < -0.05:
        notes.append(
            f"decode fell by {-run.sustained.change:.0%} within {run.sustained.seconds:.0f} s: "
            f"{run.sustained.first_tps:.1f} to {run.sustained.last_tps:.1f} tok/s"
        )
    drafted = sum(item.drafted_tokens or 0 for item in run.measurements)
    if report.settings.lookup or report.settings.draft:
        right = sum(item.accepted_tokens or 0 for item in run.measurements)
        notes.append(f"{right} of {drafted} guesses were right on a text that quotes itself; others gain less")
    settings = report.settings.model_copy(update={"stopped_by": run.stopped_by})
    return report.model_copy(
        update={
            "settings": settings,
            "valid": not labels,
            "labels": labels,
            "warnings": tuple(label.reason for label in labels),
            "notes": tuple(dict.fromkeys(notes)),
            "measurements": tuple(run.measurements),
            "starts": tuple(run.starts),
            "sustained": run.sustained,
        }
    )


def _model_record(model: LoadedModel, place: _Place) -> ModelRecord:
    info = model.engine.info
    manifest = model.manifest
    return ModelRecord(
        name=model.name,
        format=manifest.format if manifest else "onnx" if model.artifact.suffix == ".onnx" else "gguf",
        quant=manifest.plan.quant if manifest else _quant_of(model.artifact),
        architecture=info.architecture,
        parameters=info.parameters,
        artifact_bytes=manifest.artifact_bytes if manifest else _stored_bytes(model.artifact),
        sha256=place.record_sha256,
        bundle_sha256=place.bundle_sha256,
    )


def _stored_bytes(path: Path) -> int:
    """Bytes of a bare model, with the data files that an ONNX file names."""
    files = (
        [path, *(path.parent / name for name in read_onnx_model(path).data_files)] if path.suffix == ".onnx" else [path]
    )
    return sum(file.stat().st_size for file in files)


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
    """What this machine's CPU was to reach; None when a GPU takes part, of which nothing is known here."""
    info = model.engine.info
    if info.offload is not None and info.offload.device is not None:
        return None
    settings = RunSettings(
        context=info.context,
        depth=options.depths[0],
        threads_decode=info.threads_decode,
        threads_prefill=info.threads_prefill,
        prompt_tokens=max(next((tokens for tokens in options.prompts if tokens), 0), 1),
        kv_type=options.kv_type,
        flash_attention=info.attention is None or info.attention.value == ON,
        source_tokenizer=model.manifest is not None,
    )
    workload = _workload(model)
    return None if workload is None else predict(workload, detect_host(), settings)


@dataclass(frozen=True, slots=True)
class BestThreads:
    """Thread counts that were fastest, and the speeds they were chosen by: (threads, prefill tok/s, decode tok/s)."""

    decode: int
    prefill: int
    tried: tuple[tuple[int, float, float], ...]


_SHORT = (128, 32, 3)  # prompt, generated tokens and repetitions that tell thread counts apart
_TIE = 0.03  # fewer threads win when they are this close: they leave cores to others


def best_threads(path: Path, options: BenchOptions, progress: Progress = SILENT) -> BestThreads:
    """Try thread counts with short runs; an ONNX model shares one number between prefill and decode (decode's wins)."""
    prompt, generated, repetitions = _SHORT
    short = replace(
        options, prompts=(prompt,), generated_tokens=generated, depths=(0,), sequences=(1,), repetitions=repetitions
    )
    short = replace(
        short,
        lookup=False,
        draft="",
        threads_decode=candidate_threads(),
        threads_prefill=0,
        sustained_s=0.0,
        cold=False,
        max_time_s=None,
    )
    report = bench(path, short, progress)
    speeds: dict[int, dict[str, float]] = {}
    for item in report.measurements:
        speeds.setdefault(item.threads, {})[item.kind] = item.tps.median
    decode = fewest_of_fastest({count: found["decode"] for count, found in speeds.items() if "decode" in found})
    prefill = fewest_of_fastest({count: found["prefill"] for count, found in speeds.items() if "prefill" in found})
    tried = tuple((count, found.get("prefill", 0.0), found.get("decode", 0.0)) for count, found in speeds.items())
    return BestThreads(decode, decode if report.model.format == "onnx" else prefill, tried)


def fewest_of_fastest(speeds: dict[int, float]) -> int:
    """The smallest number of threads that is as fast as the fastest, within a tie."""
    best = max(speeds.values())
    return min(count for count, speed in speeds.items() if speed >= (1 - _TIE) * best)


def candidate_threads() -> tuple[int, ...]:
    """1 to 8 threads, then powers of two, up to all CPUs that this process may use."""
    cpus = usable_cpus()
    counts = {count for count in (*range(1, 9), 16, 32, 64, 128) if count < cpus} | {cpus}
    return tuple(sorted(counts))
