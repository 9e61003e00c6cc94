"""Second moments of what goes into each matrix, from the unquantised model reading calibration text, layer by layer.

Needs torch and transformers. The text's hidden states go through one layer after the other, so only that layer's
moments are in memory (4 bytes times the square of each input's width), and nothing is computed behind the last layer
that is asked for. Matrices that read the same input share its moments. Knows neither types nor rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelm.progress import Progress
from exporter.architectures.base import TensorDescription
from exporter.checkpoint import Checkpoint
from exporter.device import DeviceChoice
from exporter.reference import open_transformers
from exporter.transformers_model import decoder_layers, module_of

WINDOW = 512
WINDOWS = 24
TABLES = -1
"""The group of the output matrix, after all layers."""

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class CalibrationWindows:
    """Token ids that the model reads, all windows of one length, and the name of their text."""

    windows: tuple[tuple[int, ...], ...]
    text: str

    @property
    def tokens(self) -> int:
        return sum(map(len, self.windows))


@dataclass(frozen=True)
class MomentSource:
    """Where the moments of a checkpoint's inputs can be had from."""

    checkpoint: Checkpoint
    text: CalibrationWindows
    progress: Progress
    device: DeviceChoice = "auto"

    def by_group(self, wanted: Sequence[TensorDescription]) -> Iterator[tuple[int, Mapping[str, Floats]]]:
        """(layer or ``TABLES``, moments (columns, columns) by tensor name) of all wanted matrices, in order of use.

        Raises ``MissingDependencyError`` or ``CheckpointError`` when transformers cannot compute the checkpoint, and
        ``DoesNotFitError`` when it does not fit on the device.
        """
        groups: dict[int, list[TensorDescription]] = {}
        for tensor in wanted:
            groups.setdefault(group_of(tensor), []).append(tensor)
        order = sorted(groups, key=lambda group: (group == TABLES, group))
        stages = 1 + (order[-1] if order[-1] != TABLES else max([0, *groups]))
        with (
            open_transformers(self.checkpoint, self.progress, device=self.device) as model,
            self.progress.stage("calibrating", stages, unit="layers") as stage,
        ):
            yield from _Reader(model, self.checkpoint, self.text, stage.advance).read(groups, order)


def spread_windows(ids: Sequence[int], name: str, length: int, windows: int = WINDOWS) -> CalibrationWindows:
    """Up to ``windows`` windows spread over a text; one shorter one if it is shorter than a window."""
    count = min(windows, max(1, len(ids) // length))
    step = (len(ids) - length) // max(count - 1, 1) if len(ids) > length else 0
    return CalibrationWindows(tuple(tuple(ids[index * step : index * step + length]) for index in range(count)), name)


def group_of(tensor: TensorDescription) -> int:
    """The layer of a matrix, ``TABLES`` for the output matrix."""
    parts = tensor.name.split(".")
    return int(parts[1]) if parts[0] == "blk" else TABLES


class _Stop(Exception):  # noqa: N818  (not an error: everything that was looked for has been seen)
    pass


@dataclass
class _Call:
    """How a layer is called beside its hidden states, and whether it answers with a tuple."""

    arguments: tuple[Any, ...] = ()
    named: dict[str, Any] = field(default_factory=dict)
    in_tuple: bool = False


class _Reader:
    """Takes one model through the text."""

    def __init__(
        self, model: Any, checkpoint: Checkpoint, text: CalibrationWindows, advance: Callable[[], None]
    ) -> None:
        import torch

        self._model, self._checkpoint, self._text, self._advance = model, checkpoint, text, advance
        self._layers = decoder_layers(model)
        self._head = model.get_output_embeddings()
        self._modules = dict(model.named_modules())
        self._calls = [_Call() for _ in self._layers]
        self._final_norm: Any = None
        self._states: list[Any] = []
        self._ids = [torch.tensor([window], device=model.device) for window in text.windows]

    def read(
        self, groups: Mapping[int, Sequence[TensorDescription]], order: Sequence[int]
    ) -> Iterator[tuple[int, Mapping[str, Floats]]]:
        """All groups in order; layers between them are passed."""
        self._look_at_calls()
        self._states = [self._embedded(ids) for ids in self._ids]
        last = len(self._layers) - 1 if TABLES in groups else order[-1]
        for index in range(last + 1):
            found = self._pass(index, groups.get(index, ()))
            self._advance()
            if index in groups:
                yield index, found
        if TABLES in groups:
            yield TABLES, self._tables(groups[TABLES])

    def _pass(self, index: int, wanted: Sequence[TensorDescription]) -> Mapping[str, Floats]:
        """Take the hidden states through a layer; the moments of the wanted matrices on the way."""
        import torch

        layer, call = self._layers[index], self._calls[index]
        sums = _Sums({tensor.name: module_of(self._model, self._checkpoint, tensor) for tensor in wanted})
        with sums.watching(), torch.inference_mode():
            for position, state in enumerate(self._states):
                answer = layer(state, *call.arguments, **call.named)
                self._states[position] = answer[0] if call.in_tuple else answer
        return sums.moments(self._text.tokens)

    def _tables(self, wanted: Sequence[TensorDescription]) -> Mapping[str, Floats]:
        import torch

        total: Any = None
        with torch.inference_mode():
            for state in self._states:
                rows = self._final_norm(state)
                rows = rows.reshape(-1, rows.shape[-1])
                total = rows.T @ rows if total is None else total.addmm_(rows.T, rows)
        moments: Floats = total.cpu().numpy() / self._text.tokens
        return {tensor.name: moments for tensor in wanted}

    def _look_at_calls(self) -> None:
        """Run one window to see how the model calls its layers and what comes before its output matrix."""
        hooks = []
        for layer, call in zip(self._layers, self._calls, strict=True):
            hooks.append(layer.register_forward_pre_hook(_note_arguments(call), with_kwargs=True))
            hooks.append(layer.register_forward_hook(_note_answer(call)))
        leaves: list[Any] = [None]
        modules = [item for item in self._modules.values() if item is not self._head and not list(item.children())]
        hooks += [module.register_forward_hook(_note_leaf(leaves)) for module in modules]
        hooks.append(self._head.register_forward_pre_hook(_stop))
        self._run(self._ids[0], hooks)
        self._final_norm = leaves[0]

    def _embedded(self, ids: Any) -> Any:
        """What the first layer reads."""
        seen: list[Any] = []

        def keep(_module: Any, arguments: Any, named: Any) -> None:
            seen.append(arguments[0] if arguments else named["hidden_states"])
            raise _Stop

        self._run(ids, [self._layers[0].register_forward_pre_hook(keep, with_kwargs=True)])
        return seen[0]

    def _run(self, ids: Any, hooks: Sequence[Any]) -> None:
        import torch

        try:
            with torch.inference_mode():
                self._model(ids, use_cache=False)
        except _Stop:
            pass
        finally:
            for hook in hooks:
                hook.remove()


def _note_arguments(call: _Call) -> Callable[[Any, Any, Any], None]:
    def note(_module: Any, arguments: Any, named: Any) -> None:
        call.arguments = tuple(arguments[1:])
        call.named = {name: value for name, value in named.items() if name != "hidden_states"}

    return note


def _note_answer(call: _Call) -> Callable[[Any, Any, Any], None]:
    def note(_module: Any, _arguments: Any, answer: Any) -> None:
        call.in_tuple = isinstance(answer, tuple)

    return note


def _note_leaf(leaves: list[Any]) -> Callable[[Any, Any, Any], None]:
    def note(module: Any, _arguments: Any, _answer: Any) -> None:
        leaves[0] = module

    return note


def _stop(_module: Any, _arguments: Any) -> None:
    raise _Stop


class _Sums:
    """Sums of products of the inputs of modules. Modules that are given the same tensor share a sum."""

    def __init__(self, modules: Mapping[str, Any]) -> None:
        self._modules = modules
        self._totals: dict[int, Any] = {}
        self._owners: dict[int, int] = {}  # module -> the module whose sum is its own
        self._latest: tuple[Any, int] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count what goes into the modules inside."""
        hooks = [module.register_forward_pre_hook(self._add) for module in set(self._modules.values())]
        try:
            yield
        finally:
            self._latest = None
            for hook in hooks:
                hook.remove()

    def _add(self, module: Any, arguments: Any) -> None:
        given, key = arguments[0], id(module)
        if self._latest is not None and self._latest[0] is given:
            self._owners[key] = self._latest[1]
            return
        self._latest, self._owners[key] = (given, key), key
        rows = given.reshape(-1, given.shape[-1])
        if key in self._totals:
            self._totals[key].addmm_(rows.T, rows)
        else:
            self._totals[key] = rows.T @ rows

    def moments(self, tokens: int) -> dict[str, Floats]:
        """By the names that the modules were given under."""
        found = {key: total.cpu().numpy() / np.float32(tokens) for key, total in self._totals.items()}
        return {name: found[self._owners[id(module)]] for name, module in self._modules.items()}
