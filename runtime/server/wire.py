"""What the server and its engine process say to one another: small frozen values, as JSON.

JSON and not pickle: a process that a hostile model file has taken over must not be able to run code in the server.
The values inside are the project's own dataclasses, so a field added to one of them travels by itself. The one message
that comes with every token, and mostly says nothing but the token, has a form of fixed fields beside it: writing,
reading and checking JSON took a quarter of the time that serving a token takes. Knows neither sockets nor processes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from edgelm.bundle import Manifest
from runtime.engine import EngineInfo, EngineOptions
from runtime.generate import GenerationRequest, TokenEvent
from runtime.server.metrics import Observation
from runtime.server.pace import Pace
from runtime.server.prompt_files import PromptCacheOptions
from runtime.server.scheduler import Failure
from runtime.supervisor import FrameError
from targets.vram import Device


@dataclass(frozen=True, slots=True)
class Load:
    """First message to the engine process: which model, and how; where prompts are kept between starts, if anywhere."""

    path: str
    options: EngineOptions
    prompts: PromptCacheOptions | None = None
    kind: Literal["load"] = "load"


@dataclass(frozen=True, slots=True)
class Submit:
    """Queue a generation under a number of the server's choice."""

    job: int
    request: GenerationRequest
    kind: Literal["submit"] = "submit"


@dataclass(frozen=True, slots=True)
class Cancel:
    """End a generation before its next token."""

    job: int
    kind: Literal["cancel"] = "cancel"


@dataclass(frozen=True, slots=True)
class Abort:
    """Fail everything that is running or waiting."""

    message: str
    kind: Literal["abort"] = "abort"


@dataclass(frozen=True, slots=True)
class Stop:
    """Finish what was submitted and end."""

    kind: Literal["stop"] = "stop"


@dataclass(frozen=True, slots=True)
class Encode:
    """Tokenize: answered by ``Encoded`` with the same number."""

    call: int
    text: str
    special: bool
    kind: Literal["encode"] = "encode"


@dataclass(frozen=True, slots=True)
class Decode:
    """Text of token ids, or with ``raw`` their bytes: answered by ``Decoded`` with the same number."""

    call: int
    ids: list[int]
    special: bool = False
    raw: bool = False
    kind: Literal["decode"] = "decode"


@dataclass(frozen=True, slots=True)
class LookAtDevice:
    """How much memory is free on the engine's GPU: answered by ``DeviceSeen`` with the same number."""

    call: int
    kind: Literal["look_at_device"] = "look_at_device"


@dataclass(frozen=True, slots=True)
class DeviceSeen:
    """The GPU as it is now, None when there is none any more."""

    call: int
    device: Device | None
    kind: Literal["device_seen"] = "device_seen"


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids, or in ``refusal`` why there are none."""

    call: int
    ids: list[int]
    refusal: str | None = None
    kind: Literal["encoded"] = "encoded"


@dataclass(frozen=True, slots=True)
class Decoded:
    """The text, or the bytes in hexadecimal digits."""

    call: int
    text: str
    kind: Literal["decoded"] = "decoded"


@dataclass(frozen=True, slots=True)
class Loaded:
    """The model was loaded; what the server has to know of it. ``template`` is the chat template's source."""

    name: str
    info: EngineInfo
    template: str | None
    special_tokens: dict[str, str]
    stop_tokens: frozenset[int]
    bos: int | None
    manifest: Manifest | None
    kind: Literal["loaded"] = "loaded"


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine computed its first token."""

    kind: Literal["ready"] = "ready"


@dataclass(frozen=True, slots=True)
class Refused:
    """The model cannot be loaded or computes nonsense; an ``EdgelmError`` in words. The process ends."""

    message: str
    hint: str | None
    exit_code: int
    kind: Literal["refused"] = "refused"


@dataclass(frozen=True, slots=True)
class Delivery:
    """One event of a job: a token or its failure. ``queue_s`` are the seconds it waited for a sequence."""

    job: int
    queue_s: float
    token: TokenEvent | None = None
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """What came of one step: events in order, and what was counted since it was told last; how many jobs are running
    now, how many tokens the sequences hold, and how the steps went so far, None when there was none."""

    running: int
    deliveries: list[Delivery]
    observations: list[Observation]
    kv_tokens: int = 0
    pace: Pace | None = None
    kind: Literal["progress"] = "progress"


Answer = Encoded | Decoded | DeviceSeen
ToEngine = Load | Submit | Cancel | Abort | Stop | Encode | Decode | LookAtDevice
FromEngine = Loaded | Ready | Refused | Progress | Encoded | Decoded | DeviceSeen

_Message = TypeVar("_Message")
# A plain step: a mark that no JSON begins with; running, tokens held, steps, slowest and best time, how many tokens
# follow. Of each its job, seconds queued, number, index, seconds so far, cached, drafted, accepted and shifted tokens,
# bytes of its text.
_MARK = b"\0"
_STEP = struct.Struct("<cIQQddI")
_TOKEN = struct.Struct("<QdqIdIIIII")
_EXACT = ConfigDict(ser_json_inf_nan="constants")
_TO_ENGINE: TypeAdapter[ToEngine] = TypeAdapter(Annotated[ToEngine, Field(discriminator="kind")], config=_EXACT)
_FROM_ENGINE: TypeAdapter[FromEngine] = TypeAdapter(Annotated[FromEngine, Field(discriminator="kind")], config=_EXACT)


def pack_to_engine(message: ToEngine) -> bytes:
    """A message of the server as JSON."""
    return _TO_ENGINE.dump_json(message)


def pack_from_engine(message: FromEngine) -> bytes:
    """A message of the engine process: a plain step in fixed fields, everything else as JSON."""
    if isinstance(message, Progress) and message.pace is not None and _says_only_tokens(message):
        return _pack_plain(message, message.pace)
    return _FROM_ENGINE.dump_json(message)


def unpack_to_engine(frame: bytes) -> ToEngine:
    """The server's message in a frame. Raises ``FrameError``."""
    return _unpack(_TO_ENGINE, frame)


def unpack_from_engine(frame: bytes) -> FromEngine:
    """The engine process's message in a frame; it may come from a process that was taken over, so nothing is taken for
    granted. Raises ``FrameError``."""
    if frame[:1] == _MARK:
        try:
            return _unpack_plain(frame)
        except (struct.error, UnicodeDecodeError):
            raise FrameError(f"{len(frame)} bytes are no step") from None
    return _unpack(_FROM_ENGINE, frame)


def is_plain(delivery: Delivery) -> bool:
    """Whether it says nothing but a token in the middle of its answer."""
    event = delivery.token
    if event is None or event.token is None or event.finish_reason is not None:
        return False
    return event.prefill_s is None and event.logprobs is None


def _says_only_tokens(progress: Progress) -> bool:
    return not progress.observations and bool(progress.deliveries) and all(map(is_plain, progress.deliveries))


def _pack_plain(progress: Progress, pace: Pace) -> bytes:
    parts = [
        _STEP.pack(
            _MARK,
            progress.running,
            progress.kv_tokens,
            pace.steps,
            pace.slowest_s,
            pace.token_s,
            len(progress.deliveries),
        )
    ]
    for delivery in progress.deliveries:
        event = delivery.token
        assert event is not None
        assert event.token is not None
        text = event.text.encode()
        counts = event.cached_tokens, event.drafted_tokens, event.accepted_tokens, event.shifted_tokens, len(text)
        parts += (
            _TOKEN.pack(delivery.job, delivery.queue_s, event.token, event.number, event.elapsed_s, *counts),
            text,
        )
    return b"".join(parts)


def _unpack_plain(frame: bytes) -> Progress:
    """Raises ``struct.error`` and ``UnicodeDecodeError``."""
    _, running, kv_tokens, steps, slowest_s, token_s, count = _STEP.unpack_from(frame)
    deliveries: list[Delivery] = []
    at = _STEP.size
    for _ in range(count):
        job, queue_s, token, index, elapsed_s, cached, *counts, length = _TOKEN.unpack_from(frame, at)
        at += _TOKEN.size
        text = frame[at : at + length].decode()
        at += length
        event = TokenEvent(token, text, index, elapsed_s, None, cached, None, None, *counts)
        deliveries.append(Delivery(job, queue_s, event))
    if at != len(frame):
        raise struct.error("what the fields say and how long the frame is do not agree")
    return Progress(running, deliveries, [], kv_tokens, Pace(steps, slowest_s, token_s))


def _unpack(adapter: TypeAdapter[_Message], frame: bytes) -> _Message:
    try:
        return adapter.validate_json(frame)
    except ValidationError as error:
        # Values are left out: they may be words of a client.
        places = {".".join(map(str, item["loc"])): item["type"] for item in error.errors(include_input=False)}
        raise FrameError(f"not a message: {places}") from None
