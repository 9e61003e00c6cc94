"""Every type that ggml can quantise, there and back. The small types make their tables of points first, in seconds."""

from __future__ import annotations

import numpy as np
import pytest

from exporter import ggml

ROWS = np.random.default_rng(7).standard_normal((6, 768), dtype=np.float32)
QUANTIZABLE = [kind for kind in ggml.TYPES.values() if kind.quantizable]


@pytest.mark.parametrize("kind", QUANTIZABLE, ids=lambda kind: kind.name)
def test_every_type_comes_back_near(kind: ggml.GgmlType) -> None:
    importance = np.ones(768, dtype=np.float32)
    data = ggml.quantize(ROWS, kind.name, importance=importance)
    assert data.nbytes == 6 * kind.row_bytes(768)
    back = ggml.dequantize(data, kind.name, ROWS.size).reshape(ROWS.shape)
    # 2 bits and fewer keep little of random numbers, but never less than nothing.
    assert np.mean((back - ROWS) ** 2) < (0.01 if kind.bits > 4.6 else 0.05 if kind.bits > 3.2 else 0.9)
    assert ggml.is_valid(data, kind.name)
