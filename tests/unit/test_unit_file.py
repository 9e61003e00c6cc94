"""The systemd unit: what systemd itself thinks of it, what it promises, and how a server tells systemd of itself."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from fake_engine import FakeEngine, wait_until
from live_server import fake_model, running_server

from edgelm.bundle import Choice
from edgelm.cli.app import run_cli
from edgelm.errors import UsageError
from runtime.engine import EngineOptions
from runtime.notify import Notifier
from runtime.server.metrics import Metrics
from runtime.server.worker import Worker
from runtime.settings import predicted_bytes
from targets.unit import STOP_S, Unit, unit_text

needs_datagrams = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="systemd's sockets are Unix sockets")


def parsed(text: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text)
    return parser


@pytest.mark.parametrize("user", [None, "daemon"])
def test_a_unit_has_every_promise_once(user: str | None) -> None:
    unit = Unit(["/usr/bin/edgelm", "serve", "/b"], user=user, memory_max=Choice(value=1000, reason="predicted 900 B"))
    text = unit_text(unit)
    found = parsed(text)  # strict: no key twice
    assert found["Unit"]["StartLimitIntervalSec"] == "0"
    service = found["Service"]
    assert service["Type"] == "notify"
    assert service["Restart"] == "on-failure"
    assert service["MemoryMax"] == "1000"
    assert "# predicted 900 B\nMemoryMax=" in text
    assert service["NoNewPrivileges"] == "yes"
    assert int(service["OOMScoreAdjust"]) > 0
    assert int(service["TimeoutStopSec"]) == STOP_S
    assert ("ProtectSystem" in service) == (user is not None)
    assert found["Install"]["WantedBy"] == ("default.target" if user is None else "multi-user.target")


def test_a_unit_for_what_cannot_tell_and_cannot_be_confined() -> None:
    service = parsed(unit_text(Unit(["/x"], notify=False, hardened=False)))["Service"]
    assert service["Type"] == "exec"
    assert not {"WatchdogSec", "NoNewPrivileges", "MemoryMax"} & set(service)


@pytest.mark.parametrize("word", ["a b", "50%", "$HOME", 'say "x"', "back\\slash", "", "dash-ed/path.gguf"])
def test_words_are_quoted_as_systemd_reads_them(word: str) -> None:
    line = parsed(unit_text(Unit(["/bin/echo", word])))["Service"]["ExecStart"]
    assert "%" not in line.replace("%%", "")
    assert "$" not in line.replace("$$", "")
    # Beyond specifiers and variables, double quotes and backslashes mean what they mean to a shell.
    assert shlex.split(line.replace("%%", "%").replace("$$", "$")) == ["/bin/echo", word]


def test_a_word_with_a_line_break_cannot_add_a_setting() -> None:
    with pytest.raises(UsageError, match="control character"):
        unit_text(Unit(["/bin/echo", "x\nExecStartPre=/bin/false"]))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    path = tmp_path / "edgelm.service"
    unit = Unit(["/bin/true", "a b%"], directory=str(tmp_path), user="daemon", writable=[str(tmp_path)])
    path.write_text(unit_text(unit))
    done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, check=False)
    ours = [line for line in done.stderr.splitlines() if path.name in line]
    newer = re.compile(r"Unknown key( name)? '(RestartSteps|RestartMaxDelaySec)'")  # before systemd 254
    assert done.returncode == 0, done.stderr
    assert not [line for line in ours if not newer.search(line)]


def test_the_command_writes_what_serve_would_take(
    tmp_path: Path, smollm2_gguf: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "units" / "edgelm.service"
    arguments = ["service", str(smollm2_gguf), "-o", str(output), "--", "--port", "9000", "--parallel", "2"]
    assert run_cli(arguments) == 0
    service = parsed(output.read_text())["Service"]
    assert shlex.split(service["ExecStart"])[-6:] == ["serve", str(smollm2_gguf), "--port", "9000", "--parallel", "2"]
    assert service["WorkingDirectory"] == str(tmp_path)
    needed = predicted_bytes(smollm2_gguf, EngineOptions(context=0, sequences=2), in_process=False)
    assert needed < int(service["MemoryMax"]) < 2 * needed
    assert run_cli(["service", str(smollm2_gguf), "--", "--port", "99999"]) == 2
    assert "--port" in capsys.readouterr().err
    # The suite itself may run from a temporary directory; here another one is.
    monkeypatch.setattr("edgelm.cli.service.PRIVATE_DIRECTORIES", (tmp_path,))
    hidden = str(tmp_path / "key")
    assert run_cli(["service", str(smollm2_gguf), "--system", "pi", "--", "--api-key-file", hidden]) == 2
    assert "temporary" in capsys.readouterr().err
    key = smollm2_gguf.parent / "keys" / "key"
    assert run_cli(["service", str(smollm2_gguf), "--system", "pi", "--", "--api-key-file", str(key)]) == 0
    service = parsed(capsys.readouterr().out)["Service"]
    assert service["User"] == "pi"
    assert service["ReadWritePaths"] == str(key.parent)
    for prompts, writable in ((smollm2_gguf.parent / "new", smollm2_gguf.parent), (smollm2_gguf.parent,) * 2):
        assert run_cli(["service", str(smollm2_gguf), "--system", "pi", "--", "--prompt-cache", str(prompts)]) == 0
        assert parsed(capsys.readouterr().out)["Service"]["ReadWritePaths"] == str(writable)
    assert run_cli(["service", str(smollm2_gguf), "--system", "pi", "--", "--prompt-cache", hidden]) == 2
    assert "temporary" in capsys.readouterr().err


@contextmanager
def manager(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """What systemd does: a socket, and everything that was said to it."""
    said: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.settimeout(0.05)
        stopped = threading.Event()

        def listen() -> None:
            while not stopped.is_set():
                with suppress(TimeoutError):
                    said.extend(receiver.recv(4096).decode().splitlines())

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield str(tmp_path / "notify"), said
        finally:
            stopped.set()
            thread.join()


@needs_datagrams
def test_systemd_is_told_of_readiness_life_and_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    engine = FakeEngine(on_forward=lambda _: release.wait(10) and None)
    metrics = Metrics()
    with manager(tmp_path) as (address, said):
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        monkeypatch.setenv("WATCHDOG_USEC", "400000")
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
        with running_server(Worker(fake_model(engine), metrics), metrics):
            assert wait_until(lambda: said.count("WATCHDOG=1") >= 2)  # alive before it is ready
            assert "STATUS=starting" in said
            assert "READY=1" not in said
            release.set()
            assert wait_until(lambda: "READY=1" in said)
            assert "STOPPING=1" not in said
        assert wait_until(lambda: "STOPPING=1" in said)


@needs_datagrams
def test_without_a_manager_nothing_is_said(tmp_path: Path) -> None:
    assert Notifier({}).watchdog_s is None
    Notifier({}).send("READY=1")
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "nobody")}).send("READY=1")
    Notifier({"NOTIFY_SOCKET": "@edgelm-nobody-listens"}).send("READY=1")
    assert Notifier({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": "1"}).watchdog_s is None
    assert Notifier({"WATCHDOG_USEC": "2000000"}).watchdog_s == 1.0
    assert Notifier({"WATCHDOG_USEC": "soon"}).watchdog_s is None
