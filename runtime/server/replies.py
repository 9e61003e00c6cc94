"""How answers are written in OpenAI's words: whole or as events, with choices, tool calls and probabilities.

Token events in, bytes and documents out. Knows the shape of answers, not HTTP, engines or where events come from.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from runtime.generate import LikelyToken, TokenEvent, TokenLogprobs
from runtime.server.errors import ApiError
from runtime.tools import ToolCall, ToolCallReader

_LEAST_LOGPROB = -9999.0  # OpenAI's word for "practically impossible"; JSON has no infinity


@dataclass(frozen=True, slots=True)
class Timings:
    """How a request went. All times count from when its tokens were queued; rates are tokens per second.
    ``drafted_tokens`` are the guesses of speculative decoding, ``accepted_tokens`` those of them that were right.
    ``dropped_messages`` of the conversation were left out, and ``shifted_tokens`` forgotten while answering, because
    the context was full."""

    queue_s: float
    ttft_s: float | None
    prefill_tps: float | None
    decode_tps: float | None
    total_s: float
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    dropped_messages: int = 0
    shifted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts. The prompt counts once, however many choices; ``cached_tokens`` of it needed no computation."""

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


class Writer(Protocol):
    """Writes one answer in the words of one API. ``choice`` counts from 0."""

    media_type: str

    def whole(self, choices: Sequence[Sequence[TokenEvent]], usage: Usage, timings: Timings) -> dict[str, Any]:
        """The body of an answer that is not streamed, from all events of every choice."""
        ...

    def pieces(self, choice: int, events: Sequence[TokenEvent]) -> bytes:
        """What some consecutive events of a choice add to a stream; the last event of a choice ends it."""
        ...

    def closing(self, usage: Usage, timings: Timings) -> bytes:
        """What a stream ends with."""
        ...

    def failure(self, error: ApiError) -> bytes:
        """The end of a stream that failed."""
        ...


class ChoiceReader:
    """Separates the text of one choice from its tool calls; ``calls`` None looks for none."""

    def __init__(self, calls: Callable[[], ToolCallReader] | None) -> None:
        self._reader = calls() if calls is not None else None
        self.called = False

    def read(self, event: TokenEvent) -> list[str | ToolCall]:
        """What is certain with ``event``; after the last one everything is."""
        if self._reader is None:
            return [event.text] if event.text else []
        parts = self._reader.push(event.text)
        if event.finish_reason is not None:
            parts += self._reader.finish()
        self.called = self.called or any(isinstance(part, ToolCall) for part in parts)
        return parts


@dataclass(frozen=True, slots=True)
class Form:
    """What an answer needs to know beyond the events. ``echo`` is the prompt's text, repeated in front of a text
    completion."""

    model: str
    chat: bool
    include_usage: bool = False
    echo: str = ""
    calls: Callable[[], ToolCallReader] | None = None


class Answer:
    """OpenAI's answer to a chat or a text completion."""

    media_type = "text/event-stream; charset=utf-8"

    def __init__(self, form: Form) -> None:
        self._form = form
        self._readers: dict[int, ChoiceReader] = {}
        self._call_counts: dict[int, int] = {}
        self._offsets: dict[int, int] = {}
        self._around: dict[int, tuple[bytes, bytes]] = {}
        self._last: dict[str, Any] = {}  # the end of the choice that ended last: the last of all carries timings
        self._base = {
            "id": ("chatcmpl-" if form.chat else "cmpl-") + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": form.model,
        }

    def whole(self, choices: Sequence[Sequence[TokenEvent]], usage: Usage, timings: Timings) -> dict[str, Any]:
        return {
            **self._base,
            "object": "chat.completion" if self._form.chat else "text_completion",
            "choices": [self._choice(index, events) for index, events in enumerate(choices)],
            "usage": usage.document,
            "timings": asdict(timings),
        }

    def _choice(self, index: int, events: Sequence[TokenEvent]) -> dict[str, Any]:
        reader = self._reader(index)
        parts = [part for event in events for part in reader.read(event)]
        text = self._form.echo + "".join(part for part in parts if isinstance(part, str))
        content: dict[str, Any] = {"text": text}
        if self._form.chat:
            calls = [self._call(index, part) for part in parts if isinstance(part, ToolCall)]
            message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
            if calls:
                message["tool_calls"] = [{name: call[name] for name in ("id", "type", "function")} for call in calls]
            content = {"message": message}
        reason = self._finish_reason(index, events[-1])
        return {"index": index, **content, "logprobs": self._logprobs(index, events), "finish_reason": reason}

    def pieces(self, choice: int, events: Sequence[TokenEvent]) -> bytes:
        data = server_sent_event(self._last) if self._last else b""
        self._last = {}
        if choice not in self._readers:
            first = {"role": "assistant", "content": ""} if self._form.chat else self._form.echo
            data += server_sent_event(self._piece(choice, first)) if first else b""
        reader = self._reader(choice)
        for event in events:
            parts = reader.read(event)
            logprobs = None if event.logprobs is None else self._logprobs(choice, [event])
            if logprobs is not None and not any(isinstance(part, str) for part in parts):
                parts = ["", *parts]  # a token without text of its own still has a probability
            for part in parts:
                if logprobs is None and isinstance(part, str):
                    data += self._text_piece(choice, part)
                    continue
                data += server_sent_event(self._piece(choice, self._delta(choice, part), logprobs=logprobs))
                logprobs = None
            if event.finish_reason is not None:
                self._last = self._piece(choice, {} if self._form.chat else "", self._finish_reason(choice, event))
        return data

    def _text_piece(self, choice: int, text: str) -> bytes:
        """What most pieces are: all that differs from one to the next is the text, so the rest is written once."""
        around = self._around.get(choice)
        if around is None:
            mark = uuid.uuid4().hex
            before, _, behind = server_sent_event(self._piece(choice, self._delta(choice, mark))).partition(
                f'"{mark}"'.encode()
            )
            around = self._around[choice] = before, behind
        return around[0] + json.dumps(text, ensure_ascii=False).encode() + around[1]

    def closing(self, usage: Usage, timings: Timings) -> bytes:
        """The end of the last choice with timings, the counts when they were asked for, and the end mark."""
        extra: dict[str, Any] = {"timings": asdict(timings)}
        data = server_sent_event(self._last | extra)
        if self._form.include_usage:
            document = {**self._base, "object": self._piece_object, "choices": [], "usage": usage.document}
            data += server_sent_event(document | extra)
        return data + b"data: [DONE]\n\n"

    def failure(self, error: ApiError) -> bytes:
        return server_sent_event(error.document)

    @property
    def _piece_object(self) -> str:
        return "chat.completion.chunk" if self._form.chat else "text_completion"

    def _reader(self, choice: int) -> ChoiceReader:
        return self._readers.setdefault(choice, ChoiceReader(self._form.calls))

    def _finish_reason(self, choice: int, event: TokenEvent) -> str | None:
        return "tool_calls" if self._reader(choice).called else event.finish_reason

    def _call(self, choice: int, call: ToolCall) -> dict[str, Any]:
        """A call as OpenAI writes it. Nine letters and digits, since Mistral's templates take no other id back."""
        index = self._call_counts.get(choice, 0)
        self._call_counts[choice] = index + 1
        function = {"name": call.name, "arguments": call.arguments}
        return {"index": index, "id": uuid.uuid4().hex[:9], "type": "function", "function": function}

    def _delta(self, choice: int, part: str | ToolCall) -> dict[str, Any] | str:
        if isinstance(part, ToolCall):
            return {"tool_calls": [self._call(choice, part)]}
        return {"content": part} if self._form.chat else part

    def _logprobs(self, choice: int, events: Sequence[TokenEvent]) -> dict[str, Any] | None:
        """The probabilities that some events carry, None when they carry none."""
        entries = [logprob_entry(event.logprobs) for event in events if event.logprobs is not None]
        if not entries:
            return None
        if self._form.chat:
            return {"content": entries, "refusal": None}
        offsets = [self._offsets.get(choice, 0)]
        for entry in entries:
            offsets.append(offsets[-1] + len(entry["token"]))
        self._offsets[choice] = offsets.pop()
        top: list[dict[str, float]] = []
        for entry in entries:
            ranked = {_unique_text(other): other["logprob"] for other in reversed(entry["top_logprobs"])}
            top.append(dict(reversed(ranked.items())))  # of equal texts (special tokens have none) the likeliest stays
        return {
            "tokens": [_unique_text(entry) for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": top if any(top) else None,
            "text_offset": offsets,
        }

    def _piece(
        self,
        choice: int,
        content: dict[str, Any] | str,
        finish_reason: str | None = None,
        *,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        key = "delta" if self._form.chat else "text"
        document = {"index": choice, key: content, "logprobs": logprobs, "finish_reason": finish_reason}
        usage = {"usage": None} if self._form.include_usage else {}
        return {**self._base, "object": self._piece_object, "choices": [document], **usage}


def _unique_text(entry: Mapping[str, Any]) -> str:
    """A token's text; OpenAI's spelling of its bytes where they are no text by themselves."""
    data = bytes(entry["bytes"])
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def logprob_entry(logprobs: TokenLogprobs) -> dict[str, Any]:
    """One token with its probability and those of the likeliest, as OpenAI and Ollama write them."""

    def entry(token: LikelyToken) -> dict[str, Any]:
        text = bytes(token.text).decode("utf-8", "replace")
        return {"token": text, "logprob": max(token.logprob, _LEAST_LOGPROB), "bytes": list(token.text)}

    return {**entry(logprobs.chosen), "top_logprobs": [entry(token) for token in logprobs.top]}


def server_sent_event(document: Mapping[str, Any]) -> bytes:
    """One ``data:`` event; JSON never contains a raw line break, so one line is enough."""
    return b"data: " + json.dumps(document, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


def model_document(name: str, created: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of ``/v1/models``."""
    return {"id": name, "object": "model", "created": created, "owned_by": "edgelm", **facts}
