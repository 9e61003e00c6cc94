"""Abuse of ``edgelm serve``: aborted streams, a killed engine, SIGTERM under load, slow clients, a full disk.

Every case states its ceiling and fails when it is passed. Raw rows go to ``results/soak.jsonl``.

    python benchmarks/soak.py --aborts 10000 --kills 50
    python benchmarks/soak.py --model model.gguf --cases kills --kills 50
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from measure import edgelm, save

PARALLEL = 4
CONNECTIONS = 30
RSS_GROWTH_LIMIT_BYTES = 24 * 2**20
RECOVERY_LIMIT_S = 3.0
QUESTION = "Once upon a time there was a"
START_TIMEOUT_S = 120.0


class SoakError(Exception):
    """The server did not stand it."""


@dataclass
class Server:
    """A running ``edgelm serve``."""

    process: subprocess.Popen[bytes]
    port: int

    def post(self, document: dict[str, Any], timeout_s: float = 60) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            connection.request("POST", "/v1/completions", json.dumps(document))
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def figure(self, name: str) -> float:
        lines = self.get("/metrics")[1].decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split(" ")[0] == name)

    @property
    def engine(self) -> psutil.Process:
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def answer(self) -> str:
        status, document = self.post(wanted(16))
        if status != 200:
            raise SoakError(f"a plain request was answered {status}: {document}")
        return str(document["choices"][0]["text"])

    def is_ready(self) -> bool:
        return self.get("/health/ready")[0] == 200

    def wait_ready(self) -> None:
        wait(lambda: self.is_ready(), START_TIMEOUT_S, "the server is not ready")

    def usage(self) -> dict[str, int]:
        """Memory, threads and descriptors of the server and its engine."""
        row: dict[str, int] = {}
        for name, process in (("server", psutil.Process(self.process.pid)), ("engine", self.engine)):
            row |= {f"{name}_rss_bytes": process.memory_info().rss, f"{name}_threads": process.num_threads()}
            row[f"{name}_descriptors"] = process.num_fds()
        return row


def wanted(max_tokens: int, **more: Any) -> dict[str, Any]:
    return {"prompt": QUESTION, "max_tokens": max_tokens, "temperature": 0, **more}


def wait(condition: Callable[[], bool], timeout_s: float, failure: str) -> float:
    """Seconds until ``condition`` held."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > timeout_s:
            raise SoakError(failure)
        time.sleep(0.02)
    return time.monotonic() - started


@contextmanager
def serving(model: Path, *options: str, stderr: Any = subprocess.DEVNULL) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = edgelm("serve", str(model), "--port", str(port), "--parallel", str(PARALLEL), "--context", "512")
    process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=stderr)
    server = Server(process, port)

    def listening() -> bool:
        if process.poll() is not None:
            raise SoakError(f"the server ended with status {process.returncode}")
        try:
            return server.is_ready()
        except OSError:
            return False

    try:
        wait(listening, START_TIMEOUT_S, "the server did not start")
        yield server
    finally:
        process.kill()
        process.wait()


def request_bytes(document: dict[str, Any]) -> bytes:
    body = json.dumps(document).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def abort_one(port: int, chance: random.Random) -> str:
    """A stream that its client leaves: at once, after the headers, or after some tokens; politely or with a reset."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    outcome = "sent"
    try:
        writer.write(request_bytes(wanted(300, stream=True, seed=chance.randrange(100))))
        await writer.drain()
        if chance.random() < 0.7:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
            outcome = head.split(b" ", 2)[1].decode()
            for _ in range(chance.randrange(4)):
                await asyncio.wait_for(reader.readline(), 30)
        else:
            await asyncio.sleep(chance.random() * 0.02)
        if chance.random() < 0.5:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    finally:
        writer.close()
    return outcome


async def abort_many(server: Server, count: int, rows: list[dict[str, Any]]) -> None:
    done = 0
    outcomes: dict[str, int] = {}

    async def client(number: int) -> None:
        nonlocal done
        chance = random.Random(number)
        while done < count:
            done += 1
            outcome = await abort_one(server.port, chance)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            if done % max(count // 20, 1) == 0:
                rows.append({"case": "aborts", "done": done, **server.usage()})

    await asyncio.gather(*(client(number) for number in range(CONNECTIONS)))
    rows.append({"case": "aborts", "outcomes": outcomes})


def aborts(model: Path, count: int, rows: list[dict[str, Any]]) -> str:
    """Aborted streams over 30 connections: nothing hangs, nothing grows."""
    with serving(model) as server:
        expected = server.answer()
        # The warm-up fills what fills once: caches of the allocator, of tokens, of connections.
        asyncio.run(abort_many(server, max(count // 10, CONNECTIONS), []))
        wait(lambda: server.figure("edgelm_requests_running") == 0, 30, "generations were left running")
        before = server.usage()
        started = time.monotonic()
        asyncio.run(abort_many(server, count, rows))
        elapsed_s = time.monotonic() - started
        wait(lambda: server.figure("edgelm_requests_running") == 0, 30, "generations were left running")
        wait(lambda: server.usage()["server_descriptors"] <= before["server_descriptors"] + 1, 30, "descriptors leaked")
        after = server.usage()
        if server.answer() != expected:
            raise SoakError("the answer after the aborts is another one")
        if server.figure("edgelm_engine_starts_total") != 1:
            raise SoakError("the engine was restarted")
    for name, value in after.items():
        limit = RSS_GROWTH_LIMIT_BYTES if name.endswith("bytes") else 2
        if value > before[name] + limit:
            raise SoakError(f"{name} grew from {before[name]} to {value}")
    rows.append({"case": "aborts", "count": count, "elapsed_s": elapsed_s, "before": before, "after": after})
    growth = {name: after[name] - before[name] for name in after}
    return f"{count} aborted streams in {elapsed_s:.0f} s, growth {growth}"


def kills(model: Path, count: int, rows: list[dict[str, Any]]) -> str:
    """``kill -9`` of the engine while it streams: an error event, service back in time, the same answer."""
    recoveries: list[float] = []
    with serving(model) as server:
        expected = server.answer()
        for number in range(count):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            connection.request("POST", "/v1/completions", json.dumps(wanted(400, stream=True)))
            response = connection.getresponse()
            response.readline()
            server.engine.kill()
            killed = time.monotonic()
            last = response.read().decode().strip().split("\n\n")[-1]
            connection.close()
            told_s = time.monotonic() - killed
            if "engine_failed" not in last:
                raise SoakError(f"the stream of a killed engine ended with {last!r}")
            wait(server.is_ready, START_TIMEOUT_S, "the engine did not come back")
            ready_s = time.monotonic() - killed
            if server.answer() != expected:
                raise SoakError("the answer after a restart is another one")
            recoveries.append(time.monotonic() - killed)
            rows.append(
                {"case": "kills", "number": number, "told_s": told_s, "ready_s": ready_s, "answered_s": recoveries[-1]}
            )
    worst, late = max(recoveries), sum(recovery > RECOVERY_LIMIT_S for recovery in recoveries)
    median = sorted(recoveries)[len(recoveries) // 2]
    return f"{count} kills, answered again after {median:.2f} s (median), {worst:.2f} s (worst), {late} over the limit"


def drain(model: Path, _: int, rows: list[dict[str, Any]]) -> str:
    """SIGTERM while streams run: they finish, the process ends with status 0."""
    endings: list[str] = []
    started = threading.Barrier(PARALLEL + 1)

    def client(server: Server) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        connection.request("POST", "/v1/completions", json.dumps(wanted(200, stream=True)))
        response = connection.getresponse()
        response.readline()
        started.wait(60)
        endings.append(response.read().decode()[-16:].strip())
        connection.close()

    with serving(model) as server:
        threads = [threading.Thread(target=client, args=(server,)) for _ in range(PARALLEL)]
        for thread in threads:
            thread.start()
        started.wait(60)
        server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(120)
        status = server.process.wait(60)
    rows.append({"case": "drain", "endings": endings, "status": status})
    if status != 0 or endings != ["data: [DONE]"] * PARALLEL:
        raise SoakError(f"status {status}, streams ended with {endings}")
    return f"{PARALLEL} streams finished after SIGTERM, status 0"


def slow(model: Path, _: int, rows: list[dict[str, Any]]) -> str:
    """Clients that read, and clients that send, one byte per second: the others do not notice."""

    def quickest(server: Server) -> float:
        times: list[float] = []
        for _ in range(5):
            started = time.monotonic()
            server.answer()
            times.append(time.monotonic() - started)
        return min(times)

    with serving(model) as server:
        server.answer()
        alone_s = quickest(server)
        connections = [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(20)]
        stopped = threading.Event()

        def crawl() -> None:
            message = request_bytes(wanted(100, stream=True))
            for connection in connections[:10]:
                connection.sendall(message)
            for place in range(1000):
                for connection in connections[:10]:
                    connection.recv(1)
                for connection in connections[10:]:
                    with contextlib.suppress(OSError):  # closed by the server after its read timeout
                        connection.sendall(message[place : place + 1])
                if stopped.wait(1):
                    return

        thread = threading.Thread(target=crawl)
        thread.start()
        time.sleep(2)
        wait(lambda: server.figure("edgelm_requests_running") == 0, 120, "slow readers hold the engine")
        beside_s = quickest(server)
        stopped.set()
        thread.join(60)
        for connection in connections:
            connection.close()
    rows.append({"case": "slow", "alone_s": alone_s, "beside_s": beside_s})
    if beside_s > 3 * alone_s + 2:
        raise SoakError(f"an answer took {beside_s:.2f} s beside slow clients, {alone_s:.2f} s without")
    return f"an answer took {alone_s:.3f} s alone, {beside_s:.3f} s beside 20 slow clients"


def disk(model: Path, _: int, rows: list[dict[str, Any]]) -> str:
    """No byte of log can be written: serving goes on, and a killed engine still comes back."""
    with open("/dev/full", "wb") as full, serving(model, stderr=full) as server:
        expected = server.answer()
        server.engine.kill()
        wait(lambda: server.figure("edgelm_engine_deaths_total") == 1, 30, "the death of the engine went unnoticed")
        server.wait_ready()
        if server.answer() != expected:
            raise SoakError("the answer is another one")
    rows.append({"case": "disk", "answered": True})
    return "answers, and a restart, with a full disk under the log"


CASES = {"aborts": aborts, "kills": kills, "drain": drain, "slow": slow, "disk": disk}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, help="bundle or .gguf file [default: a tiny random model]")
    parser.add_argument("--cases", default=",".join(CASES), help="some of them, with commas")
    parser.add_argument("--aborts", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--name", default="soak", help="name of the file with the raw rows")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    counts = {"aborts": arguments.aborts, "kills": arguments.kills}
    rows: list[dict[str, Any]] = []
    failed = 0
    with tempfile.TemporaryDirectory(prefix="edgelm-soak-") as directory:
        model = arguments.model or Path(directory) / "tiny.gguf"
        if arguments.model is None:
            from runtime.probe import write_tiny_gguf

            write_tiny_gguf(model)
        for name in arguments.cases.split(","):
            started = time.monotonic()
            try:
                said = CASES[name](model, counts.get(name, 0), rows)
            except SoakError as error:
                failed += 1
                said = f"FAILED: {error}"
            rows.append({"case": name, "said": said, "elapsed_s": time.monotonic() - started, "model": model.stem})
            print(f"{name}: {said}", flush=True)
    print(f"raw rows: {save(arguments.name, rows)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
