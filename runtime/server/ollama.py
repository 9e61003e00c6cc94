"""Ollama's vocabulary: what its requests may say and how its answers are written, as lines of JSON.

Pure data in, pure data out. As with OpenAI's words, what this server cannot honour is refused by name. ``keep_alive``
and ``think: false`` pass without effect: a model is never unloaded between requests here, and never thinks apart.
Defaults of the options are Ollama's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Annotated, Any, ClassVar, Literal

import pydantic_core
from pydantic import Field

from runtime.generate import LOGPROBS_LIMIT, TokenEvent
from runtime.sampling import SamplingOptions
from runtime.server.errors import ApiError
from runtime.server.limits import INPUT_COUNT_LIMIT, MESSAGE_COUNT_LIMIT, TOOL_COUNT_LIMIT
from runtime.server.openai import (
    INTEGER_LIMIT,
    NAME_LENGTH_LIMIT,
    SEED_LIMIT,
    Body,
    EchoedModel,
    ModelName,
    StopTexts,
    StrictModel,
    ToolEntry,
)
from runtime.server.prepare import ANY_OBJECT
from runtime.server.replies import ChoiceReader, Timings, Usage, logprob_entry
from runtime.tools import Tool, ToolCall, ToolCallReader

SHIFTED_CONTEXTS = 10
VERSION_SPOKEN = "0.12.0"  # of Ollama's API; clients ask for it before they use newer routes


class Options(EchoedModel):
    """``options``: sampling and limits. What is not listed here is refused by name."""

    num_ctx: int | None = Field(default=None, ge=1, le=INTEGER_LIMIT)
    num_predict: int = Field(default=-1, ge=-2, le=INTEGER_LIMIT)
    temperature: float = Field(default=0.8, ge=0, le=100)
    top_k: int = Field(default=40, ge=0, le=INTEGER_LIMIT)
    top_p: float = Field(default=0.9, gt=0, le=1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repeat_penalty: float = Field(default=1.1, ge=0.01, le=10)
    repeat_last_n: int = Field(default=64, ge=-1, le=INTEGER_LIMIT)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=0, le=SEED_LIMIT)
    stop: StopTexts = Field(default=[])

    def sampling(self, context: int) -> SamplingOptions:
        """As the sampler wants it. Raises ``ApiError`` when a larger context is asked for than there is."""
        if self.num_ctx is not None and self.num_ctx > context:
            message = f"options.num_ctx: {self.num_ctx} is more than the {context} tokens that this server keeps"
            raise ApiError(400, message, param="options.num_ctx", code="invalid_value")
        return SamplingOptions(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repeat_penalty,
            repetition_window=context if self.repeat_last_n < 0 else self.repeat_last_n,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
        )


class _OllamaBody(Body):
    """What both kinds of generation share. Ollama streams unless told otherwise."""

    labels: ClassVar[frozenset[str]] = frozenset({"keep_alive"})
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "context": ([],),
        "height": (),
        "images": ([],),
        "steps": (),
        "suffix": ("",),
        "template": ("",),
        "think": (False,),
        "width": (),
    }

    model: ModelName
    stream: bool = True
    options: Options = Options()
    format: Literal["", "json"] | dict[str, Any] = ""
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=LOGPROBS_LIMIT)
    shift: bool = False

    def tokens_wanted(self, context: int) -> int | None:
        """Most tokens to generate, None for as many as fit; Ollama's -1 and -2 both mean: until the model ends.

        With ``shift`` a context never ends, so the bound is Ollama's own: ten contexts.
        """
        if self.options.num_predict > 0:
            return self.options.num_predict
        return SHIFTED_CONTEXTS * context if self.shift else None

    @property
    def schema_wanted(self) -> dict[str, Any] | None:
        """The JSON schema that the answer is held to, None for any text."""
        if isinstance(self.format, dict):
            return self.format
        return ANY_OBJECT if self.format == "json" else None

    @property
    def logprobs_wanted(self) -> int | None:
        """Likeliest tokens to tell of, None when no probability was asked for."""
        return self.top_logprobs if self.logprobs else None


class GenerateBody(_OllamaBody):
    """Body of ``POST /api/generate``. No prompt asks whether the model is loaded; ``raw`` leaves out the template.

    One prompt has no turns that ``truncate`` could leave out.
    """

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = _OllamaBody.unsupported | {"truncate": (False,)}

    prompt: str = ""
    system: str = ""
    raw: bool = False


class OllamaFunction(StrictModel):
    """The function of a call; the arguments are an object here, not a text."""

    name: str = Field(min_length=1, max_length=NAME_LENGTH_LIMIT)
    arguments: dict[str, Any]


class OllamaToolCall(StrictModel):
    """A call that the assistant made earlier."""

    function: OllamaFunction


class OllamaMessage(EchoedModel):
    """One message. Images and thoughts are refused; ``tool_name`` says whose result a ``tool`` message is."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    tool_calls: list[OllamaToolCall] = Field(default=[], max_length=TOOL_COUNT_LIMIT)
    tool_name: str | None = Field(default=None, max_length=NAME_LENGTH_LIMIT)

    @property
    def template_message(self) -> dict[str, Any]:
        """As chat templates expect it."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = [
                {"type": "function", "function": call.function.model_dump()} for call in self.tool_calls
            ]
        if self.tool_name is not None:
            message["name"] = self.tool_name
        return message

    @property
    def characters(self) -> int:
        """Size of everything in it that reaches the model."""
        return len(self.content) + sum(len(str(call.function)) for call in self.tool_calls)


class OllamaTool(EchoedModel, ToolEntry):
    """One entry of ``tools``."""


class ChatBody(_OllamaBody):
    """Body of ``POST /api/chat``."""

    truncate: bool = False
    messages: list[OllamaMessage] = Field(default=[], max_length=MESSAGE_COUNT_LIMIT)
    tools: list[OllamaTool] = Field(default=[], max_length=TOOL_COUNT_LIMIT)

    @property
    def offered_tools(self) -> list[Tool]:
        functions = [entry.function for entry in self.tools]
        return [Tool(function.name, function.description, function.parameters) for function in functions]


class ShowBody(Body):
    """Body of ``POST /api/show``. ``name`` is the older word for ``model``."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"verbose": (False,)}

    model: ModelName | None = None
    name: ModelName | None = None


class EmbedBody(Body):
    """Body of ``POST /api/embed``. As with Ollama, a text that is too long is cut unless ``truncate`` is false."""

    labels: ClassVar[frozenset[str]] = frozenset({"keep_alive"})
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"options": ({},)}

    model: ModelName
    input: str | Annotated[list[str], Field(min_length=1, max_length=INPUT_COUNT_LIMIT)]
    truncate: bool = True
    dimensions: int | None = Field(default=None, ge=1, le=INTEGER_LIMIT)

    @property
    def texts(self) -> list[str]:
        """All of them, also when there is one."""
        return [self.input] if isinstance(self.input, str) else self.input


@dataclass(frozen=True, slots=True)
class OllamaForm:
    """What an answer needs to know beyond the events."""

    model: str
    chat: bool
    load_s: float
    calls: Callable[[], ToolCallReader] | None = None


class OllamaAnswer:
    """Writes Ollama's answer to one generation, whole or line by line. Ollama knows no second choice."""

    media_type = "application/x-ndjson"

    def __init__(self, form: OllamaForm) -> None:
        self._form = form
        self._reader = ChoiceReader(form.calls)
        self._reason = "stop"

    def whole(self, choices: Sequence[Sequence[TokenEvent]], usage: Usage, timings: Timings) -> dict[str, Any]:
        events = choices[0]
        parts = [part for event in events for part in self._reader.read(event)]
        self._reason = events[-1].finish_reason or "stop"
        text = "".join(part for part in parts if isinstance(part, str))
        calls = [part for part in parts if isinstance(part, ToolCall)]
        return self._line(text, calls, events) | self._end(usage, timings)

    def pieces(self, choice: int, events: Sequence[TokenEvent]) -> bytes:
        data = b""
        for event in events:
            parts = self._reader.read(event)
            text = "".join(part for part in parts if isinstance(part, str))
            calls = [part for part in parts if isinstance(part, ToolCall)]
            if text or calls or event.logprobs is not None:
                data += _json_line(self._line(text, calls, [event]))
            self._reason = event.finish_reason or self._reason
        return data

    def closing(self, usage: Usage, timings: Timings) -> bytes:
        return _json_line(self._line("", [], []) | self._end(usage, timings))

    def failure(self, error: ApiError) -> bytes:
        return _json_line(error_document(error))

    def _line(self, text: str, calls: Sequence[ToolCall], events: Sequence[TokenEvent]) -> dict[str, Any]:
        line: dict[str, Any] = {"model": self._form.model, "created_at": timestamp()}
        if self._form.chat:
            line["message"] = {"role": "assistant", "content": text}
            if calls:
                line["message"]["tool_calls"] = [
                    {"function": {"name": call.name, "arguments": pydantic_core.from_json(call.arguments)}}
                    for call in calls
                ]
        else:
            line["response"] = text
        known = [logprob_entry(event.logprobs) for event in events if event.logprobs is not None]
        if known:
            line["logprobs"] = known
        return line | {"done": False}

    def _end(self, usage: Usage, timings: Timings) -> dict[str, Any]:
        """Durations are nanoseconds. Decoding begins with the first token, which belongs to the prompt's."""
        first_s = timings.ttft_s or timings.total_s
        return {
            "done": True,
            "done_reason": self._reason,
            "total_duration": _nanoseconds(timings.total_s),
            "load_duration": _nanoseconds(self._form.load_s),
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": _nanoseconds(first_s - timings.queue_s),
            "eval_count": usage.completion_tokens,
            "eval_duration": _nanoseconds(timings.total_s - first_s),
        }


def loaded_document(model: str) -> dict[str, Any]:
    """The answer to a generation without a prompt: the model is there."""
    return {"model": model, "created_at": timestamp(), "response": "", "done": True, "done_reason": "load"}


def vectors_document(model: str, vectors: list[list[float]], tokens: int, elapsed_s: float) -> dict[str, Any]:
    """The answer to ``/api/embed``. The encoder is always loaded."""
    counts = {"total_duration": _nanoseconds(elapsed_s), "load_duration": 0, "prompt_eval_count": tokens}
    return {"model": model, "embeddings": vectors, **counts}


def error_document(error: ApiError) -> dict[str, Any]:
    """A failure as Ollama's clients expect it; the message names the field."""
    return {"error": error.message}


def timestamp(seconds: float | None = None) -> str:
    """A time (None: now) as Ollama writes it."""
    moment = datetime.now(timezone.utc) if seconds is None else datetime.fromtimestamp(seconds, timezone.utc)
    return moment.isoformat().replace("+00:00", "Z")


def _nanoseconds(seconds: float) -> int:
    return max(0, round(seconds * 1e9))


def _json_line(document: dict[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, allow_nan=False).encode() + b"\n"
