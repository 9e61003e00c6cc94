"""Time to the first token of the first request after a start, with a long system prompt: computed, or kept on disk.

    python benchmarks/prompt_cache.py MODEL --rounds 7

Servers with and without ``--prompt-cache`` in turn. Each gets a chat as its first request, the same chat with another
question as its second (what memory keeps), and after ``kill -9`` of its engine the first one again. Fails when
an answer with the cache differs from another one with it, since those are computed from the same numbers. Rows go to
``results/prompt_cache.jsonl``. Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import RESULTS, append, machine
from soak import Server, serving, wait

FORMS = ("computed", "kept")
QUESTIONS = ("What is the capital of France?", "Which number has region 3?")
CONTEXT = 2048


def system_prompt(shelves: int) -> str:
    """About 17 tokens for each shelf."""
    lines = [f"Shelf {number} holds books on the history of region {number * 7}." for number in range(shelves)]
    return "You are the assistant of a small library. " + " ".join(lines)


def asked(server: Server, system: str, question: str) -> dict[str, Any]:
    """Time to the first piece of the answer, its text, and what was cached of the prompt."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    wanted = {"messages": messages, "max_tokens": 16, "temperature": 0, "stream": True}
    body = json.dumps(wanted | {"stream_options": {"include_usage": True}})
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    text, ttft_s, usage = "", None, None
    try:
        started = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", body)
        for line in connection.getresponse():
            if not line.startswith(b"data: {"):
                continue
            document = json.loads(line[6:])
            usage = document.get("usage") or usage
            for choice in document["choices"]:
                piece = choice["delta"].get("content") or ""
                if piece and ttft_s is None:
                    ttft_s = time.perf_counter() - started
                text += piece
    finally:
        connection.close()
    if usage is None:
        raise SystemExit(f"no answer but {text!r}")
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {"ttft_s": ttft_s, "text": text, "prompt_tokens": usage["prompt_tokens"], "cached_tokens": cached}


def measured(model: Path, form: str, cache: Path, system: str) -> list[dict[str, Any]]:
    """The requests of one server, in order."""
    options = ["--context", str(CONTEXT), *(["--prompt-cache", str(cache)] if form == "kept" else [])]
    with serving(model, *options) as server:
        server.wait_ready()
        rows = [{"request": "first", **asked(server, system, QUESTIONS[0])}]
        rows.append({"request": "second", **asked(server, system, QUESTIONS[1])})
        server.engine.kill()
        wait(lambda: server.figure("edgelm_engine_starts_total") > 1, 60, "the engine does not come back")
        server.wait_ready()
        rows.append({"request": "after a kill", **asked(server, system, QUESTIONS[0])})
    return [{"form": form, **row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shelves", type=int, default=46)
    arguments = parser.parse_args()
    system = system_prompt(arguments.shelves)
    rows: list[dict[str, Any]] = []

    def note(number: int, form: str) -> None:
        for row in measured(arguments.model, form, cache, system):
            rows.append({"round": number, **row})
            append("prompt_cache", rows[-1])

    append("prompt_cache", {"machine": machine()})
    with tempfile.TemporaryDirectory() as place:
        cache = Path(place) / "prompts"
        note(0, "kept")
        (file,) = cache.iterdir()
        append("prompt_cache", {"file_bytes": file.stat().st_size})
        for number in range(1, arguments.rounds + 1):
            for form in FORMS if number % 2 else reversed(FORMS):
                note(number, form)
    for request in ("first", "second", "after a kill"):
        kept = [row for row in rows if (row["form"], row["request"]) == ("kept", request)]
        if len({row["text"] for row in kept}) != 1:
            raise SystemExit(f"{request}: the same numbers gave different answers")
        for form in FORMS:
            those = [row for row in rows if row["round"] and (row["form"], row["request"]) == (form, request)]
            times = sorted(row["ttft_s"] for row in those)
            told = f"{statistics.median(times):.3f} s ({times[0]:.3f} to {times[-1]:.3f})"
            same = sum(row["text"] == kept[0]["text"] for row in those)
            counts = sorted({(row["cached_tokens"], row["prompt_tokens"]) for row in those})
            print(f"{request}, {form}: {told}, cached of prompt {counts}, same text {same} of {len(those)}")
    print(RESULTS / "prompt_cache.jsonl")


if __name__ == "__main__":
    main()
