"""The bundle format: what is refused on opening, and that a half bundle never exists."""

from __future__ import annotations

import json
import os
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from edgelm.bundle import (
    Choice,
    ExportPlan,
    Manifest,
    Prediction,
    RamParts,
    SourceRecord,
    file_record,
    new_bundle,
    open_bundle,
    write_manifest,
)
from edgelm.errors import BundleError


def make_plan() -> ExportPlan:
    parts = RamParts(weights_bytes=1, repack_bytes=0, kv_bytes=1, compute_bytes=1, process_bytes=1)
    predicted = Prediction(
        target="t", ram_bytes=4, ram_parts=parts, prefill_tps=1.0, decode_tps=1.0, fits="fits", fit_reason="small"
    )
    choice = Choice(value=1, reason="only one")
    return ExportPlan(
        target="t",
        format="gguf",
        quant="Q8_0",
        architecture="llama",
        parameters=1,
        bits_per_weight=8.5,
        artifact_bytes=4,
        context=choice,
        threads_decode=choice,
        threads_prefill=choice,
        tensors=(),
        predicted=predicted,
    )


def fill(directory: Path, *, artifact: str = "model.gguf") -> None:
    (directory / "model.gguf").write_bytes(b"GGUF")
    manifest = Manifest(
        name="m",
        created="2026-01-01T00:00:00+00:00",
        format="gguf",
        artifact=artifact,
        source=SourceRecord(kind="gguf", location="m.gguf", architecture="llama", parameters=1, files=()),
        plan=make_plan(),
        quality=None,
        files=(file_record(directory / "model.gguf"),),
        tool_versions={},
    )
    write_manifest(directory, manifest)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "bundle"
    with new_bundle(path) as staging:
        fill(staging)
    return path


def edit(bundle: Path, **changes: object) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_round_trip(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert opened.manifest.plan == make_plan()
    assert opened.artifact_path.read_bytes() == b"GGUF"
    assert opened.file("model.gguf") == bundle / "model.gguf"
    assert opened.file("tokenizer.json") is None
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_changed_bytes_are_found_by_hash_and_by_size(bundle: Path) -> None:
    (bundle / "model.gguf").write_bytes(b"GGUG")
    with pytest.raises(BundleError, match="SHA-256"):
        open_bundle(bundle)
    (bundle / "model.gguf").write_bytes(b"GGUF!")
    with pytest.raises(BundleError, match="5 bytes, its manifest says 4"):
        open_bundle(bundle, check_hashes=False)


@pytest.mark.parametrize("name", ["../model.gguf", "/etc/hostname", "a/b", "", ".hidden", "manifest.json", "a\x00b"])
def test_only_plain_file_names(bundle: Path, name: str) -> None:
    record = file_record(bundle / "model.gguf").model_dump()
    edit(bundle, files=[record, {**record, "name": name}])
    with pytest.raises(BundleError, match="plain file name"):
        open_bundle(bundle)


def test_a_symbolic_link_is_no_bundle_file(bundle: Path) -> None:
    target = bundle.parent / "elsewhere"
    (bundle / "model.gguf").rename(target)
    (bundle / "model.gguf").symlink_to(target)
    with pytest.raises(BundleError, match="not a regular file"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"surprise": 1}, "surprise"),
        ({"files": []}, "does not list it"),
        ({"plan": None}, "plan"),
    ],
)
def test_manifest_is_strict(bundle: Path, changes: dict[str, object], message: str) -> None:
    edit(bundle, **changes)
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle)


def test_missing_things_are_named(tmp_path: Path, bundle: Path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        open_bundle(tmp_path / "nothing")
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        open_bundle(tmp_path)
    (bundle / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match="not a valid manifest"):
        open_bundle(bundle)


def test_an_interrupted_write_leaves_the_old_bundle(bundle: Path) -> None:
    before = sorted(os.listdir(bundle.parent))

    def write_and_stop() -> None:
        with new_bundle(bundle, force=True) as staging:
            fill(staging)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_stop()
    assert sorted(os.listdir(bundle.parent)) == before
    open_bundle(bundle)


@pytest.mark.parametrize("exchange", [True, False])
def test_replacing_is_complete_with_and_without_an_atomic_exchange(
    bundle: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr("edgelm.bundle._exchange", lambda one, other: False)
    with new_bundle(bundle, force=True) as staging:
        fill(staging)
        (staging / "marker").touch()
    assert (bundle / "marker").exists()
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_an_existing_output_needs_force_and_must_be_a_bundle(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="exists"), new_bundle(bundle):
        pytest.fail("entered")
    with new_bundle(bundle, force=True) as staging:
        fill(staging)
        (staging / "marker").touch()
    assert (bundle / "marker").exists()
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").touch()
    with pytest.raises(BundleError, match="not a bundle"), new_bundle(precious, force=True):
        pytest.fail("entered")
    assert (precious / "thesis.txt").exists()


def test_hashing_stops_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"1234")
    with pytest.raises(CancelledError):
        file_record(path, stopped=lambda: True)
