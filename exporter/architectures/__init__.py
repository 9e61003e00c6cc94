"""One module per model family, named as its ``model_type``. A miss lists what exists."""

from __future__ import annotations

import importlib
import pkgutil

from edgelm.errors import CheckpointError
from exporter.architectures.base import ModelDescription
from exporter.checkpoint import Checkpoint


def available() -> tuple[str, ...]:
    """The ``model_type`` of every family that can be exported."""
    return tuple(sorted(item.name for item in pkgutil.iter_modules(__path__) if item.name != "base"))


def describe(checkpoint: Checkpoint) -> ModelDescription:
    """The checkpoint in terms of the artefact. Raises ``CheckpointError`` for families that are not known."""
    if checkpoint.architecture not in available():
        raise CheckpointError(
            f"{checkpoint.source.location} is of the architecture '{checkpoint.architecture}', which is not supported",
            hint=f"there are: {', '.join(available())}",
        )
    module = importlib.import_module(f"{__name__}.{checkpoint.architecture}")
    description: ModelDescription = module.describe(checkpoint)
    return description
