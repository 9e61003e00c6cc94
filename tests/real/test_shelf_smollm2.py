"""Two real models behind one server on memory for one: each answers as it does alone, and takes what was predicted."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest
from fake_engine import wait_until
from live_server import LiveServer, running_server

from runtime.engine import EngineOptions
from runtime.server.metrics import Metrics
from runtime.server.serving import make_shelf
from runtime.server.shelf import Shelf
from runtime.settings import predicted_bytes

pytestmark = pytest.mark.real
OPTIONS = EngineOptions(context=256)


def said(server: LiveServer, model: str) -> str:
    body = {"model": model, "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
    status, answer = server.post("/v1/completions", body)
    assert status == 200, answer
    text: str = answer["choices"][0]["text"]
    return text


def test_two_models_on_memory_for_one(smollm2_gguf: Path, tmp_path: Path) -> None:
    paths = [tmp_path / "one.gguf", tmp_path / "two.gguf"]
    for path in paths:
        path.symlink_to(smollm2_gguf)
    metrics = Metrics()
    shelf = make_shelf(paths, lambda _: (OPTIONS, False), metrics, unload_after_s=None)
    predicted = predicted_bytes(paths[0], OPTIONS, in_process=True)
    engines: list[int] = []

    def free() -> int:
        """Room for one and a half: what is taken is measured."""
        engines[:] = shelf.engine_pids
        return predicted * 3 // 2 - sum(psutil.Process(pid).memory_info().rss for pid in engines)

    shelf._free = free
    with running_server(shelf, metrics) as server:  # type: ignore[arg-type]
        assert isinstance(server.worker, Shelf)
        assert wait_until(lambda: shelf.state == "ready", 60)
        assert "Paris" in said(server, "one")
        first = shelf.engine_pids[0]
        assert psutil.Process(first).memory_info().rss < 1.1 * predicted
        started = time.monotonic()
        assert said(server, "two") == said(server, "two")
        assert time.monotonic() - started < 60
        assert {name: book.state for name, book in shelf.books.items()} == {"one": "unloaded", "two": "ready"}
        assert not psutil.pid_exists(first)
        assert "Paris" in said(server, "one")
        assert len(shelf.engine_pids) == 1
