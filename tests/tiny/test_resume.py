"""Interrupted exports that may go on: what stays, what is used again, what makes them start anew."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edgelm.bundle import journal_path, kept_bytes, new_bundle, open_bundle
from edgelm.errors import BundleError, CheckpointError, UsageError
from edgelm.progress import Stage
from exporter.options import ExportOptions
from exporter.pipeline import export
from tests.tiny_models import make_tiny_llama

PARTS = 20_000


class Watch:
    """Counts the bytes that are quantised; interrupts once so many are done, like a Ctrl-C."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.advances: list[int] = []
        self._stop_after = stop_after

    @contextmanager
    def stage(self, name: str, total: int | None = None, *, unit: str = "") -> Iterator[Stage]:
        yield self if name == "quantising" else Watch()

    def advance(self, amount: int = 1) -> None:
        self.advances.append(amount)
        if self._stop_after is not None and sum(self.advances) >= self._stop_after:
            raise KeyboardInterrupt


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("exporter.resume.PART_BYTES", PARTS)
    return make_tiny_llama(tmp_path / "model", layers=4)


def options(model: Path, quant: str = "Q8_0") -> ExportOptions:
    return ExportOptions(str(model), target="raspberry-pi-5", quant=quant, context=256, verify=False)


def interrupted(model: Path, bundle: Path, *, resume: bool) -> None:
    with pytest.raises(KeyboardInterrupt):
        export(options(model), bundle, resume=resume, progress=Watch(100_000))
    assert not bundle.exists()


def left(bundle: Path) -> list[str]:
    return sorted(path.name for path in bundle.parent.iterdir() if path.name.startswith("."))


def test_an_interrupted_export_goes_on(model: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "out" / "bundle"
    plain = export(options(model), tmp_path / "plain")
    interrupted(model, bundle, resume=True)
    assert left(bundle) == [".bundle.journal", ".bundle.resume"]
    assert kept_bytes(bundle) >= 100_000
    watch = Watch()
    made = export(options(model), bundle, resume=True, progress=watch)
    assert sum(watch.advances) == sum(item.size_bytes for item in made.manifest.plan.tensors)
    assert watch.advances[0] >= 50_000  # what was there counts at once
    assert left(bundle) == []
    assert open_bundle(bundle).artifact_path.read_bytes() == plain.artifact_path.read_bytes()


def test_without_resume_nothing_is_left(model: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "out" / "bundle"
    interrupted(model, bundle, resume=False)
    assert left(bundle) == []


@pytest.mark.parametrize("change", ["quant", "source", "cut", "journal"])
def test_what_makes_it_start_anew(change: str, model: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "out" / "bundle"
    interrupted(model, bundle, resume=True)
    if change == "source":
        os.utime(model / "model.safetensors", ns=(1, 1))
    if change == "cut":
        os.truncate(tmp_path / "out" / ".bundle.resume" / "model.gguf", 1000)
    if change == "journal":
        journal_path(bundle).write_text("{")
    watch = Watch()
    asked = options(model, "Q4_0" if change == "quant" else "Q8_0")
    made = export(asked, bundle, resume=True, progress=watch)
    assert watch.advances[0] == 0
    assert made.artifact_path.read_bytes() == export(asked, tmp_path / "plain").artifact_path.read_bytes()


def test_a_killed_export_goes_on(model: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    script = f"""
import os
from pathlib import Path
import exporter.resume
from exporter.options import ExportOptions
from exporter.pipeline import export
exporter.resume.PART_BYTES = {PARTS}
note, notes = exporter.resume._note, []
def counted(*arguments):
    note(*arguments)
    notes.append(arguments)
    if len(notes) == 4:
        os.kill(os.getpid(), 9)
exporter.resume._note = counted
export(ExportOptions({str(model)!r}, target="raspberry-pi-5", quant="Q8_0", context=256, verify=False),
       Path({str(bundle)!r}), resume=True)
"""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=root, capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    assert not bundle.exists()
    watch = Watch()
    made = export(options(model), bundle, resume=True, progress=watch)
    assert watch.advances[0] > 0
    assert made.artifact_path.read_bytes() == export(options(model), tmp_path / "plain").artifact_path.read_bytes()


def test_what_another_try_would_meet_again_is_not_kept(tmp_path: Path) -> None:
    def write_and_fail(error: Exception) -> None:
        with new_bundle(tmp_path / "bundle", resume=True) as staging:
            (staging / "model.gguf").write_bytes(b"x")
            raise error

    with pytest.raises(CheckpointError):
        write_and_fail(CheckpointError("NaN"))
    assert left(tmp_path / "bundle") == []
    with pytest.raises(BundleError):
        write_and_fail(BundleError("no room left"))
    assert left(tmp_path / "bundle") == [".bundle.resume"]


def test_one_at_a_time(tmp_path: Path) -> None:
    with (
        new_bundle(tmp_path / "bundle", resume=True) as staging,
        pytest.raises(BundleError, match="another export is writing"),
        new_bundle(tmp_path / "bundle", resume=True),
    ):
        raise AssertionError
    assert not staging.exists()


def test_onnx_cannot_go_on(model: Path, tmp_path: Path) -> None:
    asked = ExportOptions(str(model), target="raspberry-pi-5", format="onnx", quant="int8", verify=False)
    with pytest.raises(UsageError, match="--resume is for GGUF"):
        export(asked, tmp_path / "bundle", resume=True)
