"""``truncation``, ``truncate`` and ``shift`` over HTTP: conversations and answers longer than the context."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fake_engine import FakeEngine, FakeTokenizer, ShiftingEngine
from live_server import TOOL_TEMPLATE, LiveServer, fake_model, live_server

from runtime.server.ollama import SHIFTED_CONTEXTS

CONTEXT = 512
SYSTEM = {"role": "system", "content": "Answer briefly."}


@pytest.fixture(scope="module", params=[FakeEngine, ShiftingEngine])
def server(request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    with live_server(fake_model(request.param(context=CONTEXT), source=TOOL_TEMPLATE)) as running:
        yield running


def turns(count: int, length: int = 40) -> list[dict[str, Any]]:
    """So many questions with answers, and a last question; each message tells its place."""
    roles = ["user", "assistant"] * count + ["user"]
    return [{"role": role, "content": f"{at:03}".ljust(length, "x")} for at, role in enumerate(roles)]


def chat(server: LiveServer, messages: list[dict[str, Any]], **more: Any) -> tuple[int, dict[str, Any]]:
    return server.post("/v1/chat/completions", {"messages": messages, "temperature": 0, **more})


def prompt_of(server: LiveServer) -> str:
    """The text of the prompt that was computed last, as far as it is in its sequence."""
    engine: Any = server.worker
    return FakeTokenizer().decode(engine._engine.held[0], special=True)


def test_a_conversation_that_does_not_fit_is_refused(server: LiveServer) -> None:
    for more in ({}, {"truncation": "disabled"}, {"truncation": None}):
        status, document = chat(server, turns(10), **more)
        assert (status, document["error"]["code"]) == (400, "context_length_exceeded")
        assert document["error"]["param"] == "messages"


def test_other_words_are_refused(server: LiveServer) -> None:
    status, document = chat(server, turns(1), truncation="always")
    assert (status, document["error"]["param"]) == (400, "truncation")


def test_the_oldest_turns_are_left_out_as_a_whole(server: LiveServer) -> None:
    messages = [SYSTEM, *turns(10)]
    status, document = chat(server, messages, truncation="auto", max_tokens=5)
    assert status == 200
    dropped = document["timings"]["dropped_messages"]
    assert dropped % 2 == 0
    assert 0 < dropped < 20
    kept = [SYSTEM, *messages[1 + dropped :]]
    assert chat(server, kept, max_tokens=5)[1]["usage"]["prompt_tokens"] == document["usage"]["prompt_tokens"]
    text = prompt_of(server)
    assert text.startswith("<|im_start|>system\nAnswer briefly.<|im_end|>\n<|im_start|>user\n")
    assert [message["content"] in text for message in messages] == [message in kept for message in messages]


def test_what_fits_is_left_alone(server: LiveServer) -> None:
    messages = [SYSTEM, *turns(2)]
    status, document = chat(server, messages, truncation="auto", max_tokens=5)
    assert (status, document["timings"]["dropped_messages"]) == (200, 0)
    assert document["usage"]["prompt_tokens"] == chat(server, messages, max_tokens=5)[1]["usage"]["prompt_tokens"]


def test_room_is_left_for_the_answer(server: LiveServer) -> None:
    for length in range(30, 120, 7):
        status, document = chat(server, turns(10, length), truncation="auto")
        assert status == 200
        usage = document["usage"]
        assert usage["prompt_tokens"] <= CONTEXT - CONTEXT // 4
        assert usage["completion_tokens"] == CONTEXT - usage["prompt_tokens"] + 1
        assert document["timings"]["shifted_tokens"] == 0


def test_the_next_turns_cut_at_the_same_place(server: LiveServer) -> None:
    """So that they find in the cache what the turn before computed."""
    cached = [
        chat(server, [SYSTEM, *turns(count, 5)], truncation="auto", max_tokens=1)[1]["usage"]["prompt_tokens_details"]
        for count in range(5, 55)
    ]
    found = [one["cached_tokens"] > 200 for one in cached]
    assert sum(found) > 0.7 * len(found)


def test_a_result_is_not_left_without_its_call(server: LiveServer) -> None:
    call = {"id": "abc", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turn = [
        {"role": "user", "content": "question".ljust(60, "x")},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abc", "content": "result"},
        {"role": "assistant", "content": "answer"},
    ]
    status, document = chat(server, [*turn * 6, *turn[:3]], truncation="auto", max_tokens=3)
    assert status == 200
    assert document["timings"]["dropped_messages"] % 4 == 0
    assert document["timings"]["dropped_messages"] > 0
    assert prompt_of(server).startswith("<|im_start|>user\nquestion")


def test_a_newest_turn_that_fills_the_context_alone_is_refused(server: LiveServer) -> None:
    for length in (600, 20_000):
        status, document = chat(server, [*turns(3), {"role": "user", "content": "x" * length}], truncation="auto")
        assert (status, document["error"]["code"]) == (400, "context_length_exceeded")
        assert document["error"]["param"] == "messages"


def test_a_conversation_of_any_length_is_cut_without_tokenizing_all_of_it(server: LiveServer) -> None:
    status, document = chat(server, turns(500, 900)[:-1] + turns(0), truncation="auto", max_tokens=3)
    assert status == 200
    assert document["timings"]["dropped_messages"] == 1000


def test_an_answer_goes_on_in_a_full_context(server: LiveServer) -> None:
    with server.client() as client:
        pieces = list(
            client.chat.completions.create(
                model="fake",
                messages=[{"role": "system", "content": "s" * 200}, {"role": "user", "content": "Hello"}],
                max_tokens=1500,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"truncation": "auto"},
            )
        )
    usage = pieces[-1].usage
    assert usage is not None
    assert usage.completion_tokens == 1500
    assert sum(len(piece.choices[0].delta.content or "") for piece in pieces if piece.choices) == 1500
    assert (pieces[-1].model_extra or {})["timings"]["shifted_tokens"] > 1000
    # What was kept is the system prompt, up to where the user's words begin.
    assert prompt_of(server).startswith(f"<|im_start|>system\n{'s' * 200}<|im_end|>\n<|im_start|>user\n")
    assert "Hello" not in prompt_of(server)


def test_a_text_goes_on_too(server: LiveServer) -> None:
    wanted = {"prompt": "x" * 500, "max_tokens": 700, "temperature": 0}
    _, short = server.post("/v1/completions", wanted)
    status, document = server.post("/v1/completions", wanted | {"truncation": "auto"})
    assert status == 200
    assert (short["usage"]["completion_tokens"], document["usage"]["completion_tokens"]) == (13, 700)
    assert document["choices"][0]["text"].startswith(short["choices"][0]["text"])
    status, document = server.post("/v1/completions", {"prompt": "x" * 513, "truncation": "auto"})
    assert (status, document["error"]["param"]) == (400, "prompt")  # a text has no turns


def test_without_max_tokens_an_answer_ends_with_the_context(server: LiveServer) -> None:
    status, document = chat(server, turns(1), truncation="auto")
    assert status == 200
    assert document["usage"]["total_tokens"] == CONTEXT + 1


def ollama(server: LiveServer, path: str, document: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    return server.post(path, {"model": "fake", "stream": False, **document})


def test_ollamas_words_for_it(server: LiveServer) -> None:
    few = {"options": {"num_predict": 600, "temperature": 0}}
    status, refused = ollama(server, "/api/chat", {"messages": turns(10), **few})
    assert (status, "context" in refused["error"]) == (400, True)
    status, document = ollama(server, "/api/chat", {"messages": turns(10), "truncate": True, **few})
    assert status == 200
    assert document["eval_count"] == CONTEXT - document["prompt_eval_count"] + 1
    both = {"messages": turns(10), "truncate": True, "shift": True, **few}
    assert ollama(server, "/api/chat", both)[1]["eval_count"] == 600
    status, document = ollama(server, "/api/generate", {"prompt": "Hello", "shift": True, **few})
    assert (status, document["eval_count"]) == (200, 600)
    assert ollama(server, "/api/generate", {"prompt": "Hello", "truncate": False, **few})[0] == 200
    status, document = ollama(server, "/api/generate", {"prompt": "Hello", "truncate": True, **few})
    assert (status, "truncate" in document["error"]) == (400, True)


def test_without_a_bound_a_shifting_answer_has_ollamas(server: LiveServer) -> None:
    wanted = {"prompt": "Hello", "shift": True, "raw": True, "options": {"temperature": 0}}
    assert ollama(server, "/api/generate", wanted)[1]["eval_count"] == SHIFTED_CONTEXTS * CONTEXT


def test_the_document_knows_the_words(server: LiveServer) -> None:
    document = json.loads(server.request("GET", "/openapi.json")[2])
    known = json.dumps(document)
    assert '"truncation"' in known
    assert '"shift"' in known
    assert '"dropped_messages"' in known
