"""How large the inputs of every matrix are: llama.cpp's importance statistic, collected by the engine itself.

The unquantised model reads the calibration windows in llama.cpp, and the squared inputs of every matrix are summed on
the way. It needs neither torch nor transformers and works for every family that llama.cpp runs; what it cannot tell is
how much an error in a matrix matters, so types are not chosen by it. Results are kept in the cache as the
importance-matrix file that llama.cpp's own tools read. Knows no types.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgelm.bundle import CalibrationRecord, ExportPlan, TensorPlan
from edgelm.errors import CheckpointError, UsageError
from edgelm.progress import Progress
from exporter import cache, ggml
from exporter.calibration import Calibration, open_calibration
from exporter.checkpoint import Checkpoint, open_checkpoint, open_source
from exporter.imatrix_file import Entry, ImportanceFile, read_importance, write_importance
from exporter.preflight import check_checkpoint
from exporter.reference import BATCH, open_observed_engine
from exporter.sensitivity import TensorStatistics
from exporter.tokenizer import load_tokenizer
from runtime.engine import Chunk
from runtime.engines.llamacpp_inputs import InputSquares

_VERSION = 1
_FILE = "imatrix.gguf"


def collect_importance(checkpoint: Checkpoint, windows: Sequence[Sequence[int]], progress: Progress) -> ImportanceFile:
    """Sums of squared inputs over windows of token ids, each read from an empty context.

    Raises ``DoesNotFitError`` when the unquantised model does not fit, and ``EngineError``.
    """
    observer = InputSquares()
    length = max(len(window) for window in windows)
    total = sum(len(window) for window in windows)
    with (
        open_observed_engine(checkpoint, length, observer, progress) as engine,
        progress.stage("measuring importance", total, unit="tokens") as stage,
    ):
        for window in windows:
            engine.truncate(0)
            for start in range(0, len(window), BATCH):
                part = window[start : start + BATCH]
                engine.forward([Chunk(0, part, "all")])  # all, or the head would see the last token only
                stage.advance(len(part))
    observer.check()
    entries = {
        name: Entry(sums.astype(np.float32)[None, :], np.array([observer.counts[name]], np.float32))
        for name, sums in observer.sums.items()
    }
    return ImportanceFile(entries, chunk_count=len(windows), chunk_size=length)


def importance(
    checkpoint: Checkpoint, calibration: Calibration, source_hashes: tuple[str, ...], progress: Progress
) -> Mapping[str, TensorStatistics]:
    """What ``damage.quantizers`` wants of every matrix, from the cache or measured and cached. Errors as above."""
    key = cache.key_of("importance", _VERSION, source_hashes, calibration.record.model_dump())
    directory = cache.find(key)
    if directory is not None:
        try:
            return _statistics(read_importance(directory / _FILE))
        except CheckpointError:
            cache.remove(key)
    found = collect_importance(checkpoint, calibration.statistics, progress)
    with cache.new_entry(key) as entry:
        if entry is not None:
            write_importance(entry / _FILE, found)
    return _statistics(found)


def importance_of_file(path: Path, plan: ExportPlan) -> tuple[CalibrationRecord, Mapping[str, TensorStatistics]]:
    """The record of an importance-matrix file, in either format, and what ``damage.quantizers`` wants of it.

    Raises ``CheckpointError`` when the file is damaged or of another model, ``UsageError`` when it lacks a matrix whose
    type is useless without.
    """
    found = read_importance(path)
    planned = {item.name: item for item in plan.tensors}
    known = {name: entry for name, entry in found.entries.items() if name in planned}
    wrong = next((name for name, entry in known.items() if entry.sums.shape != (1, planned[name].shape[-1])), None)
    if not known or wrong is not None:
        told = f"{wrong} has {planned[wrong].shape[-1]} columns here" if wrong else "it names no tensor of this one"
        raise CheckpointError(f"{path} is an importance matrix of another model: {told}", hint="make one of this model")
    lacking = next((item for item in plan.tensors if item.name not in known and _is_needed(item)), None)
    if lacking is not None:
        raise UsageError(f"{path} has no entry for {lacking.name}, which {lacking.type} needs")
    tokens = max(int(entry.counts.max()) for entry in known.values()) if found.chunk_size else 0
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    record = CalibrationRecord(text=f"importance matrix {path.name}", text_sha256=digest, tokens=tokens)
    return record, _statistics(ImportanceFile(known))


def _is_needed(item: TensorPlan) -> bool:
    return ggml.TYPES[item.type].requires_importance


def write_measured(
    source: str, path: Path, choice: Path | None, progress: Progress, *, legacy: bool = False
) -> ImportanceFile:
    """Measure the importance of a source's columns and write it as llama.cpp's tools read it; what was written.

    ``choice`` is as of ``open_calibration``. Raises ``UsageError``, ``CheckpointError``, ``DoesNotFitError``,
    ``EngineError``, and ``BundleError`` when the file cannot be written.
    """
    checkpoint = open_checkpoint(open_source(source, progress))
    check_checkpoint(checkpoint)
    text = open_calibration(checkpoint, load_tokenizer(checkpoint, progress), choice, progress)
    found = collect_importance(checkpoint, text.statistics, progress)
    found = replace(found, datasets=(text.record.text,))
    write_importance(path, found, legacy=legacy)
    return found


def _statistics(found: ImportanceFile) -> dict[str, TensorStatistics]:
    return {
        name: TensorStatistics(tokens=max(int(entry.counts[0]), 1), input_squares=entry.sums[0].astype(np.float64))
        for name, entry in found.entries.items()
    }
