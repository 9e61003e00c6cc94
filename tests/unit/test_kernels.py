"""Runs of the engine's kernels turned into a profile: prediction has to give back what was measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgelm.errors import ProfileError
from targets.calibration import calibration
from targets.catalogue import workload_from_figures
from targets.kernels import KernelRun, throughput_gflops, with_kernels
from targets.predict import RunSettings, family_of, layer_us, predict_speed
from targets.profile import Figure, Streaming, TargetProfile, load_profile, parse_profile, profile_toml
from targets.workload import TypedWeights, Workload

PROMPT = 128


def workload(kind: str, parameters: int, bits: float) -> Workload:
    size_bytes = round(parameters * bits / 8)
    weights = (TypedWeights(kind, parameters, size_bytes),)
    return Workload("gguf", "llama", parameters, size_bytes, weights, None, 6, 1024, 320, 1024)


def run(kind: str, threads: int, prefill_s: float, decode_s: float, bits: float = 4.5) -> KernelRun:
    return KernelRun(kind, threads, "type", workload(kind, 90_000_000, bits), PROMPT, prefill_s, decode_s)


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
    KernelRun("Q8_0", 2, "narrow", NARROW, PROMPT, 1e-4, 1 / 2000),
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


SCAN = Streaming(
    sizes_bytes=(20e6, 500e6), rates=((20e9, 40e9), (10e9, 18e9)), source="measured: made up for this test"
)


def sized(layers: int, threads: int, rate: float) -> KernelRun:
    """A model of as many layers of 15 M weights whose weights come at ``rate`` bytes per second."""
    model = replace(workload("Q8_0", 15_000_000 * layers, 8.5), layers=layers)
    return KernelRun("Q8_0", threads, "size", model, PROMPT, 1 / 500, model.streamed_bytes / rate)


def test_the_read_rate_depends_on_the_size_of_a_model(profile: TargetProfile) -> None:
    scanned = profile.model_copy(update={"memory": profile.memory.model_copy(update={"streaming": SCAN})})
    sizes = [sized(2, 1, 21e9), sized(2, 2, 42e9), sized(16, 1, 14e9), sized(16, 2, 28e9)]
    typed = [replace(sized(6, 1, 18e9), role="type"), replace(sized(6, 2, 36e9), role="type")]
    told = with_kernels(scanned, [*typed, *RUNS[2:], *sizes])
    streaming = told.memory.streaming
    assert streaming is not None
    # The engine was faster than the scan at both sizes; the cost of layers comes off, so a little more than was put in.
    assert streaming.rate(32e6, 2) == pytest.approx(42e9, rel=0.3)
    assert streaming.rate(32e6, 2) >= 42e9
    assert streaming.rate(255e6, 1) == pytest.approx(14e9, rel=0.3)
    assert streaming.rate(255e6, 2) < 0.8 * streaming.rate(32e6, 2)
    assert told.memory.effective is not None
    assert told.memory.effective.value == pytest.approx(28e9, rel=0.3)
    settings = RunSettings(context=PROMPT, threads_decode=2, threads_prefill=2)
    small, large = (run.workload for run in sizes[::2])
    per_weight = [1 / (predict_speed(model, told, settings).decode_tps * model.parameters) for model in (small, large)]
    assert per_weight[1] > 1.3 * per_weight[0]


def test_a_cache_s_rate_ends_where_a_larger_model_streams_as_fast_as_memory(profile: TargetProfile) -> None:
    scanned = profile.model_copy(update={"memory": profile.memory.model_copy(update={"streaming": SCAN})})
    sizes = [sized(2, 1, 21e9), sized(2, 2, 60e9), sized(6, 1, 21e9), sized(6, 2, 60e9)]
    typed = [replace(item, role="type") for item in sizes[2:]]
    large = replace(sized(12, 2, 24e9), role="large")
    slow = replace(large, decode_s=2 * large.decode_s)  # half of what a scan reaches: its kernels are slow
    rates = {}
    for name, more in (("none", []), ("large", [large]), ("slow", [slow])):
        memory = with_kernels(scanned, [*typed, *RUNS[2:], *sizes, *more]).memory
        assert memory.streaming is not None
        rates[name] = memory.streaming.rate(90e6, 2), memory.streaming.rate(800e6, 2)
    assert rates["none"] == rates["slow"]
    assert rates["large"][0] == rates["none"][0]
    assert rates["large"][1] == pytest.approx(24e9, rel=0.2)
    assert rates["none"][1] >= 60e9


def test_kernels_of_weights_as_filed_are_told_apart(profile: TargetProfile) -> None:
    filed = replace(RUNS[2], role="as_filed", prefill_s=0.0, decode_s=1 / 40)
    told = with_kernels(profile, [*RUNS, filed])
    cycles, without = told.kernel_cycles, with_kernels(profile, RUNS).kernel_cycles
    assert cycles is not None
    assert without is not None
    assert cycles.model_copy(update={"decode_as_filed": {}}) == without
    assert list(cycles.decode_as_filed) == ["Q4_0"]
    assert cycles.decode_as_filed["Q4_0"] > 2 * cycles.decode["Q4_0"]
    again = parse_profile(profile_toml(told).encode(), "me.toml").kernel_cycles
    assert again is not None
    assert again.decode_as_filed["Q4_0"] == pytest.approx(cycles.decode_as_filed["Q4_0"], rel=0.001)


def test_rates_are_interpolated_and_held_at_the_ends() -> None:
    assert SCAN.rate(1e6, 1) == SCAN.rate(20e6, 1) == 20e9
    assert SCAN.rate(9e9, 5) == SCAN.rate(500e6, 2) == 18e9
    assert SCAN.rate(100e6, 1) == pytest.approx(15e9)  # the middle of 20 and 500 in logarithms


def test_attention_is_what_a_deep_run_takes_longer(profile: TargetProfile) -> None:
    flat = run("Q8_0", 2, 1 / 900, 1 / 110, 8.5)
    deep = replace(flat, role="deep", prefill_s=1.5 / 900, decode_s=1.8 / 110, prefill_depth=384, decode_depth=528)
    told = with_kernels(profile, [*RUNS, deep])
    assert told.kernel_cycles is not None
    assert told.kernel_cycles.attention_decode is not None
    assert told.kernel_cycles.attention_prefill is not None
    settings = RunSettings(context=1024, depth=528, threads_decode=2)
    assert predict_speed(flat.workload, told, settings).decode_tps == pytest.approx(110 / 1.8, rel=0.07)
    behind = RunSettings(context=1024, depth=384, prompt_tokens=PROMPT, threads_prefill=2)
    assert predict_speed(flat.workload, told, behind).prefill_tps == pytest.approx(900 / 1.5, rel=0.01)
    assert parse_profile(profile_toml(told).encode(), "me.toml").kernel_cycles is not None
    # Nothing is known of attention without flash attention: it counts as the other.
    assert told.kernel_cycles.plain_decode is None
    plain = replace(settings, flash_attention=False)
    assert predict_speed(flat.workload, told, plain) == predict_speed(flat.workload, told, settings)
    # A difference that is noise tells nothing.
    none = with_kernels(profile, [*RUNS, replace(deep, prefill_s=1 / 901, decode_s=1 / 111)]).kernel_cycles
    assert none is not None
    assert none.attention_decode is none.attention_prefill is None


def test_attention_without_flash_attention_has_figures_of_its_own(profile: TargetProfile) -> None:
    flat = run("Q8_0", 2, 1 / 900, 1 / 110, 8.5)
    deep = replace(flat, role="deep", prefill_s=1.5 / 900, decode_s=1.8 / 110, prefill_depth=384, decode_depth=528)
    plain = replace(deep, role="plain", prefill_s=2.0 / 900, decode_s=1.2 / 110)
    told = with_kernels(profile, [*RUNS, deep, plain])
    told = parse_profile(profile_toml(told).encode(), "me.toml")
    settings = RunSettings(context=1024, depth=528, threads_decode=2)
    for flash, decode, prefill in ((True, 1.8, 1.5), (False, 1.2, 2.0)):
        kind = replace(settings, flash_attention=flash)
        assert predict_speed(flat.workload, told, kind).decode_tps == pytest.approx(110 / decode, rel=0.07)
        behind = replace(kind, depth=384, prompt_tokens=PROMPT, threads_prefill=2)
        assert predict_speed(flat.workload, told, behind).prefill_tps == pytest.approx(900 / prefill, rel=0.01)


def test_a_type_may_cost_more_in_a_large_model(profile: TargetProfile) -> None:
    model = workload("Q4_0", 180_000_000, 4.5)
    large = KernelRun("Q4_0", 2, "large", model, PROMPT, 1 / 650, 1 / 40)
    told = with_kernels(profile, [*RUNS, large])
    settings = RunSettings(context=PROMPT, threads_decode=2)
    assert predict_speed(model, told, settings).decode_tps == pytest.approx(40, rel=0.07)
    assert predict_speed(RUNS[2].workload, told, settings).decode_tps == pytest.approx(160, rel=0.07)
    between = predict_speed(workload("Q4_0", 130_000_000, 4.5), told, settings).decode_tps
    assert 40 < between < 160
    again = parse_profile(profile_toml(told).encode(), "me.toml")
    assert predict_speed(model, again, settings).decode_tps == pytest.approx(40, rel=0.07)


WIDE = replace(workload("Q4_0", 90_000_000, 4.5), weights=(TypedWeights("Q4_0", 90_000_000, 50_625_000, 70_000),))
THIN = replace(
    workload("Q4_0", 90_000_000, 4.5),
    weights=(TypedWeights("Q4_0", 90_000_000, 50_625_000, 150_000),),
    layers=40,
    hidden=512,
)
ROWS = (
    run("Q8_0", 1, 1 / 500, 1 / 70, 8.5),
    run("Q8_0", 2, 1 / 900, 1 / 110, 8.5),
    KernelRun("Q4_0", 1, "type", WIDE, PROMPT, 1 / 700, 1 / 120),
    KernelRun("Q4_0", 2, "type", WIDE, PROMPT, 1 / 1260, 1 / 180),
    KernelRun("Q4_0", 1, "thin", THIN, PROMPT, 1 / 550, 1 / 95),
    KernelRun("Q8_0", 1, "narrow", NARROW, PROMPT, 1e-4, 1 / 1500),
    KernelRun("Q8_0", 2, "narrow", NARROW, PROMPT, 1e-4, 1 / 1000),
)


@pytest.mark.parametrize("index", [2, 3, 4])
def test_models_of_short_rows_are_given_back_as_well(profile: TargetProfile, index: int) -> None:
    one = ROWS[index]
    told = with_kernels(profile, ROWS)
    again = parse_profile(profile_toml(told).encode(), "me.toml")
    settings = RunSettings(
        context=PROMPT, prompt_tokens=PROMPT, threads_decode=one.threads, threads_prefill=one.threads
    )
    for known in (told, again):
        speed = predict_speed(one.workload, known, settings)
        assert speed.decode_tps == pytest.approx(1 / one.decode_s, rel=0.02)
        assert speed.prefill_tps == pytest.approx(1 / one.prefill_s, rel=0.05)


def test_rows_that_nobody_counted_are_as_long_as_the_model_is_wide(profile: TargetProfile) -> None:
    told = with_kernels(profile, ROWS)
    settings = RunSettings(context=PROMPT, threads_decode=1, threads_prefill=1)

    def speeds(rows: int) -> tuple[float, float]:
        model = replace(THIN, weights=(TypedWeights("Q4_0", 90_000_000, 50_625_000, rows),))
        speed = predict_speed(model, told, settings)
        return speed.prefill_tps, speed.decode_tps

    assert speeds(0) == pytest.approx(speeds(90_000_000 // 512), rel=1e-5)
    assert speeds(0) < speeds(100_000)


def test_layers_cost_what_they_did_on_as_many_threads(profile: TargetProfile) -> None:
    cycles = with_kernels(profile, ROWS).kernel_cycles
    assert cycles is not None
    assert cycles.layer_single_us is not None
    assert cycles.layer_single_us < cycles.layer_us
    told = [layer_us(cycles, threads) for threads in (1, 2, 4)]
    assert told == pytest.approx([cycles.layer_single_us, cycles.layer_us, cycles.layer_us])
    text = profile_toml(with_kernels(profile, ROWS)).replace("decode_threads = 2\n", "")
    with pytest.raises(ProfileError, match="need decode_threads"):
        parse_profile(text.encode(), "me.toml")


@pytest.mark.parametrize(
    "broken",
    ["sizes_mb = [2, 1]\ngbs = [[1.0], [1.0]]", "sizes_mb = [1, 2]\ngbs = [[1.0]]", "sizes_mb = [1]\ngbs = [[]]"],
)
def test_a_damaged_table_of_rates_is_refused(profile: TargetProfile, broken: str) -> None:
    text = profile_toml(profile) + f'\n[memory.streaming]\n{broken}\nsource = "measured: here"\n'
    with pytest.raises(ProfileError, match="streaming"):
        parse_profile(text.encode(), "me.toml")
