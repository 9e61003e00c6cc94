"""The grid of an export: scales of blocks as a bundle stores them, between whose steps training moves single numbers.

An export by measured damage rounds better than libggml's plain rounding: its scales were searched for what matters, its
numbers make up for one another's errors. Training begins with exactly that, and learns which step each number takes
(straight through, as in ``fake_quant``) and how wide the steps of each block are: the numbers in half precision that
its scales and offsets are multiples of. What comes out is stored as bytes of the type, since a scale cannot always be
found again from the numbers. Matrices of types without such steps stay what the bundle holds, and the others learn
around them. Needs torch to train.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgelm.bundle import TensorPlan
from exporter import ggml
from exporter.architectures.base import TensorDescription, ordered_rows
from exporter.block_layouts import CODEBOOK, LAYOUTS, NEAREST, RUN, half
from exporter.checkpoint import TensorReader, open_checkpoint, open_source
from exporter.ggml import Bytes, Floats

_BLOCK_ROWS = 512
# A bundle's numbers may lie farther from the weights than the nearest steps do, to make up for others' errors; the
# squared distance of another model's, or of one trained on, is a hundred times that.
_FARTHEST = 4.0
# An estimate: what a block may be narrower and wider than the bundle has it, so that one gone astray stays a number.
_NARROWEST, _WIDEST = 0.25, 4.0


@dataclass(frozen=True)
class Grid:
    """A matrix as a type stores it: ``stored`` (rows, bytes of a row), rows in the order of the model's parameter."""

    kind: str
    stored: Bytes

    @property
    def columns(self) -> int:
        """Numbers of a row."""
        kind = ggml.type_named(self.kind)
        return int(self.stored.shape[1]) // kind.block_bytes * kind.block

    @property
    def has_zero(self) -> bool:
        """Whether zero is one of a block's steps, whatever its scale, and training may take it."""
        layout = LAYOUTS.get(self.kind)
        return layout is not None and not layout.codebook and len(layout.halves) == 1

    def values(self) -> Floats:
        """The numbers (rows, columns)."""
        shape = (len(self.stored), self.columns)
        return ggml.dequantize(self.stored.reshape(-1), self.kind, shape[0] * shape[1]).reshape(shape)

    def steps(self) -> tuple[Floats, Floats | None]:
        """Scale and offset of each ``RUN`` numbers, both (rows, columns / RUN)."""
        layout, scales, offsets = LAYOUTS[self.kind], [], []
        for block in self._parts():
            each, from_zero = layout.steps(self._blocks(self.stored[block]))
            scales.append(each[:, ::RUN].copy())
            if from_zero is not None:
                offsets.append(from_zero[:, ::RUN].copy())
        shape = (len(self.stored), -1)
        return np.concatenate(scales).reshape(shape), np.concatenate(offsets).reshape(shape) if offsets else None

    def halves(self) -> tuple[Floats, ...]:
        """What the scales of each block are multiples of, and its offsets where it has some, each (rows, blocks)."""
        blocks = self._blocks(self.stored)
        return tuple(half(blocks, at).reshape(len(self.stored), -1) for at in LAYOUTS[self.kind].halves)

    def with_halves(self, halves: Sequence[Floats]) -> Grid:
        """The same numbers with other ``halves``, rounded to half precision."""
        stored = self.stored.copy()
        blocks = self._blocks(stored)  # a view
        for at, values in zip(LAYOUTS[self.kind].halves, halves, strict=True):
            blocks[:, at : at + 2] = values.astype(np.float16).reshape(-1, 1).view(np.uint8)
        return Grid(self.kind, stored)

    def holding(self, values: Floats) -> Grid:
        """The same scales with the numbers nearest to ``values`` (rows, columns); itself where there are no steps."""
        if self.kind not in LAYOUTS:
            return self
        layout, stored = LAYOUTS[self.kind], self.stored.copy()
        for block in self._parts():
            blocks = self._blocks(stored[block])  # a view
            scales, offsets = layout.steps(blocks)
            wanted = values[block].reshape(scales.shape)
            wanted = wanted if offsets is None else wanted - offsets
            whole = np.rint(np.divide(wanted, scales, out=np.zeros_like(scales), where=scales != 0))
            whole = np.clip(whole, layout.lowest, layout.highest)
            whole = NEAREST[whole.astype(np.intp) + 128] if layout.codebook else whole - layout.lowest
            layout.store(blocks, whole.astype(np.uint8))
        return Grid(self.kind, stored)

    def _parts(self) -> Iterator[slice]:
        for start in range(0, len(self.stored), _BLOCK_ROWS):
            yield slice(start, min(start + _BLOCK_ROWS, len(self.stored)))

    def _blocks(self, rows: Bytes) -> Bytes:
        return rows.reshape(-1, ggml.type_named(self.kind).block_bytes)


def read_grids(
    artifact: Path, plans: Sequence[TensorPlan], descriptions: Mapping[str, TensorDescription]
) -> dict[str, Grid]:
    """What a GGUF file holds of all quantised matrices, by name of the parameter.

    ``plans`` and ``descriptions`` are those of the model that is to be trained. Tensors that are stored otherwise than
    planned and those that are part of a parameter or computed from it are left out. Raises ``CheckpointError``.
    """
    bundle, shared = open_checkpoint(open_source(str(artifact))), [item.source_name for item in plans]
    found = {}
    with TensorReader() as reader:
        for plan in plans:
            tensor, description = bundle.tensors.get(plan.name), descriptions[plan.name]
            whole = shared.count(plan.source_name) == 1 and description.values is None and not description.skipped
            plain = not description.transposed and (description.scale, description.offset) == (1.0, 0.0)
            same = tensor is not None and (tensor.type, tensor.shape) == (plan.type, plan.shape)
            quantised = ggml.type_named(plan.type).is_quantized and len(plan.shape) == 2
            if tensor is None or not (whole and plain and same and quantised):
                continue
            rows = reader.read(tensor, 0, tensor.size_bytes).reshape(plan.shape[0], -1)
            back = np.argsort(ordered_rows(np.arange(len(rows)), description))
            found[plan.source_name] = Grid(plan.type, np.ascontiguousarray(rows[back]))
    return found


def fits(grid: Grid, weight: Floats) -> bool:
    """Whether a grid was made for these weights (rows, columns), and not for another model or before more training."""
    if weight.shape != (len(grid.stored), grid.columns):
        return False
    ones = np.ones(grid.columns, dtype=np.float32)  # some types want to be told what matters
    plain = ggml.dequantize(ggml.quantize(weight, grid.kind, importance=ones), grid.kind, weight.size)
    plain = plain.reshape(weight.shape)
    nearest, found = (float(np.square(item - weight, dtype=np.float64).sum()) for item in (plain, grid.values()))
    return found <= _FARTHEST * nearest


class Held:
    """A parameter that is on the device what a bundle stores, whatever training makes of it. ``grid`` is that."""

    def __init__(self, grid: Grid, parameter: Any) -> None:
        import torch

        self._grid = grid
        self._values = torch.from_numpy(grid.values()).to(parameter.device, parameter.dtype)
        parameter.data = self._values.clone()
        self.factors: tuple[Any, ...] = ()

    def __call__(self, _values: Any) -> Any:
        """What is stored (rows, columns)."""
        return self._values

    def stored(self, _parameter: Any) -> Grid:
        """As the bundle has it."""
        return self._grid


class OnGrid:
    """One parameter on its grid, on the parameter's device.

    Where the bundle chose another step than the nearest, the parameter is moved there: training begins with exactly
    what the bundle holds. ``factors`` are trained, too, each (rows, blocks, 1) and one to begin with: by how much a
    block's steps are wider than the bundle's, and its offsets larger. Which step a number takes goes by the bundle's
    steps throughout, so that a block that grows takes its numbers along.
    """

    def __init__(self, grid: Grid, parameter: Any) -> None:
        import torch

        self._grid, layout = grid, LAYOUTS[grid.kind]
        self._range = (layout.lowest, layout.highest)

        def there(values: Floats) -> Any:
            return torch.from_numpy(values).to(parameter.device)

        scales, offsets = grid.steps()
        self._scales = there(scales)[..., None]
        self._inverse = torch.where(self._scales == 0, 0.0, 1 / self._scales)
        self._offsets = None if offsets is None else there(offsets)[..., None]
        self._codebook = (there(NEAREST).long(), there(CODEBOOK)) if layout.codebook else None
        self._halves = tuple(there(values)[..., None] for values in grid.halves())
        self.factors = tuple(torch.nn.Parameter(torch.ones_like(values)) for values in self._halves)
        stored = there(grid.values()).to(parameter.dtype)
        far = (self(parameter.data) - stored).reshape(*self._scales.shape[:2], RUN).abs() > 0.01 * self._scales.abs()
        parameter.data = torch.where(far.reshape_as(stored), stored, parameter.data)

    def __call__(self, values: Any) -> Any:
        """``values`` (rows, columns) at the nearest steps, in their own type and on their device."""
        runs = values.reshape(*self._scales.shape[:2], RUN)
        if self._offsets is not None:
            runs = runs - self._offsets
        whole = (runs * self._inverse).round_().clamp_(*self._range)
        if self._codebook is not None:
            nearest, codebook = self._codebook
            whole = codebook[nearest[whole.long() + 128]]
        found = self._of_blocks(whole.mul_(self._scales)).mul_(self._growth(0))
        if self._offsets is not None:
            found = found.add_(self._moved(self._offsets))
        return found.reshape_as(values).to(values.dtype)

    def learn(self, values: Any, gradient: Any) -> None:
        """Set the gradients of the factors, where ``gradient`` (rows, columns) is that of the ``values`` as called."""
        gradient, scaled = self._of_blocks(gradient), self._of_blocks(values)
        if self._offsets is not None:
            moved = self._moved(self._offsets)
            self._set_gradient(1, gradient * moved)
            scaled = scaled - moved
        self._set_gradient(0, gradient * scaled)

    def _set_gradient(self, index: int, products: Any) -> None:
        import torch

        growth, total = self._growth(index), products.sum(dim=-1, keepdim=True)
        self.factors[index].grad = torch.where(growth > 0, total / growth, 0.0)  # 0: too small for half precision

    def stored(self, parameter: Any) -> Grid:
        """The parameter's values as the type stores them."""
        values = np.ascontiguousarray(parameter.detach().float().cpu().numpy())
        halves = [begun * self._growth(index) for index, begun in enumerate(self._halves)]
        return self._grid.holding(values).with_halves([item.cpu().numpy() for item in halves])

    def _of_blocks(self, values: Any) -> Any:
        """(rows, blocks, numbers of a block)"""
        return values.reshape(*self._halves[0].shape[:2], -1)

    def _growth(self, index: int) -> Any:
        """Factors of scales (0) or offsets (1) within their bounds, as half precision leaves them."""
        import torch

        begun = self._halves[index]
        grown = begun * self.factors[index].data.clamp(_NARROWEST, _WIDEST)
        return torch.where(begun == 0, 1.0, grown.half().float() / begun)

    def _moved(self, offsets: Any) -> Any:
        """The bundle's ``offsets`` of runs as they are now, of each number (rows, blocks, numbers of a block)."""
        return self._of_blocks(offsets.expand(-1, -1, RUN)) * self._growth(1)


def on_grid(grid: Grid, parameter: Any) -> OnGrid | Held:
    """A parameter that trains on its grid, or that cannot."""
    return (OnGrid if grid.kind in LAYOUTS else Held)(grid, parameter)
