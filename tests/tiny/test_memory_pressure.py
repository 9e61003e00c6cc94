"""Control groups of 512 MiB and 1 GiB, real ones: what does not fit is refused with a sentence, what fits works."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_tiny_llama

from edgelm.bundle import Choice
from edgelm.cli.app import run_cli
from edgelm.errors import DoesNotFitError
from edgelm.units import parse_size
from runtime.engine import EngineOptions
from runtime.model import open_model
from runtime.settings import Asked, choose_settings

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


@pytest.fixture(scope="module")
def thirsty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a large cache: 64 sequences of 1,024 tokens take 1 GiB at f16, 544 MiB at q8_0."""
    directory = tmp_path_factory.mktemp("thirsty")
    source = str(make_tiny_llama(directory / "checkpoint", hidden=256, layers=16, heads=4, kv_heads=4))
    path = directory / "bundle"
    words = ["--quant", "Q8_0", "--context", "1024", "--no-verify"]
    assert run_cli(["export", source, *words, "-o", str(path)]) == 0
    return path


def test_a_server_takes_the_memory_that_is_there(group: Path, thirsty: Path) -> None:
    arguments = ["serve", str(thirsty), "--target", "auto", "--parallel", "64", "--port", "0"]
    command = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", sys.executable, "-m", "edgelm"]
    server = subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert server.stderr is not None
    try:
        events, told = {}, []
        for line in server.stderr:
            told.append(line)
            if line.startswith("{"):
                event = json.loads(line)
                events[event["event"]] = event
            if "listening" in events:
                break
        assert "listening" in events, told
        settled = events["settings"]
        answer = _chat(events["listening"]["url"])
        assert answer["usage"]["completion_tokens"] >= 1
        status = Path(f"/proc/{server.pid}/status").read_text(encoding="ascii")
    finally:
        server.terminate()
        code = server.wait(timeout=60)
        server.stderr.close()
    assert code == 0
    limit = int(_limit_file(group).read_text())
    assert settled["kv_type"].startswith("q8_0: memory is short")
    assert _limit_file(group).name in settled["kv_type"]
    context, reason = settled["context"].split(": ", 1)
    if limit == 2**30:
        assert (context, reason) == ("1024", "the bundle's plan")
    else:
        assert 512 <= int(context) < 1024
        assert reason.startswith("1024 would need")
    swapped = re.search(r"VmSwap:\s+(\d+) kB", status)
    assert swapped
    assert int(swapped[1]) == 0
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert peak
    assert int(peak[1]) * 1024 < limit


def _chat(url: str) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        document: dict[str, Any] = json.load(response)
    return document


def test_an_onnx_model_gets_settings_that_its_engine_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(make_tiny_llama(tmp_path / "checkpoint", hidden=256, layers=4, heads=4, kv_heads=4))
    path = tmp_path / "bundle"
    words = ["--format", "onnx", "--quant", "int8", "--context", "1024", "--no-verify"]
    assert run_cli(["export", source, *words, "-o", str(path)]) == 0
    roomy = choose_settings(path, "auto", Asked(sequences=8))
    assert roomy.options.context == 1024
    assert roomy.lines()["kv_type"].startswith("f32: ")
    assert roomy.options.threads_decode == roomy.options.threads_prefill
    free = int(parse_size(str(roomy.reasons["memory"].value).replace(" ", "")) - 2**23)
    told = Choice(value=free, reason="a test says so")
    monkeypatch.setattr("runtime.settings.memory_for_model", lambda: told)
    tight = choose_settings(path, "auto", Asked(sequences=8))
    assert 512 <= tight.options.context < 1024
    model = open_model(path, tight.options)
    assert model.engine.info.context == tight.options.context
    model.close()


def test_a_context_that_fits_is_offered(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = (bundle / "model.gguf").stat().st_size
    per_token = 2 * 2 * 16 * 2 * 2  # layers x KV heads x head size x keys and values x bytes of f16
    free = weights + 64 * 2**20 + 600 * per_token
    monkeypatch.setattr("runtime.model.memory_for_model", lambda: Choice(value=free, reason="a test says so"))
    with pytest.raises(DoesNotFitError, match="a test says so") as caught:
        open_model(bundle, EngineOptions(context=1024))
    assert caught.value.hint == "use --context 512"
    model = open_model(bundle, EngineOptions(context=512, threads_decode=1, threads_prefill=1))
    model.close()
