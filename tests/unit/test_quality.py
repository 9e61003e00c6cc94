"""Quality figures: exact against the definition, honest in what they count, loud about nonsense."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import exp, log

import numpy as np
import pytest

from edgelm.errors import ProofError, UsageError
from edgelm.progress import SILENT
from exporter.quality import (
    MIN_CONTEXT,
    Window,
    compare_logits,
    compare_models,
    cut_windows,
    log_softmax,
    windows_between,
)
from runtime.engine import Logits


def test_log_softmax_survives_extremes() -> None:
    logits = np.array([[1e4, 0, -1e4], [-3e38, -3e38, -3e38], [3e38, 0, 0]], dtype=np.float32)
    result = log_softmax(logits)
    assert result.dtype == np.float64
    assert np.isfinite(result).all()
    np.testing.assert_allclose(np.exp(result).sum(axis=1), 1.0, atol=1e-12)
    np.testing.assert_allclose(result[1], -log(3))


def test_kl_is_the_definition() -> None:
    generator = np.random.default_rng(0)
    reference, artifact = (generator.standard_normal((40, 97)).astype(np.float32) * 4 for _ in range(2))
    targets = generator.integers(0, 97, 40)
    result = compare_logits(reference, artifact, targets)
    p, q = (np.exp(values.astype(np.longdouble)) for values in (reference, artifact))
    p, q = p / p.sum(axis=1, keepdims=True), q / q.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(result.kl, (p * np.log(p / q)).sum(axis=1).astype(float), rtol=1e-9)
    np.testing.assert_allclose(result.log_probability, np.log(q[range(40), targets]).astype(float), rtol=1e-9)
    np.testing.assert_allclose(result.log_probability_reference, np.log(p[range(40), targets]).astype(float), rtol=1e-9)
    assert (result.agrees == (p.argmax(axis=1) == q.argmax(axis=1))).all()


def test_known_divergence_of_two_coins() -> None:
    fair, bent = np.log([[0.5, 0.5]]).astype(np.float32), np.log([[0.9, 0.1]]).astype(np.float32)
    expected = 0.5 * log(0.5 / 0.9) + 0.5 * log(0.5 / 0.1)
    assert compare_logits(fair, bent, np.array([0])).kl[0] == pytest.approx(expected, rel=1e-6)


def test_shifted_logits_are_the_same_distribution() -> None:
    logits = np.random.default_rng(1).standard_normal((5, 50)).astype(np.float32)
    result = compare_logits(logits, logits, np.zeros(5, dtype=np.int64))
    assert (result.kl == 0).all()
    assert compare_logits(logits, logits + 8, np.zeros(5, dtype=np.int64)).kl.max() < 1e-9


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_fail_the_proof(bad: float) -> None:
    good = np.zeros((2, 4), dtype=np.float32)
    broken = good.copy()
    broken[1, 2] = bad
    with pytest.raises(ProofError, match="no finite numbers"):
        compare_logits(good, broken, np.array([0, 0]))


def test_windows_hold_enough_predictions_and_do_not_overlap() -> None:
    ids = list(range(9000))
    windows = cut_windows(ids, 2000, length=512)
    assert sum(window.predictions for window in windows) >= 2000
    assert all(window.first == MIN_CONTEXT - 1 for window in windows)
    for before, after in pairwise(windows):
        assert after.tokens[0] > before.tokens[-1]
    assert windows[-1].tokens[-1] > 7000  # spread over the text, not cut from its beginning


def test_windows_begin_with_what_the_model_expects() -> None:
    windows = cut_windows(list(range(100, 900)), 100, length=64, prefix=(1,))
    assert all(window.tokens[0] == 1 and len(window.tokens) == 64 for window in windows)
    assert sum(window.predictions for window in windows) >= 100


def test_windows_fit_exactly_and_not_one_token_less() -> None:
    assert len(cut_windows(list(range(5 * 512)), 2000, length=512)) == 5
    with pytest.raises(UsageError, match="has 2559 tokens; 2560 are needed"):
        cut_windows(list(range(5 * 512 - 1)), 2000, length=512)


class Markov:
    """Logits depend on the position only, so a skipped, doubled or misplaced position changes the figures."""

    def __init__(self, name: str, scale: float, vocabulary: int = 11) -> None:
        self.name, self.vocabulary, self._scale, self._position = name, vocabulary, scale, 0

    def reset(self) -> None:
        self._position = 0

    def append(self, tokens: Sequence[int]) -> Logits:
        positions = np.arange(self._position, self._position + len(tokens))
        self._position += len(tokens)
        table = np.sin(np.arange(self.vocabulary)[None, :] * (positions[:, None] + 1))
        return (table * self._scale).astype(np.float32)


@pytest.mark.parametrize("length", [140, 512, 513])
def test_models_are_compared_position_by_position(length: int) -> None:
    tokens = tuple(int(token) for token in np.random.default_rng(2).integers(0, 11, length))
    window = Window(tokens, first=31)
    result = compare_models(Markov("a", 3.0), Markov("b", 2.0), [window, window], SILENT)
    whole_a, whole_b = Markov("a", 3.0).append(tokens), Markov("b", 2.0).append(tokens)
    once = compare_logits(whole_a[31:-1], whole_b[31:-1], np.array(tokens[32:]))
    assert len(result.kl) == 2 * window.predictions == 2 * (length - 32)
    np.testing.assert_allclose(result.kl, np.tile(once.kl, 2))
    np.testing.assert_allclose(result.log_probability, np.tile(once.log_probability, 2))
    assert exp(-result.log_probability.mean()) == pytest.approx(exp(-once.log_probability.mean()))


def test_models_of_different_vocabularies_are_refused() -> None:
    with pytest.raises(ProofError, match="12 tokens, its reference 11"):
        compare_models(Markov("a", 1.0), Markov("b", 1.0, 12), [Window((1,) * 64, 31)], SILENT)


def test_probes_lie_between_the_windows_that_a_proof_counts() -> None:
    ids = range(10_000)
    counted = {token for window in cut_windows(ids, 900, length=256) for token in window.tokens}
    probes = windows_between(ids, 900, length=256, wanted=3)
    assert [len(probe) for probe in probes] == [256] * 3
    assert len({token for probe in probes for token in probe}) == 3 * 256
    assert not counted & {token for probe in probes for token in probe}
    assert probes[-1][-1] < 10_000
    assert windows_between(range(1500), 900, length=256, wanted=3) == []
