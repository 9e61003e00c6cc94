"""What the engine's kernels reach on one machine: runs of random models, turned into the constants of prediction.

A run is one model whose matrices all have one type, with its seconds per prompt token and per generated token. The
formulas of ``predict`` are solved for the cycles of that type, so that prediction gives the measured speed back. Knows
no engine: ``runtime.kernels`` does the runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from targets.calibration import Family, calibration
from targets.predict import NO_SCALE, RunSettings, bandwidth_at, parallel_cores, prefill_seconds
from targets.profile import GB, Figure, KernelCycles, TargetProfile
from targets.workload import Workload

# Of the seconds that memory alone takes, at least this share is arithmetic: below it the type is limited by memory
# anyway and the fourth power hides the difference.
_LEAST_ARITHMETIC = 0.5


@dataclass(frozen=True, slots=True)
class KernelRun:
    """One random model of one type on a number of threads. ``narrow`` models are all layers and hardly any weights."""

    type: str
    threads: int
    narrow: bool
    workload: Workload
    prompt_tokens: int
    prefill_s: float
    decode_s: float


def with_kernels(profile: TargetProfile, runs: Sequence[KernelRun]) -> TargetProfile:
    """A detected profile with what the runs tell: cycles by type, cost of a layer, thread scaling and, where the
    engine streams weights faster than a plain scan of memory, its bandwidth."""
    family = calibration().family(profile.kernels)
    wide = [run for run in runs if not run.narrow]
    most = max(run.threads for run in wide)
    loss = _parallel_loss([run for run in wide if run.type == wide[0].type])
    family = family.model_copy(update={"parallel_loss": loss})
    best = [run for run in wide if run.threads == most]
    prefill: dict[str, float] = {}
    for run in sorted(best, key=lambda item: item.type != "F16"):  # F16 first: attention computes in it
        prefill[run.type] = _prefill_cycles(run, profile, family)
        family = family.model_copy(update={"prefill": family.prefill | prefill})
    layer_us = _layer_us([run for run in runs if run.narrow], profile, family)
    streamed = max(run.workload.streamed_bytes / (run.decode_s - run.workload.layers * layer_us * 1e-6) for run in best)
    known = profile.memory.effective.value if profile.memory.effective is not None else 0.0
    bandwidth = max(streamed, known)
    share = bandwidth_at(profile, family, 1.0, most) if profile.memory.by_threads else 1.0
    decode = {run.type: _decode_cycles(run, profile, bandwidth * share, layer_us) for run in best}
    source = f"measured: random models of {wide[0].workload.parameters / 1e6:.0f} M weights, 1 to {most} threads"
    cycles = KernelCycles(prefill=prefill, decode=decode, layer_us=layer_us, parallel_loss=loss, source=source)
    changes: dict[str, object] = {"kernel_cycles": cycles}
    if streamed > known:
        told = Figure(value=streamed, source=f"{source}: weights streamed while generating")
        changes["memory"] = profile.memory.model_copy(update={"effective": told})
    return profile.model_copy(update=changes)


def throughput_gflops(profile: TargetProfile, kind: str) -> float | None:
    """Matrix throughput in prefill, all threads, 2 operations per weight; None when the type was not measured."""
    if profile.kernel_cycles is None or kind not in profile.kernel_cycles.prefill or profile.cores is None:
        return None
    family = calibration().family(profile.kernels)
    family = family.model_copy(update={"parallel_loss": profile.kernel_cycles.parallel_loss})
    cores = parallel_cores(profile, family, int(profile.threads_prefill.value))
    return 2e-9 * profile.cores.fast_ghz.value * GB * cores / profile.kernel_cycles.prefill[kind]


def _prefill_cycles(run: KernelRun, profile: TargetProfile, family: Family) -> float:
    """Cycles per weight: prefill is proportional to them but for attention, so two predictions give the line."""
    settings = RunSettings(context=run.prompt_tokens, threads_prefill=run.threads, prompt_tokens=run.prompt_tokens)

    def seconds(cycles: float) -> float:
        changed = family.model_copy(update={"prefill": {**family.prefill, run.type: cycles}})
        return prefill_seconds(run.workload, profile, settings, changed, NO_SCALE)

    at_zero, at_one = seconds(0.0), seconds(1.0)
    return max((run.prefill_s - at_zero) / (at_one - at_zero), 1e-4)


def _decode_cycles(run: KernelRun, profile: TargetProfile, bandwidth: float, layer_us: float) -> float:
    """Cycles per weight from t = (memory^4 + arithmetic^4)^(1/4) + layers."""
    norm = calibration().norm
    weights_s = run.decode_s - run.workload.layers * layer_us * 1e-6
    memory_s = run.workload.streamed_bytes / bandwidth
    arithmetic_s = float(max(weights_s**norm - memory_s**norm, 0.0) ** (1 / norm))
    arithmetic_s = max(arithmetic_s, _LEAST_ARITHMETIC * memory_s)
    return arithmetic_s * _hertz(profile) * min(run.threads, _cores(profile)) / run.workload.parameters


def _layer_us(narrow: Sequence[KernelRun], profile: TargetProfile, family: Family) -> float:
    """Fixed microseconds of a layer at the most threads: what is left when the arithmetic is taken off."""
    run = max(narrow, key=lambda item: item.threads)
    cycles = run.workload.parameters * family.decode_of(run.type)
    arithmetic_s = cycles / (_hertz(profile) * min(run.threads, _cores(profile)))
    return max(run.decode_s - arithmetic_s, 0.2 * run.decode_s) / run.workload.layers * 1e6


def _parallel_loss(runs: Sequence[KernelRun]) -> float:
    """a of the speed-up n / (1 + a (n - 1)), the median over thread counts; 0 with one count."""
    one = next((run.prefill_s for run in runs if run.threads == 1), None)
    losses = [
        (run.threads * run.prefill_s / one - 1) / (run.threads - 1)
        for run in runs
        if one is not None and run.threads > 1
    ]
    return min(max(statistics.median(losses), 0.0), 0.9) if losses else 0.0


def _hertz(profile: TargetProfile) -> float:
    assert profile.cores is not None
    return profile.cores.fast_ghz.value * GB


def _cores(profile: TargetProfile) -> int:
    assert profile.cores is not None
    return profile.cores.fast
