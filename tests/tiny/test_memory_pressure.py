"""Control groups of 512 MiB and 1 GiB, real ones: what does not fit is refused with a sentence, what fits works."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import make_tiny_llama

from edgelm.bundle import Choice
from edgelm.cli.app import run_cli
from edgelm.errors import DoesNotFitError
from runtime.engine import EngineOptions
from runtime.model import open_model

pytestmark = pytest.mark.tiny

ROOT = Path(__file__).resolve().parents[2]
V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
LIMITS = {"512MiB": 512 * 2**20, "1GiB": 2**30}


def _limit_file(group: Path) -> Path:
    return group / ("memory.limit_in_bytes" if group.parent == V1 else "memory.max")


@pytest.fixture(params=LIMITS)
def group(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A control group with a memory limit; skipped where this user may not make one."""
    base = V1 if (V1 / "memory.limit_in_bytes").exists() else V2
    made = base / f"edgelm-test-{os.getpid()}"
    try:
        made.mkdir()
    except OSError as error:
        pytest.skip(f"cannot make control groups here: {error}")
    try:
        if not os.access(_limit_file(made), os.W_OK):
            pytest.skip("the memory controller is not delegated here")
        _limit_file(made).write_text(str(LIMITS[request.param]))
        yield made
    finally:
        made.rmdir()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pressure")
    path = directory / "bundle"
    source = str(make_tiny_llama(directory / "checkpoint"))
    assert run_cli(["export", source, "--quant", "Q8_0", "--no-verify", "-o", str(path)]) == 0
    return path


def enlarge(bundle: Path, directory: Path, size_bytes: int) -> Path:
    """The bundle's model with a hole of ``size_bytes`` behind its tensors: a large file that costs no disk."""
    model = directory / "large.gguf"
    model.write_bytes((bundle / "model.gguf").read_bytes())
    os.truncate(model, model.stat().st_size + size_bytes)
    return model


def edgelm(group: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One command as a process that is in ``group`` from its first instruction on."""
    join = f'echo $$ > {group}/cgroup.procs && exec "$@"'
    command = ["sh", "-c", join, "sh", sys.executable, "-m", "edgelm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)


def test_a_model_that_fits_answers(group: Path, bundle: Path) -> None:
    result = edgelm(group, "run", str(bundle), "hello", "--max-tokens", "4")
    assert result.returncode == 0, result.stderr


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(group: Path, bundle: Path, tmp_path: Path) -> None:
    limit = int(_limit_file(group).read_text())
    model = enlarge(bundle, tmp_path, limit)
    result = edgelm(group, "run", str(model), "hello", "--max-tokens", "4")
    assert result.returncode == 4, result.stderr
    assert "error: large.gguf needs" in result.stderr
    assert _limit_file(group).name in result.stderr  # the limit that decided is named
    assert "hint: use a smaller model or quantisation" in result.stderr


def test_a_context_that_fits_is_offered(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = (bundle / "model.gguf").stat().st_size
    per_token = 2 * 2 * 16 * 2 * 2  # layers x KV heads x head size x keys and values x bytes of f16
    free = weights + 64 * 2**20 + 600 * per_token
    monkeypatch.setattr("runtime.model.available_memory", lambda: Choice(value=free, reason="a test says so"))
    with pytest.raises(DoesNotFitError, match="a test says so") as caught:
        open_model(bundle, EngineOptions(context=1024))
    assert caught.value.hint == "use --context 512"
    model = open_model(bundle, EngineOptions(context=512, threads_decode=1, threads_prefill=1))
    model.close()
