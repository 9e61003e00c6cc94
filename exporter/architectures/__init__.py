"""One module per model family, named as its ``model_type``. A miss lists what exists.

Each module is data: a ``Family``, which ``shared`` reads. A GGUF file is described as it stands if its architecture is
one that the families become.
"""

from __future__ import annotations

import importlib
import pkgutil

from edgelm.errors import CheckpointError
from exporter.architectures.base import ModelDescription
from exporter.architectures.shared.checkpoints import describe_checkpoint
from exporter.architectures.shared.family import Family
from exporter.architectures.shared.gguf_files import describe_gguf
from exporter.checkpoint import Checkpoint


def available() -> tuple[str, ...]:
    """The ``model_type`` of every family that can be exported."""
    return tuple(sorted(item.name for item in pkgutil.iter_modules(__path__) if item.name != "base" and not item.ispkg))


def family(model_type: str) -> Family:
    """The family of an ``available`` model_type."""
    found: Family = importlib.import_module(f"{__name__}.{module_name(model_type)}").FAMILY
    return found


def module_name(model_type: str) -> str:
    """A model_type as a module can be called: some have a hyphen."""
    return model_type.replace("-", "_")


def gguf_architectures() -> tuple[str, ...]:
    """The architectures of GGUF files that families become."""
    return tuple(sorted({target.name for name in available() for target in family(name).targets}))


def describe(checkpoint: Checkpoint) -> ModelDescription:
    """The checkpoint in terms of the artefact.

    Raises ``CheckpointError`` for families that are not known, else with every reason that stands in the way.
    """
    is_gguf = checkpoint.source.kind == "gguf"
    known = gguf_architectures() if is_gguf else available()
    if (checkpoint.architecture if is_gguf else module_name(checkpoint.architecture)) not in known:
        raise CheckpointError(
            f"{checkpoint.source.location} is of the architecture '{checkpoint.architecture}', which is not supported",
            hint=f"there are: {', '.join(known)}",
        )
    return describe_gguf(checkpoint) if is_gguf else describe_checkpoint(checkpoint, family(checkpoint.architecture))


def embedding_names(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The names that the embedding of a checkpoint may have, for families that are known."""
    if module_name(checkpoint.architecture) not in available():
        return ()
    found = family(checkpoint.architecture)
    return tuple(f"{prefix}{found.tensors[0].source}.weight" for prefix in found.prefixes)
