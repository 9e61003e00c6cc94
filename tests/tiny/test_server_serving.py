"""A server's life in a process of its own: it drains on SIGTERM; and what stops it from starting, in sentences."""

from __future__ import annotations

import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from fake_engine import wait_until

from edgelm.cli.app import run_cli
from edgelm.errors import EdgelmError
from runtime.server.serving import bind

ROOT = Path(__file__).resolve().parents[2]
SERVER = """
import sys
import threading
from fake_engine import FakeEngine
from live_server import fake_model
from runtime.server.limits import Access
from runtime.server.logs import start_logging
from runtime.server.metrics import Metrics
from runtime.server.serving import bind, serve
from runtime.server.worker import Worker

start_logging()
with bind("127.0.0.1", 0) as listener:
    print(listener.getsockname()[1], flush=True)
    engine = FakeEngine(context=4096, step_delay_s=0.02)
    metrics = Metrics()
    serve(Worker(fake_model(engine), metrics), metrics, listener, Access(), drain_s=float(sys.argv[1]))
    assert engine.closed
"""


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """The command configures the process's logging; the next test's stderr is another one."""
    loggers = (logging.getLogger("edgelm.server"), logging.getLogger("uvicorn.error"))
    before = [(logger, logger.handlers, logger.level, logger.propagate) for logger in loggers]
    hook = threading.excepthook
    yield
    threading.excepthook = hook
    for logger, handlers, level, propagate in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@contextmanager
def server_process(drain_s: float) -> Iterator[tuple[subprocess.Popen[str], int]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", SERVER, str(drain_s)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    try:
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


@contextmanager
def stream(port: int, max_tokens: int) -> Iterator[http.client.HTTPResponse]:
    """A stream whose first event has arrived."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", "/v1/completions", json.dumps({"prompt": "x", "max_tokens": max_tokens, "stream": True}))
    with closing(connection), connection.getresponse() as response:
        assert response.status == 200
        assert response.readline().startswith(b"data: {")
        yield response


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return True
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_streams_finish(number: signal.Signals) -> None:
    with server_process(drain_s=20) as (process, port), stream(port, max_tokens=40) as answer:
        process.send_signal(number)
        assert wait_until(lambda: refuses(port))
        rest = answer.read().decode()
        assert rest.endswith("data: [DONE]\n\n")
        assert '"finish_reason": "length"' in rest
        _, log = process.communicate(timeout=20)
        assert process.returncode == 0, log
        events = [json.loads(line)["event"] for line in log.splitlines()]
        assert {"draining", "stopped"} <= set(events)


def test_the_drain_has_a_deadline_and_tells_the_clients() -> None:
    with server_process(drain_s=0.2) as (process, port), stream(port, max_tokens=4000) as answer:
        process.send_signal(signal.SIGTERM)
        last = answer.read().decode().strip().split("\n\n")[-1]
        assert "deadline" in json.loads(last.removeprefix("data: "))["error"]["message"]
        _, log = process.communicate(timeout=20)
        assert process.returncode == 0, log


def test_a_port_in_use_is_one_sentence() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(EdgelmError, match=f"port {port} on 127.0.0.1 is in use"):
            bind("127.0.0.1", port)


def test_an_address_of_another_machine_is_one_sentence() -> None:
    with pytest.raises(EdgelmError, match="cannot listen on 192"):
        bind("192.0.2.1", 0)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["missing"], 1, "missing does not exist"),
        (["missing", "--host", "0.0.0.0"], 2, "an API key is needed"),
        (["missing", "--api-key-file", "loose"], 1, "can be read by other users"),
        (["missing", "--port", "70000"], 2, "--port"),
        (["missing", "--parallel", "0"], 2, "--parallel"),
        ([], 2, "BUNDLE"),
    ],
)
def test_what_stops_the_command(
    arguments: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loose").write_text("a key that everybody can read")
    (tmp_path / "loose").chmod(0o644)
    assert run_cli(["serve", *arguments, *(["--port", "0"] if "--port" not in arguments else [])]) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert message in output.err
    assert "error: " in output.err


def test_the_port_of_a_running_server_stops_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with bind("127.0.0.1", 0) as first:
        assert run_cli(["serve", "missing", "--port", str(first.getsockname()[1])]) == 1
    assert "hint: choose another with --port" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--in-process"]])
def test_a_file_that_is_no_model_ends_the_command_with_its_error(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert run_cli(["serve", str(tmp_path / "x.gguf"), "--port", "0", *arguments]) == 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    error = capsys.readouterr().err
    assert "error: " in error
    assert "x.gguf" in error


def test_two_models_of_one_name_are_refused(smollm2_gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["serve", str(smollm2_gguf), str(smollm2_gguf), "--port", "0"]) == 2
    assert "two of the models are named" in capsys.readouterr().err
