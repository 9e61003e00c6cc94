"""Writes an artefact in parts and remembers which are safely on disk, so that an interrupted export can go on.

The journal stands beside the artefact's directory. It names what the parts were made from; anything else, a file of the
source that was touched included, starts anew. Knows no format: the caller writes head and tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgelm.bundle import TensorPlan
from edgelm.progress import Progress, Stage
from exporter.cache import key_of
from exporter.checkpoint import Checkpoint
from exporter.gguf import write_errors
from exporter.gguf_header import padded

PART_BYTES = 2**29
"""Of the artefact; what an interruption loses at most."""


@dataclass(frozen=True)
class Writer:
    """How an artefact is written: its head, giving the first tensor's position, then planned tensors from one on."""

    head: Callable[[], int]
    tensors: Callable[[int, Sequence[TensorPlan], Progress], None]


def key_of_artifact(checkpoint: Checkpoint, plans: Sequence[TensorPlan], metadata_hash: str, further: str) -> str:
    """A key over everything that decides the artefact's bytes, contents of files apart: those go by size and time."""
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.files]
    tools = [version("edgelm"), version("llama-cpp-python")]
    return key_of(states, [(plan.name, plan.type, plan.shape) for plan in plans], metadata_hash, further, tools)


def hash_of_metadata(metadata: Mapping[str, Any]) -> str:
    """SHA-256 of metadata; arrays count as lists, strings that a GGUF source holds undecoded among them."""

    def plain(value: Any) -> Any:
        if isinstance(value, bytes):
            return value.hex()
        return value.tolist() if hasattr(value, "tolist") else list(value)

    text = json.dumps(metadata, sort_keys=True, default=plain)
    return hashlib.sha256(text.encode()).hexdigest()


def write_in_parts(
    journal: Path, key: str, artifact: Path, plans: Sequence[TensorPlan], writer: Writer, progress: Progress
) -> None:
    """Write an artefact, going on after the parts that the journal says are there. Raises what the writer raises.

    The writer's tensors are flushed to disk when it returns; only then is a part noted.
    """
    started = _started(journal, key) if artifact.is_file() else None
    if started is not None and artifact.stat().st_size < started[0] + sum(plan.size_bytes for plan in plans):
        started = None  # somebody cut it
    if started is None:
        journal.unlink(missing_ok=True)
        started = (writer.head(), 0)
        _note(journal, key, *started)
    data_start, finished = started
    with progress.stage("quantising", sum(plan.size_bytes for plan in plans), unit="bytes") as stage:
        stage.advance(sum(plan.size_bytes for plan in plans[:finished]))
        for part in _parts(plans[finished:]):
            position = data_start + sum(padded(plan.size_bytes) for plan in plans[:finished])
            writer.tensors(position, part, _Within(stage))
            finished += len(part)
            _note(journal, key, data_start, finished)


def _parts(plans: Sequence[TensorPlan]) -> Iterator[Sequence[TensorPlan]]:
    start, filled = 0, 0
    for index, plan in enumerate(plans):
        filled += plan.size_bytes
        if filled >= PART_BYTES:
            yield plans[start : index + 1]
            start, filled = index + 1, 0
    if start < len(plans):
        yield plans[start:]


def _started(journal: Path, key: str) -> tuple[int, int] | None:
    """Position of the first tensor and the number of finished ones, if the journal is of the same artefact."""
    try:
        noted = json.loads(journal.read_text(encoding="utf-8"))
        return (int(noted["data_start"]), int(noted["finished"])) if noted["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _note(journal: Path, key: str, data_start: int, finished: int) -> None:
    fresh = journal.with_name(f"{journal.name}.new")
    with write_errors(journal):
        with fresh.open("w", encoding="utf-8") as stream:
            json.dump({"key": key, "data_start": data_start, "finished": finished}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(journal)


class _Within:
    """Stages of parts advance the stage of the whole."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    @contextmanager
    def stage(self, name: str, total: int | None = None, *, unit: str = "") -> Iterator[Stage]:
        yield self._stage
