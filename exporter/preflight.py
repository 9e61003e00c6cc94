"""Everything that would stop an export of a checkpoint, found from headers and small files before any work is done.

Weights are not read: NaN in them, and tokens that llama.cpp would give otherwise, are found later. Knows no target.
"""

from __future__ import annotations

from edgelm.bundle import Format
from exporter.architectures import describe
from exporter.architectures.shared.problems import Problems
from exporter.checkpoint import Checkpoint
from exporter.tokenizer import read_tokenizer


def check_checkpoint(checkpoint: Checkpoint, form: Format = "gguf") -> None:
    """Raises ``CheckpointError`` with every problem of configuration, tensors and tokenizer at once."""
    problems = Problems(checkpoint.source.location)
    with problems.collect():
        describe(checkpoint, form)
    with problems.collect():
        read_tokenizer(checkpoint)
    problems.raise_all()
