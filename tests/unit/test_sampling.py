"""Sampling against a plain implementation that sorts everything, and against the distributions it has to draw."""

from __future__ import annotations

import math
import time

import numpy as np
import numpy.typing as npt
import pytest

from edgelm.errors import EngineError, UsageError
from runtime.sampling import Sampler, SamplingOptions, token_logprobs

Row = npt.NDArray[np.float32]


def peaked(vocabulary: int, seed: int) -> Row:
    """Logits as models make them: a few likely tokens above a long tail."""
    random = np.random.default_rng(seed)
    row = random.standard_normal(vocabulary) * 1.5 - 6
    row[random.integers(0, vocabulary, 40)] += random.uniform(4, 12, 40)
    return row.astype(np.float32)


def naive_distribution(row: Row, recent: list[int], options: SamplingOptions) -> dict[int, float]:
    """Probabilities by the book, in llama.cpp's order: penalty, top-k, top-p, min-p, temperature."""
    logits = [float(value) for value in row]
    for token in set(recent[-options.repetition_window :] if options.repetition_window else []):
        value = logits[token]
        logits[token] = value / options.repetition_penalty if value > 0 else value * options.repetition_penalty
    ranked = sorted(range(len(logits)), key=lambda token: -logits[token])
    if options.top_k:
        ranked = ranked[: options.top_k]
    highest = logits[ranked[0]]
    weights = {token: math.exp(logits[token] - highest) for token in ranked}
    if options.top_p < 1:
        total, reached, kept = sum(weights.values()), 0.0, []
        for token in ranked:
            kept.append(token)
            reached += weights[token] / total
            if reached >= options.top_p:
                break
        ranked = kept
    if options.min_p:
        ranked = [token for token in ranked if weights[token] >= options.min_p]
    warm = {token: math.exp((logits[token] - highest) / options.temperature) for token in ranked}
    return {token: weight / sum(warm.values()) for token, weight in warm.items()}


OPTIONS = [
    SamplingOptions(temperature=1.0),
    SamplingOptions(temperature=0.7, top_k=5),
    SamplingOptions(temperature=1.3, top_p=0.8),
    SamplingOptions(temperature=0.9, min_p=0.1),
    SamplingOptions(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02),
    SamplingOptions(temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.3),
    SamplingOptions(temperature=1.0, top_k=3, repetition_penalty=0.5, repetition_window=2),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("vocabulary", [50, 3000])
def test_draws_follow_the_plain_implementation(options: SamplingOptions, vocabulary: int) -> None:
    row = peaked(vocabulary, seed=vocabulary)
    recent = [int(token) for token in np.argsort(-row)[:6]]
    expected = naive_distribution(row, recent, options)
    sampler = Sampler(SamplingOptions(**{**_fields(options), "seed": 7}))
    draws = 4000
    counts: dict[int, int] = {}
    for _ in range(draws):
        token = sampler.pick(row, recent)
        counts[token] = counts.get(token, 0) + 1
    assert set(counts) <= set(expected)
    for token, probability in expected.items():
        # Five standard deviations of a binomial: one false alarm in a million per token.
        slack = 5 * math.sqrt(draws * probability * (1 - probability)) + 1
        assert abs(counts.get(token, 0) - draws * probability) <= slack


def _fields(options: SamplingOptions) -> dict[str, object]:
    return {name: getattr(options, name) for name in SamplingOptions.__slots__}


@pytest.mark.parametrize("flat", [False, True])
def test_a_flat_distribution_keeps_the_whole_nucleus(flat: bool) -> None:
    row = np.zeros(5000, np.float32) if flat else np.linspace(0, 1, 5000, dtype=np.float32)
    options = SamplingOptions(temperature=1.0, top_p=0.5, seed=3)
    sampler = Sampler(options)
    picked = {sampler.pick(row) for _ in range(3000)}
    expected = set(range(5000)) if flat else set(naive_distribution(row, [], options))
    assert picked <= expected
    assert len(picked) > 1000


def test_greedy_takes_the_first_of_the_best_and_ignores_filters() -> None:
    row = np.array([0, 3, 3, 1], np.float32)
    assert Sampler(SamplingOptions(top_k=1, top_p=0.1, min_p=1.0)).pick(row) == 1


def test_greedy_with_penalty_leaves_a_repeated_token() -> None:
    row = np.array([0.0, 3.0, 2.9, -1.0], np.float32)
    sampler = Sampler(SamplingOptions(repetition_penalty=1.5))
    assert sampler.pick(row, [1]) == 2
    assert sampler.pick(row, []) == 1
    assert row.tolist() == pytest.approx([0.0, 3.0, 2.9, -1.0])


def test_the_window_forgets_older_tokens() -> None:
    row = np.array([0.0, 3.0, 2.9], np.float32)
    sampler = Sampler(SamplingOptions(repetition_penalty=1.5, repetition_window=2))
    assert sampler.pick(row, [1, 0, 0]) == 1
    assert sampler.pick(row, [0, 1, 0]) == 2
    assert Sampler(SamplingOptions(repetition_penalty=1.5, repetition_window=0)).pick(row, [1]) == 1


def test_a_seed_repeats_and_no_seed_does_not() -> None:
    row = np.zeros(1000, np.float32)

    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingOptions(temperature=1.0, seed=seed))
        return [sampler.pick(row) for _ in range(20)]

    assert draws(5) == draws(5)
    assert draws(5) != draws(6)
    assert draws(None) != draws(None)


def test_a_read_only_row_is_not_written() -> None:
    row = peaked(100, 1)
    row.flags.writeable = False
    for options in OPTIONS:
        Sampler(options).pick(row, [1, 2, 3])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.5),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_window", -1),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_senseless_options_are_named(field: str, value: float) -> None:
    with pytest.raises(UsageError, match=field):
        Sampler(SamplingOptions(**{field: value}))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_broken_logits_are_an_error(value: float) -> None:
    with pytest.raises(EngineError, match="finite"):
        Sampler(SamplingOptions()).pick(np.full(10, value, np.float32))


@pytest.mark.parametrize("options", OPTIONS)
def test_a_token_is_cheap_at_a_real_vocabulary(options: SamplingOptions) -> None:
    row = peaked(49152, 2)
    sampler = Sampler(options)
    recent = list(range(64))

    def seconds() -> float:
        # CPU time of the quickest of many: other processes do not count.
        started = time.thread_time()
        for _ in range(10):
            sampler.pick(row, recent)
        return (time.thread_time() - started) / 10

    assert min(seconds() for _ in range(15)) < 400e-6  # usually 60 to 150 microseconds


def test_presence_and_frequency_count_what_was_generated_and_nothing_else() -> None:
    """OpenAI's formula: logit - count * frequency - (count > 0) * presence."""
    row = np.array([3.013, 2.637, 2.271, -5.0], np.float32)
    sampler = Sampler(SamplingOptions(presence_penalty=0.3, frequency_penalty=0.2))
    counts = [0, 0, 0, 0]
    for _ in range(20):
        expected = max(range(4), key=lambda token: float(row[token]) - 0.2 * counts[token] - 0.3 * (counts[token] > 0))
        assert sampler.pick(row, [0, 0, 0, 1]) == expected
        counts[expected] += 1
    assert counts[3] == 0
    assert min(counts[:3]) > 0


def test_logit_bias_forbids_and_forces() -> None:
    row = peaked(500, 3)
    best = int(row.argmax())
    assert Sampler(SamplingOptions(logit_bias=((best, -100.0),))).pick(row) != best
    assert Sampler(SamplingOptions(logit_bias=((17, 100.0),))).pick(row) == 17
    assert row[17] == peaked(500, 3)[17]


def test_logprobs_are_of_the_model_and_not_of_the_sampler() -> None:
    row = peaked(3000, 5)
    exact = row.astype(np.float64) - math.log(np.exp(row.astype(np.float64)).sum())
    ranked = np.argsort(-exact)[:7]
    found = token_logprobs(row, 123, 7)
    assert [token for token, _ in found] == [123, *ranked]
    assert [value for _, value in found] == pytest.approx([exact[123], *exact[ranked]], abs=1e-4)
    assert len(token_logprobs(row, 123, 0)) == 1
    assert len(token_logprobs(row[:5], 1, 20)) == 6


@pytest.mark.reference
def test_penalties_and_filters_are_those_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    row = peaked(400, 8)
    recent = [int(token) for token in np.argsort(-row)[:6]]
    options = SamplingOptions(
        temperature=1.0, top_k=30, min_p=0.01, repetition_penalty=1.4, logit_bias=((recent[0], -1.5), (399, 9.0))
    )
    scores = torch.from_numpy(row.copy())[None]
    ids = torch.tensor([recent])
    for processor in (
        processors.SequenceBiasLogitsProcessor({(token,): bias for token, bias in options.logit_bias}),
        processors.RepetitionPenaltyLogitsProcessor(options.repetition_penalty),
        processors.TopKLogitsWarper(options.top_k),
        processors.MinPLogitsWarper(options.min_p),
    ):
        scores = processor(ids, scores)
    expected = torch.softmax(scores[0].double(), -1).numpy()
    sampler = Sampler(SamplingOptions(**{**_fields(options), "seed": 4}))
    draws = 20_000
    counts = np.bincount([sampler.pick(row, recent) for _ in range(draws)], minlength=400) / draws
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(expected))
    assert np.abs(counts - expected).max() < 0.02
