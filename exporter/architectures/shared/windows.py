"""Which layers of a checkpoint see only a window of the latest tokens."""

from __future__ import annotations

from edgelm.errors import CheckpointError
from exporter.architectures.base import config_count
from exporter.architectures.shared.family import Windows
from exporter.checkpoint import Checkpoint

_KINDS = {"full_attention": False, "sliding_attention": True}


def attention_windows(checkpoint: Checkpoint, windows: Windows, layers: int) -> tuple[int, ...]:
    """Tokens that attention of each layer sees, itself included; 0 for all. Raises ``CheckpointError``."""
    config = checkpoint.config
    size = config.get("sliding_window", windows.default)
    switched_off = windows.kind == "switched" and not config.get("use_sliding_window")
    if windows.kind == "none" or size is None or switched_off:
        return (0,) * layers
    size = config_count(checkpoint, "sliding_window", windows.default)
    return tuple(size if limited else 0 for limited in _limited(checkpoint, windows, layers))


def _limited(checkpoint: Checkpoint, windows: Windows, layers: int) -> list[bool]:
    config = checkpoint.config
    kinds = config.get("layer_types")
    if kinds is not None and windows.kind != "all":
        if not isinstance(kinds, list) or len(kinds) != layers or not all(map(list(_KINDS).__contains__, kinds)):
            raise CheckpointError(
                f"{checkpoint.source.location}: config.json: layer_types is no list of {layers} of {', '.join(_KINDS)}"
            )
        return [_KINDS[kind] for kind in kinds]
    if windows.kind == "switched":
        first = config_count(checkpoint, "max_window_layers", layers)
        return [layer >= first for layer in range(layers)]
    if windows.kind == "periodic":
        name = "_sliding_window_pattern" if "_sliding_window_pattern" in config else "sliding_window_pattern"
        period = config_count(checkpoint, name, windows.period)
        return [bool((layer + 1) % period) for layer in range(layers)]
    return [True] * layers
