"""Malformed input for everything that reads what others wrote: requests, headers, messages, model files.

Documents grow from the request models' own schemas and from a kept corpus (``fuzz_corpus/``: what brought down other
servers), are mutated as text, and go to the whole ASGI application, to the parsers alone and to the validators of model
files. Whatever ends in anything but the refusal that is promised is a failure: a 5xx, another exception, more than five
seconds. Failing inputs are kept under ``fuzz_corpus/failures``. The same seed gives the same cases.

    python benchmarks/fuzz.py --cases 1000000

``--openapi`` lets schemathesis judge real servers instead (a text model in a supervised process, an encoder, the tasks,
several models) by the OpenAPI document that each gives of itself, so many cases for every operation: no 5xx, no answer
that contradicts the document, no restart, nothing that takes longer than five seconds.

    python benchmarks/fuzz.py --openapi 2000
    python benchmarks/fuzz.py --openapi 2000 --targets text,several --seed 2
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import logging
import pkgutil
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.routing import Route
from starlette.types import ASGIApp, Message

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from fake_engine import FakeEngine, wait_until  # noqa: E402
from live_server import fake_model  # noqa: E402

import runtime.server  # noqa: E402
from edgelm.errors import EdgelmError  # noqa: E402
from exporter.safetensors_header import read_safetensors_header  # noqa: E402
from runtime.generate import TokenEvent  # noqa: E402
from runtime.gguf_header import read_gguf_header  # noqa: E402
from runtime.onnx_header import read_onnx_model  # noqa: E402
from runtime.probe import write_tiny_gguf  # noqa: E402
from runtime.server import wire  # noqa: E402
from runtime.server.app import create_app  # noqa: E402
from runtime.server.errors import ApiError  # noqa: E402
from runtime.server.limits import Access, parse_json, split_host  # noqa: E402
from runtime.server.metrics import Metrics  # noqa: E402
from runtime.server.openai import Body, parse_request  # noqa: E402
from runtime.server.pace import Pace  # noqa: E402
from runtime.server.worker import Worker  # noqa: E402
from runtime.supervisor import FrameError  # noqa: E402

CORPUS = HERE / "fuzz_corpus"
SLOW_S = 5.0
NUMBERS = (0, -1, 1, 0.5, -0.0, 2**31, 2**63, -(2**63), 10**400, 1e308, -1e308)
WORDS = (
    "",
    "x",
    "model",
    "user",
    "\0",
    "\ud800",
    "é🎉",
    "<|im_end|>",
    "{{ 7*7 }}",
    "{% for i in range(10**9) %}",
    "a" * 300,
)
TOKENS = (b"{", b"}", b"[", b"]", b'"', b":", b",", b"-1", b"1e999", b"NaN", b"null", b"true", b"\\u0000", b"\\ud800")
# Without content-length: the HTTP library lets only digits through.
HEADER_NAMES = (b"host", b"origin", b"authorization", b"content-type", b"x-forwarded-for", b"range")


@dataclass(frozen=True)
class Target:
    """Something that reads bytes. ``run`` raises when it does anything but accept or refuse them as promised."""

    name: str
    share: float
    seeds: list[bytes]
    run: Callable[[bytes, random.Random], None]


def request_models() -> list[type[Body]]:
    """Every request body that a module of the server declares; new ones are found by themselves."""
    modules = [module.name for module in pkgutil.iter_modules(runtime.server.__path__, "runtime.server.")]
    items = [item for name in modules for item in vars(importlib.import_module(name)).values()]
    models = {item for item in items if isinstance(item, type) and issubclass(item, Body)}
    return sorted((model for model in models if model.__name__[0] != "_"), key=lambda model: model.__name__)


class Grower:
    """Random documents of a JSON schema; one value in eight is of another kind."""

    def __init__(self, schema: dict[str, Any], chance: random.Random) -> None:
        self._definitions = schema.get("$defs", {})
        self._schema = schema
        self._chance = chance

    def document(self) -> Any:
        return self._grow(self._schema, 0)

    def _grow(self, schema: dict[str, Any], depth: int) -> Any:
        chance = self._chance
        if depth > 6 or chance.random() < 0.125:
            return chance.choice((None, True, [], {}, chance.choice(NUMBERS[:9]), chance.choice(WORDS), [[]] * 3))
        if "$ref" in schema:
            return self._grow(self._definitions[schema["$ref"].rpartition("/")[2]], depth + 1)
        for union in ("anyOf", "oneOf"):
            if union in schema:
                return self._grow(chance.choice(schema[union]), depth + 1)
        if "const" in schema or "enum" in schema:
            return schema.get("const", chance.choice(schema.get("enum", [None])))
        return self._of_type(schema, depth)

    def _of_type(self, schema: dict[str, Any], depth: int) -> Any:
        chance, kind = self._chance, schema.get("type")
        if kind == "object":
            wanted = set(schema.get("required", ()))
            names = [name for name in schema.get("properties", {}) if name in wanted or chance.random() < 0.25]
            grown = {name: self._grow(schema["properties"][name], depth + 1) for name in names}
            return grown | ({chance.choice(WORDS): 1} if chance.random() < 0.05 else {})
        if kind == "array":
            return [self._grow(schema.get("items", {}), depth + 1) for _ in range(chance.randrange(4))]
        if kind in {"integer", "number"}:
            bounds = (schema.get("minimum", 0), schema.get("maximum", 3), 1, 2)
            return chance.choice(bounds if chance.random() < 0.8 else NUMBERS[:9])
        return chance.random() < 0.5 if kind == "boolean" else chance.choice(WORDS)


def mutated(data: bytes, chance: random.Random) -> bytes:
    """A few random changes: bytes, tokens, pieces doubled, cut or moved, lengths pushed to their ends."""
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 6)):
        place = chance.randrange(len(changed) + 1)
        end = min(len(changed), place + chance.randrange(1, 32))
        what = chance.randrange(6)
        if what == 0 and place < len(changed):
            changed[place] = chance.randrange(256)
        elif what == 1:
            changed[place:place] = chance.choice(TOKENS)
        elif what == 2:
            del changed[place:end]
        elif what == 3:
            changed[place:place] = changed[place:end] * chance.randrange(1, 4)
        elif what == 4:
            changed[place : place + 8] = chance.choice((b"\xff" * 8, bytes(8), b"\0" * 7 + b"\x80", b"\x7f" * 8))
        else:
            changed[place:place] = bytes(chance.randrange(256) for _ in range(4))
    return bytes(changed[: 2**20])


def as_json(document: Any) -> bytes:
    return json.dumps(document).encode()


def corpus() -> list[bytes]:
    """What stopped other servers, as kept in files, and what is too large to keep."""
    kept = [path.read_bytes() for path in sorted(CORPUS.glob("*.json"))]
    prompt = {"prompt": "x", "max_tokens": 1}
    grown = [
        b"(" * 60_000,
        b"[" * 60_000,
        b'{"a":' * 60_000,
        as_json({**prompt, "response_format": {"type": "json_schema", "json_schema": {"schema": "x" * 50_000}}}),
        as_json({"messages": [{"role": "user", "content": "(" * 60_000}]}),
    ]
    return kept + grown


class Application:
    """The whole application around the scripted engine, called as the HTTP library would call it."""

    def __init__(self) -> None:
        metrics = Metrics()
        self.worker = Worker(fake_model(FakeEngine(script="ok", context=512, sequences=2)), metrics)
        self._app: ASGIApp = create_app(self.worker, metrics, Access())
        self._routes = sorted(route.path for route in _routes(self._app) if "POST" in (route.methods or ()))
        self._loop = asyncio.new_event_loop()
        self.worker.start()
        wait_until(lambda: self.worker.state == "ready")

    def close(self) -> None:
        self.worker.stop()
        self._loop.close()

    def run(self, data: bytes, chance: random.Random) -> None:
        headers = [(b"host", b"localhost")]
        if chance.random() < 0.1:
            headers.append((chance.choice(HEADER_NAMES), bytes(chance.choice(data or b"x") for _ in range(6))))
        path = chance.choice(self._routes)
        status, body = self._loop.run_until_complete(asyncio.wait_for(self._call(path, headers, data), SLOW_S))
        if status >= 500 or status < 200:
            raise AssertionError(f"{path} answered {status}: {body[:200]!r}")
        if status >= 400 and "error" not in json.loads(body):
            raise AssertionError(f"{path} answered {status} without an error: {body[:200]!r}")

    async def _call(self, path: str, headers: list[tuple[bytes, bytes]], body: bytes) -> tuple[int, bytes]:
        given = [{"type": "http.request", "body": body, "more_body": False}]
        answer: list[Message] = []
        left = asyncio.Event()

        async def receive() -> Message:
            if given:
                return given.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            answer.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
        scope |= {"headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "http_version": "1.1"}
        await self._app({**scope, "root_path": "", "scheme": "http"}, receive, send)
        return answer[0]["status"], b"".join(message.get("body", b"") for message in answer[1:])


def _routes(app: Any) -> list[Route]:
    return [route for route in app.routes if isinstance(route, Route)]


def refuses(read: Callable[[bytes], object], *promised: type[Exception]) -> Callable[[bytes, random.Random], None]:
    """A target that may raise what is ``promised`` and nothing else."""

    def run(data: bytes, _: random.Random) -> None:
        try:
            read(data)
        except promised:
            return

    return run


def parse_any(models: list[type[Body]]) -> Callable[[bytes], object]:
    def read(data: bytes) -> None:
        split_host(data[:80].decode("latin-1"))
        document = parse_json(data)
        for model in models:
            parse_one(model, document)

    def parse_one(model: type[Body], document: Any) -> None:
        try:
            parse_request(model, document)
        except ApiError as error:
            json.dumps(error.document)
            if not 400 <= error.status < 500:
                raise AssertionError(f"refused with {error.status}") from error

    return read


def onnx_seed() -> bytes:
    """A graph of one node with one weight inside."""
    from onnx import TensorProto, helper

    weight = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
    places = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    node = helper.make_node("Add", ["x", "w"], ["y"])
    model: bytes = helper.make_model(
        helper.make_graph([node], "g", places[:1], places[1:], [weight])
    ).SerializeToString()
    return model


def from_file(directory: Path, name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    path = directory / name

    def run(data: bytes) -> None:
        path.write_bytes(data)
        read(path)

    return run


def targets(directory: Path, application: Application, chance: random.Random) -> list[Target]:
    models = request_models()
    growers = [Grower(model.model_json_schema(), chance) for model in models]
    grown = [as_json(grower.document()) for grower in growers for _ in range(300)]
    requests = corpus() + grown
    write_tiny_gguf(directory / "seed.gguf")
    gguf = (directory / "seed.gguf").read_bytes()[:20_000]
    safetensors = b'{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}'
    tensors = len(safetensors).to_bytes(8, "little") + safetensors + bytes(16)
    frames = [wire.pack_to_engine(wire.Encode(1, "x", special=True)), wire.pack_from_engine(wire.Ready())]
    frames += [wire.pack_from_engine(wire.Progress(1, [wire.Delivery(1, 0.0)], []))]
    token = wire.Delivery(1, 0.5, TokenEvent(7, " text", 3, 0.25))
    frames += [wire.pack_from_engine(wire.Progress(1, [token, token], [], 9, Pace(5, 0.5, 0.01)))]

    def unpack(data: bytes) -> None:
        for unpacked in (wire.unpack_to_engine, wire.unpack_from_engine):
            refuses(unpacked, FrameError)(data, chance)

    gguf_reader = from_file(directory, "case.gguf", read_gguf_header)
    onnx_reader = from_file(directory, "case.onnx", read_onnx_model)
    tensor_reader = from_file(directory, "case.safetensors", read_safetensors_header)
    return [
        Target("application", 0.05, requests, application.run),
        Target("requests", 0.45, requests, refuses(parse_any(models), ApiError)),
        Target("messages", 0.2, frames, refuses(unpack)),
        Target("gguf", 0.1, [gguf, gguf[:2000]], refuses(gguf_reader, EdgelmError)),
        Target("onnx", 0.1, [onnx_seed()], refuses(onnx_reader, EdgelmError)),
        Target("safetensors", 0.1, [tensors], refuses(tensor_reader, EdgelmError)),
    ]


def cases(target: Target, count: int, chance: random.Random) -> Iterator[bytes]:
    """Every seed as it is, then mutations of seeds and of mutations."""
    yield from target.seeds[:count]
    recent = list(target.seeds)
    for _ in range(max(0, count - len(target.seeds))):
        data = mutated(chance.choice(recent), chance)
        if len(data) < 4096:
            recent[chance.randrange(len(recent))] = data if chance.random() < 0.3 else chance.choice(target.seeds)
        yield data


def fuzz(target: Target, count: int, seed: int) -> list[str]:
    """Sentences on the failures, at most ten."""
    chance = random.Random(f"{target.name} {seed}")
    failures: list[str] = []
    for number, data in enumerate(cases(target, count, chance)):
        started = time.monotonic()
        try:
            target.run(data, chance)
            if time.monotonic() - started > SLOW_S:
                raise AssertionError(f"took {time.monotonic() - started:.1f} s")
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what this looks for
            kept = CORPUS / "failures" / f"{target.name}-{seed}-{number}.bin"
            kept.parent.mkdir(exist_ok=True)
            kept.write_bytes(data)
            failures.append(f"{target.name} case {number}: {type(error).__name__}: {error} (kept as {kept.name})")
            if len(failures) == 10:
                break
    return failures


def judge_servers(cases: int, seed: int, targets: str | None) -> int:
    from openapi_judge import SERVERS, judge

    failed = 0
    for name, serving in SERVERS.items():
        if targets and name not in targets.split(","):
            continue
        started = time.monotonic()
        with serving() as server:
            fine, told = judge(server, cases, seed)
        failed += not fine
        counted = next((line.strip() for line in told.splitlines() if " generated, " in line), "nothing generated")
        print(f"{name}: {counted} in {time.monotonic() - started:.0f} s, {'fine' if fine else 'FAILED'}", flush=True)
        if not fine:
            print(told, flush=True)
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", type=int, default=1_000_000, help="in all, shared out among the targets")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--targets", help="some of them, with commas")
    parser.add_argument("--openapi", type=int, metavar="CASES", help="for each operation, judged by schemathesis")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    if arguments.openapi is not None:
        return judge_servers(arguments.openapi, arguments.seed, arguments.targets)
    application = Application()
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="edgelm-fuzz-") as at:
        for target in targets(Path(at), application, random.Random(arguments.seed)):
            if arguments.targets and target.name not in arguments.targets.split(","):
                continue
            started, count = time.monotonic(), int(arguments.cases * target.share)
            found = fuzz(target, count, arguments.seed)
            failures += found
            print(
                f"{target.name}: {count} cases in {time.monotonic() - started:.0f} s, {len(found)} failures", flush=True
            )
    application.close()
    print("\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
