"""How much layers, neurons, heads and channels matter, measured on windows of text.

Three measures: ``activation`` (mean magnitude of what a unit puts out, times the norm of the weights that read it),
``fisher`` (expected squared change of the log-likelihood when a unit is removed, to first order: the square of
activation times gradient, labels sampled from the model itself; Molchanov et al. 2019, arXiv:1906.10771) and
``magnitude`` (norms of weights alone). Layers count by block influence, 1 - cosine of what goes in and comes out (Men
et al. 2024, arXiv:2403.03853), or by what their removal costs, one after the other: the KL divergence of predictions,
or 1 - cosine of an encoder's vectors. An encoder's likelihood is taken as normal around its vector, so that ``fisher``
is the squared change of the vector. Needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edgelm.progress import Progress, Stage
from exporter.compress.anatomy import ANATOMIES
from exporter.compress.shape import Shape, kv_heads_of, shape_of

Measure = Literal["activation", "fisher", "magnitude"]
DepthMeasure = Literal["influence", "kl", "cosine"]
Pool = Callable[[Any], Any]
"""Of an encoder: the states of one text's tokens (1, tokens, width) to its vector (1, width), scaled as it is used."""
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
    pool: Pool | None = None,
) -> Importance:
    """Measure what ``wanted`` asks to remove; the rest costs nothing. ``windows`` are token ids on the model's device.

    ``pool`` makes an encoder's vectors and is None for decoders; ``kl`` is for these, ``cosine`` for encoders. Memory:
    the model and the activations of one window (with gradients for ``fisher``).
    """
    full = shape_of(model.config)
    gauge = _Gauge(model, units, pool)
    narrower = (full.neurons, full.kv_heads, full.hidden) != (wanted.neurons, wanted.kv_heads, wanted.hidden)
    if narrower:
        with progress.stage("measuring importance", len(windows), unit="windows") as stage:
            gauge.over(windows, stage)
    order = tuple(range(full.layers))
    if wanted.layers < full.layers:
        removed = full.layers - wanted.layers
        if depth == "influence":
            order = _by_influence(model, windows, progress, final_norm=pool is None)
        else:
            # A decoder has a prediction for each token, an encoder one vector for each text. The first and the last
            # window: of a corpus of the teacher's own words and of texts one of each.
            read = (windows[0], windows[-1]) if pool is None else windows
            order = _by_cost(model, read, removed, progress, _Outcome(model, pool))
    neurons, heads, hidden = gauge.scores()
    return Importance(order, neurons, heads, hidden)


class _Outcome:
    """What a model makes of a text, and what another outcome costs: KL in nats per token, or 1 - cosine."""

    def __init__(self, model: Any, pool: Pool | None) -> None:
        self._model, self._pool = model, pool

    def of(self, ids: Any) -> Any:
        """Log-probabilities (tokens, vocabulary), or one vector (1, width)."""
        import torch

        if self._pool is not None:
            return self._pool(self._model(ids).last_hidden_state.float())
        return torch.log_softmax(self._model(ids, use_cache=False).logits[0].float(), dim=-1)

    def cost(self, whole: Any, found: Any) -> float:
        """Of ``found`` in place of ``whole``."""
        import torch

        if self._pool is not None:
            return float((1 - torch.cosine_similarity(whole, found)).mean())
        return float((whole.exp() * (whole - found)).sum(dim=-1).mean())


class _Gauge:
    """Hooks that add up a score per unit."""

    def __init__(self, model: Any, units: Measure, pool: Pool | None) -> None:
        import torch

        self.model, self.units, self.pool = model, units, pool
        anatomy, full = ANATOMIES[model.config.model_type], shape_of(model.config)
        layers = anatomy.layers_of(model)
        self.down, self.output, self.stream = (
            [layer.get_submodule(path) for layer in layers] for path in (anatomy.down, anatomy.output, anatomy.stream)
        )
        self.kv_heads = kv_heads_of(model.config)
        self.neurons = torch.zeros(len(layers), full.neurons, dtype=torch.float64)
        self.heads = torch.zeros(len(layers), self.kv_heads, dtype=torch.float64)
        self.hidden = torch.zeros(full.hidden, dtype=torch.float64)

    def over(self, windows: Sequence[Sequence[int]], stage: Stage) -> None:
        """Run all windows."""
        if self.units == "magnitude":
            stage.advance(len(windows))
            return
        import torch

        handles = []
        watched = ((self.down, self._add_neurons), (self.output, self._add_heads), (self.stream, self._add_hidden))
        for modules, add in watched:
            handles += [
                module.register_forward_pre_hook(self._watch(add, index)) for index, module in enumerate(modules)
            ]
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
        inputs = {"use_cache": False} if self.pool is None else {}
        if self.units == "activation":
            with torch.no_grad():
                self.model(ids, **inputs)
            return
        embedded = self.model.get_input_embeddings()(ids).detach().requires_grad_(True)
        output = self.model(inputs_embeds=embedded, **inputs)
        if self.pool is not None:
            vector = self.pool(output.last_hidden_state.float())
            direction = torch.randn(vector.shape, generator=generator, device=vector.device)
            (vector * direction).sum().backward()
        else:
            logits = output.logits[0].float()
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
                values.register_hook(lambda gradient: add(index, self._changes(values, gradient)))

        return hook

    def _changes(self, values: Any, gradient: Any) -> Any:
        """To first order, what each unit changes: of each token's prediction, or (1, units) of the one vector."""
        changes = (values.detach() * gradient).double().flatten(0, -2)
        return (changes if self.pool is None else changes.sum(dim=0, keepdim=True)).cpu()

    def _add_neurons(self, index: int, values: Any) -> None:
        if values.dim() == 1:
            self.neurons[index] += values * self._column_norms(self.down[index])
        else:
            self.neurons[index] += values.square().sum(dim=0)

    def _add_heads(self, index: int, values: Any) -> None:
        if values.dim() == 1:
            weighted = values * self._column_norms(self.output[index])
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
            for index, module in enumerate(self.down):
                self.neurons[index] = self._column_norms(module)
                norms = self._column_norms(self.output[index]).square()
                self.heads[index] = norms.reshape(self.kv_heads, -1).sum(dim=1).sqrt()
            for module in self.stream:
                self.hidden += self._column_norms(module)
        return self.neurons, self.heads, self.hidden


def _by_influence(
    model: Any, windows: Sequence[Sequence[int]], progress: Progress, *, final_norm: bool
) -> tuple[int, ...]:
    import torch

    layers = len(ANATOMIES[model.config.model_type].layers_of(model))
    seen = layers - final_norm
    inputs = {"use_cache": False} if final_norm else {}
    changed = torch.zeros(layers, dtype=torch.float64)
    if final_norm:
        # The last state comes after the final norm, so the last layer's own output is not among them.
        changed[-1] = float("inf")
    with progress.stage("measuring layers", len(windows), unit="windows") as stage, torch.no_grad():
        for window in windows:
            ids = torch.tensor([list(window)], device=model.device)
            states = model(ids, output_hidden_states=True, **inputs).hidden_states
            for index in range(seen):
                alike = torch.cosine_similarity(states[index][0], states[index + 1][0]).double().mean()
                changed[index] += 1 - float(alike)  # the sums stay in the host's memory
            stage.advance()
    return tuple(int(index) for index in changed.argsort())


def _by_cost(
    model: Any, windows: Sequence[Sequence[int]], removed: int, progress: Progress, outcome: _Outcome
) -> tuple[int, ...]:
    """Greedy: each time the layer goes whose absence, after those before it, costs the least beside the whole model."""
    import torch

    layers = ANATOMIES[model.config.model_type].layers_of(model)
    texts = [torch.tensor([list(window)], device=model.device) for window in windows]
    gone: list[int] = []
    total = sum(len(layers) - count for count in range(removed))
    with progress.stage("measuring layers", total, unit="trials") as stage, torch.no_grad():
        whole = [outcome.of(ids) for ids in texts]
        for _ in range(removed):
            costs: dict[int, float] = {}
            for index in range(len(layers)):
                if index in gone:
                    continue
                with _without(layers, [*gone, index]):
                    pairs = zip(whole, texts, strict=True)
                    costs[index] = sum(outcome.cost(expected, outcome.of(ids)) for expected, ids in pairs)
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
