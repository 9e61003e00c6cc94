"""From a submitted generation to an HTTP answer, whole or streamed, and back to a cancellation when the client leaves.

Bridges the backend's thread and the event loop. Knows nothing of requests' contents.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from runtime.generate import FinishReason, GenerationRequest, TokenEvent
from runtime.server.errors import ApiError
from runtime.server.logs import log_event
from runtime.server.openai import Answer, Timings, Usage, server_sent_event
from runtime.server.scheduler import Failure, JobEvent
from runtime.server.worker import Backend, NotReadyError, QueueFullError

_STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]


class ClientLeftError(Exception):
    """There is nobody left to answer."""


def unavailable(error: NotReadyError) -> ApiError:
    """503 for an engine that is loading, dead or stopping; a client may ask again soon."""
    return ApiError(503, error.message, code="engine_unavailable", headers={"Retry-After": "2"})


class Generation:
    """One generation as the event loop sees it: its events, then its counts and timings."""

    def __init__(self, backend: Backend, request: GenerationRequest) -> None:
        """Submit ``request``. Raises ``ApiError`` 429 or 503 when the backend does not take it."""
        self._backend = backend
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[JobEvent] = asyncio.Queue()
        self._prompt_tokens = len(request.prompt)
        self._completion_tokens = 0
        self._first: TokenEvent | None = None
        self._last: TokenEvent | None = None
        try:
            self._job = backend.submit(request, self._receive)
        except QueueFullError as error:
            headers = {"Retry-After": str(error.retry_after_s)}
            raise ApiError(429, error.message, code="queue_full", headers=headers) from error
        except NotReadyError as error:
            raise unavailable(error) from error

    def cancel(self) -> None:
        """Free the engine before its next token; harmless when the generation has ended."""
        self._backend.cancel(self._job)

    async def batches(self) -> AsyncIterator[list[TokenEvent]]:
        """Events as they come, all that are there at once; the last one has a finish reason.

        Raises ``ApiError`` when the engine fails and ``ClientLeftError`` when the generation was cancelled.
        """
        finished = False
        while not finished:
            arrived = [await self._events.get()]
            while not self._events.empty():
                arrived.append(self._events.get_nowait())
            tokens = [event for event in arrived if isinstance(event, TokenEvent)]
            for event in tokens:
                self._first = self._first or event
                self._last = event
                self._completion_tokens += event.token is not None
            finished = self.finish_reason is not None
            if self.finish_reason == "cancelled":
                raise ClientLeftError
            if tokens:
                yield tokens
            for failure in arrived:
                if isinstance(failure, Failure):
                    raise ApiError(503, failure.message, code="engine_failed")

    @property
    def finish_reason(self) -> FinishReason | None:
        return self._last.finish_reason if self._last else None

    @property
    def usage(self) -> Usage:
        cached_tokens = self._first.cached_tokens if self._first else 0
        return Usage(self._prompt_tokens, self._completion_tokens, cached_tokens)

    @property
    def timings(self) -> Timings:
        first, last = self._first, self._last
        if first is None or last is None:
            return Timings(self._job.queue_s, None, None, None, time.monotonic() - self._job.submitted_s)
        decode_s = last.elapsed_s - first.elapsed_s
        computed = self._prompt_tokens - first.cached_tokens
        return Timings(
            queue_s=self._job.queue_s,
            ttft_s=first.elapsed_s,
            prefill_tps=computed / first.prefill_s if first.prefill_s else None,
            decode_tps=last.index / decode_s if decode_s > 0 else None,
            total_s=last.elapsed_s,
        )

    @property
    def facts(self) -> dict[str, object]:
        """Counts and timings for the log; no words."""
        usage, timings = self.usage, self.timings
        return {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "finish_reason": self.finish_reason,
            "queue_s": round(timings.queue_s, 6),
            "ttft_s": None if timings.ttft_s is None else round(timings.ttft_s, 6),
        }

    def _receive(self, event: JobEvent) -> None:
        """Called in the backend's thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:
            # The loop was closed after the drain deadline: nobody listens any more.
            log_event("event after shutdown")


@dataclass(slots=True)
class GenerationResponse:
    """ASGI response for one generation. A client that leaves at any time cancels it.

    ``facts`` gets what the log tells of the generation.
    """

    generation: Generation
    answer: Answer
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
        texts = [event.text async for batch in self.generation.batches() for event in batch]
        reason = self.generation.finish_reason or "stop"
        document = self.answer.whole("".join(texts), reason, self.generation.usage, self.generation.timings)
        await JSONResponse(document)(scope, receive, send)

    async def _send_stream(self, send: Send) -> None:
        """The status goes out with the first token, so that a failure before it still has a status of its own."""
        started = False
        try:
            async for batch in self.generation.batches():
                data = b"" if started else self.answer.opening()
                if not started:
                    await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
                started = True
                data += b"".join(self.answer.piece(event.text) for event in batch if event.text)
                reason = batch[-1].finish_reason
                if reason is not None:
                    data += self.answer.closing(reason, self.generation.usage, self.generation.timings)
                if data:
                    await send({"type": "http.response.body", "body": data, "more_body": reason is None})
        except ApiError as error:
            if not started:
                raise
            await send({"type": "http.response.body", "body": server_sent_event(error.document), "more_body": False})
