"""docs/compress.md leads from a teacher to a served student: its commands are run in their order, on a tiny teacher."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgelm.cli.app import run_cli
from edgelm.cli.compress import command
from exporter.compress import decoders as decoders_module
from tests.tiny_encoders import make_tiny_bert
from tests.tiny_models import make_tiny_llama

pytestmark = [pytest.mark.tiny, pytest.mark.reference]
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "compress.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
# What would take hours, or be more than the tiny teacher has.
SMALLER = {
    "--layers": "2", "--tokens": "1024", "--finish-tokens": "512", "--min-decode-tps": "1", "--vocabulary": "400",
}  # fmt: skip
SHORT = ["--length", "64", "--batch", "4"]


def typed(line: str) -> list[str]:
    words = shlex.split(line)
    for option, value in SMALLER.items():
        if option in words and words[words.index(option) + 1] != "0":
            words[words.index(option) + 1] = value
    return [*words, *SHORT] if words[:2] == ["edgelm", "compress"] else words


@pytest.mark.skipif(shutil.which("curl") is None, reason="the example is for curl")
def test_the_page_leads_from_a_teacher_to_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(decoders_module, "EVALUATION_TOKENS", 300)
    make_tiny_llama(tmp_path / "teacher", layers=4, ffn=256)
    make_tiny_bert(tmp_path / "all-MiniLM-L6-v2", layers=3)
    (tmp_path / "notes.txt").write_text("What is written down about one thing, again and again. " * 40)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    done: list[str] = []
    server = None
    try:
        for line in COMMANDS:
            words = typed(line.replace("demo:smollm2", "./teacher").replace("8080", port))
            if words[:2] == ["edgelm", "serve"]:
                server = subprocess.Popen([sys.executable, "-m", *words], stderr=subprocess.DEVNULL)
            elif words[0] == "curl":
                assert '"choices"' in until_answered(words, server)
            else:
                assert run_cli(words[1:]) == 0, f"{line}\n{capsys.readouterr().err}"
            done.append(words[1] if words[0] == "edgelm" else words[0])
    finally:
        if server is not None:
            server.terminate()
            server.wait(30)
    assert done.count("compress") == 5
    assert {"export", "verify", "run", "serve", "curl", "compare"} <= set(done)


def until_answered(words: list[str], server: subprocess.Popen[bytes] | None) -> str:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert server is not None
        assert server.poll() is None, "the server ended"
        answer = subprocess.run(
            [*words, "--silent", "--fail", "--max-time", "60"], capture_output=True, text=True, check=False
        )
        if answer.returncode == 0:
            return answer.stdout
        time.sleep(0.3)
    raise AssertionError("the server did not answer")


def choices_of(name: str) -> list[str]:
    kind: Callable[..., object] = next(item.type for item in command.params if item.name == name)
    return list(kind.choices)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("option", "name"), [("--importance", "importance"), ("--depth-by", "depth_by")])
def test_every_measure_is_explained(option: str, name: str) -> None:
    for choice in choices_of(name):
        assert f"| `{option} {choice}` |" in PAGE
