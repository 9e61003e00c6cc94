"""How large the inputs of every matrix are: llama.cpp's importance statistic, collected by the engine itself.

The unquantised model reads the calibration windows in llama.cpp, and the squared inputs of every matrix are summed on
the way. It needs neither torch nor transformers and works for every family that llama.cpp runs; what it cannot tell is
how much an error in a matrix matters, so types are not chosen by it. Results are kept in the cache as the
importance-matrix file that llama.cpp's own tools read. Knows no types.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgelm.errors import CheckpointError
from edgelm.progress import Progress
from exporter import cache
from exporter.calibration import Calibration
from exporter.checkpoint import Checkpoint
from exporter.imatrix_file import Entry, ImportanceFile, read_importance, write_importance
from exporter.reference import BATCH, open_observed_engine
from exporter.sensitivity import TensorStatistics
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


def _statistics(found: ImportanceFile) -> dict[str, TensorStatistics]:
    return {
        name: TensorStatistics(tokens=int(entry.counts[0]), input_squares=entry.sums[0].astype(np.float64))
        for name, entry in found.entries.items()
    }
