"""llama.cpp's own tools, where ``make peers`` built them: the server that answers, the converter that converts.

``EDGELM_PEERS`` names the directory when it is not ``.cache/peers``. Tests that need a tool skip without it.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
CHILD_TIMEOUT_S = 600


def peers() -> Path:
    """The directory that ``make peers`` fills."""
    return Path(os.environ.get("EDGELM_PEERS", ROOT / ".cache" / "peers"))


def tool(name: str) -> Path:
    """A tool's path; without it the test skips."""
    path = peers() / "build" / "bin" / name
    if not path.is_file():
        pytest.skip(f"llama.cpp's {name} is not built: make peers, or EDGELM_PEERS=DIRECTORY")
    return path


def sources() -> Path:
    """llama.cpp's sources; without them the test skips."""
    found = next(peers().glob("llama_cpp_python-*/vendor/llama.cpp"), None)
    if found is None:
        pytest.skip("llama.cpp's sources are not here: make peers, or EDGELM_PEERS=DIRECTORY")
    return found


@contextmanager
def llama_server(model: Path, context: int) -> Iterator[http.client.HTTPConnection]:
    """A connection to llama-server on a free port, one sequence, float32 keys and values as in our parity runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(tool("llama-server")),
        "-m",
        str(model),
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
        "-c",
        str(context),
    ]
    command += ["-np", "1", "-t", "2", "-ctk", "f32", "-ctv", "f32", "-fit", "off", "--offline", "--log-disable"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        _wait_until_ready(process, connection)
        yield connection
    finally:
        connection.close()
        process.terminate()
        process.wait(30)


def _wait_until_ready(process: subprocess.Popen[bytes], connection: http.client.HTTPConnection) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"llama-server ended with {process.returncode}")
        try:
            connection.request("GET", "/health")
            answer = connection.getresponse()
            answer.read()
            if answer.status == 200:
                return
        except OSError:
            connection.close()
        time.sleep(0.1)
    raise AssertionError("llama-server did not become ready")


def server_greedy(connection: http.client.HTTPConnection, prompt: Sequence[int], tokens: int) -> list[int]:
    """Ids that the server takes as the likeliest, one after the other."""
    request = {"prompt": list(prompt), "n_predict": tokens, "temperature": 0.0, "top_k": 1, "return_tokens": True}
    request |= {"ignore_eos": True, "cache_prompt": False, "repeat_penalty": 1.0}
    connection.request("POST", "/completion", json.dumps(request), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    document = json.loads(answer.read())
    assert answer.status == 200, document
    ids: list[int] = document["tokens"]
    return ids


def convert(checkpoints: Mapping[Path, Path]) -> list[str | None]:
    """Convert checkpoints to float32 GGUF files by llama.cpp's script; what it said where it failed."""
    command = [sys.executable, str(Path(__file__).with_name("converter_child.py")), str(sources())]
    for checkpoint, result in checkpoints.items():
        command += [str(checkpoint), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("null", '"'))]


@dataclass(frozen=True)
class Difference:
    """Ours against theirs: names of tensors and keys. ``tensors`` and ``keys`` are in both and differ."""

    tensors_ours: tuple[str, ...]
    tensors_theirs: tuple[str, ...]
    tensors: tuple[str, ...]
    keys_ours: tuple[str, ...]
    keys_theirs: tuple[str, ...]
    keys: tuple[str, ...]


def compare(ours: Path, theirs: Path) -> Difference:
    """Names, shapes and bytes of tensors, and all keys but those of the container."""
    files = gguf.GGUFReader(ours), gguf.GGUFReader(theirs)
    mine, other = ({item.name: item for item in file.tensors} for file in files)
    keys, their_keys = (_keys(file) for file in files)
    return Difference(
        tuple(sorted(mine.keys() - other.keys())),
        tuple(sorted(other.keys() - mine.keys())),
        tuple(sorted(name for name in mine.keys() & other.keys() if not _same_tensor(mine[name], other[name]))),
        tuple(sorted(keys.keys() - their_keys.keys())),
        tuple(sorted(their_keys.keys() - keys.keys())),
        tuple(sorted(name for name in keys.keys() & their_keys.keys() if not _same(keys[name], their_keys[name]))),
    )


def _keys(file: Any) -> dict[str, Any]:
    return {name: field.contents() for name, field in file.fields.items() if not name.startswith("GGUF.")}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return bool(np.float32(one) == np.float32(other))
    return bool(one == other)


def _same_tensor(one: Any, other: Any) -> bool:
    return (
        one.tensor_type == other.tensor_type
        and one.shape.tolist() == other.shape.tolist()
        and np.array_equal(np.asarray(one.data), np.asarray(other.data))
    )
