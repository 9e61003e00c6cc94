"""Who is let in and how much they may send: hosts, origins, keys, bodies, times."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import stat
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
from fake_engine import FakeEngine, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import LiveServer, fake_model, live_server
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from edgelm.errors import EdgelmError, UsageError
from runtime.server import limits
from runtime.server.app import refusal
from runtime.server.errors import ApiError
from runtime.server.limits import Access, Guard, is_loopback, parse_json, read_or_create_key, split_host
from runtime.server.serving import ServerOptions, resolve_access

KEY = b"correct-horse-battery-staple"
ROUTES = ("/", "/health/ready", "/metrics", "/status", "/v1/models", "/v1/models/fake", "/v1/nothing")


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server(fake_model(FakeEngine(script="Paris", context=512))) as running:
        yield running


@pytest.fixture(scope="module")
def locked() -> Iterator[LiveServer]:
    access = Access(limits.LOOPBACK_NAMES | {"edge.example"}, KEY)
    with live_server(fake_model(FakeEngine(script="Paris", context=512)), access) as running:
        yield running


def refused(answer: bytes) -> str:
    return str(json.loads(answer)["error"]["code"])


@pytest.mark.parametrize("route", [*ROUTES, "/health/live"])
@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.2", "[::2]"])
def test_foreign_hosts_are_refused_on_every_route(server: LiveServer, route: str, host: str) -> None:
    status, _, answer = server.request("GET", route, headers={"Host": host})
    assert (status, refused(answer)) == (403, "host_not_allowed")


@pytest.mark.parametrize("host", ["", ":80", "localhost:x", "[::1", "[::1]x", "localhost:80:80"])
def test_malformed_hosts_are_refused(server: LiveServer, host: str) -> None:
    status, _, answer = server.request("GET", "/health/live", headers={"Host": host})
    assert (status, refused(answer)) == (400, "invalid_host")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8080", "127.0.0.1:1", "[::1]:8080", "localhost."])
def test_loopback_names_are_answered(server: LiveServer, host: str) -> None:
    assert server.request("GET", "/health/live", headers={"Host": host})[0] == 200


def test_a_listed_host_is_answered(locked: LiveServer) -> None:
    assert locked.request("GET", "/health/live", headers={"Host": "Edge.Example:8080"})[0] == 200


def call_guard(guard: Guard, client: str, method: str = "POST") -> Coroutine[Any, Any, int]:
    """One request from ``client`` straight into the middleware; its status."""

    async def call() -> int:
        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        statuses: list[int] = []

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        headers = [(b"host", b"localhost")]
        scope = {"type": "http", "method": method, "path": "/x", "raw_path": b"/x", "query_string": b""}
        await guard({**scope, "headers": headers, "client": (client, 5), "server": ("10.1.1.1", 80)}, receive, send)
        return statuses[0]

    return call()


def test_one_address_cannot_take_all_places() -> None:
    async def scenario() -> None:
        release = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await release.wait()
            await JSONResponse({})(scope, receive, send)

        guard = Guard(app, Access(per_client=2), refusal)
        waiting = [asyncio.create_task(call_guard(guard, "10.0.0.1")) for _ in range(2)]
        waiting += [asyncio.create_task(call_guard(guard, address)) for address in ["10.0.0.2", *["127.0.0.1"] * 5]]
        await asyncio.sleep(0)
        assert await call_guard(guard, "10.0.0.1") == 429
        release.set()
        assert await asyncio.gather(*waiting) == [200] * 8
        assert await call_guard(guard, "10.0.0.1") == 200
        assert not guard._under_way

    asyncio.run(scenario())


def test_connections_beyond_the_limit_get_a_plain_503(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.server.serving.CONNECTION_LIMIT", 5)
    with live_server(fake_model(FakeEngine(context=512))) as small, ExitStack() as held:
        connections = [
            held.enter_context(socket.create_connection(("127.0.0.1", small.port), timeout=10)) for _ in range(6)
        ]
        connections[-1].sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connections[-1].recv(4096).startswith(b"HTTP/1.1 503 ")
        for connection in connections:
            connection.close()
        assert wait_until(lambda: small.request("GET", "/health/live")[0] == 200)


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost.evil.example", "file://", ""])
def test_foreign_origins_are_refused(server: LiveServer, origin: str) -> None:
    for method, route in (("POST", "/v1/chat/completions"), ("OPTIONS", "/v1/chat/completions"), ("GET", "/metrics")):
        status, headers, answer = server.request(method, route, headers={"Origin": origin})
        assert (status, refused(answer)) == (403, "origin_not_allowed")
        assert not any(name.startswith("access-control") for name in headers)


def test_the_own_page_is_answered(server: LiveServer) -> None:
    headers = {"Origin": server.url}
    assert server.post("/v1/completions", {"prompt": "x"}, headers)[0] == 200


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer wrong",
        f"Bearer {KEY.decode()}x",
        f"Bearer {KEY.decode()[:-1]}",
        f"Token {KEY.decode()}",
        "Basic !!!",
        "Basic " + base64.b64encode(b"user:wrong").decode(),
        "Bearer \xe9\xff",
    ],
)
@pytest.mark.parametrize("route", ROUTES)
def test_without_the_key_nothing_is_answered(locked: LiveServer, route: str, authorization: str | None) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    status, answered, answer = locked.request("GET", route, headers=headers)
    assert (status, refused(answer)) == (401, "invalid_api_key")
    assert answered["www-authenticate"].startswith("Basic" if route == "/" else "Bearer")


def test_with_the_key_everything_is_answered(locked: LiveServer) -> None:
    for credentials in (b"Bearer " + KEY, b"bearer " + KEY, b"Basic " + base64.b64encode(b"anybody:" + KEY)):
        headers = {"Authorization": credentials.decode()}
        assert [locked.request("GET", route, headers=headers)[0] for route in ROUTES[:-1]] == [200] * 6


def test_the_openai_client_with_and_without_the_key(locked: LiveServer) -> None:
    with locked.client() as client:
        assert client.completions.create(model="fake", prompt="x").choices[0].text == "Paris"
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()


def test_liveness_needs_no_key(locked: LiveServer) -> None:
    assert locked.request("GET", "/health/live")[0] == 200


def test_keys_are_compared_in_constant_time(locked: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return left == right

    monkeypatch.setattr(limits.hmac, "compare_digest", compare)
    locked.request("GET", "/metrics", headers={"Authorization": "Bearer wrong"})
    assert compared == [(b"wrong", KEY)]


def test_a_body_too_large_is_refused_before_it_is_read(server: LiveServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1048577\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 413")
    huge = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + b"9" * 500 + b"\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(huge)
        assert client.recv(65536).split(b" ")[1] in {b"400", b"413"}


def test_a_chunked_body_too_large_is_refused_on_the_way(server: LiveServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(17):
            client.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_arrive_times_out(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "READ_TIMEOUT_S", 0.1)
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
        assert client.recv(65536).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("sent", [b"", b"GET /health/live HTTP/1.1\r\nHost: loc"])
def test_headers_that_do_not_arrive_end_the_connection(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(limits, "READ_TIMEOUT_S", 0.1)
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as client:
        client.sendall(sent)
        assert client.recv(65536) == b""


def test_drops_of_headers_do_not_prolong_the_wait(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "READ_TIMEOUT_S", 0.2)
    with socket.create_connection(("127.0.0.1", server.port), timeout=0.02) as client:

        def closed() -> bool:
            try:
                client.sendall(b"G")
                return client.recv(1) == b""
            except TimeoutError:
                return False
            except OSError:
                return True

        assert wait_until(closed, 2)


def test_headers_too_large_are_refused(server: LiveServer) -> None:
    assert server.request("GET", "/health/live", headers={"X-Large": "x" * 20_000})[0] == 431
    assert server.request("GET", "/" + "x" * 20_000)[0] == 431


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{:", "invalid_json"),
        (b"{", "invalid_json"),
        (b'{"prompt": NaN}', "invalid_json"),
        (b'{"prompt": "x", "temperature": Infinity}', "invalid_json"),
        (b'{"prompt": "\\ud800"}', "invalid_json"),
        (b'{"prompt": "\xff"}', "invalid_json"),
        (b"[" * 60_000 + b"]" * 60_000, "invalid_json"),
        (b"(" * 60_000, "invalid_json"),
        (b"[" * 34 + b"]" * 34, "json_too_deep"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "json_too_deep"),
        (b"[]", "invalid_type"),
        (b"null", "invalid_type"),
        (b'"text"', "invalid_type"),
        (b"9" * 10_000, None),
    ],
)
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_hostile_documents_get_a_400(server: LiveServer, route: str, body: bytes, code: str | None) -> None:
    status, answer = server.post(route, body)
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"
    assert code is None or answer["error"]["code"] == code


@pytest.mark.parametrize(
    "route", ["/v1/chat/completions", "/v1/completions", "/api/chat", "/api/generate", "/tokenize"]
)
@pytest.mark.parametrize("field", ["chat_template", "template"])
def test_a_template_of_a_client_is_refused_by_name(server: LiveServer, route: str, field: str) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "model": "fake"}
    if "chat" not in route and route != "/tokenize":
        body = {"prompt": "x", "model": "fake"}
    status, answer = server.post(route, {**body, field: "{% for _ in range(10**9) %}{% endfor %}"})
    assert status == 400
    assert field in json.dumps(answer)
    assert server.idle


def test_json_up_to_the_depth_limit_is_read() -> None:
    assert parse_json(b"[" * 32 + b"]" * 32) is not None
    with pytest.raises(ApiError, match="deeper than 32"):
        parse_json(b"[" * 33 + b"]" * 33)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
names = st.sampled_from(["prompt", "messages", "stop", "seed", "max_tokens", "n", "temperature", "stream", "top_k"])


@settings(max_examples=25, deadline=None, database=None)
@given(document=st.dictionaries(names, json_values, max_size=5))
def test_no_document_makes_the_server_fail(server: LiveServer, document: dict[str, Any]) -> None:
    document["stream"] = False
    status, _, answer = server.request("POST", "/v1/completions", json.dumps(document).encode("utf-8", "surrogatepass"))
    assert status in {200, 400, 404}
    assert status == 200 or json.loads(answer)["error"]["message"]


@settings(max_examples=200, deadline=None, database=None)
@given(st.text(max_size=40))
def test_host_names_are_split_or_refused(value: str) -> None:
    name = split_host(value)
    assert name is None or (name and name == name.lower())


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("LocalHost", True), ("0.0.0.0", False), ("pi", False)],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_other_addresses_need_a_key_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="API key is needed") as caught:
        resolve_access(ServerOptions(host="0.0.0.0"))
    assert "--api-key-file" in (caught.value.hint or "")
    access = resolve_access(ServerOptions(host="0.0.0.0", key_file=tmp_path / "key", allowed_hosts=("Pi.local",)))
    assert access.key == (tmp_path / "key").read_bytes().strip()
    assert "pi.local" in access.hosts
    assert "0.0.0.0" not in access.hosts


def test_a_key_is_generated_once_and_for_the_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "key"
    key, created = read_or_create_key(path)
    assert created
    assert len(key) >= 43  # 256 bits in base64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_or_create_key(path) == (key, False)
    assert read_or_create_key(tmp_path / "other")[0] != key


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(KEY)
    path.chmod(0o640)
    with pytest.raises(EdgelmError, match=r"can be read by other users \(mode 0640\)") as caught:
        read_or_create_key(path)
    assert caught.value.hint == f"chmod 600 {path}"


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 5000, b"two words of a key", "schlüsselschlüssel".encode()])
def test_a_file_without_a_sensible_key_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(EdgelmError, match="does not hold one key"):
        read_or_create_key(path)


def test_a_key_file_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing" / "key"):
        with pytest.raises(EdgelmError, match="key file"):
            read_or_create_key(path)


def test_the_address_a_client_really_came_to_is_a_host_name(server: LiveServer) -> None:
    # A server on 0.0.0.0 is asked by the machine's own addresses, which no list can foresee.
    with live_server(fake_model(FakeEngine()), Access(frozenset())) as bare:
        assert bare.request("GET", "/health/live", headers={"Host": "127.0.0.1"})[0] == 200
        assert bare.request("GET", "/health/live", headers={"Host": "localhost"})[0] == 403


def test_refusals_left_nothing_running(server: LiveServer) -> None:
    assert wait_until(lambda: server.idle)
