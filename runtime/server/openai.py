"""The OpenAI vocabulary: what requests may say, and how answers, streams and errors are written.

Pure data in, pure data out. A field of OpenAI's API that this server cannot honour is refused by name unless it asks
for nothing; no field is accepted and dropped, apart from labels that ask for no behaviour (``user``, ``metadata``).
Knows nothing of HTTP, engines or tokens.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from runtime.generate import FinishReason
from runtime.sampling import SamplingOptions
from runtime.server.errors import ApiError
from runtime.server.limits import MESSAGE_COUNT_LIMIT, STOP_COUNT_LIMIT, STOP_LENGTH_LIMIT

COMPLETION_TOKENS_DEFAULT = 16
INTEGER_LIMIT = 2**31 - 1
SEED_LIMIT = 2**63 - 1

# Fields of the API that are not offered, with the values that ask for nothing and therefore pass.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
_LABELS = frozenset(
    {"metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier", "user"}
)


def _without_nothing(value: Any) -> Any:
    """Clients echo answers back with every absent field as null or empty; absent they are."""
    if not isinstance(value, dict):
        return value
    return {name: item for name, item in value.items() if item is not None and item != []}


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Model):
    """One piece of a message; text is the only kind."""

    type: Literal["text"]
    text: str


class Message(_Model):
    """One message of a chat. Parts are joined by ``text``."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=MESSAGE_COUNT_LIMIT)]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    @property
    def template_message(self) -> dict[str, str]:
        """As chat templates expect it; ``developer`` is OpenAI's newer word for ``system``."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.text}


class StreamOptions(_Model):
    """``include_usage`` asks for one more event with the token counts. Obfuscation padding is never sent."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_StopText = Annotated[str, Field(min_length=1, max_length=STOP_LENGTH_LIMIT)]
_TokenId = Annotated[int, Field(ge=0, le=INTEGER_LIMIT)]
_TokenCount = Annotated[int, Field(ge=1, le=INTEGER_LIMIT)]


class _Sampled(_Model):
    """What both kinds of completion may ask. The penalty fields beyond OpenAI's are those of ``SamplingOptions``."""

    model: str | None = Field(default=None, max_length=256)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    stop: Annotated[list[_StopText], BeforeValidator(_listed), Field(max_length=STOP_COUNT_LIMIT)] = []
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, le=INTEGER_LIMIT)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, le=10)
    seed: int | None = Field(default=None, ge=0, le=SEED_LIMIT)

    @property
    def sampling(self) -> SamplingOptions:
        return SamplingOptions(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )


class ChatRequest(_Sampled):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[
        list[Annotated[Message, BeforeValidator(_without_nothing)]], Field(min_length=1, max_length=MESSAGE_COUNT_LIMIT)
    ]
    max_tokens: _TokenCount | None = None
    max_completion_tokens: _TokenCount | None = None

    @property
    def tokens_wanted(self) -> int | None:
        """Most tokens to generate, None for as many as fit. The newer field wins, as at OpenAI."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class CompletionRequest(_Sampled):
    """Body of ``POST /v1/completions``: one prompt, as text or as token ids, alone or in a list of one."""

    prompt: str | list[_TokenId] | Annotated[list[str], Field(min_length=1, max_length=1)] | list[list[_TokenId]]
    max_tokens: _TokenCount = COMPLETION_TOKENS_DEFAULT

    @property
    def tokens_wanted(self) -> int | None:
        return self.max_tokens

    @property
    def prompt_text_or_ids(self) -> str | list[int]:
        """The one prompt. Raises ``ApiError`` when a list holds none or several."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return prompt
        if all(isinstance(item, int) for item in prompt) and prompt:
            return [item for item in prompt if isinstance(item, int)]
        if len(prompt) != 1:
            raise ApiError(400, "prompt: exactly one prompt per request", param="prompt", code="invalid_value")
        first = prompt[0]
        if isinstance(first, int) or not first:
            raise ApiError(400, "prompt: it is empty", param="prompt", code="invalid_value")
        return first


_Request = TypeVar("_Request", bound=_Sampled)


def parse_request(kind: type[_Request], document: Any) -> _Request:
    """A validated request. Raises ``ApiError`` 400 naming the first field that is wrong, unknown or not supported."""
    if not isinstance(document, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_type")
    fields: dict[str, Any] = {}
    for name, value in document.items():
        if value is None or name in _LABELS:
            continue
        if name in kind.model_fields:
            fields[name] = value
        elif name not in _UNSUPPORTED:
            raise ApiError(400, f"unknown field {name[:64]!r}", param=name[:64], code="unknown_parameter")
        elif not _asks_nothing(name, value):
            raise ApiError(400, f"{name} is not supported by this server", param=name, code="unsupported_parameter")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _as_api_error(error) from error


def _asks_nothing(name: str, value: Any) -> bool:
    """Equality that keeps booleans and numbers apart: ``n: true`` is not ``n: 1``."""
    return any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in _UNSUPPORTED[name]
    )


def _as_api_error(error: ValidationError) -> ApiError:
    """Names the deepest place that failed; of a union's alternatives that is the one that came nearest."""
    first = max(
        error.errors(include_url=False, include_context=False, include_input=False), key=lambda e: len(e["loc"])
    )
    # Pydantic puts names of types (``list[...]``, ``TextPart``) between the keys of a union; a client knows only keys.
    parts = [str(part) for part in first["loc"] if isinstance(part, int) or (part.islower() and part.isidentifier())]
    parts = [part for part in parts if part not in {"str", "int"}]
    param = ".".join(parts)
    return ApiError(400, f"{param}: {first['msg']}", param=param, code="invalid_value")


@dataclass(frozen=True, slots=True)
class Timings:
    """How a request went. All times count from when its tokens were queued; rates are tokens per second."""

    queue_s: float
    ttft_s: float | None
    prefill_tps: float | None
    decode_tps: float | None
    total_s: float


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts. ``cached_tokens`` of the prompt needed no computation."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    @property
    def document(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Answer:
    """Writes one answer, whole or in pieces, in the form of its route."""

    def __init__(self, model: str, *, chat: bool, include_usage: bool = False) -> None:
        self._chat = chat
        self._include_usage = include_usage
        self._base = {
            "id": ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, finish_reason: FinishReason, usage: Usage, timings: Timings) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        content = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
        return {
            **self._base,
            "object": "chat.completion" if self._chat else "text_completion",
            "choices": [{"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}],
            "usage": usage.document,
            "timings": asdict(timings),
        }

    def opening(self) -> bytes:
        """First event of a stream: a chat names its role, a text completion has nothing to say yet."""
        return self._event({"role": "assistant", "content": ""}) if self._chat else b""

    def piece(self, text: str) -> bytes:
        """One event with some text."""
        return self._event({"content": text} if self._chat else text)

    def closing(self, finish_reason: FinishReason, usage: Usage, timings: Timings) -> bytes:
        """Last events: why it ended, the counts when they were asked for, and the end mark."""
        extra = {"timings": asdict(timings)}
        last = self._event({} if self._chat else "", finish_reason, extra)
        if self._include_usage:
            document = {**self._base, "object": self._piece_object, "choices": [], "usage": usage.document, **extra}
            last += server_sent_event(document)
        return last + b"data: [DONE]\n\n"

    @property
    def _piece_object(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _event(
        self,
        content: dict[str, str] | str,
        finish_reason: FinishReason | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> bytes:
        key = "delta" if self._chat else "text"
        choice = {"index": 0, key: content, "logprobs": None, "finish_reason": finish_reason}
        usage = {"usage": None} if self._include_usage else {}
        document = {**self._base, "object": self._piece_object, "choices": [choice], **usage, **(extra or {})}
        return server_sent_event(document)


def server_sent_event(document: Mapping[str, Any]) -> bytes:
    """One ``data:`` event; JSON never contains a raw line break, so one line is enough."""
    return b"data: " + json.dumps(document, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


def model_document(name: str, created: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of ``/v1/models``."""
    return {"id": name, "object": "model", "created": created, "owned_by": "edgelm", **facts}
