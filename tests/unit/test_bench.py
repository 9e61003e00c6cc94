"""Benchmark runs on the scripted engine: what is counted, what is kept, what makes a run invalid."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgelm.errors import UsageError
from runtime import bench
from runtime.bench import BenchOptions, Measured, check_options, context_needed, measure, summarise
from runtime.memory import MemorySnapshot
from tests.fake_engine import FakeEngine, FakeTokenizer


def run(options: BenchOptions, step_delay_s: float = 0.0) -> tuple[FakeEngine, Measured]:
    engine = FakeEngine(context=context_needed(options), step_delay_s=step_delay_s)
    return engine, measure(engine, FakeTokenizer(), options)


def test_every_repetition_is_kept_and_the_warm_up_is_not() -> None:
    engine, measured = run(BenchOptions(prompt_tokens=16, generated_tokens=4, repetitions=3), step_delay_s=0.002)
    assert len(measured.prefill_tps) == len(measured.decode_tps) == len(measured.ttft_s) == 3
    assert all(0 < tps <= 4 / (4 * 0.002) for tps in measured.decode_tps)
    assert all(0 < tps <= 16 / 0.002 for tps in measured.prefill_tps)
    assert all(seconds >= 0.002 for seconds in measured.ttft_s)
    prefills = [tokens for call in engine.calls for _, tokens, _ in call if len(tokens) == 16]
    assert len(prefills) == 4
    assert len(set(prefills)) == 1  # the same random tokens every time


def test_logits_are_asked_for_the_last_token_only() -> None:
    engine, _ = run(BenchOptions(prompt_tokens=16, generated_tokens=2, repetitions=1))
    assert {wanted for call in engine.calls for _, _, wanted in call} == {"last"}


def test_depth_is_in_the_cache_and_not_timed() -> None:
    options = BenchOptions(prompt_tokens=8, generated_tokens=3, repetitions=1, depth=20)
    engine, _ = run(options)
    assert engine.length() == 20 + 3
    sizes = [len(tokens) for call in engine.calls for _, tokens, _ in call]
    assert sizes.count(20) == 2  # filled before the prefill of the warm-up and of the repetition
    assert sizes.count(8) == 2


def test_figures_can_be_left_out() -> None:
    _, measured = run(BenchOptions(prompt_tokens=0, generated_tokens=2, repetitions=1))
    assert measured.prefill_tps == measured.ttft_s == ()
    assert summarise(measured.prefill_tps) is None
    _, measured = run(BenchOptions(prompt_tokens=4, generated_tokens=0, repetitions=1))
    assert measured.decode_tps == ()


def test_summary() -> None:
    samples = summarise([3.0, 1.0, 2.0])
    assert samples is not None
    assert samples.samples == (3.0, 1.0, 2.0)
    assert (samples.p5, samples.median, samples.p95) == pytest.approx((1.1, 2.0, 2.9))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (BenchOptions(prompt_tokens=-1), "prompt_tokens"),
        (BenchOptions(depth=-1), "depth"),
        (BenchOptions(repetitions=0), "repetitions"),
        (BenchOptions(prompt_tokens=0, generated_tokens=0), "nothing to measure"),
    ],
)
def test_senseless_options(options: BenchOptions, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        check_options(options)


QUIET = MemorySnapshot(100, 100, 50, 50, 0, 5)


def machine(**changes: object) -> bench._Machine:
    return replace(bench._Machine(10.0, 1.0, 100.0, 7, QUIET), **changes)  # type: ignore[arg-type]


def test_what_spoils_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.os, "cpu_count", lambda: 2)
    before = machine()
    quiet = machine(wall_s=20.0, own_cpu_s=21.0, all_cpu_s=120.5)
    assert bench._disturbances(before, quiet, threads=2) == []
    busy = replace(quiet, all_cpu_s=128.0)
    assert "other processes" in bench._disturbances(before, busy, threads=2)[0]
    assert bench._disturbances(before, busy, threads=1) == []  # the second core was free for them
    faults = replace(quiet, memory=replace(QUIET, major_faults=500))
    assert "major faults" in bench._disturbances(before, faults, threads=2)[0]
    swapped = replace(quiet, swapped_in=9, memory=replace(QUIET, swap_bytes=4096))
    assert len(bench._disturbances(before, swapped, threads=2)) == 2


def test_unsteady_samples_are_told() -> None:
    assert bench._unsteady("decode", summarise([100, 101, 99])) == []
    assert "decode varied" in bench._unsteady("decode", summarise([100, 50, 101]))[0]
    assert bench._unsteady("decode", None) == []
