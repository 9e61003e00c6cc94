"""``edgelm serve`` against ``llama-server`` on the same file: the official client, over loopback, in turn.

One stream, time to first token at 512 tokens, 4 and 8 streams together, the second turn of a chat, peak memory. Both
servers stand all the time and only one of them works; who goes first alternates from round to round.

    python benchmarks/server_side_by_side.py model.gguf --llama-server .cache/peers/build/bin/llama-server --rounds 15
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import statistics
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
from measure import edgelm, save

PARALLEL, CONTEXT = 8, 2048
PROMPT_TOKENS, GENERATED = 512, 128
START_TIMEOUT_S = 120.0
# Bars: how our figure has to stand to theirs; the direction tells whether more or less is better.
BARS = {
    "decode_1_tps": (">=", 0.97),
    "ttft_512_s": ("<=", 1.03),
    "aggregate_4_tps": (">=", 0.95),
    "aggregate_8_tps": (">=", 0.95),
    "second_turn_ttft_s": ("<=", 1.0),
}


@dataclass(frozen=True)
class Server:
    """One side: its process, a client, and how it calls the model."""

    name: str
    process: subprocess.Popen[bytes]
    client: openai.OpenAI
    model: str

    def memory(self) -> dict[str, int]:
        """Bytes of the process and its children, added up: peak resident, where shared libraries count twice, and
        private memory now, where nothing does."""
        process = psutil.Process(self.process.pid)
        pids = [member.pid for member in [process, *process.children(recursive=True)]]
        return {
            "peak_rss_bytes": sum(_proc_bytes(f"/proc/{pid}/status", "VmHWM:") for pid in pids),
            "anonymous_bytes": sum(_proc_bytes(f"/proc/{pid}/smaps_rollup", "Anonymous:") for pid in pids),
        }


@dataclass(frozen=True)
class Stream:
    """One finished stream. ``tokens`` as the server counted them."""

    ttft_s: float
    decode_s: float
    tokens: int
    text: str


def _proc_bytes(path: str, name: str) -> int:
    lines = Path(path).read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(name: str, command: list[str], port: int) -> Iterator[Server]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path = "/health/ready" if name == "edgelm" else "/health"
    deadline = time.monotonic() + START_TIMEOUT_S
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5).close()
                break
            except (OSError, urllib.error.HTTPError) as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{name} did not start: {' '.join(command)}") from error
                time.sleep(0.1)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            yield Server(name, process, client, client.models.list().data[0].id)
    finally:
        process.terminate()
        process.wait(60)


def ours(model: Path, extra: list[str]) -> tuple[str, list[str], int]:
    port = free_port()
    sizes = ["--parallel", str(PARALLEL), "--context", str(CONTEXT)]
    return "edgelm", edgelm("serve", str(model), "--port", str(port), *sizes, *extra), port


def theirs(binary: Path, model: Path, threads: int) -> tuple[str, list[str], int]:
    port = free_port()
    sizes = ["-np", str(PARALLEL), "-c", str(PARALLEL * CONTEXT), "-t", str(threads), "-tb", str(threads)]
    command = [str(binary), "-m", str(model), "--port", str(port), *sizes, "-fa", "on", "--no-webui"]
    return "llama-server", command, port


def complete(server: Server, prompt: str | list[int], max_tokens: int) -> Stream:
    """One greedy stream, timed from the call to its first and last piece of text."""
    started = time.perf_counter()
    chunks = server.client.completions.create(
        model=server.model,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    return _read(chunks, started, lambda choice: choice.text)


def chat(server: Server, messages: list[dict[str, str]], max_tokens: int) -> Stream:
    started = time.perf_counter()
    chunks = server.client.chat.completions.create(
        model=server.model,
        messages=messages,
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    return _read(chunks, started, lambda choice: choice.delta.content)


def _read(chunks: Any, started: float, text_of: Callable[[Any], str | None]) -> Stream:
    first = last = 0.0
    tokens, pieces = 0, []
    for chunk in chunks:
        piece = text_of(chunk.choices[0]) if chunk.choices else None
        if piece:
            last = time.perf_counter()
            first = first or last
            pieces.append(piece)
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
    return Stream(first - started, last - first, tokens, "".join(pieces))


def round_of(server: Server, number: int) -> dict[str, float | str]:
    """All figures of one side once. Prompts differ from round to round, so that no cache answers for the engine."""
    chance = random.Random(number)
    single = complete(server, f"Story number {number}. Once upon a time, in a small village,", GENERATED)
    ids = [chance.randrange(1000, 20000) for _ in range(PROMPT_TOKENS)]
    ttft = complete(server, ids, 2).ttft_s
    figures: dict[str, float | str] = {
        "decode_1_tps": (single.tokens - 1) / single.decode_s,
        "ttft_512_s": ttft,
        "text": single.text,
    }
    for streams in (4, 8):
        figures[f"aggregate_{streams}_tps"] = together(server, streams, number)
    topic = " ".join(chance.choice(("river", "stone", "winter", "lamp", "market", "garden")) for _ in range(300))
    messages = [{"role": "system", "content": f"You know this text: {topic}"}, {"role": "user", "content": "Hello!"}]
    first = chat(server, messages, 24)
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And what else?"}]
    return {**figures, "second_turn_ttft_s": chat(server, messages, 4).ttft_s}


def together(server: Server, streams: int, number: int) -> float:
    """Tokens per second of several streams together, from the first request to the last token."""
    done: list[Stream] = []

    def client(place: int) -> None:
        done.append(complete(server, f"Tale {number} of {place}: the king and the", GENERATED // 2))

    threads = [threading.Thread(target=client, args=(place,)) for place in range(streams)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(stream.tokens for stream in done) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama-server", type=Path, help="left out: our side alone")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of llama-server")
    parser.add_argument("--in-process", action="store_true", help="our engine in the server's process")
    parser.add_argument("--name", default="server_side_by_side", help="name of the file with the raw rows")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    extra = ["--in-process"] if arguments.in_process else []
    with serving(*ours(arguments.model, extra)) as mine:
        if arguments.llama_server is None:
            measure([mine], arguments.rounds, rows)
        else:
            with serving(*theirs(arguments.llama_server, arguments.model, arguments.threads)) as other:
                measure([mine, other], arguments.rounds, rows)
    print(f"raw rows: {save(arguments.name, rows)}")
    summarise(rows)


def measure(sides: list[Server], rounds: int, rows: list[dict[str, Any]]) -> None:
    for server in sides:
        complete(server, "Warm up", 8)
    for number in range(rounds):
        order = sides if number % 2 else sides[::-1]
        rows.extend({"round": number, "side": server.name, **round_of(server, number)} for server in order)
    rows.extend({"side": server.name, **server.memory()} for server in sides)


def summarise(rows: list[dict[str, Any]]) -> None:
    """Medians of each side, and the median of the ratios round by round."""
    print("| figure | edgelm | llama-server | ratio | bar |\n|---|---|---|---|---|")
    for figure, (direction, bar) in BARS.items():
        sides = [
            [row[figure] for row in rows if row["side"] == side and figure in row]
            for side in ("edgelm", "llama-server")
        ]
        mine, other = sides
        theirs_text = f"{statistics.median(other):.3f}" if other else "-"
        ratio = f"{statistics.median(a / b for a, b in zip(mine, other, strict=True)):.3f}" if other else "-"
        print(f"| {figure} | {statistics.median(mine):.3f} | {theirs_text} | {ratio} | {direction} {bar} |")
    for row in rows:
        if "peak_rss_bytes" in row:
            rss_mib, private_mib = row["peak_rss_bytes"] / 2**20, row["anonymous_bytes"] / 2**20
            print(f"{row['side']}: peak RSS {rss_mib:.0f} MiB, private {private_mib:.0f} MiB")
    texts = {side: [row.get("text") for row in rows if row["side"] == side] for side in ("edgelm", "llama-server")}
    if any(texts["llama-server"]):
        same = sum(a == b for a, b in zip(texts["edgelm"], texts["llama-server"], strict=True) if a is not None)
        print(f"same greedy text in {same} of {sum(text is not None for text in texts['edgelm'])} rounds")


if __name__ == "__main__":
    main()
