"""What a client may do before any of its words reach the model: hosts, origins, keys, sizes, times.

One ASGI middleware in front of every route, the bounds that requests are checked against, a connection class that ends
clients who never finish their headers, and the API key file. Knows nothing of what the routes do.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import os
import secrets
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic_core
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from edgelm.errors import EdgelmError
from runtime.server.errors import ApiError

BODY_LIMIT_BYTES = 2**20
HEADER_LIMIT_BYTES = 16 * 2**10
JSON_DEPTH_LIMIT = 32
READ_TIMEOUT_S = 10.0
STOP_COUNT_LIMIT = 16
STOP_LENGTH_LIMIT = 256
MESSAGE_COUNT_LIMIT = 1024
CHOICE_COUNT_LIMIT = 8
BIAS_COUNT_LIMIT = 1024
TOOL_COUNT_LIMIT = 128
INPUT_COUNT_LIMIT = 2048  # of texts to make vectors of: OpenAI's own
KEY_LENGTH_MINIMUM = 16
KEY_LENGTH_LIMIT = 1024
OPEN_ROUTE = "/health/live"
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
# No token of a common vocabulary averages more text than this over a whole prompt, so a longer prompt cannot fit and
# is refused without spending time on encoding it.
PROMPT_CHARACTERS_PER_TOKEN = 16


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine can reach an address or name."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def prompt_characters_limit(context: int) -> int:
    """Most characters that a prompt for a context of ``context`` tokens may have."""
    return PROMPT_CHARACTERS_PER_TOKEN * context


def split_host(value: str) -> str | None:
    """Host name of a ``Host`` header or of an origin's authority, lower case, without port; None when malformed."""
    name, port = value, ""
    if value.startswith("["):
        name, bracket, rest = value[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            return None
        port = rest[1:]
    elif ":" in value:
        name, _, port = value.partition(":")
    if port and not (port.isascii() and port.isdigit()):
        return None
    return name.lower().removesuffix(".") or None


def parse_json(body: bytes) -> Any:
    """The document in ``body``. Raises ``ApiError`` 400 for anything but JSON at most 32 levels deep, NaN included."""
    try:
        document = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        # The parser's message tells line and column and quotes nothing of the body.
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not check_depth(document):
        raise ApiError(400, f"the body is nested deeper than {JSON_DEPTH_LIMIT} levels", code="json_too_deep")
    return document


def check_depth(document: Any) -> bool:
    """Whether a JSON document is at most ``JSON_DEPTH_LIMIT`` levels deep."""
    level = [document]
    for _ in range(JSON_DEPTH_LIMIT):
        level = [child for item in level for child in _children(item)]
        if not level:
            return True
    return False


def _children(item: Any) -> Any:
    if isinstance(item, dict):
        return item.values()
    return item if isinstance(item, list) else ()


@dataclass(frozen=True, slots=True)
class Access:
    """Who may talk to the server. ``hosts`` are lower-case names; ``key`` None means that no key is needed.

    ``per_client`` is how many requests with a body one address may have under way; loopback addresses are one user's
    programs, or a proxy with many users behind it, and are not counted. None counts nobody.
    """

    hosts: frozenset[str] = LOOPBACK_NAMES
    key: bytes | None = None
    per_client: int | None = None


class Guard:
    """ASGI middleware: Host, Origin, key, then the whole body within its size and time.

    ``refuse`` turns an ``ApiError`` on a path into a response. The routes behind find the body already read: their
    ``receive`` gives it in one message and from then on tells only when the client leaves.
    """

    def __init__(self, app: ASGIApp, access: Access, refuse: Callable[[ApiError, str], ASGIApp]) -> None:
        self._app = app
        self._access = access
        self._refuse = refuse
        self._under_way: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            # Lifespan passes; there are no WebSocket routes, and the router closes such a connection.
            await self._app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            _check_header_size(scope)
            self._check_host(scope, headers)
            self._check_origin(headers)
            if scope["path"] != OPEN_ROUTE:
                self._check_key(scope, headers)
            body = await _read_body(headers, receive)
            client = self._enter(scope)
        except ApiError as error:
            await self._refuse(error, scope["path"])(scope, receive, send)
            return
        try:
            if body is not None:
                await self._app(scope, _replay(body, receive), send)
        finally:
            self._leave(client)

    def _enter(self, scope: Scope) -> str | None:
        """Count a request that may cost the engine something; its client's address when it counts."""
        host = str((scope.get("client") or ("",))[0])
        if self._access.per_client is None or scope["method"] != "POST" or is_loopback(host):
            return None
        if self._under_way[host] >= self._access.per_client:
            raise ApiError(
                429,
                f"{self._access.per_client} requests from your address are under way, more are not taken",
                code="client_limit",
                headers={"Retry-After": "1"},
            )
        self._under_way[host] += 1
        return host

    def _leave(self, client: str | None) -> None:
        if client is not None:
            self._under_way[client] -= 1
            if not self._under_way[client]:
                del self._under_way[client]

    def _check_host(self, scope: Scope, headers: Headers) -> None:
        """DNS rebinding reaches a loopback server under the attacker's name, so unknown names are refused."""
        values = headers.getlist("host")
        host = split_host(values[0]) if len(values) == 1 else None
        if host is None:
            raise ApiError(400, "the Host header is missing, repeated or malformed", code="invalid_host")
        server = scope.get("server")
        if host in self._access.hosts or (server is not None and host == str(server[0]).lower()):
            return
        raise ApiError(403, "this server does not answer under that Host name", code="host_not_allowed")

    def _check_origin(self, headers: Headers) -> None:
        """A browser names the page that asks. Only pages that this server gave out may."""
        for origin in headers.getlist("origin"):
            scheme, _, authority = origin.partition("://")
            if scheme not in {"http", "https"} or authority.lower() != headers["host"].lower():
                raise ApiError(403, "requests from other web pages are refused", code="origin_not_allowed")

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        if self._access.key is None:
            return
        values = headers.getlist("authorization")
        given = _presented_key(values[0]) if len(values) == 1 else b""
        if not hmac.compare_digest(given, self._access.key):
            # A browser can present the key only through its own dialog, which Basic opens; programs send Bearer.
            challenge = 'Basic realm="edgelm", charset="UTF-8"' if scope["path"] == "/" else "Bearer"
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": challenge},
            )


def _presented_key(value: str) -> bytes:
    scheme, _, credentials = value.partition(" ")
    raw = credentials.strip().encode("latin-1", "replace")
    if scheme.lower() == "bearer":
        return raw
    if scheme.lower() != "basic":
        return b""
    try:
        return base64.b64decode(raw, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


def _check_header_size(scope: Scope) -> None:
    """The protocol layer bounds only headers that come in pieces; what one packet brings is measured here."""
    size = len(scope["raw_path"]) + len(scope["query_string"])
    size += sum(len(name) + len(value) for name, value in scope["headers"])
    if size > HEADER_LIMIT_BYTES:
        raise ApiError(431, f"the headers are larger than {HEADER_LIMIT_BYTES} bytes", code="headers_too_large")


async def _read_body(headers: Headers, receive: Receive) -> bytes | None:
    """The whole body, None when the client left before sending it. Raises ``ApiError`` 413 or 408."""
    too_large = ApiError(
        413,
        f"the body is larger than {BODY_LIMIT_BYTES} bytes",
        code="body_too_large",
        headers={"Connection": "close"},
    )
    declared = headers.get("content-length", "0")
    # The protocol layer lets through digits only; twenty of them are more than any limit.
    if len(declared) > 20 or int(declared) > BODY_LIMIT_BYTES:
        raise too_large
    body = bytearray()

    async def read() -> bool:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            body.extend(message.get("body", b""))
            if len(body) > BODY_LIMIT_BYTES:
                raise too_large
            if not message.get("more_body", False):
                return True

    try:
        complete = await asyncio.wait_for(read(), READ_TIMEOUT_S)
    except asyncio.TimeoutError:
        raise ApiError(
            408,
            f"the body did not arrive within {READ_TIMEOUT_S:g} s",
            code="read_timeout",
            headers={"Connection": "close"},
        ) from None
    return bytes(body) if complete else None


def _replay(body: bytes, receive: Receive) -> Receive:
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


class TimedH11Protocol(H11Protocol):
    """uvicorn's HTTP/1.1 connection, closed when a request's headers are not complete after ``READ_TIMEOUT_S``.

    uvicorn itself waits for ever for a client that opens a connection and says nothing, or says it slowly.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        self._watch()

    def _watch(self) -> None:
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is not None and not cycle.response_complete:
            self._disarm()
        elif self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(READ_TIMEOUT_S, self.transport.close)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def read_or_create_key(path: Path) -> tuple[bytes, bool]:
    """The API key in ``path`` and whether it was made just now: 256 random bits in a new file with mode 0600.

    Raises ``EdgelmError`` when the file is readable by others, belongs to somebody else or holds no sensible key.
    """
    key = secrets.token_urlsafe(32).encode()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return _read_key(path), False
    except OSError as error:
        raise EdgelmError(f"cannot create key file {path}: {error.strerror}") from error
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(key + b"\n")
    return key, True


def _read_key(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            facts = os.fstat(stream.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise EdgelmError(f"key file {path} is not a regular file")
            if facts.st_mode & 0o077 or facts.st_uid not in {0, os.geteuid()}:
                raise EdgelmError(
                    f"key file {path} can be read by other users (mode {stat.S_IMODE(facts.st_mode):04o})",
                    hint=f"chmod 600 {path}",
                )
            key = stream.read(KEY_LENGTH_LIMIT + 1).strip()
    except OSError as error:
        raise EdgelmError(f"cannot read key file {path}: {error.strerror}") from error
    printable = all(0x21 <= byte <= 0x7E for byte in key)
    if not KEY_LENGTH_MINIMUM <= len(key) <= KEY_LENGTH_LIMIT or not printable:
        raise EdgelmError(
            f"key file {path} does not hold one key of {KEY_LENGTH_MINIMUM} to {KEY_LENGTH_LIMIT} printable characters",
            hint="remove the file to have a key generated",
        )
    return key
