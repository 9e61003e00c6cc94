"""A hub on loopback: the few addresses that huggingface_hub asks for models, with faults to order.

Serves directories as repositories of one commit. Weights are announced with their SHA-256 as the hub does for files in
large storage, all else with git's SHA-1. Counts what was sent, so that a test can tell headers from whole files.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Hub:
    """What the server does and what it did. ``requests`` are (method, file, Range header or None).

    Each file in ``cut_after`` (bytes sent before the connection breaks) and ``corrupted`` is spoilt once.
    """

    models: dict[str, Path]
    gated: set[str] = field(default_factory=set)
    cut_after: dict[str, int] = field(default_factory=dict)
    corrupted: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    endpoint: str = ""

    def environment(self, home: Path) -> dict[str, str]:
        """For a child process: this hub, and a cache of its own."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home / "hf"),
            "EDGELM_CACHE": str(home / "edgelm"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }


def digest(path: Path) -> tuple[str, bool]:
    """Hash of a file as the hub lists it, and whether that is of large storage."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        return hashlib.sha256(content).hexdigest(), True
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest(), False


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Run the hub on a free port of loopback."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, text: str, *arguments: Any) -> None:
            """Keep quiet."""

        def do_HEAD(self) -> None:
            self._answer("HEAD")

        def do_GET(self) -> None:
            self._answer("GET")

        def _answer(self, method: str) -> None:
            path = self.path.partition("?")[0].strip("/")
            if path.startswith("api/models/"):
                self._info(path.removeprefix("api/models/"))
            else:
                owner, name, _, revision, *rest = path.split("/")
                self._file(method, f"{owner}/{name}", revision, "/".join(rest))

        def _refuse(self, status: int, code: str) -> None:
            self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

        def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content)

        def _info(self, path: str) -> None:
            repository, _, revision = path.partition("/revision/")
            if repository not in hub.models:
                self._refuse(401, "RepoNotFound")
                return
            if revision not in ("", "main", COMMIT):
                self._refuse(404, "RevisionNotFound")
                return
            siblings = []
            for file in sorted(hub.models[repository].iterdir()):
                hashed, large = digest(file)
                item: dict[str, Any] = {"rfilename": file.name, "size": file.stat().st_size, "blobId": hashed}
                if large:
                    item["lfs"] = {"sha256": hashed, "size": file.stat().st_size, "pointerSize": 130}
                siblings.append(item)
            document = {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings, "tags": []}
            self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

        def _file(self, method: str, repository: str, revision: str, name: str) -> None:
            wanted = self.headers.get("Range")
            hub.requests.append((method, name, wanted))
            if repository in hub.gated:
                self._refuse(401, "GatedRepo")
                return
            file = hub.models[repository] / name
            if revision != COMMIT or not file.is_file():
                self._refuse(404, "EntryNotFound")
                return
            hashed, large = digest(file)
            content = bytearray(file.read_bytes())
            if name in hub.corrupted and method == "GET":
                hub.corrupted.discard(name)
                content[-1] ^= 0xFF
            headers = {"ETag": f'"{hashed}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if large:
                headers |= {"X-Linked-Etag": f'"{hashed}"', "X-Linked-Size": str(len(content))}
            if method == "HEAD":
                self._send(200, b"", {**headers, "Content-Length": str(len(content))})
                return
            start, stop = 0, len(content)
            if wanted is not None:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                start, stop = int(first), min(int(last) + 1, stop) if last else stop
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            part = bytes(content[start:stop])
            headers["Content-Length"] = str(len(part))
            cut = hub.cut_after.pop(name, None)
            if cut is not None:
                part, self.close_connection = part[:cut], True
            hub.sent[name] = hub.sent.get(name, 0) + len(part)
            self._send(206 if wanted is not None else 200, part, headers)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
