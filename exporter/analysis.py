"""Measures once what every tensor loses in every type, and how far that estimate is from the truth.

The estimate sums the tensors' damages. Three artefacts are built and read by the engine to correct it: one at 8 bits,
which shows the floor that the kernels' own 8-bit activations leave under every type, one in the middle and the
smallest; between them the KL is interpolated. Every part is kept in the cache as soon as it is there: other limits and
targets cost nothing new, and a run that was interrupted goes on behind the last finished part. Models that do not fit
into memory are measured layer by layer. Needs torch and transformers; knows no limits and no targets.
"""

from __future__ import annotations

import importlib.util
import json
import math
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from edgelm.bundle import CalibrationRecord, Choice, TensorPlan
from edgelm.progress import Progress
from exporter import cache, damage, ggml, sensitivity
from exporter.allocate import Limits, Option, cheapest, solve
from exporter.architectures import describe
from exporter.architectures.base import ModelDescription
from exporter.calibration import Calibration
from exporter.checkpoint import Checkpoint
from exporter.damage import Quantizer
from exporter.device import DeviceChoice
from exporter.gguf import usable_cpus, write_gguf
from exporter.layerwise import open_layerwise_scoring
from exporter.quality import MIN_CONTEXT, Window, compare_models
from exporter.reference import BATCH, EngineModel, ScoringModel, TransformersModel, open_torch_model
from exporter.sensitivity import TensorStatistics, measured_tensors
from exporter.sensitivity_layers import collect_by_layers
from exporter.statistics_store import DamagedStoreError, StatisticsStore, StoredQuantizers, open_store
from exporter.tokenizer import SourceTokenizer
from runtime.engine import EngineOptions
from runtime.engines.llamacpp import load_engine

_VERSION = 4  # of everything that a cached result depends on in this code
_RESULT, _DAMAGES, _PROBE, _STATISTICS = "analysis.json", "damages.json", "probe.json", "statistics.npz"


@dataclass(frozen=True)
class Analysis:
    """``damages`` by tensor and type; ``knots`` are measured (sum of damages, KL), rising. ``key`` is the cache's.

    ``rounding`` gives the quantisers that damages are of, by tensor; for large models they read as they go. ``note``
    tells how it was measured, where there is something to tell.
    """

    key: str
    calibration: CalibrationRecord
    damages: Mapping[str, Mapping[str, float]]
    knots: tuple[tuple[float, float], ...]
    rounding: Callable[[], Mapping[str, Quantizer]]
    note: str = ""

    def predicted_kl(self, damage_sum: float) -> float:
        """Expected mean KL in nats per token of types whose damages add up to this.

        From knot to knot a line in both logarithms, and on beyond the last; below the first, where the kernels' own
        8-bit activations are most of the KL, a plain line.
        """
        for low, high in pairwise(self.knots):
            if damage_sum <= low[0] or min(*low, damage_sum) <= 0:
                slope = (high[1] - low[1]) / (high[0] - low[0])
                return max(low[1] + slope * (damage_sum - low[0]), 0.0)
            if damage_sum <= high[0] or high == self.knots[-1]:
                share = math.log(damage_sum / low[0]) / math.log(high[0] / low[0])
                return float(low[1] * (high[1] / low[1]) ** share)
        return self.knots[0][1]

    @property
    def scale(self) -> float:
        """KL per damage over the whole range."""
        (low, kl_low), (high, kl_high) = self.knots[0], self.knots[-1]
        return (kl_high - kl_low) / (high - low) if high > low else 1.0


def is_possible() -> bool:
    """Whether what measuring needs is installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers"))


def analyse(
    checkpoint: Checkpoint,
    words: SourceTokenizer,
    calibration: Calibration,
    source_hashes: tuple[str, ...],
    progress: Progress,
    *,
    way: Choice,
    device: DeviceChoice = "auto",
) -> Analysis:
    """The analysis of a checkpoint under a calibration, from the cache or measured and cached.

    ``source_hashes`` are the SHA-256 of the checkpoint's files, ``way`` is of ``measuring_way``. What was measured on
    one device or in one way serves all: figures of a CPU and a GPU differ by less than those of two texts. Raises
    ``CheckpointError``, ``EngineError`` and ``DoesNotFitError``.
    """
    description = describe(checkpoint)
    measured_of = cache.key_of("statistics", _VERSION, source_hashes, calibration.record.model_dump())
    table_of = cache.key_of("damages", measured_of, damage.CANDIDATE_TYPES)
    key = cache.key_of("analysis", table_of, calibration.probes)
    kept, (knots, note) = _load_damages(table_of), _load_result(key)
    given: _Whole | _ByLayers
    if way.value == "layers":
        given = _ByLayers(checkpoint, calibration.statistics, table_of, device, progress)
    else:
        given = _Whole(checkpoint, calibration.statistics, measured_of, device, progress)
    damages: Mapping[str, Mapping[str, float]] = kept if kept is not None and knots is not None else given.damages(kept)
    if kept is None:
        _store(table_of, _DAMAGES, damages)
    if knots is None:
        knots = _Probe(key, checkpoint, description, words, calibration, damages, given).knots(progress)
        note = way.reason if way.value == "layers" else ""
        _store(key, _RESULT, {"knots": knots, "note": note})
    return Analysis(key, calibration.record, damages, knots, given.rounding, note)


@dataclass
class _Whole:
    """Statistics of all matrices in memory, from the cache or from the whole model."""

    checkpoint: Checkpoint
    windows: Sequence[Sequence[int]]
    key: str
    device: DeviceChoice
    progress: Progress
    quantizers: Mapping[str, Quantizer] | None = None

    def damages(self, known: Mapping[str, Mapping[str, float]] | None) -> Mapping[str, Mapping[str, float]]:
        """By tensor and type, measured unless they are known; quantisers stay for what follows."""
        statistics = self._statistics()
        self.quantizers = damage.quantizers(statistics)
        if known is not None:
            return known
        return damage.table(self.checkpoint, describe(self.checkpoint), statistics, self.quantizers, self.progress)

    def rounding(self) -> Mapping[str, Quantizer]:
        """The quantisers."""
        if self.quantizers is None:
            statistics = self._statistics()
            with self.progress.stage("preparing rounding", 1) as stage:
                self.quantizers = damage.quantizers(statistics)
                stage.advance()
        return self.quantizers

    @contextmanager
    def reference(self, windows: Sequence[Sequence[int]]) -> Iterator[ScoringModel]:
        """The unquantised model that probes are compared with."""
        with open_torch_model(self.checkpoint, self.progress, device=self.device) as model:
            yield TransformersModel(model, "")

    def _statistics(self) -> Mapping[str, TensorStatistics]:
        statistics = _load_statistics(self.key)
        if statistics is None:
            statistics = sensitivity.collect(self.checkpoint, self.windows, self.progress, device=self.device)
            _store_statistics(self.key, statistics)
        return statistics


@dataclass
class _ByLayers:
    """Statistics of one matrix in memory at a time; they and the quantisers are on disk."""

    checkpoint: Checkpoint
    windows: Sequence[Sequence[int]]
    key: str
    device: DeviceChoice
    progress: Progress
    store: StatisticsStore | None = None

    def damages(self, known: Mapping[str, Mapping[str, float]] | None) -> Mapping[str, Mapping[str, float]]:
        """By tensor and type, as they were measured when the quantisers were made."""
        self.store = self.store or open_store(self.key)
        try:
            found = self._measured(self.store)
        except DamagedStoreError:  # what the file was made from is gone
            self.store.clear()
            found = self._measured(self.store)
        return known if known is not None else found

    def rounding(self) -> Mapping[str, Quantizer]:
        """The quantisers, each read when it is asked for."""
        if self.store is None:
            self.damages(None)
        assert self.store is not None
        return StoredQuantizers(self.store, list(measured_tensors(describe(self.checkpoint))[0]))

    @contextmanager
    def reference(self, windows: Sequence[Sequence[int]]) -> Iterator[ScoringModel]:
        """The unquantised model that probes are compared with, for these windows."""
        with open_layerwise_scoring(self.checkpoint, windows, self.progress, device=self.device) as model:
            yield model

    def _measured(self, store: StatisticsStore) -> dict[str, dict[str, float]]:
        """What every tensor loses; one tensor after the other, each with its quantiser in place of its statistics."""
        collect_by_layers(self.checkpoint, self.windows, store, self.progress, device=self.device)
        matrices = measured_tensors(describe(self.checkpoint))[0]
        found: dict[str, dict[str, float]] = {}
        stage_of = self.progress.stage("measuring types", len(matrices), unit="tensors")
        with stage_of as stage, ThreadPoolExecutor(usable_cpus()) as pool:
            for name, item in matrices.items():
                if store.has_quantizer(name):
                    store.quantizer(name)  # raises when it is damaged
                else:
                    statistics = store.statistics(name)
                    given = damage.quantizer(statistics)
                    store.put_quantizer(name, given, damage.judge(self.checkpoint, item, statistics, given, pool=pool))
                found[name] = store.damages(name)
                stage.advance()
        return found


# --- correction by measurement


@dataclass(frozen=True)
class _Probe:
    key: str
    checkpoint: Checkpoint
    description: ModelDescription
    words: SourceTokenizer
    calibration: Calibration
    damages: Mapping[str, Mapping[str, float]]
    given: _Whole | _ByLayers

    def knots(self, progress: Progress) -> tuple[tuple[float, float], ...]:
        """(sum of damages, KL) of three artefacts: all in the most bits, a good one of middle size, the smallest."""
        high = {name: max(row, key=lambda kind: ggml.TYPES[kind].bits) for name, row in self.damages.items() if row}
        options = {name: row for name, row in options_of(self.description, self.damages).items() if row}
        least = solve(options, Limits(size_bytes=cheapest(options, "size_bytes").size_bytes))
        most = sum(size_in(self.description, name, kind) for name, kind in high.items())
        assert least is not None  # the cheapest choice keeps its own limit
        middle = solve(options, Limits(size_bytes=round((least.size_bytes * most) ** 0.5)))
        assert middle is not None
        with self.given.reference(self.calibration.probes) as reference:
            found = [
                (damage.total(self.damages, types), self._kl(types, reference, progress))
                for types in (high, middle.types, least.types)
            ]
        return _rising(found)

    def _kl(self, types: Mapping[str, str], reference: ScoringModel, progress: Progress) -> float:
        """What was measured of an artefact, kept as soon as it is there."""
        key = cache.key_of("probe", self.key, sorted(types.items()))
        held = _load(key, _PROBE)
        if not isinstance(held, float):
            held = self._measure(types, reference, progress)
            _store(key, _PROBE, held)
        return held

    def _measure(self, types: Mapping[str, str], reference: ScoringModel, progress: Progress) -> float:
        windows = [Window(tokens, min(MIN_CONTEXT, len(tokens) // 2) - 1) for tokens in self.calibration.probes]
        with tempfile.TemporaryDirectory(prefix="edgelm-probe-") as directory:
            path = Path(directory) / "probe.gguf"
            metadata = {**self.description.metadata, **self.words.gguf_metadata}
            plans = [
                _tensor_plan(self.description, item.name, types.get(item.name)) for item in self.description.tensors
            ]
            write_gguf(
                path, self.checkpoint, self.description.tensors, plans, metadata,
                progress=progress, quantizers=self.given.rounding(),
            )  # fmt: skip
            length = max(len(window.tokens) for window in windows)
            options = EngineOptions(context=length, batch=BATCH, all_logits=True, flash_attention="on")
            engine = load_engine(path, options)
            try:
                compared = compare_models(reference, EngineModel(engine), windows, progress)
            finally:
                engine.close()
        return float(compared.kl.mean())


def _rising(found: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Knots that rise in both: where noise is larger than the difference, a knot is left out."""
    knots = sorted(found)
    kept = knots[:1]
    for lost, kl in knots[1:]:
        if lost > kept[-1][0] * (1 + 1e-6) + 1e-12 and kl > kept[-1][1]:
            kept.append((lost, kl))
    return tuple(kept)


def _tensor_plan(description: ModelDescription, name: str, kind: str | None) -> TensorPlan:
    item = next(item for item in description.tensors if item.name == name)
    size_bytes = size_in(description, name, kind or "F32")
    return TensorPlan(
        name=name, source_name=item.source_name, shape=item.shape, type=kind or "F32", size_bytes=size_bytes, reason=""
    )


def size_in(description: ModelDescription, name: str, kind: str) -> int:
    """Bytes of a tensor of the artefact in a type."""
    shape = next(item.shape for item in description.tensors if item.name == name)
    return int(np.prod(shape[:-1], dtype=np.int64)) * ggml.TYPES[kind].row_bytes(shape[-1])


def options_of(description: ModelDescription, damages: Mapping[str, Mapping[str, float]]) -> dict[str, list[Option]]:
    """Options by damage and size alone."""
    return {
        name: [Option(kind, lost, size_in(description, name, kind)) for kind, lost in row.items()]
        for name, row in damages.items()
    }


# --- storing


def _packed(statistics: Mapping[str, TensorStatistics]) -> dict[str, np.ndarray[Any, Any]]:
    """Arrays by ``tensor/field``."""
    return {
        f"{name}/{field.name}": np.asarray(getattr(item, field.name))
        for name, item in statistics.items()
        for field in fields(item)
        if getattr(item, field.name) is not None
    }


def _unpacked(arrays: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, TensorStatistics]:
    found: dict[str, TensorStatistics] = {}
    for name in dict.fromkeys(key.rpartition("/")[0] for key in arrays):
        values: dict[str, Any] = {
            field.name: arrays[f"{name}/{field.name}"]
            for field in fields(TensorStatistics)
            if f"{name}/{field.name}" in arrays
        }
        values["tokens"] = int(values["tokens"])
        found[name] = TensorStatistics(**values)
    return found


def _store(key: str, name: str, document: Any) -> None:
    with cache.new_entry(key) as directory:
        if directory is not None:
            (directory / name).write_text(json.dumps(document), encoding="utf-8")


def _store_statistics(key: str, statistics: Mapping[str, TensorStatistics]) -> None:
    with cache.new_entry(key) as directory:
        if directory is not None:
            with (directory / _STATISTICS).open("wb") as stream:
                np.savez(stream, **_packed(statistics))  # type: ignore[arg-type]


class _Lazy(Mapping[str, TensorStatistics]):
    """Statistics that are read from the cache only when somebody asks."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: dict[str, TensorStatistics] | None = None

    def _read(self) -> dict[str, TensorStatistics]:
        if self._held is None:
            with np.load(self._path, allow_pickle=False) as arrays:
                self._held = _unpacked({name: arrays[name] for name in arrays.files})
        return self._held

    def __getitem__(self, name: str) -> TensorStatistics:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())


def _load(key: str, name: str) -> Any:
    """A JSON document from the cache, None when it is not there or damaged."""
    directory = cache.find(key)
    if directory is None:
        return None
    try:
        return json.loads((directory / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        cache.remove(key)
        return None


def _load_damages(key: str) -> dict[str, dict[str, float]] | None:
    document = _load(key, _DAMAGES)
    try:
        if document is not None:
            return {name: {kind: float(lost) for kind, lost in row.items()} for name, row in document.items()}
    except (ValueError, AttributeError, TypeError):
        cache.remove(key)
    return None


def _load_result(key: str) -> tuple[tuple[tuple[float, float], ...] | None, str]:
    """Knots, None when they are not there, and the note that goes with them."""
    document = _load(key, _RESULT)
    try:
        if document is not None:
            return tuple((float(lost), float(kl)) for lost, kl in document["knots"]), str(document.get("note", ""))
    except (ValueError, KeyError, TypeError, AttributeError):
        cache.remove(key)
    return None, ""


def _load_statistics(key: str) -> Mapping[str, TensorStatistics] | None:
    directory = cache.find(key)
    if directory is None:
        return None
    try:
        with zipfile.ZipFile(directory / _STATISTICS) as archive:
            archive.namelist()
        return _Lazy(directory / _STATISTICS)
    except (OSError, zipfile.BadZipFile):
        cache.remove(key)
        return None
