"""From a submitted generation to an HTTP answer, whole or streamed, and back to a cancellation when the client leaves.

Bridges the backend's thread and the event loop. Knows nothing of requests' contents.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from runtime.generate import FinishReason, GenerationRequest, TokenEvent
from runtime.server.errors import ApiError
from runtime.server.logs import log_event
from runtime.server.replies import Timings, Usage, Writer
from runtime.server.scheduler import Failure, Job, JobEvent
from runtime.server.worker import Backend, NotReadyError, QueueFullError


class ClientLeftError(Exception):
    """There is nobody left to answer."""


def unavailable(error: NotReadyError) -> ApiError:
    """503 for an engine that is loading, dead or stopping; a client may ask again soon."""
    return ApiError(503, error.message, code="engine_unavailable", headers={"Retry-After": "2"})


@dataclass(slots=True)
class _Choice:
    """One of the answers to a request, as far as it has come."""

    job: Job
    completion_tokens: int = 0
    first: TokenEvent | None = None
    last: TokenEvent | None = None

    def add(self, event: TokenEvent) -> None:
        self.first = self.first or event
        self.last = event
        self.completion_tokens += event.token is not None

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.last.finish_reason if self.last else None


class Generation:
    """One request's choices as the event loop sees them: their events, then their counts and timings."""

    def __init__(self, backend: Backend, requests: Sequence[GenerationRequest], *, dropped_messages: int = 0) -> None:
        """Submit ``requests``, which have the same prompt, of which ``dropped_messages`` were left out. Raises
        ``ApiError`` 429 or 503 when the backend takes not all of them."""
        self._backend = backend
        self._dropped_messages = dropped_messages
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._arrived: list[tuple[int, JobEvent]] = []
        self._waiting: asyncio.Future[None] | None = None
        self._prompt_tokens = len(requests[0].prompt)
        self._choices: list[_Choice] = []
        try:
            for index, request in enumerate(requests):
                self._choices.append(_Choice(backend.submit(request, partial(self._receive, index))))
        except QueueFullError as error:
            self.cancel()
            headers = {"Retry-After": str(error.retry_after_s)}
            raise ApiError(429, error.message, code="queue_full", headers=headers) from error
        except NotReadyError as error:
            self.cancel()
            raise unavailable(error) from error

    @property
    def choices(self) -> int:
        return len(self._choices)

    def cancel(self) -> None:
        """Free the engine before its next token; harmless when the generation has ended."""
        for choice in self._choices:
            self._backend.cancel(choice.job)

    async def batches(self) -> AsyncIterator[list[tuple[int, list[TokenEvent]]]]:
        """Events as they come, all that are there at once, by choice; the last one of each has a finish reason.

        Raises ``ApiError`` when the engine fails and ``ClientLeftError`` when the generation was cancelled.
        """
        while not self.finished:
            if not self._arrived:
                self._waiting = self._loop.create_future()
                await self._waiting
            arrived, self._arrived = self._arrived, []
            tokens: dict[int, list[TokenEvent]] = {}
            for index, event in arrived:
                if isinstance(event, TokenEvent):
                    self._choices[index].add(event)
                    tokens.setdefault(index, []).append(event)
            if any(choice.finish_reason == "cancelled" for choice in self._choices):
                raise ClientLeftError
            if tokens:
                yield list(tokens.items())
            for _, failure in arrived:
                if isinstance(failure, Failure):
                    raise _as_api_error(failure)

    @property
    def finished(self) -> bool:
        """Whether every choice has come to its end."""
        return all(choice.finish_reason is not None for choice in self._choices)

    @property
    def usage(self) -> Usage:
        first = self._choices[0].first
        completion_tokens = sum(choice.completion_tokens for choice in self._choices)
        return Usage(self._prompt_tokens, completion_tokens, first.cached_tokens if first else 0)

    @property
    def timings(self) -> Timings:
        job = self._choices[0].job
        pairs = [(choice.first, choice.last) for choice in self._choices]
        begun = [(first, last) for first, last in pairs if first is not None and last is not None]
        if not begun:
            total_s = time.monotonic() - job.submitted_s
            return Timings(job.queue_s, None, None, None, total_s, dropped_messages=self._dropped_messages)
        first = min((first for first, _ in begun), key=lambda event: event.elapsed_s)
        total_s = max(last.elapsed_s for _, last in begun)
        computed = self._prompt_tokens - first.cached_tokens
        steps = sum(last.number for _, last in begun)
        decode_s = total_s - first.elapsed_s
        return Timings(
            queue_s=job.queue_s,
            ttft_s=first.elapsed_s,
            prefill_tps=computed / first.prefill_s if first.prefill_s else None,
            decode_tps=steps / decode_s if decode_s > 0 else None,
            total_s=total_s,
            drafted_tokens=sum(last.drafted_tokens for _, last in begun),
            accepted_tokens=sum(last.accepted_tokens for _, last in begun),
            dropped_messages=self._dropped_messages,
            shifted_tokens=sum(last.shifted_tokens for _, last in begun),
        )

    @property
    def facts(self) -> dict[str, object]:
        """Counts and timings for the log; no words."""
        usage, timings = self.usage, self.timings
        facts: dict[str, object] = {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "finish_reason": self._choices[0].finish_reason,
            "queue_s": round(timings.queue_s, 6),
            "ttft_s": None if timings.ttft_s is None else round(timings.ttft_s, 6),
        }
        return facts | ({"choices": self.choices} if self.choices > 1 else {})

    def _receive(self, index: int, event: JobEvent) -> None:
        """Called in any thread; a backend that reads in the event loop saves waking it."""
        if threading.get_ident() == self._thread:
            self._arrive(index, event)
            return
        try:
            self._loop.call_soon_threadsafe(self._arrive, index, event)
        except RuntimeError:
            # The loop was closed after the drain deadline: nobody listens any more.
            log_event("event after shutdown")

    def _arrive(self, index: int, event: JobEvent) -> None:
        self._arrived.append((index, event))
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


def _as_api_error(failure: Failure) -> ApiError:
    if failure.by_request:
        return ApiError(400, failure.message, code="constraint_failed")
    return ApiError(503, failure.message, code="engine_failed")


@dataclass(slots=True)
class GenerationResponse:
    """ASGI response for one generation. A client that leaves at any time cancels it.

    ``facts`` gets what the log tells of the generation.
    """

    generation: Generation
    writer: Writer
    stream: bool
    facts: dict[str, object]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(self._cancel_when_gone(receive))
        try:
            await (self._send_stream(send) if self.stream else self._send_whole(scope, receive, send))
        except ClientLeftError:
            pass  # there is nobody to answer; the log tells it
        finally:
            watch.cancel()
            self.generation.cancel()
            self.facts.update(self.generation.facts)

    async def _cancel_when_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.generation.cancel()

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        choices: list[list[TokenEvent]] = [[] for _ in range(self.generation.choices)]
        async for batch in self.generation.batches():
            for index, events in batch:
                choices[index].extend(events)
        document = self.writer.whole(choices, self.generation.usage, self.generation.timings)
        await JSONResponse(document)(scope, receive, send)

    async def _send_stream(self, send: Send) -> None:
        """The status goes out with the first token, so that a failure before it still has a status of its own."""
        started = False
        headers = [(b"content-type", self.writer.media_type.encode()), (b"x-accel-buffering", b"no")]
        try:
            async for batch in self.generation.batches():
                if not started:
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                started = True
                data = b"".join(self.writer.pieces(index, events) for index, events in batch)
                ended = self.generation.finished
                if ended:
                    data += self.writer.closing(self.generation.usage, self.generation.timings)
                if data:
                    await send({"type": "http.response.body", "body": data, "more_body": not ended})
        except ApiError as error:
            if not started:
                raise
            await send({"type": "http.response.body", "body": self.writer.failure(error), "more_body": False})
