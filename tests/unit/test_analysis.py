"""Predicting KL from damages, and storing statistics."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from edgelm.bundle import CalibrationRecord
from exporter.analysis import Analysis, _packed, _rising, _unpacked
from exporter.sensitivity import TensorStatistics, damage

RECORD = CalibrationRecord(text="t", text_sha256="0" * 64, tokens=1)


def _analysis(*knots: tuple[float, float]) -> Analysis:
    return Analysis("key", RECORD, {}, knots, dict)


def test_prediction_goes_through_what_was_measured() -> None:
    analysis = _analysis((0.001, 0.004), (0.003, 0.008), (0.02, 0.04))
    for lost, kl in analysis.knots:
        assert analysis.predicted_kl(lost) == pytest.approx(kl)
    for low, high in pairwise(analysis.knots):  # a line in logarithms: the middle of two is the middle of both
        assert analysis.predicted_kl((low[0] * high[0]) ** 0.5) == pytest.approx((low[1] * high[1]) ** 0.5)
    assert analysis.predicted_kl(0.0) == pytest.approx(0.002)
    assert analysis.predicted_kl(0.02 * 20 / 3) == pytest.approx(0.2)


def test_knots_without_any_loss_are_no_trouble() -> None:
    analysis = _analysis((0.0, 0.0), (0.01, 0.02))
    assert analysis.predicted_kl(0.005) == pytest.approx(0.01)
    assert analysis.predicted_kl(0.02) == pytest.approx(0.04)


def test_a_single_knot_predicts_itself() -> None:
    assert _analysis((0.001, 0.004)).predicted_kl(0.5) == 0.004
    assert _analysis((0.001, 0.004)).scale == 1.0


def test_knots_that_noise_has_turned_round_are_left_out() -> None:
    assert _rising([(0.02, 0.04), (0.001, 0.004), (0.003, 0.003)]) == ((0.001, 0.004), (0.02, 0.04))
    assert _rising([(0.0, 0.0), (0.0, 0.0), (0.0, 0.0)]) == ((0.0, 0.0),)


def test_statistics_come_back_as_they_were() -> None:
    random = np.random.default_rng(1)
    given = {
        "blk.0.attn_q.weight": TensorStatistics(
            7, random.random(8), random.random((8, 8)).astype(np.float32), random.random(4).astype(np.float32)
        ),
        "token_embd.weight": TensorStatistics(
            7,
            lookup_counts=random.random(5).astype(np.float32),
            lookup_weights=random.random(8).astype(np.float32),
        ),
    }
    found = _unpacked(_packed(given))
    assert list(found) == list(given)
    error = random.standard_normal((4, 8)).astype(np.float32)
    name = "blk.0.attn_q.weight"
    assert damage(error, found[name]) == damage(error, given[name])
    assert found["token_embd.weight"].moment is None


def test_damage_is_half_the_expected_square() -> None:
    """Against its definition: rows' gradients and inputs that are independent of each other."""
    random = np.random.default_rng(2)
    inputs, gradients = random.standard_normal((4000, 6)), random.standard_normal((4000, 3)) * [1, 2, 3]
    error = random.standard_normal((3, 6)).astype(np.float32)
    statistics = TensorStatistics(
        4000,
        moment=(inputs.T @ inputs / 4000).astype(np.float32),
        row_weights=np.square(gradients).mean(axis=0).astype(np.float32),
    )
    expected = 0.5 * np.mean(np.square(np.einsum("ti,ij,tj->t", gradients, error, inputs)))
    assert damage(error, statistics) == pytest.approx(expected, rel=0.1)
