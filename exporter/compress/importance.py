"""How much layers, neurons, heads and channels matter, measured on windows of text.

Three measures: ``activation`` (mean magnitude of what a unit puts out, times the norm of the weights that read it),
``fisher`` (expected squared change of the log-likelihood when a unit is removed, to first order: the square of
activation times gradient, labels sampled from the model itself; Molchanov et al. 2019, arXiv:1906.10771) and
``magnitude`` (norms of weights alone). Layers count by block influence, 1 - cosine of what goes in and comes out (Men
et al. 2024, arXiv:2403.03853), or by the KL divergence that their removal causes, one after the other. Needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edgelm.progress import Progress, Stage
from exporter.compress.shape import Shape, head_size, shape_of

Measure = Literal["activation", "fisher", "magnitude"]
DepthMeasure = Literal["influence", "kl"]
_SEED = 5


@dataclass(frozen=True)
class Importance:
    """Higher matters more. Tensors: ``neurons`` (layers, neurons), ``heads`` (layers, KV heads), ``hidden`` (width).

    ``layers`` are in the order in which they may go: the least important first.
    """

    layers: tuple[int, ...]
    neurons: Any
    heads: Any
    hidden: Any


def measure(
    model: Any,
    windows: Sequence[Sequence[int]],
    wanted: Shape,
    progress: Progress,
    *,
    units: Measure = "activation",
    depth: DepthMeasure = "influence",
) -> Importance:
    """Measure what ``wanted`` asks to remove; the rest costs nothing. ``windows`` are token ids on the model's device.

    Memory: the model and the activations of one window (with gradients for ``fisher``).
    """
    full = shape_of(model.config)
    gauge = _Gauge(model, units)
    narrower = (full.neurons, full.kv_heads, full.hidden) != (wanted.neurons, wanted.kv_heads, wanted.hidden)
    if narrower:
        with progress.stage("measuring importance", len(windows), unit="windows") as stage:
            gauge.over(windows, stage)
    order = tuple(range(full.layers))
    if wanted.layers < full.layers:
        removed = full.layers - wanted.layers
        order = _by_kl(model, windows, removed, progress) if depth == "kl" else _by_influence(model, windows, progress)
    neurons, heads, hidden = gauge.scores()
    return Importance(order, neurons, heads, hidden)


class _Gauge:
    """Hooks that add up a score per unit."""

    def __init__(self, model: Any, units: Measure) -> None:
        import torch

        self.model, self.units = model, units
        self.layers = model.model.layers
        config = model.config
        self.kv_heads, self.head_size = config.num_key_value_heads, head_size(config)
        self.neurons = torch.zeros(len(self.layers), config.intermediate_size, dtype=torch.float64)
        self.heads = torch.zeros(len(self.layers), self.kv_heads, dtype=torch.float64)
        self.hidden = torch.zeros(config.hidden_size, dtype=torch.float64)

    def over(self, windows: Sequence[Sequence[int]], stage: Stage) -> None:
        """Run all windows."""
        if self.units == "magnitude":
            stage.advance(len(windows))
            return
        import torch

        handles = []
        for index, layer in enumerate(self.layers):
            handles.append(layer.mlp.down_proj.register_forward_pre_hook(self._watch(self._add_neurons, index)))
            handles.append(layer.self_attn.o_proj.register_forward_pre_hook(self._watch(self._add_heads, index)))
            handles.append(layer.mlp.register_forward_pre_hook(self._watch(self._add_hidden, index)))
        generator = torch.Generator(device=self.model.device).manual_seed(_SEED)
        try:
            for window in windows:
                self._window(window, generator)
                stage.advance()
        finally:
            for handle in handles:
                handle.remove()

    def _window(self, window: Sequence[int], generator: Any) -> None:
        import torch

        ids = torch.tensor([list(window)], device=self.model.device)
        if self.units == "activation":
            with torch.no_grad():
                self.model(ids, use_cache=False)
            return
        embedded = self.model.get_input_embeddings()(ids).detach().requires_grad_(True)
        logits = self.model(inputs_embeds=embedded, use_cache=False).logits[0].float()
        with torch.no_grad():
            labels = torch.multinomial(torch.softmax(logits, dim=-1), 1, generator=generator)[:, 0]
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        self.model.zero_grad(set_to_none=True)

    def _watch(self, add: Any, index: int) -> Any:
        def hook(_module: Any, inputs: tuple[Any, ...]) -> None:
            values = inputs[0]
            if self.units == "activation":
                add(index, values.detach().abs().double().flatten(0, -2).mean(dim=0).cpu())
            else:
                values.register_hook(
                    lambda gradient: add(index, (values.detach() * gradient).double().flatten(0, -2).cpu())
                )

        return hook

    def _add_neurons(self, index: int, values: Any) -> None:
        if values.dim() == 1:
            self.neurons[index] += values * self._column_norms(self.layers[index].mlp.down_proj)
        else:
            self.neurons[index] += values.square().sum(dim=0)

    def _add_heads(self, index: int, values: Any) -> None:
        if values.dim() == 1:
            weighted = values * self._column_norms(self.layers[index].self_attn.o_proj)
            self.heads[index] += weighted.reshape(self.kv_heads, -1).sum(dim=1)
        else:
            self.heads[index] += values.reshape(len(values), self.kv_heads, -1).sum(dim=2).square().sum(dim=0)

    def _add_hidden(self, _index: int, values: Any) -> None:
        self.hidden += values if values.dim() == 1 else values.square().sum(dim=0)

    @staticmethod
    def _column_norms(linear: Any) -> Any:
        return linear.weight.detach().double().norm(dim=0).cpu()

    def scores(self) -> tuple[Any, Any, Any]:
        """Sums over all windows; by ``magnitude`` the norms of what reads each unit."""
        if self.units == "magnitude":
            for index, layer in enumerate(self.layers):
                self.neurons[index] = self._column_norms(layer.mlp.down_proj)
                norms = self._column_norms(layer.self_attn.o_proj).square()
                self.heads[index] = norms.reshape(self.kv_heads, -1).sum(dim=1).sqrt()
                self.hidden += self._column_norms(layer.mlp.gate_proj)
        return self.neurons, self.heads, self.hidden


def _by_influence(model: Any, windows: Sequence[Sequence[int]], progress: Progress) -> tuple[int, ...]:
    import torch

    layers = model.model.layers
    changed = torch.zeros(len(layers), dtype=torch.float64)
    with progress.stage("measuring layers", len(windows), unit="windows") as stage, torch.no_grad():
        for window in windows:
            ids = torch.tensor([list(window)], device=model.device)
            states = model(ids, use_cache=False, output_hidden_states=True).hidden_states
            for index in range(len(layers) - 1):
                alike = torch.cosine_similarity(states[index][0], states[index + 1][0]).double().mean()
                changed[index] += 1 - float(alike)  # the sums stay in the host's memory
            # The last state comes after the final norm, so the last layer's own output is not among them.
            changed[-1] = float("inf")
            stage.advance()
    return tuple(int(index) for index in changed.argsort())


def _by_kl(model: Any, windows: Sequence[Sequence[int]], removed: int, progress: Progress) -> tuple[int, ...]:
    """Greedy: each time the layer goes whose absence, after those before it, costs the least KL to the whole model."""
    import torch

    layers = model.model.layers
    # The first and the last: of a corpus of the teacher's own words and of texts one of each.
    ids = torch.tensor([list(windows[0]), list(windows[-1])], device=model.device)
    gone: list[int] = []
    total = sum(len(layers) - count for count in range(removed))
    with progress.stage("measuring layers", total, unit="trials") as stage, torch.no_grad():
        whole = torch.log_softmax(model(ids, use_cache=False).logits.float(), dim=-1)
        for _ in range(removed):
            costs: dict[int, float] = {}
            for index in range(len(layers)):
                if index in gone:
                    continue
                with _without(layers, [*gone, index]):
                    found = torch.log_softmax(model(ids, use_cache=False).logits.float(), dim=-1)
                costs[index] = float((whole.exp() * (whole - found)).sum(dim=-1).mean())
                stage.advance()
            gone.append(min(costs, key=lambda index: costs[index]))
    return (*gone, *(index for index in range(len(layers)) if index not in gone))


class _without:  # noqa: N801  (reads as a phrase where it is used)
    """Layers pass their input on while the block runs."""

    def __init__(self, layers: Any, gone: Sequence[int]) -> None:
        self._handles = [layers[index].register_forward_hook(self._skip) for index in gone]

    @staticmethod
    def _skip(_module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        return (inputs[0], *output[1:]) if isinstance(output, tuple) else inputs[0]

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
