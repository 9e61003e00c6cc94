"""Compensated rounding: valid blocks of every type, and a smaller error where inputs are correlated."""

from __future__ import annotations

import numpy as np
import pytest

from exporter import ggml, rounding

TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K"]


def _problem() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(5)
    columns = 512
    rows = random.standard_normal((96, columns)).astype(np.float32)
    mixing = random.standard_normal((columns, 64)) @ random.standard_normal((64, columns))
    inputs = random.standard_normal((2000, columns)) @ (mixing / 30 + np.eye(columns))
    return rows, (inputs.T @ inputs / len(inputs)).astype(np.float32)


def _output_error(rows: np.ndarray, data: np.ndarray, type_name: str, moment: np.ndarray) -> float:
    error = ggml.dequantize(data, type_name, rows.size).reshape(rows.shape) - rows
    return float(np.einsum("ij,jk,ik->", error, moment, error))


@pytest.mark.parametrize("type_name", TYPES)
def test_output_error_is_well_below_rounding_to_nearest(type_name: str) -> None:
    rows, moment = _problem()
    before = rows.copy()
    data = rounding.quantize(rows, type_name, rounding.compensation(moment))
    importance = np.ascontiguousarray(np.diag(moment))
    nearest = ggml.quantize(rows, type_name, importance=importance)
    assert data.nbytes == nearest.nbytes
    assert ggml.is_valid(data, type_name)
    ratio = _output_error(rows, data, type_name, moment) / _output_error(rows, nearest, type_name, moment)
    assert ratio < 0.6
    np.testing.assert_array_equal(rows, before)


@pytest.mark.parametrize("type_name", TYPES)
def test_uncorrelated_inputs_give_numbers_next_to_the_nearest(type_name: str) -> None:
    rows, _ = _problem()
    data = rounding.quantize(rows, type_name, rounding.compensation(np.eye(512, dtype=np.float32)))
    nearest = ggml.quantize(rows, type_name, importance=np.ones(512, dtype=np.float32))
    ours = _output_error(rows, data, type_name, np.eye(512))
    assert ours == pytest.approx(_output_error(rows, nearest, type_name, np.eye(512)), rel=0.1)


def test_result_can_be_written_into_a_given_buffer() -> None:
    rows, moment = _problem()
    given = rounding.compensation(moment)
    out = np.zeros(96 * 512 // 32 * 18, dtype=np.uint8)
    assert rounding.quantize(rows, "Q4_0", given, out) is out
    np.testing.assert_array_equal(out, rounding.quantize(rows, "Q4_0", given))


def test_the_factor_is_that_of_the_inverse() -> None:
    inputs = np.random.default_rng(3).standard_normal((400, 250))
    moment = (inputs.T @ inputs).astype(np.float32)
    found = rounding.compensation(moment).factor.astype(np.float64)
    damped = moment.astype(np.float64) + rounding.DAMPING * np.trace(moment) / 250 * np.eye(250)
    assert np.allclose(np.tril(found, -1), 0)
    np.testing.assert_allclose(found.T @ found @ damped, np.eye(250), atol=1e-5)
