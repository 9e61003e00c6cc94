"""Servers of every kind over scripted engines, and schemathesis as the judge of what they say of themselves.

Used by the tests with a small budget and by ``benchmarks/fuzz.py`` with any.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from fake_encoder import FakeEncoder, fake_encoder_model, live_embedding_server
from fake_engine import FakeEngine, wait_until
from fake_task import FakeTask
from live_server import TOOL_TEMPLATE, LiveServer, fake_model, running_server

from edgelm.bundle import TaskKind
from runtime.engine import EngineOptions
from runtime.server.embedding_worker import EmbeddingWorker
from runtime.server.limits import Access
from runtime.server.metrics import Metrics
from runtime.server.shelf import Shelf, Title
from runtime.server.supervised import SupervisedWorker
from runtime.server.task_worker import TaskWorker
from runtime.server.worker import Worker

KEY = "k" * 32
HERE = Path(__file__).resolve().parent
SLOW_S = 5.0
START_TIMEOUT_S = 60
# In a process of its own, as real engines are: a request that ends it is found by the restart.
ENGINE = """
import sys
sys.path[:] = {path!r}
from fake_engine import FakeEngine
from live_server import TOOL_TEMPLATE, fake_model
from runtime.server.engine_process import main
main(lambda path, options: fake_model(FakeEngine(script="ok", context=512, sequences=2), source=TOOL_TEMPLATE))
"""


@contextmanager
def text_server() -> Iterator[LiveServer]:
    """A text model behind a key, in a supervised process; at the end that has to be the first one."""
    metrics = Metrics()
    command = [sys.executable, "-c", ENGINE.format(path=[str(HERE), *sys.path])]
    worker = SupervisedWorker(Path("fake"), EngineOptions(), metrics, command=command)
    with running_server(worker, metrics, Access(key=KEY.encode())) as server:
        assert wait_until(lambda: worker.state == "ready", START_TIMEOUT_S)
        yield server
        assert metrics.total(metrics.engine_starts) == 1, "the engine was started again"


def encoder_server() -> AbstractContextManager[LiveServer]:
    return live_embedding_server(fake_encoder_model(FakeEncoder(context=64, batch=128)))


@contextmanager
def task_server(kind: TaskKind) -> Iterator[LiveServer]:
    metrics = Metrics()
    with running_server(TaskWorker(FakeTask(kind), metrics), metrics) as server:
        assert wait_until(lambda: server.worker.state == "ready", START_TIMEOUT_S)
        yield server


@contextmanager
def several_server() -> Iterator[LiveServer]:
    """A text model and an encoder."""
    metrics = Metrics()
    writer = fake_model(FakeEngine(script="ok", context=512, sequences=2), source=TOOL_TEMPLATE)
    vectors = dataclasses.replace(fake_encoder_model(FakeEncoder(context=64, batch=128)), name="vectors")
    titles = [
        Title("writer", None, 0, lambda: 1, lambda: Worker(dataclasses.replace(writer, name="writer"), metrics)),
        Title("vectors", None, 0, lambda: 1, lambda: EmbeddingWorker(vectors, metrics)),
    ]
    shelf = Shelf(titles, metrics, lambda: 2**30)
    with running_server(shelf, metrics) as server:  # type: ignore[arg-type]
        assert wait_until(lambda: shelf.state == "ready", START_TIMEOUT_S)
        yield server


SERVERS: Mapping[str, Callable[[], AbstractContextManager[LiveServer]]] = {
    "text": text_server,
    "encoder": encoder_server,
    "translate": lambda: task_server("translate"),
    "fill-mask": lambda: task_server("fill-mask"),
    "classify": lambda: task_server("classify"),
    "several": several_server,
}
COVERAGE_CASES = 50
"""From this budget on, every boundary of every field is tried as well, which takes some hundred requests."""


def judge(server: LiveServer, cases: int, seed: int, *, only: str | None = None) -> tuple[bool, str]:
    """Whether every answer of a server to at most about ``cases`` requests for each operation is what its document
    promises, and what schemathesis tells. ``only`` is the path of one operation.

    One check is left out: that every request which the document allows succeeds. What a prompt may not be together
    with (a context, a template, a grammar) has no words in a schema, and is refused by a 400 that is checked.
    """
    phases = "examples,coverage,fuzzing" if cases >= COVERAGE_CASES else "examples,fuzzing"
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--phases", phases]
    command += ["--max-examples", str(cases), "--seed", str(seed), "--no-color"]
    command += ["--exclude-checks", "positive_data_acceptance", "--max-response-time", str(SLOW_S)]
    command += ["--generation-database", "none", "--header", f"Authorization: Bearer {server.key}"]
    command += ["--include-path", only] if only else []
    hooks = {"SCHEMATHESIS_HOOKS": "openapi_hooks", "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    with tempfile.TemporaryDirectory(prefix="edgelm-openapi-") as directory:
        finished = subprocess.run(
            command, cwd=directory, env={**os.environ, **hooks}, capture_output=True, text=True, check=False
        )
    fine = finished.returncode == 0 and server.worker.state == "ready" and wait_until(lambda: server.idle)
    return fine, finished.stdout + finished.stderr
