"""Inside the container: wait until the server is ready, ask one question, print the answer as JSON.

usage: chat.py QUESTION MAX_TOKENS TIMEOUT_S
"""

from __future__ import annotations

import http.client
import json
import sys
import time
from pathlib import Path
from typing import Any


def request(method: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> tuple[int, bytes]:
    key = Path("/state/api-key").read_text(encoding="ascii").strip()
    connection = http.client.HTTPConnection("127.0.0.1", 8080, timeout=timeout_s)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection.request(method, path, json.dumps(body) if body is not None else None, headers)
    response = connection.getresponse()
    return response.status, response.read()


def main() -> None:
    question, max_tokens, timeout_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    started = time.monotonic()
    while True:
        try:
            status, _ = request("GET", "/health/ready", None, 10)
            if status == 200:
                break
        except OSError:
            status = 0
        if time.monotonic() - started > timeout_s:
            sys.exit(f"error: the server was not ready after {timeout_s:g} s (last status {status})")
        time.sleep(1)
    ready_s = time.monotonic() - started
    # A model of this size depends on its system prompt: under the template's own it does not name the city.
    messages = [{"role": "system", "content": "Answer in one short sentence."}, {"role": "user", "content": question}]
    body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0}
    status, data = request("POST", "/v1/chat/completions", body, timeout_s)
    if status != 200:
        sys.exit(f"error: status {status}: {data[:500].decode(errors='replace')}")
    answer = json.loads(data)
    print(json.dumps({"ready_s": round(ready_s, 1), "answer": answer["choices"][0], "usage": answer["usage"]}))


if __name__ == "__main__":
    main()
