"""Zeros among the weights of layers: a share of each row, or two of every four neighbours.

Which weights go is decided within each row by magnitude, or by magnitude times the norm of what the weight is
multiplied with (Sun et al. 2023, arXiv:2306.11695). They stay zero while the rest is trained. None of the engines here
computes or stores zeros for less: whoever asks for it is told so. Needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgelm.errors import UsageError
from edgelm.progress import Progress
from exporter.compress.anatomy import ANATOMIES
from exporter.compress.shape import Shape

NO_GAIN = (
    "llama.cpp and ONNX Runtime store and multiply zeros like other numbers: neither the file nor a token gets cheaper"
)
_GROUPED = "2:4"


@dataclass(frozen=True, slots=True)
class Pattern:
    """Zeros per row: ``share`` of it, spread freely, or of every ``of`` neighbours where that is above zero."""

    share: float
    of: int = 0

    def __str__(self) -> str:
        return _GROUPED if self.of else f"{self.share:g}"

    def at(self, progress: float) -> Pattern:
        """What a gradual pruning has reached at a share of its stages; groups come with the last one."""
        return self if progress >= 1 else Pattern(self.share * progress)


def parse_pattern(text: str) -> Pattern:
    """``0.5`` or ``2:4``. Raises ``UsageError``."""
    if text == _GROUPED:
        return Pattern(0.5, 4)
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise UsageError(f"--sparsity {text}: neither a share between 0 and 1 nor {_GROUPED}", hint="give 0.5 or 2:4")
    return Pattern(share)


def check_rows(pattern: Pattern, shape: Shape) -> None:
    """Raises ``UsageError`` when rows do not divide into groups."""
    for name, length in (("width", shape.hidden), ("neurons", shape.neurons)):
        if pattern.of and length % pattern.of:
            raise UsageError(f"--sparsity {pattern}: rows of {length} ({name}) are no multiple of {pattern.of}")


class Masks:
    """Which weights of a model stay, by the names of its parameters (boolean tensors of their shapes)."""

    def __init__(self, model: Any, kept: Mapping[str, Any]) -> None:
        parameters = dict(model.named_parameters())
        self.names = frozenset(kept)
        self._kept = [(parameters[name], mask.to(parameters[name].device)) for name, mask in kept.items()]

    def apply(self) -> None:
        """Set the others to zero."""
        for weight, mask in self._kept:
            weight.data.mul_(mask)

    @property
    def zeros(self) -> float:
        """The share of zeros in these weights now."""
        total = sum(weight.numel() for weight, _ in self._kept)
        return float(sum(int((weight.data == 0).sum()) for weight, _ in self._kept) / total)


def choose_masks(
    model: Any, pattern: Pattern, windows: Sequence[Sequence[int]], progress: Progress, *, by_activation: bool
) -> dict[str, Any]:
    """Masks of every matrix of the layers. ``windows`` are token ids, read by activation only."""
    norms = _input_norms(model, windows, progress) if by_activation else {}
    masks = {}
    for name, linear in _matrices(model):
        scores = linear.weight.detach().abs().float()
        if name in norms:
            scores = scores * norms[name]
        masks[f"{name}.weight"] = _mask(scores, pattern)
    return masks


def _mask(scores: Any, pattern: Pattern) -> Any:
    import torch

    rows, length = scores.shape
    grouped = scores.reshape(rows, -1, pattern.of or length)
    gone = round(pattern.share * grouped.shape[-1])
    # Sorted stably, so that equal scores keep the first.
    order = grouped.argsort(dim=-1, stable=True, descending=True)
    kept = torch.ones_like(grouped, dtype=torch.bool)
    kept.scatter_(-1, order[..., grouped.shape[-1] - gone :], False)
    return kept.reshape(rows, length)


def _matrices(model: Any) -> Iterator[tuple[str, Any]]:
    """Names and modules of what multiplies in layers."""
    path = ANATOMIES[model.config.model_type].layers
    for name, module in model.named_modules():
        if name.startswith(f"{path}.") and type(module).__name__ == "Linear":
            yield name, module


def _input_norms(model: Any, windows: Sequence[Sequence[int]], progress: Progress) -> dict[str, Any]:
    """The root of the sum of squares of each number that a matrix reads, over all tokens."""
    import torch

    squares = {name: torch.zeros(module.in_features, device=model.device) for name, module in _matrices(model)}

    def watch(name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        def hook(_module: Any, inputs: tuple[Any, ...]) -> None:
            squares[name] += inputs[0].detach().float().flatten(0, -2).square().sum(dim=0)

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in _matrices(model)]
    try:
        with progress.stage("measuring weights", len(windows), unit="windows") as stage, torch.no_grad():
            for window in windows:
                model(torch.tensor([list(window)], device=model.device))
                stage.advance()
    finally:
        for handle in handles:
            handle.remove()
    return {name: values.sqrt() for name, values in squares.items()}


def save_masks(path: Path, masks: Mapping[str, Any]) -> None:
    """Keep masks beside a run's state, one bit for each weight."""
    partial = path.with_name(f".partial.{path.name}")
    rows = {name: np.packbits(mask.cpu().numpy(), axis=-1) for name, mask in masks.items()}
    with partial.open("wb") as stream:
        np.savez(stream, **rows)  # type: ignore[arg-type]
    partial.replace(path)


def load_masks(path: Path, model: Any) -> dict[str, Any]:
    """What ``save_masks`` kept, for the model that it was chosen for."""
    import torch

    lengths = {f"{name}.weight": module.in_features for name, module in _matrices(model)}
    with np.load(path, allow_pickle=False) as packed:
        return {
            name: torch.from_numpy(np.unpackbits(packed[name], axis=-1, count=length).astype(bool))
            for name, length in lengths.items()
        }
