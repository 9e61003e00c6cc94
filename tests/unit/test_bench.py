"""Benchmark runs on the scripted engine: what is counted, what is kept, when it ends."""

from __future__ import annotations

import pytest

from edgelm.errors import UsageError
from runtime.bench import BenchOptions, check_options, context_needed, fewest_of_fastest, points_of
from runtime.points import Point, Runner, Taken, Until, measurement, sustained
from runtime.sensors import Sampler, Sensors
from targets.significance import summarise
from tests.fake_engine import FakeEngine, FakeTokenizer


def run(
    options: BenchOptions, step_delay_s: float = 0.0, *, until: Until | None = None
) -> tuple[FakeEngine, list[Taken]]:
    engine = FakeEngine(context=context_needed(options), sequences=max(options.sequences), step_delay_s=step_delay_s)
    runner = Runner(engine, FakeTokenizer(), Sampler(Sensors(), 0))
    taken, _ = runner.run(points_of(options), Until(options.repetitions))
    return engine, taken


def test_every_repetition_is_kept_and_the_warm_up_is_not() -> None:
    options = BenchOptions(prompts=(16,), generated_tokens=4, repetitions=3)
    engine, (prefill, decode) = run(options, step_delay_s=0.002)
    assert len(prefill.tps) == len(decode.tps) == len(prefill.ttft_s) == 3
    assert all(0 < tps <= 4 / (4 * 0.002) for tps in decode.tps)
    assert all(0 < tps <= 16 / 0.002 for tps in prefill.tps)
    assert all(seconds >= 0.002 for seconds in prefill.ttft_s)
    prefills = [tokens for call in engine.calls for _, tokens, _ in call if len(tokens) == 16]
    assert len(prefills) == 4
    assert len(set(prefills)) == 1  # the same random tokens every time


def test_logits_are_asked_for_the_last_token_only() -> None:
    engine, _ = run(BenchOptions(prompts=(16,), generated_tokens=2, repetitions=1))
    assert {wanted for call in engine.calls for _, _, wanted in call} == {"last"}


def test_depth_is_in_the_cache_and_not_timed() -> None:
    engine, _ = run(BenchOptions(prompts=(8,), generated_tokens=3, repetitions=1, depths=(20,)))
    assert engine.length() == 20 + 3
    sizes = [len(tokens) for call in engine.calls for _, tokens, _ in call]
    assert sizes.count(20) == 2  # filled before the prefill of the warm-up and of the repetition
    assert sizes.count(8) == 2


def test_sequences_are_decoded_together() -> None:
    engine, taken = run(BenchOptions(prompts=(0,), generated_tokens=5, repetitions=2, sequences=(3,)), 0.001)
    together = [call for call in engine.calls if len(call) == 3]
    assert len(together) == 5 + 2 * 5
    assert 0 < max(taken[0].tps) <= 3 * 5 / (5 * 0.001)


def test_a_sweep_is_ordered_as_llama_bench_does_and_figures_can_be_left_out() -> None:
    options = BenchOptions(prompts=(128, 512), generated_tokens=16, depths=(0, 64), sequences=(1, 2))
    assert [point.name for point in points_of(options)] == [
        "pp128",
        "pp512",
        "tg16",
        "tg16 x2",
        "pp128 @ d64",
        "pp512 @ d64",
        "tg16 @ d64",
        "tg16 x2 @ d64",
    ]
    assert [point.kind for point in points_of(BenchOptions(prompts=(0,)))] == ["decode"]
    assert [point.kind for point in points_of(BenchOptions(generated_tokens=0))] == ["prefill"]


def test_repetitions_end_when_the_median_is_known_or_time_is_up() -> None:
    engine = FakeEngine(context=64, step_delay_s=0.01)
    runner = Runner(engine, FakeTokenizer(), Sampler(Sensors(), 0))
    taken, stopped_by = runner.run((Point("decode", 2),), Until(0, deadline_s=0.0))
    assert (len(taken[0].tps), stopped_by) == (1, "time")
    exact = Taken(Point("decode", 2), tps=[100, 100.5, 99.5, 100.2])
    assert not exact.tight  # four are too few
    exact.tps.append(99.9)
    assert exact.tight
    exact.tps += [50.0, 150.0, 60.0, 140.0, 55.0, 145.0]
    assert not exact.tight


def test_ctrl_c_keeps_what_was_measured() -> None:
    engine = FakeEngine(context=64)

    def interrupt(_chunks: object) -> None:
        if len(engine.calls) > 12:
            raise KeyboardInterrupt

    engine.on_forward = interrupt
    runner = Runner(engine, FakeTokenizer(), Sampler(Sensors(), 0))
    taken, stopped_by = runner.run((Point("decode", 3),), Until(100))
    assert stopped_by == "interrupt"
    assert 1 <= len(taken[0].tps) < 100
    found = measurement(taken[0], 1, 0.0)
    assert found is not None
    assert len(found.tps.samples) == len(taken[0].tps)
    assert measurement(Taken(Point("decode", 3)), 1, 0.0) is None


def test_a_long_run_becomes_a_curve() -> None:
    engine = FakeEngine(context=64, step_delay_s=0.005)
    runner = Runner(engine, FakeTokenizer(), Sampler(Sensors(), 0))
    record = sustained(runner, 2.2, 20)
    assert record is not None
    assert 2 <= len(record.points) <= 3
    assert record.seconds >= 2.2
    assert all(0 < point.decode_tps <= 1 / 0.005 for point in record.points)
    assert record.change == pytest.approx(record.last_tps / record.first_tps - 1)


def test_fewer_threads_win_a_tie() -> None:
    assert fewest_of_fastest({1: 50.0, 2: 99.0, 3: 98.0, 4: 100.0}) == 2
    assert fewest_of_fastest({1: 50.0, 2: 90.0, 4: 100.0}) == 4


def test_summary() -> None:
    samples = summarise([3.0, 1.0, 2.0])
    assert samples is not None
    assert samples.samples == (3.0, 1.0, 2.0)
    assert (samples.p5, samples.median, samples.p95) == pytest.approx((1.1, 2.0, 2.9))
    assert samples.interval == (1.0, 3.0)
    assert summarise([]) is None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (BenchOptions(prompts=(-1,)), "prompts"),
        (BenchOptions(depths=(0, -1)), "depths"),
        (BenchOptions(repetitions=-1), "repetitions"),
        (BenchOptions(sequences=(0,)), "sequences"),
        (BenchOptions(max_time_s=0), "max_time_s"),
        (BenchOptions(generated_tokens=0, sustained_s=5), "sustained"),
        (BenchOptions(prompts=tuple(range(1, 300))), "points"),
        (BenchOptions(prompts=(0,), generated_tokens=0), "nothing to measure"),
    ],
)
def test_senseless_options(options: BenchOptions, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        check_options(options)
