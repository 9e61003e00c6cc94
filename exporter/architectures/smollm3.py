"""SmolLM3: a llama in which every fourth layer does not rotate."""

from exporter.architectures.base import config_count
from exporter.architectures.shared.family import (
    LLAMA_LIKE_GLOBALS,
    SILU,
    Family,
    RopeSettings,
    Target,
    Windows,
    llama_like_layers,
)
from exporter.checkpoint import Checkpoint

_STEP = 4  # fixed in llama.cpp's graph


def skipped_layers(checkpoint: Checkpoint, layers: int) -> tuple[int, ...]:
    """Layers that do not rotate, as configured. ``no_rope_layers`` holds 1 for those that do, despite its name."""
    rotating = checkpoint.config.get("no_rope_layers")
    if isinstance(rotating, list):
        return tuple(layer for layer, rotates in enumerate(rotating) if not rotates)
    step = config_count(checkpoint, "no_rope_layer_interval", _STEP)
    return tuple(layer for layer in range(layers) if not (layer + 1) % step)


def _check(checkpoint: Checkpoint) -> list[str]:
    layers = checkpoint.config.get("num_hidden_layers")
    if not isinstance(layers, int):
        return []
    wanted = tuple(layer for layer in range(layers) if not (layer + 1) % _STEP)
    found = skipped_layers(checkpoint, layers)
    if found == wanted:
        return []
    told = f"layers {list(found)} do not rotate; llama.cpp's smollm3 leaves out every fourth, {list(wanted)}"
    return [f"{told}: remove layers in groups of four"]


FAMILY = Family(
    targets=(Target("smollm3", adjacent=True),),
    tensors=LLAMA_LIKE_GLOBALS,
    layer_tensors=llama_like_layers(others="none"),
    expected=SILU,
    tied=True,
    rope=RopeSettings(theta=("rope_theta", 2e6)),
    windows=Windows("switched"),
    skipped_rotation=skipped_layers,
    check=_check,
)
