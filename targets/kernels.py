"""What the engine's kernels reach on one machine: runs of random models, turned into the constants of prediction.

A run is one model whose matrices all have one type, with its seconds per prompt token and per generated token. The
formulas of ``predict`` are solved for the cycles of that type, so that prediction gives the measured speed back. Knows
no engine: ``runtime.kernels`` does the runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from targets.bandwidth import every_count
from targets.calibration import Family, calibration
from targets.predict import NO_SCALE, RunSettings, bandwidth_at, layer_us, parallel_cores, prefill_seconds, row_cycles
from targets.profile import GB, Figure, KernelCycles, Memory, Streaming, TargetProfile
from targets.workload import Workload

# Of the seconds that memory alone takes, at least this share is arithmetic: below it the type is limited by memory
# anyway and the fourth power hides the difference.
_LEAST_ARITHMETIC = 0.5

# Rows are given no more of a model's cycles than this: what is left to its weights stays above 0.
_MOST_ROWS = 0.8
_ROW = 1024  # weights
# Where a larger model streams at less than this share of a smaller one's rate a cache held that one, and where at more
# than this share of a plain scan, memory is what it waits for.
_CACHED, _SCANNED = 0.75, 0.8

_Cycles = tuple[float | None, float | None]
Role = Literal["type", "size", "large", "thin", "deep", "plain", "narrow", "as_filed"]


@dataclass(frozen=True, slots=True)
class KernelRun:
    """One random model of one type on a number of threads.

    ``role``: ``type`` measures a type's kernels; ``size`` is the same model with fewer or more layers, for the read
    rate; ``large`` has more, for the type; ``thin`` has as many weights in shorter rows, for what a row costs;
    ``deep`` is the first one behind many tokens, ``plain`` the same without flash attention; ``narrow`` models are all
    layers and hardly any weights; ``as_filed`` is the first one whose weights the engine did not rearrange,
    in decode. ``prefill_depth`` tokens were cached before the prompt, ``decode_depth`` in the middle of decoding.
    """

    type: str
    threads: int
    role: Role
    workload: Workload
    prompt_tokens: int
    prefill_s: float
    decode_s: float
    prefill_depth: int = 0
    decode_depth: int = 0


def with_kernels(profile: TargetProfile, runs: Sequence[KernelRun]) -> TargetProfile:
    """A detected profile with what the runs tell: cycles by type, of attention, cost of a layer, thread scaling and,
    where the engine streams weights faster than a plain scan of memory, its bandwidth."""
    family = calibration().family(profile.kernels)
    typed = [run for run in runs if run.role == "type"]
    most = max(run.threads for run in typed)
    loss = _parallel_loss(typed)
    family = family.model_copy(update={"parallel_loss": loss})
    best = [run for run in typed if run.threads == most]
    source = f"measured: random models of {best[0].workload.parameters / 1e6:.0f} M weights, 1 to {most} threads"
    attention = _attention(runs, profile, family, "deep")
    plain = _attention(runs, profile, family, "plain", attention)
    known = KernelCycles(
        prefill={},
        decode={},
        layer_us=_layer_us([run for run in runs if run.role == "narrow"], profile, family, most),
        parallel_loss=loss,
        attention_prefill=attention[0],
        attention_decode=attention[1],
        plain_prefill=plain[0],
        plain_decode=plain[1],
        source=source,
    )
    single = [run for run in runs if run.role == "narrow" and run.threads == 1]
    if most > 1 and single:
        alone = {"layer_single_us": _layer_us(single, profile, family, 1), "decode_threads": most}
        known = known.model_copy(update=alone)
    known = known.model_copy(update={"prefill_row": _prefill_rows(runs, profile, family, known)})
    profile = profile.model_copy(update={"kernel_cycles": known})
    prefill: dict[str, float] = {}
    for run in sorted(best, key=lambda item: item.type != "F16"):  # F16 first: attention may count as it
        prefill[run.type] = _prefill_cycles(run, profile, family)
        family = family.model_copy(update={"prefill": family.prefill | prefill})
    memory = _streamed(profile, [run for run in runs if run.role in ("type", "size", "large")], known)
    profile = profile.model_copy(update={"memory": memory})
    known = _with_rows(known, runs, profile, family)
    decode = {run.type: _decode_cycles(run, profile, family, known) for run in best}
    tables: dict[str, object] = {"prefill": prefill, "decode": decode}
    large = [run for run in runs if run.role == "large"]
    if large:
        tables["decode_large"] = {run.type: _decode_cycles(run, profile, family, known) for run in large}
        tables["decode_weights"] = (float(best[0].workload.parameters), float(large[0].workload.parameters))
    as_filed = [run for run in runs if run.role == "as_filed" and run.threads == most]
    tables["decode_as_filed"] = {run.type: _decode_cycles(run, profile, family, known) for run in as_filed}
    return profile.model_copy(update={"kernel_cycles": known.model_copy(update=tables)})


def throughput_gflops(profile: TargetProfile, kind: str) -> float | None:
    """Matrix throughput in prefill, all threads, rows of ``_ROW``, 2 operations per weight; None when the type was not
    measured."""
    if profile.kernel_cycles is None or kind not in profile.kernel_cycles.prefill or profile.cores is None:
        return None
    family = calibration().family(profile.kernels)
    family = family.model_copy(update={"parallel_loss": profile.kernel_cycles.parallel_loss})
    cores = parallel_cores(profile, family, int(profile.threads_prefill.value))
    cycles = profile.kernel_cycles.prefill[kind] + profile.kernel_cycles.prefill_row.get(kind, 0.0) / _ROW
    return 2e-9 * profile.cores.fast_ghz.value * GB * cores / cycles


def _attention(
    runs: Sequence[KernelRun], profile: TargetProfile, family: Family, role: Role, flat_cycles: _Cycles = (None, None)
) -> _Cycles:
    """Cycles per multiplication of one kind of attention in prefill and decode: what the same model takes longer behind
    many tokens than behind few. ``flat_cycles`` are those of the run behind few where it was another kind. None where
    no run or no difference tells."""
    deep = next((run for run in runs if run.role == role), None)
    if deep is None:
        return None, None
    flat = next(run for run in runs if (run.role, run.type, run.threads) == ("type", deep.type, deep.threads))
    scale = _hertz(profile) / (2.0 * deep.workload.layers * deep.workload.hidden)
    half = flat.prompt_tokens / 2  # a prompt looks back at half of itself besides
    prefill = _per_token(
        (deep.prefill_s - flat.prefill_s) * scale * parallel_cores(profile, family, deep.threads),
        (deep.prefill_depth + half, flat.prefill_depth + half),
        flat_cycles[0],
    )
    decode = _per_token(
        (deep.decode_s - flat.decode_s) * scale * min(deep.threads, _cores(profile)),
        (deep.decode_depth, flat.decode_depth),
        flat_cycles[1],
    )
    return prefill, decode


def _per_token(cycles: float, depths: tuple[float, float], flat_cycles: float | None) -> float | None:
    """``cycles`` more behind the first of two depths than behind the second, per token; None where none tell."""
    deep, flat = depths
    found = cycles / (deep - flat) if flat_cycles is None else (cycles + flat_cycles * flat) / deep
    return found if cycles > 0 else None


def _with_rows(cycles: KernelCycles, runs: Sequence[KernelRun], profile: TargetProfile, family: Family) -> KernelCycles:
    """The cycles with what a row costs in decode, by type, and with those of a weight on the thread count of those
    runs: models of long rows and of short ones tell both."""
    decode, single = dict(cycles.decode_row), dict(cycles.decode_single)
    for thin, wide in _thin_and_wide(runs):
        long_s, short_s = (_arithmetic_s(run, profile, family, cycles) for run in (wide, thin))
        work = _hertz(profile) * min(wide.threads, _cores(profile))
        row, single[wide.type] = _per_row_and_weight(wide, thin, long_s * work, short_s * work)
        decode[wide.type] = row
    if cycles.decode_threads is None:
        single = {}
    return cycles.model_copy(update={"decode_row": decode, "decode_single": single})


def _prefill_rows(
    runs: Sequence[KernelRun], profile: TargetProfile, family: Family, cycles: KernelCycles
) -> dict[str, float]:
    """Cycles per row and prompt token, by type."""
    found = {}
    for thin, wide in _thin_and_wide(runs):
        work = _hertz(profile) * parallel_cores(profile, family, wide.threads)
        long_s, short_s = (_matrices_s(run, profile, cycles, family) for run in (wide, thin))
        found[wide.type], _ = _per_row_and_weight(wide, thin, long_s * work, short_s * work)
    return found


def _thin_and_wide(runs: Sequence[KernelRun]) -> Iterator[tuple[KernelRun, KernelRun]]:
    for thin in runs:
        if thin.role == "thin":
            same = ("type", thin.type, thin.threads)
            yield thin, next(run for run in runs if (run.role, run.type, run.threads) == same)


def _per_row_and_weight(wide: KernelRun, thin: KernelRun, long: float, short: float) -> tuple[float, float]:
    """Cycles per row and per weight from those of two models. Rows cost no less than nothing and no more than most of
    the model of long ones."""
    share = thin.workload.parameters / wide.workload.parameters
    row = (short - share * long) / (_rows(thin) - share * _rows(wide))
    row = min(max(row, 0.0), _MOST_ROWS * long / _rows(wide))
    return row, (long - row * _rows(wide)) / wide.workload.parameters


def _rows(run: KernelRun) -> float:
    return row_cycles(run.workload.weights, run.workload, {run.type: 1.0})


def _matrices_s(run: KernelRun, profile: TargetProfile, cycles: KernelCycles, family: Family) -> float:
    """Seconds of a prompt token without attention."""
    products = 2.0 * run.workload.layers * run.workload.hidden * (run.prefill_depth + run.prompt_tokens / 2)
    attention = products * (cycles.attention_prefill or 0.0)
    return run.prefill_s - attention / (_hertz(profile) * parallel_cores(profile, family, run.threads))


def _streamed(profile: TargetProfile, runs: Sequence[KernelRun], cycles: KernelCycles) -> Memory:
    """The memory of a profile, raised to what the engine's weights were streamed at."""
    memory, most = profile.memory, max(run.threads for run in runs)
    kind = next((run.type for run in runs if run.role == "size"), runs[0].type)
    largest = max(run.workload.streamed_bytes for run in runs if run.type == kind)
    told = f"{cycles.source}: weights streamed while generating"
    # A model that a cache may hold says nothing of memory, unless there is no larger one.
    large = [run for run in runs if run.threads == most and run.workload.streamed_bytes >= largest]
    if memory.streaming is None:
        large = [run for run in runs if run.threads == most]
    streamed = max(_rate(run, profile, cycles) for run in large)
    if memory.effective is None or streamed > memory.effective.value:
        memory = memory.model_copy(update={"effective": Figure(value=streamed, source=told)})
    scan = profile.memory.streaming
    if scan is None:
        return memory
    by_size: dict[float, dict[int, float]] = {}
    for run in runs:
        if run.type == kind and run.role != "large":
            by_size.setdefault(float(run.workload.streamed_bytes), {})[run.threads] = _rate(run, profile, cycles)
    held = max(by_size)
    for run in runs:
        # Beyond what a cache holds the rate is memory's: that of a larger model, unless its kernels are what is slow.
        rate, size = _rate(run, profile, cycles), float(run.workload.streamed_bytes)
        slower, scanned = rate < _CACHED * by_size[held][most], rate > _SCANNED * scan.rate(size, most)
        if run.role == "large" and run.type == kind and slower and scanned:
            by_size[size] = {count: min(by_size[held][count], rate) for count in by_size[held]}
    sizes = sorted(by_size)
    engine = Streaming(sizes_bytes=tuple(sizes), rates=tuple(every_count(by_size[size]) for size in sizes), source=told)
    union = sorted({*scan.sizes_bytes, *sizes})
    rows = (
        tuple(max(scan.rate(size, count), engine.rate(size, count)) for count in range(1, most + 1)) for size in union
    )
    merged = Streaming(sizes_bytes=tuple(union), rates=tuple(rows), source=f"{scan.source}; {told}")
    return memory.model_copy(update={"streaming": merged})


def _rate(run: KernelRun, profile: TargetProfile, cycles: KernelCycles) -> float:
    """Bytes of weights per second while generating."""
    return run.workload.streamed_bytes / _weights_s(run, profile, cycles)


def _weights_s(run: KernelRun, profile: TargetProfile, cycles: KernelCycles) -> float:
    """Seconds of a generated token without the fixed cost of its layers and, where that is known, attention."""
    other_s = run.workload.layers * layer_us(cycles, run.threads) * 1e-6
    if cycles.attention_decode is not None:
        products = 2.0 * run.workload.layers * run.workload.hidden * run.decode_depth
        other_s += products * cycles.attention_decode / (_hertz(profile) * min(run.threads, _cores(profile)))
    return max(run.decode_s - other_s, 0.2 * run.decode_s)


def _prefill_cycles(run: KernelRun, profile: TargetProfile, family: Family) -> float:
    """Cycles per weight: prefill is proportional to them but for attention, so two predictions give the line."""
    settings = RunSettings(
        context=run.prompt_tokens,
        depth=run.prefill_depth,
        threads_prefill=run.threads,
        prompt_tokens=run.prompt_tokens,
    )

    def seconds(cycles: float) -> float:
        changed = family.model_copy(update={"prefill": {**family.prefill, run.type: cycles}})
        return prefill_seconds(run.workload, profile, settings, changed, NO_SCALE)

    at_zero, at_one = seconds(0.0), seconds(1.0)
    return max((run.prefill_s - at_zero) / (at_one - at_zero), 1e-4)


def _decode_cycles(run: KernelRun, profile: TargetProfile, family: Family, cycles: KernelCycles) -> float:
    """Cycles per weight, without those of rows."""
    work = _hertz(profile) * min(run.threads, _cores(profile))
    all_cycles = _arithmetic_s(run, profile, family, cycles) * work
    rows = row_cycles(run.workload.weights, run.workload, cycles.decode_row)
    return max(all_cycles - rows, (1 - _MOST_ROWS) * all_cycles) / run.workload.parameters


def _arithmetic_s(run: KernelRun, profile: TargetProfile, family: Family, cycles: KernelCycles) -> float:
    """Seconds of arithmetic from t = (memory^4 + arithmetic^4)^(1/4) + attention + layers."""
    norm = calibration().norm
    assert profile.memory.effective is not None
    bandwidth, streamed_bytes = profile.memory.effective.value, run.workload.streamed_bytes
    if profile.memory.by_threads or profile.memory.streaming is not None:
        bandwidth = bandwidth_at(profile, family, bandwidth, run.threads, streamed_bytes)
    weights_s = _weights_s(run, profile, cycles)
    memory_s = streamed_bytes / bandwidth
    arithmetic_s = float(max(weights_s**norm - memory_s**norm, 0.0) ** (1 / norm))
    return max(arithmetic_s, _LEAST_ARITHMETIC * memory_s)


def _layer_us(narrow: Sequence[KernelRun], profile: TargetProfile, family: Family, threads: int) -> float:
    """Fixed microseconds of a layer on a number of threads: what is left when the arithmetic is taken off."""
    run = next((run for run in narrow if run.threads == threads), narrow[0])
    cycles = run.workload.parameters * family.decode_of(run.type)
    arithmetic_s = cycles / (_hertz(profile) * min(run.threads, _cores(profile)))
    return max(run.decode_s - arithmetic_s, 0.2 * run.decode_s) / run.workload.layers * 1e6


def _parallel_loss(runs: Sequence[KernelRun]) -> float:
    """a of the speed-up n / (1 + a (n - 1)), the median over types and thread counts; 0 with one count."""
    alone = {run.type: run.prefill_s for run in runs if run.threads == 1}
    losses = [
        (run.threads * run.prefill_s / alone[run.type] - 1) / (run.threads - 1)
        for run in runs
        if run.threads > 1 and run.type in alone
    ]
    return min(max(statistics.median(losses), 0.0), 0.9) if losses else 0.0


def _hertz(profile: TargetProfile) -> float:
    assert profile.cores is not None
    return profile.cores.fast_ghz.value * GB


def _cores(profile: TargetProfile) -> int:
    assert profile.cores is not None
    return profile.cores.fast
