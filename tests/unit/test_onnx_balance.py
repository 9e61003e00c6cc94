"""Factors that even out channels: what they are, and that they leave the product alone."""

from __future__ import annotations

import numpy as np

from exporter.onnx_balance import Site, balance_factors


def test_factors_even_out_channels_and_columns() -> None:
    squares = np.asarray([1.0, 256.0, 1.0, 1.0])  # one channel is 16 times the others
    found = balance_factors([Site(("q", "k"))], {"q": squares}, {"q": np.ones(4), "k": np.ones(4)})["q"]
    assert found[1] * 4 == found[0]  # the root of 16: as uneven as the columns become
    assert found[0] == found[2] == found[3]


def test_factors_are_powers_of_two_around_one() -> None:
    generator = np.random.default_rng(0)
    squares = generator.lognormal(0, 4, 64)
    found = balance_factors([Site(("q",))], {"q": squares}, {"q": generator.lognormal(0, 2, 64)})["q"]
    exponents = np.log2(found)
    assert (exponents == np.rint(exponents)).all()
    assert abs(exponents.mean()) < 0.5


def test_dead_channels_get_no_absurd_factor() -> None:
    squares = np.asarray([0.0, 1.0, 1.0, 1.0])
    found = balance_factors([Site(("q",))], {"q": squares}, {"q": np.asarray([1.0, 0.0, 1.0, 1.0])})["q"]
    assert np.isfinite(found).all()
    assert 2.0**-6 <= found.min() <= found.max() <= 2.0**6


def test_heads_that_share_values_share_factors() -> None:
    squares = np.exp2(np.arange(12))  # two heads of values, three of queries each, of two channels
    found = balance_factors([Site(("o",), (2, 3, 2))], {"o": squares}, {"o": np.ones(12)})["o"].reshape(2, 3, 2)
    assert (found == found[:, :1]).all()
    assert found[0, 0, 0] > found[1, 0, 0]
