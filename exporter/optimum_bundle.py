"""Files of bundles that optimum draws: graphs, their weights as planned, and notes for the engines.

Knows neither plans' reasons nor proofs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgelm.bundle import ExportPlan
from edgelm.errors import CheckpointError
from edgelm.progress import Progress
from exporter.architectures.base import ModelDescription
from exporter.checkpoint import Checkpoint
from exporter.optimum_graphs import draw_graphs, open_task_model
from exporter.optimum_weights import round_weights, rounding_named, store_graphs
from runtime.engines.onnx_encoder import GRAPH, OUTPUT

ARTIFACT = "model.onnx"


def write_encoder(
    staging: Path, checkpoint: Checkpoint, description: ModelDescription, plan: ExportPlan, progress: Progress
) -> Path:
    """Write ``model.onnx`` of an encoder and its data file; returns the former.

    Raises ``MissingDependencyError``, ``CheckpointError`` and ``BundleError``.
    """
    assert description.encoder is not None
    with open_task_model(checkpoint, "feature-extraction", progress) as model:
        graph = draw_graphs(model, "feature-extraction", checkpoint, progress)["model"]
    keep_outputs(graph, (OUTPUT,), checkpoint)
    with progress.stage("rounding", 1) as stage:
        graph = round_weights(graph, rounding_named(plan.quant))
        stage.advance()
    counts = (description.dimensions.vocabulary, int(plan.context.value), description.dimensions.context_trained)
    notes = text_notes(GRAPH, checkpoint, plan, counts) | {"edgelm.pooling": description.encoder.record.pooling}
    store_graphs(staging, {ARTIFACT: graph}, {ARTIFACT: notes})
    return staging / ARTIFACT


def text_notes(graph: str, checkpoint: Checkpoint, plan: ExportPlan, counts: tuple[int, int, int]) -> dict[str, str]:
    """Metadata of a graph that reads texts. ``counts``: tokens in the vocabulary, planned and longest text."""
    vocabulary, context, trained = counts
    return {
        "edgelm.graph": graph,
        "edgelm.name": checkpoint.source.location.rsplit("/", 1)[-1],
        "edgelm.architecture": checkpoint.architecture,
        "edgelm.vocabulary": str(vocabulary),
        "edgelm.context": str(context),
        "edgelm.context_trained": str(trained),
        "edgelm.padding": str(padding_of(checkpoint.config)),
        "edgelm.parameters": str(plan.parameters),
    }


def padding_of(config: Mapping[str, Any]) -> int:
    """The id that fills up short texts, 0 where none is named: it is masked either way."""
    value = config.get("pad_token_id")
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


def keep_outputs(graph: Any, names: tuple[str, ...], checkpoint: Checkpoint) -> None:
    """Leave only some outputs. Raises ``CheckpointError`` when the graph has no such ones."""
    kept = [item for item in graph.graph.output if item.name in names]
    if len(kept) != len(names):
        raise CheckpointError(f"optimum's graph of {checkpoint.source.location} has no output {' and '.join(names)}")
    del graph.graph.output[:]
    graph.graph.output.extend(kept)
