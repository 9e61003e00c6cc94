"""Training through quantisation: the forward pass sees weights as a GGUF type stores them, the gradient passes by.

The straight-through estimator (Bengio et al. 2013, arXiv:1308.3432): for a step each planned weight is replaced by what
is left of it after quantising and dequantising, gradients are taken there, and applied to the full-precision weight.
Quantising is libggml's own, so what is trained for is exactly what an export writes, or goes to the nearest steps of a
grid that a bundle stores (``grid``). Needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import numpy as np

from exporter import ggml
from exporter.compress.grid import Grid, OnGrid, on_grid
from exporter.ggml import Floats
from exporter.gguf import usable_cpus

_ROWS_BYTES = 2**20


class FakeQuantizer:
    """Quantises the named parameters of a model in place, for as long as a block runs. ``types``: name -> ggml type.

    Those in ``grids`` move to what their grid holds, and are quantised to its steps.
    """

    def __init__(self, model: Any, types: Mapping[str, str], grids: Mapping[str, Grid] = MappingProxyType({})) -> None:
        parameters = dict(model.named_parameters())
        self._grids = {name: (parameters[name], on_grid(grid, parameters[name])) for name, grid in grids.items()}
        self._weights = {name: (parameters[name], kind) for name, kind in types.items() if name not in grids}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, parameters hold their quantised values; afterwards their own again."""
        weights = [weight for weight, _ in (*self._weights.values(), *self._grids.values())]
        kept = [weight.data for weight in weights]
        changed = _all_quantized([(weight.data, kind) for weight, kind in self._weights.values()])
        changed += [grid(weight.data) for weight, grid in self._grids.values()]
        for weight, values in zip(weights, changed, strict=True):
            weight.data = values
        try:
            yield
        finally:
            for weight, values in zip(weights, kept, strict=True):
                weight.data = values

    def factors(self) -> dict[str, Any]:
        """What is trained beside the parameters: how blocks of grids grow, by a name of its own."""
        return {
            f"{name}.{index}": factor
            for name, (_, grid) in self._grids.items()
            for index, factor in enumerate(grid.factors)
        }

    def learn(self) -> None:
        """Give the factors their gradients, from those of the parameters. To be called inside ``applied``."""
        for weight, grid in self._grids.values():
            if isinstance(grid, OnGrid):
                grid.learn(weight.data, weight.grad)

    def settle(self) -> dict[str, Grid]:
        """Put the parameters that have a grid onto it for good; what each is stored as, by name."""
        import torch

        found = {}
        for name, (weight, grid) in self._grids.items():
            found[name] = grid.stored(weight)
            weight.data = torch.from_numpy(found[name].values()).to(weight.device, weight.dtype)
        return found


def quantized(values: Any, kind: str) -> Any:
    """A tensor (rows, columns) after quantising to ``kind`` and back, on its own device and in its own type."""
    return _all_quantized([(values, kind)])[0]


def _all_quantized(tensors: Sequence[tuple[Any, str]]) -> list[Any]:
    """Each (tensor, kind) as above, blocks of rows of all tensors shared among the processors."""
    import torch

    found = []
    with ThreadPoolExecutor(usable_cpus()) as pool:
        waiting = []
        for values, kind in tensors:
            rows = np.ascontiguousarray(values.detach().float().cpu().numpy())
            out = np.empty_like(rows)
            found.append(out)
            step = max(1, _ROWS_BYTES // rows[0].nbytes)
            for start in range(0, len(rows), step):
                block = slice(start, start + step)
                waiting.append(pool.submit(_round, rows[block], kind, out[block]))
        for item in waiting:
            item.result()  # an error of a block is raised here
    return [
        torch.from_numpy(out).to(values.device, values.dtype) for out, (values, _) in zip(found, tensors, strict=True)
    ]


def _round(rows: Floats, kind: str, out: Floats) -> None:
    out[:] = ggml.dequantize(ggml.quantize(rows, kind), kind, rows.size).reshape(rows.shape)
