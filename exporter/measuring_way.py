"""Whether a model is measured whole in memory or layer by layer here, and why: from what memory and disk have room for.

Both ways give the same statistics; whole is faster where it fits. Knows sizes, measures nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable

from edgelm.bundle import Choice
from edgelm.errors import CheckpointError
from edgelm.units import format_bytes
from exporter.architectures import describe
from exporter.architectures.base import ModelDescription, TensorDescription
from exporter.calibration import STATISTICS_WINDOWS, WINDOW
from exporter.checkpoint import Checkpoint
from exporter.layerwise import open_layerwise
from exporter.reference import torch_obstacle
from exporter.sensitivity import measured_tensors, memory_obstacle
from exporter.statistics_store import store_directory
from exporter.transformers_model import loading_obstacle
from exporter.upper_file import upper_bytes
from targets.host import available_memory

_PROGRAM_BYTES = 10**9  # torch, transformers and what the engine takes beside a mapped file
_LOGITS = 7  # arrays of the size of a window's logits while labels are drawn
_ATTENTION = 6  # arrays of heads x tokens x tokens that a layer's backward pass keeps
_ACTIVATIONS = 24  # arrays of tokens x the widest matrix, likewise
_FACTOR_BYTES = 48  # per number of a moment while it is factorised, in float64
_ROWS = 1.8  # of the largest tensor in float32: as it is read, in float32, and some of its rows


def measuring_way(checkpoint: Checkpoint) -> Choice:
    """``whole``, ``layers`` or ``none``, and the reason that a plan can tell."""
    whole = torch_obstacle(checkpoint) or memory_obstacle(checkpoint)
    if whole is None:
        return Choice(value="whole", reason="the float32 model and what every matrix reads fit into memory")
    obstacle = _layers_obstacle(checkpoint)
    if obstacle is None:
        return Choice(value="layers", reason=f"measured layer by layer: in one piece {whole}")
    return Choice(value="none", reason=obstacle)


def _layers_obstacle(checkpoint: Checkpoint) -> str | None:
    obstacle = loading_obstacle(checkpoint, describe(checkpoint, "onnx"))
    if obstacle is not None:
        return obstacle
    description = describe(checkpoint)
    try:
        needed_bytes = layers_memory_bytes(checkpoint, description)
    except CheckpointError as error:
        return f"layer by layer: {error.message}"
    available = int(available_memory().value)
    if needed_bytes > available:
        told = f"{format_bytes(needed_bytes)} of memory even layer by layer, {format_bytes(available)} are free"
        return f"what every matrix reads takes {told}"
    return _disk_obstacle(description)


def layers_memory_bytes(checkpoint: Checkpoint, description: ModelDescription) -> int:
    """The most that measuring layer by layer has in memory at a time.

    Either a layer with its moments and what its backward pass keeps of a window, or the head with a window's logits, or
    a moment that is factorised beside its tensor, or the rows of the largest tensor.
    """
    dimensions = description.dimensions
    matrices = measured_tensors(description)[0].values()
    with open_layerwise(checkpoint, device="cpu") as model:
        sizes = model.sizes
    window = min(WINDOW, dimensions.context_trained)
    widest = max(max(item.shape) for item in matrices if item.shape[0] != dimensions.vocabulary)
    kept = window * 4 * (_ACTIVATIONS * widest + _ATTENTION * dimensions.heads * window)
    parts = (
        sizes.layer_bytes + _largest_moments(matrices, dimensions.layers) + kept,
        sizes.table_bytes + _LOGITS * 4 * window * dimensions.vocabulary,
        _FACTOR_BYTES * max(item.shape[-1] for item in matrices) ** 2,
        round(_ROWS * sizes.table_bytes),
    )
    return _PROGRAM_BYTES + max(parts)


def _largest_moments(matrices: Iterable[TensorDescription], layers: int) -> int:
    """Bytes of the moments of the layer that has most of them."""
    sums = [0] * layers
    for item in matrices:
        parts = item.name.split(".")
        if parts[0] == "blk":
            sums[int(parts[1])] += 4 * item.shape[-1] ** 2
    return max(sums)


def disk_bytes(description: ModelDescription) -> int:
    """What the store takes at most: half of every moment, and what goes into every layer."""
    dimensions = description.dimensions
    moments = [upper_bytes(item.shape[-1]) for item in measured_tensors(description)[0].values()]
    states = 4 * STATISTICS_WINDOWS * WINDOW * dimensions.hidden * (dimensions.layers + 2)
    return sum(moments) + max(moments) + states


def _disk_obstacle(description: ModelDescription) -> str | None:
    directory = store_directory().absolute()
    place = next(item for item in (directory, *directory.parents) if item.exists())
    needed_bytes, free_bytes = disk_bytes(description), shutil.disk_usage(place).free
    if needed_bytes <= free_bytes:
        return None
    told = f"{format_bytes(needed_bytes)} of disk, {format_bytes(free_bytes)} are free (EDGELM_CACHE names the folder)"
    return f"what every matrix reads, layer by layer, takes {told}"
