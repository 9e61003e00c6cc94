"""Models that do not fit into memory: a layer at a time gives what the whole model gives, and goes on when killed."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgelm.bundle import Choice
from edgelm.errors import CheckpointError, DoesNotFitError
from edgelm.progress import SILENT, Stage
from exporter import analysis, damage, layerwise, measuring_way, reference, sensitivity
from exporter.architectures import available, describe, family
from exporter.checkpoint import Checkpoint, open_checkpoint, open_source
from exporter.options import ExportOptions
from exporter.pipeline import choices, export, prepare
from exporter.rounding import quantize
from exporter.sensitivity import TensorStatistics
from exporter.sensitivity_layers import collect_by_layers
from exporter.statistics_store import StatisticsStore, open_store
from tests.parity import ROWS, VOCABULARY, Row, known_to_transformers, make_checkpoint
from tests.tiny_models import make_tiny_llama

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [pytest.mark.tiny, pytest.mark.reference, pytest.mark.filterwarnings("ignore")]
FIRST = [
    next(row for row in ROWS if row.model_type == name and row.change is None)
    for name in available()
    if not family(name).encoder
]
KNOWN = [row for row in FIRST if known_to_transformers(row)]  # the others with `make test-transformers5`
OTHERS = [row for row in ROWS if row.name in ("llama, tied, biases", "gpt_neox, one after the other")]


def _windows(count: int = 3, length: int = 48) -> list[tuple[int, ...]]:
    generator = np.random.default_rng(5)
    return [tuple(generator.integers(3, VOCABULARY, length).tolist()) for _ in range(count)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("source") / "tiny-layers", hidden=64, vocab=512)


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where nothing fits whole, everything layer by layer; its cache is empty."""
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measuring_way, "memory_obstacle", lambda _checkpoint: "what every matrix reads is too large")


def _same(found: TensorStatistics, expected: TensorStatistics) -> None:
    for field in fields(TensorStatistics):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        assert (one is None) == (other is None), field.name
        if one is not None:
            assert np.all(np.isfinite(other))
            # Each sum is of the same numbers in the same order; only a product of matrices may not be symmetric.
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6 * np.abs(other).max(), err_msg=field.name)


@pytest.mark.parametrize("row", KNOWN + OTHERS, ids=lambda row: row.name)
def test_a_layer_at_a_time_gives_what_the_whole_model_gives(row: Row, tmp_path: Path) -> None:
    make_checkpoint(row, tmp_path / "model", gain=1.0)
    checkpoint = open_checkpoint(open_source(str(tmp_path / "model")))
    windows = _windows()
    expected = sensitivity.collect(checkpoint, windows, SILENT)
    (tmp_path / "store").mkdir()
    store = StatisticsStore(tmp_path / "store")
    collect_by_layers(checkpoint, windows, store, SILENT)
    for name, item in expected.items():
        _same(store.statistics(name), item)
    assert not list(store.directory.glob("state-*"))
    with reference.open_torch_model(checkpoint, SILENT) as whole:
        plain = reference.TransformersModel(whole, "")
        windows = [*windows, windows[0][:31]]
        with layerwise.open_layerwise_scoring(checkpoint, windows, SILENT) as scoring:
            assert scoring.vocabulary == plain.vocabulary
            for window in windows:
                plain.reset()
                scoring.reset()
                logits = plain.append(window).copy()
                pieces = np.concatenate([scoring.append(window[:20]), scoring.append(window[20:])])
                np.testing.assert_allclose(pieces, logits, atol=1e-4)
            with pytest.raises(ValueError, match="announced"):
                scoring.append([0] * 100)


def test_a_gguf_source_is_computed_a_layer_at_a_time_too(model: Path, tmp_path: Path) -> None:
    bundle = export(ExportOptions(str(model), quant="F16", verify=False), tmp_path / "f16")
    checkpoint = open_checkpoint(open_source(str(bundle.artifact_path)))
    expected = sensitivity.collect(checkpoint, _windows(), SILENT)
    (tmp_path / "store").mkdir()
    store = StatisticsStore(tmp_path / "store")
    collect_by_layers(checkpoint, _windows(), store, SILENT)
    for name, item in expected.items():
        _same(store.statistics(name), item)


class _Killed(BaseException):
    pass


class _KilledAfter:
    """A progress that ends everything after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @contextmanager
    def stage(self, _name: str, _total: int | None = None, *, unit: str = "") -> Iterator[Stage]:
        yield self  # type: ignore[misc]

    def advance(self, amount: int = 1) -> None:
        self.left -= amount
        if self.left <= 0:
            raise _Killed


def test_a_killed_collection_goes_on_at_the_layer_that_was_reached(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(open_source(str(model)))
    windows = _windows()
    expected = sensitivity.collect(checkpoint, windows, SILENT)
    layers = describe(checkpoint).dimensions.layers
    computed: list[int] = []
    apply = layerwise.LayerwiseModel.apply

    def counted(self: layerwise.LayerwiseModel, index: int, state: Any) -> Any:
        computed.append(index)
        return apply(self, index, state)

    monkeypatch.setattr(layerwise.LayerwiseModel, "apply", counted)
    for steps in range(1, 2 * layers + 2):
        directory = tmp_path / str(steps)
        directory.mkdir()
        with pytest.raises(_Killed):
            collect_by_layers(checkpoint, windows, StatisticsStore(directory), _KilledAfter(steps))
        collect_by_layers(checkpoint, windows, StatisticsStore(directory), SILENT)
        for name, item in expected.items():
            _same(StatisticsStore(directory).statistics(name), item)
        assert len(computed) == 2 * layers * len(windows)  # nothing twice
        computed.clear()


def test_auto_takes_the_same_types_and_writes_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ExportOptions(str(model), quant="auto", verify=False)
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path / "whole"))
    whole = export(options, tmp_path / "first")
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measuring_way, "memory_obstacle", lambda _checkpoint: "what every matrix reads is too large")
    monkeypatch.setattr(sensitivity, "collect", None)
    monkeypatch.setattr(analysis, "open_torch_model", None)
    by_layers = export(options, tmp_path / "second")
    assert by_layers.artifact_path.read_bytes() == whole.artifact_path.read_bytes()
    plan = by_layers.manifest.plan
    assert plan.predicted_kl == pytest.approx(whole.manifest.plan.predicted_kl, rel=1e-4)
    assert "measured layer by layer: in one piece what every matrix reads is too large" in plan.notes
    (store,) = (tmp_path / "cache").glob("layers-*")
    assert not [path for path in store.iterdir() if path.suffix in (".moment", ".npz", ".npy", ".new")]
    monkeypatch.setattr(analysis, "collect_by_layers", None)  # other limits measure nothing new
    listed = choices(options, SILENT)
    assert listed[2] is not None
    assert plan.notes[-1] in listed[2].plan.notes
    smaller = ExportOptions(str(model), quant="auto", max_artifact_bytes=plan.artifact_bytes - 9000, verify=False)
    with monkeypatch.context() as patched:
        patched.setattr(analysis, "collect_by_layers", collect_by_layers)  # looks whether all is there
        patched.setattr(damage, "judge", None)
        assert export(smaller, tmp_path / "third").artifact_path.stat().st_size < plan.artifact_bytes


@pytest.mark.usefixtures("small_machine")
def test_an_interrupted_analysis_goes_on_at_its_tensor_and_damage_begins_it_anew(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ExportOptions(str(model), quant="auto")
    judged: list[str] = []
    judge = damage.judge

    def ending(checkpoint: Checkpoint, item: Any, *arguments: Any, **named: Any) -> dict[str, float]:
        judged.append(item.name)
        if len(judged) == 5:
            raise KeyboardInterrupt
        return judge(checkpoint, item, *arguments, **named)

    monkeypatch.setattr(damage, "judge", ending)
    with pytest.raises(KeyboardInterrupt):
        prepare(options)
    found = prepare(options).plan  # nothing that is kept has the store
    assert found.quant == "MIXED"
    assert len(set(judged)) == len(judged) - 1  # only the fifth twice
    (store,) = (tmp_path / "cache").glob("layers-*")
    factor = next(store.glob("*.factor"))
    factor.write_bytes(factor.read_bytes()[:-4])
    (entry,) = (tmp_path / "cache").glob("entry-*/analysis.json")
    entry.unlink()
    before, again = len(judged), prepare(options).plan
    assert len(judged) == 2 * (before - 1) + 1
    assert (again.tensors, again.predicted_kl) == (found.tensors, found.predicted_kl)
    (same,) = (tmp_path / "cache").glob("layers-*")
    assert same == store


@pytest.mark.usefixtures("small_machine")
def test_what_memory_and_disk_have_no_room_for_is_said(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(open_source(str(model)))
    assert measuring_way.measuring_way(checkpoint).value == "layers"
    monkeypatch.setattr(measuring_way, "available_memory", lambda: Choice(value=1000, reason="made up"))
    refused = measuring_way.measuring_way(checkpoint)
    assert refused.value == "none"
    assert "1 kB are free" in refused.reason
    monkeypatch.undo()
    monkeypatch.setattr(measuring_way, "memory_obstacle", lambda _checkpoint: "too large")
    monkeypatch.setattr(measuring_way.shutil, "disk_usage", lambda _path: type("Usage", (), {"free": 2000}))
    assert "of disk, 2 kB are free" in measuring_way.measuring_way(checkpoint).reason


def test_a_checkpoint_with_a_parameter_missing_is_refused(tmp_path: Path) -> None:
    row = next(row for row in ROWS if row.name == "llama")
    make_checkpoint(row, tmp_path / "model")
    whole = open_checkpoint(open_source(str(tmp_path / "model")))
    kept = {name: item for name, item in whole.tensors.items() if not name.endswith("layers.2.mlp.up_proj.weight")}
    cut = Checkpoint(whole.source, whole.architecture, whole.config, kept, whole.files, whole.vocabulary_bytes)
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.up_proj\.weight"), layerwise.open_layerwise(cut):
        pass


def test_a_proof_reads_the_reference_layer_by_layer_when_it_does_not_fit(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_OVERHEAD", 1e9)
    bundle = export(ExportOptions(str(model), quant="Q8_0"), tmp_path / "bundle")
    quality = bundle.manifest.quality
    assert quality is not None
    assert quality.reference.endswith("float32, layer by layer")
    assert 0 <= quality.kl_mean < 0.01


# --- the store


def test_a_store_gives_back_what_rounds_a_matrix(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    inputs, rows = random.standard_normal((900, 576)), random.standard_normal((40, 576)).astype(np.float32)
    moment = (inputs.T @ inputs / 900).astype(np.float32)
    moment = (moment + moment.T) / 2
    statistics = TensorStatistics(900, np.square(inputs).sum(axis=0), moment, np.ones(40, np.float32))
    store = StatisticsStore(tmp_path)
    store.put("a.weight", statistics)
    _same(store.statistics("a.weight"), statistics)
    given = damage.quantizer(statistics)
    store.put_quantizer("a.weight", given, {"Q4_0": 0.5})
    kept = store.quantizer("a.weight")
    assert store.damages("a.weight") == {"Q4_0": 0.5}
    assert given.compensation is not None
    assert kept.compensation is not None
    for name in ("Q4_0", "Q8_0"):
        np.testing.assert_array_equal(given(rows, name), kept(rows, name))
    np.testing.assert_array_equal(quantize(rows, "Q4_0", given.compensation), quantize(rows, "Q4_0", kept.compensation))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".factor", ".json", ".rounding"]


def test_one_store_is_kept_and_one_process_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path))
    first = open_store("one")
    first.put_state("x", [np.zeros(3, np.float32)])
    second = open_store("one")  # as another process would: the first is in use
    assert second.directory != first.directory
    assert second.state("x") is None
    third = open_store("other")
    assert first.state("x") is not None  # in use, so not removed
    gone = second.directory
    del second
    assert not gone.exists()
    del first, third
    assert open_store("one").state("x") is not None
    open_store("third")
    assert [path.name for path in tmp_path.iterdir()] == ["layers-third"]


def test_a_full_disk_is_said_and_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    store = StatisticsStore(tmp_path)
    with pytest.raises(DoesNotFitError, match="no room left"):
        store.put_state("x", [np.zeros(3, np.float32)])
    assert not list(tmp_path.iterdir())
