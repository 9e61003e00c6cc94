"""``sensitivity.collect`` for models that do not fit into memory: the same statistics, a layer at a time, into a store.

Forward, what goes into every layer is kept on disk. Labels are drawn behind the head. Backward, each layer is computed
once more from what was kept, its gradients go to the layer before it and its statistics to the store. Whoever is
interrupted goes on at the layer that was reached. Needs torch; knows no storage types.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelm.progress import Progress, Stage
from exporter.architectures import describe
from exporter.architectures.base import ModelDescription, TensorDescription
from exporter.checkpoint import Checkpoint
from exporter.device import DeviceChoice
from exporter.layerwise import LayerwiseModel, open_layerwise
from exporter.sensitivity import (
    LABELS_SEED,
    Collector,
    Pass,
    embedding_factor,
    finished,
    measured_tensors,
    outer_statistics,
    place_of,
    statistics_of,
)
from exporter.statistics_store import DamagedStoreError, StatisticsStore

Floats = npt.NDArray[np.float32]


def collect_by_layers(
    checkpoint: Checkpoint,
    windows: Sequence[Sequence[int]],
    store: StatisticsStore,
    progress: Progress,
    *,
    device: DeviceChoice = "auto",
) -> None:
    """Put statistics of every matrix that can be quantised into a store, from windows of token ids of one length.

    Memory: the largest layer with its activations and moments, or the head with the logits of one window. Raises what
    ``open_layerwise`` raises, ``DoesNotFitError`` when the store's disk is full, and ``DamagedStoreError``.
    """
    if store.measured:
        return
    description = describe(checkpoint)
    with open_layerwise(checkpoint, device=device) as model:
        steps = 2 * len(model.layers) + 1
        with progress.stage("measuring sensitivity", steps, unit="layers") as stage:
            _Run(model, checkpoint, description, windows, store, stage).all()


@dataclass(frozen=True)
class _Run:
    model: LayerwiseModel
    checkpoint: Checkpoint
    description: ModelDescription
    windows: Sequence[Sequence[int]]
    store: StatisticsStore
    stage: Stage

    def all(self) -> None:
        """Everything that is not in the store yet."""
        ids = [self.model.ids(window) for window in self.windows]
        with self.model.hold(self.model.table):
            embedded = [self.model.table(item).detach() for item in ids]
            factors = [embedding_factor(self.model.table, *pair) for pair in zip(ids, embedded, strict=True)]
        self.model.look(embedded[0])
        matrices, body, head = measured_tensors(self.description)
        layers = self._by_layer([matrices[name] for name in body])
        count = len(self.model.layers)
        reached = next((index for index in range(count + 1) if self._gradients(index) is not None), None)
        if reached is None:
            self._forward(embedded)
            self._head(head)
            reached = count
        else:
            self.stage.advance(2 * count + 1 - reached)
        gradients: Sequence[Any] | None = self._gradients(reached)
        assert gradients is not None
        for index in reversed(range(reached)):
            gradients = self._backward(index, layers.get(index, {}), gradients)
            self.stage.advance()
        self._outer(head, list(zip(ids, factors, embedded, gradients, strict=True)))
        self.store.finish_measuring()

    def _by_layer(self, body: Sequence[TensorDescription]) -> Mapping[int, Mapping[str, TensorDescription]]:
        """Matrices by the layer whose modules multiply by them."""
        owners = {id(module): index for index, layer in enumerate(self.model.layers) for module in layer.modules()}
        found: dict[int, dict[str, TensorDescription]] = {}
        for item in body:
            module, _ = place_of(self.model.model, self.checkpoint, item)
            found.setdefault(owners[id(module)], {})[item.name] = item
        return found

    def _forward(self, embedded: Sequence[Any]) -> None:
        """Keep what goes into every layer, and what comes out of the last."""
        import torch

        count = len(self.model.layers)
        kept = next((index for index in range(count + 1) if self.store.state(f"input-{index}") is None), count + 1)
        with torch.no_grad():
            if kept == 0:
                states = [self.model.enter(item) for item in embedded]
                self._keep("input", 0, states)
            else:
                states = self._inputs(kept - 1)
                self.stage.advance(kept - 1)
            for index in range(max(kept - 1, 0), count):
                with self.model.hold(self.model.layers[index]):
                    states = [self.model.apply(index, state) for state in states]
                self._keep("input", index + 1, states)
                self.stage.advance()

    def _head(self, head: str) -> None:
        """Draw labels in the windows' order, put the head's statistics into the store and keep gradients."""
        import torch

        count = len(self.model.layers)
        run = Pass(self.model.model, Collector({}), head)
        generator = torch.Generator().manual_seed(LABELS_SEED)
        gradients = []
        with self.model.hold(self.model.head):
            for state in self._inputs(count):
                state.requires_grad_(True)
                run.read(lambda state=state: self.model.leave(state), generator)  # type: ignore[misc]
                gradients.append(state.grad)
        self.store.put(head, statistics_of(run.head_sums))
        self._keep("gradient", count, gradients)
        self.store.drop_state(f"input-{count}")
        self.stage.advance()

    def _backward(
        self, index: int, matrices: Mapping[str, TensorDescription], gradients: Sequence[Any]
    ) -> Sequence[Any]:
        """Compute a layer again, put the statistics of its matrices into the store; gradients of what it reads."""
        import torch

        modules = {name: place_of(self.model.model, self.checkpoint, item) for name, item in matrices.items()}
        collector = Collector(modules)
        found = []
        with self.model.hold(self.model.layers[index]):
            handles = collector.attach()
            try:
                for state, gradient in zip(self._inputs(index), gradients, strict=True):
                    state.requires_grad_(True)
                    torch.autograd.backward(self.model.apply(index, state), gradient)
                    found.append(state.grad)
            finally:
                for handle in handles:
                    handle.remove()
        for name, statistics in finished(collector, list(matrices), matrices, self.description, self.checkpoint):
            self.store.put(name, statistics)
        self._keep("gradient", index, found)
        self.store.drop_state(f"gradient-{index + 1}")
        self.store.drop_state(f"input-{index}")
        return found

    def _outer(self, head: str, windows: Sequence[tuple[Any, Any, Any, Any]]) -> None:
        """What the embedding's errors do; windows are ids, factor of the embedding, what came out and gradients."""
        import torch

        run = Pass(self.model.model, Collector({}), head)
        for ids, factor, embedded, gradient in windows:
            embedded.requires_grad_(True)
            torch.autograd.backward(self.model.enter(embedded), gradient)
            run.add_lookup(ids, factor, embedded.grad)
        outer = outer_statistics(run, self.store.statistics(head), head, self.description)
        for name, statistics in outer.items():
            self.store.put(name, statistics)

    def _keep(self, name: str, index: int, values: Sequence[Any]) -> None:
        self.store.put_state(f"{name}-{index}", [value.detach().cpu().numpy() for value in values])

    def _inputs(self, index: int) -> list[Any]:
        """What goes into a layer, behind the last one what comes out of it, where the model computes."""
        import torch

        kept = self.store.state(f"input-{index}")
        if kept is None:
            raise DamagedStoreError(f"what layer {index} reads is not there")
        return [torch.from_numpy(values).to(self.model.place) for values in kept]

    def _gradients(self, index: int) -> list[Any] | None:
        import torch

        kept = self.store.state(f"gradient-{index}")
        return None if kept is None else [torch.from_numpy(values).to(self.model.place) for values in kept]
