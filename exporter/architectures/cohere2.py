"""Command R7B and Tiny Aya: as Command R, with windows in three of four layers; the others do not rotate."""

from dataclasses import replace

from exporter.architectures import cohere
from exporter.architectures.base import config_count
from exporter.architectures.shared.family import Target, Windows
from exporter.architectures.shared.windows import attention_windows
from exporter.checkpoint import Checkpoint

_WINDOWS = Windows("periodic", period=4, default=4096)


def _without_window(checkpoint: Checkpoint, layers: int) -> tuple[int, ...]:
    windows = attention_windows(checkpoint, _WINDOWS, layers)
    return tuple(layer for layer, window in enumerate(windows) if not window)


def _check(checkpoint: Checkpoint) -> list[str]:
    layers = config_count(checkpoint, "num_hidden_layers")
    if len(_without_window(checkpoint, layers)) < layers:
        return []
    return ["no layer has an attention window, llama.cpp's cohere2 needs one"]


FAMILY = replace(
    cohere.FAMILY,
    targets=(Target("cohere2", adjacent=True, square=True, windows=True, head="tied"),),
    windows=_WINDOWS,
    skipped_rotation=_without_window,
    check=_check,
)
