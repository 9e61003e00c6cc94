"""Runs of the engine's kernels turned into a profile: prediction has to give back what was measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from targets.calibration import calibration
from targets.catalogue import workload_from_figures
from targets.kernels import KernelRun, throughput_gflops, with_kernels
from targets.predict import RunSettings, family_of, predict_speed
from targets.profile import Figure, TargetProfile, load_profile, parse_profile, profile_toml
from targets.workload import TypedWeights, Workload

PROMPT = 128


def workload(kind: str, parameters: int, bits: float) -> Workload:
    size_bytes = round(parameters * bits / 8)
    weights = (TypedWeights(kind, parameters, size_bytes),)
    return Workload("gguf", "llama", parameters, size_bytes, weights, None, 6, 1024, 320, 1024)


def run(kind: str, threads: int, prefill_s: float, decode_s: float, bits: float = 4.5) -> KernelRun:
    return KernelRun(kind, threads, False, workload(kind, 90_000_000, bits), PROMPT, prefill_s, decode_s)


@pytest.fixture
def profile() -> TargetProfile:
    base = load_profile("generic-x86-64")
    figure = Figure(value=12e9, source="measured: for this test")
    assert base.cores is not None
    cores = base.cores.model_copy(update={"fast": 2, "slow": 0})
    memory = base.memory.model_copy(update={"effective": figure, "per_core": figure, "by_threads": ()})
    return base.model_copy(update={"memory": memory, "cores": cores})


NARROW = replace(workload("Q8_0", 5_000_000, 8.5), layers=32, hidden=128)
RUNS = (
    run("Q8_0", 1, 1 / 500, 1 / 70, 8.5),
    run("Q8_0", 2, 1 / 900, 1 / 110, 8.5),
    run("Q4_0", 2, 1 / 1300, 1 / 160),
    run("F16", 2, 1 / 600, 1 / 55, 16.0),
    KernelRun("Q8_0", 2, True, NARROW, PROMPT, 1e-4, 1 / 2000),
)


@pytest.mark.parametrize("index", [1, 2, 3])
def test_prediction_gives_the_measured_speed_back(profile: TargetProfile, index: int) -> None:
    one = RUNS[index]
    measured = with_kernels(profile, RUNS)
    settings = RunSettings(context=PROMPT, prompt_tokens=PROMPT, threads_decode=2, threads_prefill=2)
    speed = predict_speed(one.workload, measured, settings)
    assert speed.prefill_tps == pytest.approx(1 / one.prefill_s, rel=0.01)
    assert speed.decode_tps == pytest.approx(1 / one.decode_s, rel=0.07)


def test_thread_scaling_and_layers_are_taken_over(profile: TargetProfile) -> None:
    cycles = with_kernels(profile, RUNS).kernel_cycles
    assert cycles is not None
    assert cycles.parallel_loss == pytest.approx(2 * 500 / 900 - 1)
    assert 0 < cycles.layer_us < 1e6 / 2000 / 32


def test_weights_streamed_faster_than_the_scan_set_the_bandwidth(profile: TargetProfile) -> None:
    fast = [*RUNS, run("Q6_K", 2, 1 / 600, 1 / 400, 6.5625)]
    measured = with_kernels(profile, fast)
    assert measured.memory.effective is not None
    assert measured.memory.effective.value > 12e9
    slow = with_kernels(profile, [item for item in RUNS if item.type != "F16"])
    assert slow.memory.effective is not None
    assert slow.memory.effective.value == 12e9


def test_types_that_nobody_ran_move_with_the_others(profile: TargetProfile) -> None:
    before = calibration().family(profile.kernels)
    after = family_of(with_kernels(profile, RUNS), calibration())
    ratios = sorted(after.prefill[kind] / before.prefill[kind] for kind in ("Q8_0", "Q4_0", "F16"))
    assert after.prefill["Q3_K"] / before.prefill["Q3_K"] == pytest.approx(ratios[1])


def test_the_file_keeps_what_was_measured(profile: TargetProfile) -> None:
    measured = with_kernels(profile, RUNS).model_copy(update={"id": "me"})
    again = parse_profile(profile_toml(measured).encode(), "me.toml")
    assert again.kernel_cycles is not None
    model = workload_from_figures(parameters=135e6, file_bytes=100 * 2**20, quant="Q4_K_M")
    settings = RunSettings(context=512)
    assert predict_speed(model, again, settings).decode_tps == pytest.approx(
        predict_speed(model, measured, settings).decode_tps, rel=0.01
    )
    int8, f16 = (throughput_gflops(again, kind) for kind in ("Q8_0", "F16"))
    assert int8 is not None
    assert f16 is not None
    assert int8 > f16
    assert throughput_gflops(profile, "Q8_0") is None


def test_what_was_measured_here_wins_over_published_rows() -> None:
    pi = load_profile("raspberry-pi-5")
    assert pi.kernel_cycles is None
    faster = with_kernels(pi, RUNS)
    model = workload_from_figures(parameters=1.2e9, file_bytes=700 * 2**20, quant="Q4_0")
    settings = RunSettings(context=512, threads_prefill=2)
    assert predict_speed(model, faster, settings).prefill_tps > predict_speed(model, pi, settings).prefill_tps
