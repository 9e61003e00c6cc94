"""How much each weight matters to what the model says: second-order statistics of a few thousand tokens.

The damage of storing a matrix W as W + D is the KL divergence that it causes, to second order half of the expected
square of <g, D x>: x are the matrix's inputs, g the gradients of the log-likelihood of labels that are sampled from
the model itself (the Fisher information). Per matrix this module keeps the input's second moment, weighted by the
squared gradient of each token, and the squared gradient of each row; their product stands for the Fisher matrix
(Kronecker factors: Martens and Grosse 2015, arXiv:1503.05671). Weights themselves get no gradients, and moments are
collected for as many layers at a time as memory allows. Needs torch; knows no storage types.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelm.progress import Progress, Stage
from edgelm.units import format_bytes
from exporter.architectures import describe
from exporter.architectures.base import ModelDescription, TensorDescription, ordered_rows
from exporter.checkpoint import Checkpoint
from exporter.device import DeviceChoice
from exporter.mixes import WeightShape, is_quantizable
from exporter.reference import open_torch_model
from exporter.transformers_model import module_of
from targets.host import available_memory

Floats = npt.NDArray[np.float32]
MOMENTS_LIMIT_BYTES = 2 * 2**30
LABELS_SEED = 20_231
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class TensorStatistics:
    """Of one matrix (rows, columns) of the artefact, over ``tokens`` tokens.

    ``input_squares`` (columns) is the sum of squared inputs, llama.cpp's importance statistic. ``moment`` (columns,
    columns) is the mean of x x^T, each token weighted by its squared gradient. ``row_weights`` (rows) is the mean
    squared gradient of each output per token, in the artefact's order of rows. ``lookup_counts`` (rows) and
    ``lookup_weights`` (columns) are set for an embedding: how often each row was looked up, and the mean squared
    gradient of what came out; a tied embedding has both halves, an untied one no moment.
    """

    tokens: int
    input_squares: npt.NDArray[np.float64] | None = None
    moment: Floats | None = None
    row_weights: Floats | None = None
    lookup_counts: Floats | None = None
    lookup_weights: Floats | None = None


@dataclass
class Sums:
    """What hooks add to while windows run."""

    tokens: int = 0
    squares: Any = 0.0
    moment: Any = 0.0
    weight: Any = 0.0
    rows: Any = 0.0


@dataclass
class Collector:
    """Hooks on the linear layers of one pass: ``modules`` by tensor, and which of a module's outputs are the tensor's
    rows (a module may hold two tensors)."""

    modules: Mapping[str, tuple[Any, slice]]
    sums: dict[str, Sums] = field(default_factory=dict)

    def attach(self) -> list[Any]:
        """Begin to collect; handles that end it again."""
        handles = []
        for name, (module, _) in self.modules.items():
            self.sums[name] = Sums()
            handles.append(module.register_forward_hook(self._forward_hook(name)))
        return handles

    def _forward_hook(self, name: str) -> Any:
        def hook(_module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            taken = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            sums = self.sums[name]
            sums.tokens += len(taken)
            sums.squares = sums.squares + taken.double().square().sum(dim=0)
            output.register_hook(lambda gradient: self._backward(name, taken, gradient))

        return hook

    def _backward(self, name: str, inputs: Any, gradient: Any) -> None:
        squares = gradient.detach().reshape(len(inputs), -1)[:, self.modules[name][1]].float().square()
        self.add(name, inputs, squares.sum(dim=1), squares.sum(dim=0))

    def add(self, name: str, inputs: Any, token_weights: Any, row_weights: Any) -> None:
        """Add tokens (n, columns) with their squared gradients, summed over rows (n) and over tokens (rows)."""
        sums = self.sums[name]
        weighted = inputs * token_weights.sqrt()[:, None]
        sums.moment = sums.moment + weighted.T @ weighted
        sums.weight = sums.weight + token_weights.sum().double()
        sums.rows = sums.rows + row_weights


def collect(
    checkpoint: Checkpoint,
    windows: Sequence[Sequence[int]],
    progress: Progress,
    *,
    moments_limit_bytes: int = MOMENTS_LIMIT_BYTES,
    device: DeviceChoice = "auto",
) -> dict[str, TensorStatistics]:
    """Statistics of every matrix that can be quantised, by artefact name, from windows of token ids.

    Memory: the model once, activations of one window, and moments up to ``moments_limit_bytes`` at a time beyond those
    returned; more passes are made when the model needs them. On a GPU the same labels are drawn, except where rounding
    decides between two neighbours. Raises ``CheckpointError``, ``MissingDependencyError`` and ``DoesNotFitError``.
    """
    description = describe(checkpoint)
    matrices, body, head = measured_tensors(description)
    found: dict[str, TensorStatistics] = {}
    with open_torch_model(checkpoint, progress, device=device) as model:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        groups = _groups(body, {name: matrices[name].shape[-1] for name in body}, moments_limit_bytes)
        total = len(groups) * sum(len(window) for window in windows)
        with progress.stage("measuring sensitivity", total, unit="tokens") as stage:
            for index, group in enumerate(groups):
                modules = {name: place_of(model, checkpoint, matrices[name]) for name in group}
                run = Pass(model, Collector(modules), head if index == 0 else None)
                run.over(windows, stage)
                found.update(finished(run.collector, group, matrices, description, checkpoint))
                if index == 0:
                    found.update(outer_statistics(run, statistics_of(run.head_sums), head, description))
    return found


def measured_tensors(description: ModelDescription) -> tuple[dict[str, TensorDescription], list[str], str]:
    """Every matrix that can be quantised, the names of those within layers, and the name of the head's."""
    matrices = {item.name: item for item in description.tensors if is_quantizable(WeightShape(item.name, item.shape))}
    head = _EMBEDDING if description.dimensions.tied else _HEAD
    return matrices, [name for name in matrices if name not in (_EMBEDDING, _HEAD)], head


def memory_obstacle(checkpoint: Checkpoint) -> str | None:
    """Why this machine's memory is too small for the statistics of a model, None when it is not.

    At most there are the float32 weights with what comes with them, or the moments of all matrices and the factors that
    rounding makes of them, beside the weights of one tensor and the engine's file.
    """
    description = describe(checkpoint)
    squares = [
        item.shape[-1] ** 2 for item in description.tensors if is_quantizable(WeightShape(item.name, item.shape))
    ]
    moments_bytes = 4 * sum(squares)
    needed_bytes = moments_bytes + max(round(4.6 * description.parameters), moments_bytes)
    available = int(available_memory().value)
    if needed_bytes <= available:
        return None
    told = f"{format_bytes(needed_bytes)} of memory, {format_bytes(available)} are free"
    return f"what every matrix reads takes {told}"


def _groups(names: Sequence[str], columns: Mapping[str, int], limit_bytes: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    used = 0
    for name in names:
        size_bytes = 4 * columns[name] ** 2
        if groups[-1] and used + size_bytes > limit_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size_bytes
    return groups


def place_of(model: Any, checkpoint: Checkpoint, item: TensorDescription) -> tuple[Any, slice]:
    """The module that multiplies by a tensor, and which of its outputs are the tensor's rows."""
    return module_of(model, checkpoint, item), slice(item.skipped, item.skipped + item.shape[0])


class Pass:
    """Forward and backward over all windows, with hooks on one group of layers."""

    def __init__(self, model: Any, collector: Collector, head: str | None) -> None:
        self.model, self.collector, self.head = model, collector, head
        self.head_sums = Sums()
        self.lookup_counts: Any = None
        self.lookup_squares: Any = 0.0

    def over(self, windows: Sequence[Sequence[int]], stage: Stage) -> None:
        import torch

        generator = torch.Generator().manual_seed(LABELS_SEED)
        handles = self.collector.attach()
        try:
            for window in windows:
                self._window(torch.tensor([list(window)], device=self.model.device), generator)
                stage.advance(len(window))
        finally:
            for handle in handles:
                handle.remove()

    def _window(self, ids: Any, generator: Any) -> None:
        table = self.model.get_input_embeddings()
        embedded = table(ids).detach().requires_grad_(True)
        self.read(lambda: self.model(inputs_embeds=embedded, use_cache=False).logits, generator)
        if self.head is not None:
            self.add_lookup(ids, embedding_factor(table, ids, embedded), embedded.grad)

    def read(self, answer: Callable[[], Any], generator: Any) -> None:
        """Let the model compute the logits (1, tokens, vocabulary) of a window, draw labels and send gradients back."""
        import torch

        final: list[Any] = []
        raw: list[Any] = []
        head = self.model.get_output_embeddings()
        handles = [
            head.register_forward_pre_hook(lambda _module, inputs: final.append(inputs[0].detach())),
            head.register_forward_hook(lambda _module, _inputs, output: raw.append(output)),
        ]
        try:
            answered = answer()
        finally:
            for handle in handles:
                handle.remove()
        logits = answered[0].float()
        # The loss is a sum: every position's label sends its gradient to all earlier tokens.
        with torch.no_grad():
            probabilities = torch.softmax(logits, dim=-1)
            labels = _sampled(probabilities, generator)
        if self.head is not None:
            self._add_head(final[0][0].float(), probabilities, _slope(answered, raw[0]))
        with torch.no_grad():
            # d(-log p[label]) / d logits is softmax minus one-hot; given directly, the log-softmax needs no graph.
            probabilities.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=probabilities.dtype))
        logits.backward(probabilities)

    def add_lookup(self, ids: Any, factor: Any, gradient: Any) -> None:
        """Count the looked up rows of a window and the squared gradients (1, tokens, columns) of what came out."""
        import torch

        rows = len(self.model.get_input_embeddings().weight)
        counts = torch.bincount(ids[0], minlength=rows).float()
        self.lookup_counts = counts if self.lookup_counts is None else self.lookup_counts + counts
        self.lookup_squares = self.lookup_squares + factor * gradient[0].float().square().sum(dim=0)

    def _add_head(self, inputs: Any, probabilities: Any, slope: Any) -> None:
        """The head's Fisher information needs no sampled labels: the variance of each label is p (1 - p)."""
        variances = probabilities * (1 - probabilities) * slope**2
        collector = Collector({}, {"head": self.head_sums})
        collector.add("head", inputs, variances.sum(dim=1), variances.sum(dim=0))
        self.head_sums.tokens += len(inputs)
        self.head_sums.squares = self.head_sums.squares + inputs.double().square().sum(dim=0)


def embedding_factor(table: Any, ids: Any, embedded: Any) -> Any:
    """The square of what some families multiply rows by inside the embedding, 1 for all others."""
    return embedded.detach().square().sum() / table.weight[ids].square().sum().clamp_(min=1e-30)


def _slope(logits: Any, raw: Any) -> Any:
    """How much each logit moves with what the head gave (n, vocabulary): 1, but for scaled and soft-capped logits."""
    import torch

    if logits.data_ptr() == raw.data_ptr():
        return 1.0
    return torch.autograd.grad(logits.sum(), raw, retain_graph=True)[0][0].float()


def _sampled(probabilities: Any, generator: Any) -> Any:
    """One label per row (n, 1) by inverting the distribution: torch.multinomial draws a number per entry."""
    import torch

    reached = probabilities.cumsum(dim=1)
    # Drawn by the host: one stream of numbers, wherever the model computes.
    drawn = torch.rand(len(reached), 1, generator=generator).to(reached.device) * reached[:, -1:]
    return torch.searchsorted(reached, drawn).clamp_(max=reached.shape[1] - 1)


def statistics_of(sums: Sums, item: TensorDescription | None = None) -> TensorStatistics:
    rows: Floats = (sums.rows / max(sums.tokens, 1)).cpu().numpy().astype(np.float32)
    if item is not None:  # a weight that is stored s times as large has gradients of one s-th
        rows = ordered_rows(rows, item) / np.float32(item.scale**2)
    return TensorStatistics(
        tokens=sums.tokens,
        input_squares=sums.squares.cpu().numpy(),
        moment=(sums.moment / max(float(sums.weight), 1e-30)).cpu().numpy(),
        row_weights=rows,
    )


def finished(
    collector: Collector,
    group: Sequence[str],
    matrices: Mapping[str, TensorDescription],
    description: ModelDescription,
    checkpoint: Checkpoint,
) -> Iterator[tuple[str, TensorStatistics]]:
    """What was collected of a group of matrices, as the artefact has their rows."""
    for name in group:
        item = matrices[name]
        if checkpoint.source.kind == "gguf" and (".attn_q." in name or ".attn_k." in name):
            # The file has the artefact's order, transformers its own.
            item = replace(item, interleave=description.dimensions.head_size)
        yield name, statistics_of(collector.sums[name], item)


def outer_statistics(
    run: Pass, output: TensorStatistics, head: str, description: ModelDescription
) -> dict[str, TensorStatistics]:
    """Statistics of the head and of the embedding; one tensor when they are tied. ``output`` are those of the head, and
    the pass knows what was looked up."""
    counts = run.lookup_counts.cpu().numpy()
    squares = (run.lookup_squares / output.tokens).cpu().numpy()
    if description.dimensions.tied:
        return {head: replace(output, lookup_counts=counts, lookup_weights=squares)}
    lookup = TensorStatistics(output.tokens, lookup_counts=counts, lookup_weights=squares)
    return {head: output, _EMBEDDING: lookup}


def damage(error: Floats, statistics: TensorStatistics) -> float:
    """KL in nats per token that an error (rows, columns) of one matrix causes, to second order.

    Half of the sum over rows of row_weight x (error moment error^T), and for an embedding the squared error of the rows
    looked up, weighted by the gradients behind them.
    """
    total = 0.0
    if statistics.moment is not None and statistics.row_weights is not None:
        for start in range(0, len(error), 4096):  # the product is as large as the error
            part = error[start : start + 4096]
            squares = np.einsum("ij,ij->i", part @ statistics.moment, part)
            total += float(np.dot(squares, statistics.row_weights[start : start + 4096]))
    if statistics.lookup_counts is not None and statistics.lookup_weights is not None:
        squares = np.square(error) @ statistics.lookup_weights
        total += float(np.dot(squares, statistics.lookup_counts)) / statistics.tokens
    return 0.5 * max(total, 0.0) if math.isfinite(total) else math.inf
