"""Training through quantisation: the forward pass sees weights as a GGUF type stores them, the gradient passes by.

The straight-through estimator (Bengio et al. 2013, arXiv:1308.3432): for a step each planned weight is replaced by what
is left of it after quantising and dequantising, gradients are taken there, and applied to the full-precision weight.
Quantising is libggml's own, so what is trained for is exactly what an export writes. Needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from exporter import ggml
from exporter.gguf import usable_cpus

_ROWS_BYTES = 4 * 2**20


class FakeQuantizer:
    """Quantises the named parameters of a model in place, for as long as a block runs. ``types``: name -> ggml type."""

    def __init__(self, model: Any, types: Mapping[str, str]) -> None:
        parameters = dict(model.named_parameters())
        self._weights = {name: (parameters[name], kind) for name, kind in types.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, parameters hold their quantised values; afterwards their own again."""
        kept = {name: weight.data for name, (weight, _) in self._weights.items()}
        for name, (weight, kind) in self._weights.items():
            weight.data = quantized(kept[name], kind)
        try:
            yield
        finally:
            for name, (weight, _) in self._weights.items():
                weight.data = kept[name]


def quantized(values: Any, kind: str) -> Any:
    """A tensor (rows, columns) after quantising to ``kind`` and back, on its own device and in its own type."""
    import torch

    rows = np.ascontiguousarray(values.detach().float().cpu().numpy())
    out = np.empty_like(rows)
    step = max(1, _ROWS_BYTES // rows[0].nbytes)

    def work(start: int) -> None:
        part = rows[start : start + step]
        raw = ggml.quantize(part, kind)
        out[start : start + step] = ggml.dequantize(raw, kind, part.size).reshape(part.shape)

    with ThreadPoolExecutor(usable_cpus()) as pool:
        list(pool.map(work, range(0, len(rows), step)))
    return torch.from_numpy(out).to(values.device, values.dtype)
