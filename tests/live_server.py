"""A real server on a free loopback port in a thread, around the fake engine or any other loaded model."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fake_engine import CHATML, EOS, IM_END, FakeEngine, FakeTokenizer, wait_until

from runtime.chat import ChatTemplate
from runtime.model import LoadedModel
from runtime.server.limits import Access
from runtime.server.metrics import Metrics
from runtime.server.serving import bind, make_server
from runtime.server.worker import Backend, Worker

TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "Call with <tool_call>{...}</tool_call><|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def fake_model(engine: FakeEngine, *, template: bool = True, source: str = CHATML) -> LoadedModel:
    """A loaded model around the scripted engine, with the template ``source`` unless ``template`` is off."""
    return LoadedModel(
        name="fake",
        artifact=Path("fake.gguf"),
        engine=engine,
        tokenizer=FakeTokenizer(),
        chat_template=ChatTemplate(source) if template else None,
        stop_tokens=frozenset({EOS, IM_END}),
        bos=None,
        manifest=None,
    )


if TYPE_CHECKING:
    import openai


@dataclass
class LiveServer:
    """Where it listens, and what is behind it."""

    port: int
    worker: Backend
    key: str = "none"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def client(self) -> Iterator[openai.OpenAI]:
        """The official client, without its retries."""
        import openai  # takes a second, and the processes that only serve need none

        with openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=20) as client:
            yield client

    def request(
        self, method: str, path: str, body: bytes | str | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (lower-case names) and body of one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body=body, headers=headers or {})
            response = connection.getresponse()
            return response.status, {name.lower(): item for name, item in response.getheaders()}, response.read()
        finally:
            connection.close()

    def post(self, path: str, document: Any, headers: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
        """Status and JSON answer; a document that is text or bytes is sent as it is."""
        body = document if isinstance(document, str | bytes) else json.dumps(document)
        status, _, answer = self.request("POST", path, body, {"Content-Type": "application/json", **(headers or {})})
        return status, json.loads(answer)

    @property
    def idle(self) -> bool:
        return self.worker.running == 0 and self.worker.queued == 0


@contextmanager
def live_server(model: LoadedModel, access: Access | None = None) -> Iterator[LiveServer]:
    """Serve ``model`` until the block ends; waits for readiness, and at the end for every thread."""
    metrics = Metrics()
    with running_server(Worker(model, metrics), metrics, access) as running:
        assert wait_until(lambda: running.worker.state != "starting")
        yield running


@contextmanager
def running_server(backend: Backend, metrics: Metrics, access: Access | None = None) -> Iterator[LiveServer]:
    """Serve from any backend until the block ends, without waiting for its readiness."""
    access = access or Access()
    listener = bind("127.0.0.1", 0)
    server = make_server(backend, metrics, access, drain_s=5)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="server")
    backend.start()
    thread.start()
    try:
        assert wait_until(lambda: server.started)
        yield LiveServer(listener.getsockname()[1], backend, (access.key or b"none").decode())
    finally:
        server.should_exit = True
        thread.join(10)
        backend.stop()
        assert not thread.is_alive()
