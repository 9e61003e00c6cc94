"""What serving a token costs beside computing it: CPU time and wake-ups of the server and of its engine process.

    python benchmarks/serve_overhead.py --tokens 1000 --rounds 3
    python benchmarks/serve_overhead.py --model model.gguf

Without a model the engine is the scripted one of the tests, which sleeps for the time of a token and computes nothing:
all that its process spends is then the price of serving. With a model the engine's share cannot be told apart and only
the server's says something; its code then runs with caches that the weights have swept, as it does in earnest.

The client is a bare socket that counts events. CPU time is the scheduler's, of all threads, in nanoseconds.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from measure import edgelm, save
from soak import wait

ROOT = Path(__file__).resolve().parents[1]
START_TIMEOUT_S = 60.0
# Both processes import the project and its tests from where this file lies.
_ENGINE = """
import sys
sys.path[:] = {path!r}
from fake_engine import FakeEngine
from live_server import fake_model
from runtime.server.engine_process import main
engine = FakeEngine(script=[120] * 8000, context=8192, sequences=4, step_delay_s={step_s})
main(lambda path, options: fake_model(engine))
"""
_SERVER = """
import sys
sys.path[:] = {path!r}
from pathlib import Path
from runtime.engine import EngineOptions
from runtime.server.limits import Access
from runtime.server.logs import start_logging
from runtime.server.metrics import Metrics
from runtime.server.serving import bind, serve
from runtime.server.supervised import SupervisedWorker
start_logging()
metrics = Metrics()
worker = SupervisedWorker(Path("fake"), EngineOptions(), metrics, command=[sys.executable, "-c", {engine!r}])
serve(worker, metrics, bind("127.0.0.1", {port}), Access())
"""


def server_command(model: Path | None, port: int, step_s: float) -> list[str]:
    if model is not None:
        return edgelm("serve", str(model), "--port", str(port), "--context", "2048", "--parallel", "4")
    path = [str(ROOT), str(ROOT / "tests"), *sys.path]
    engine = _ENGINE.format(path=path, step_s=step_s)
    return [sys.executable, "-c", _SERVER.format(path=path, engine=engine, port=port)]


@contextmanager
def serving(command: list[str], port: int) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def ready() -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health/ready")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    try:
        wait(ready, START_TIMEOUT_S, "the server did not start")
        yield process
    finally:
        process.terminate()
        process.wait(30)


def spent(pid: int) -> tuple[float, int]:
    """Seconds of CPU and voluntary switches of all threads of a process, those that ended left out."""
    cpu_s, switches = 0.0, 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        cpu_s += int((task / "schedstat").read_text().split()[0]) / 1e9
        status = (task / "status").read_text()
        switches += int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])
    return cpu_s, switches


def stream(port: int, tokens: int) -> tuple[int, float]:
    """Read one stream; its events that carry text, and seconds from the first to the last of them."""
    document = {"messages": [{"role": "user", "content": "Tell a long story."}], "max_tokens": tokens}
    body = json.dumps({**document, "temperature": 0, "stream": True})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/chat/completions", body)
    response = connection.getresponse()
    count, first, last = 0, 0.0, 0.0
    while line := response.readline():
        if b'"content"' in line:
            last = time.perf_counter()
            first = first or last
            count += 1
    connection.close()
    return count, last - first


def measured(port: int, pids: dict[str, int], tokens: int) -> dict[str, Any]:
    before = {name: spent(pid) for name, pid in pids.items()}
    events, elapsed_s = stream(port, tokens)
    row: dict[str, Any] = {"events": events, "elapsed_s": elapsed_s}
    for name, pid in pids.items():
        cpu_s, switches = (after - start for after, start in zip(spent(pid), before[name], strict=True))
        row |= {f"{name}_us_per_event": cpu_s / events * 1e6, f"{name}_switches_per_event": switches / events}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, help="bundle or .gguf file [default: an engine that computes nothing]")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step-s", type=float, default=0.008, help="time of a token without a model")
    parser.add_argument("--port", type=int, default=18431)
    parser.add_argument("--name", default="serve_overhead", help="name of the file with the raw rows")
    arguments = parser.parse_args()
    command = server_command(arguments.model, arguments.port, arguments.step_s)
    with serving(command, arguments.port) as process:
        (engine,) = psutil.Process(process.pid).children()
        pids = {"server": process.pid, "engine": engine.pid}
        stream(arguments.port, 50)
        rows = [measured(arguments.port, pids, arguments.tokens) for _ in range(arguments.rounds)]
    for field in rows[0]:
        print(f"{field}: {statistics.median(row[field] for row in rows):.3f}")
    print(f"raw rows: {save(arguments.name, rows)}")


if __name__ == "__main__":
    main()
