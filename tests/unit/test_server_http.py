"""The server as its clients meet it: the official ``openai`` client on a real port, over the scripted engine."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from fake_engine import EOS, FakeEngine, FakeTokenizer, wait_until
from live_server import LiveServer, fake_model, live_server

from runtime.generate import GenerationRequest, Session, generate

ANSWER = "Paris – größer als Lyon. 🎉"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server(fake_model(FakeEngine(script=ANSWER, context=512, sequences=2))) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def prompt_length(messages: list[dict[str, str]]) -> int:
    return len(fake_model(FakeEngine()).chat_prompt(messages))


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=QUESTION)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == prompt_length(QUESTION)
    assert answer.usage.completion_tokens == len(ANSWER.encode())
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    timings = answer.model_extra["timings"]
    assert timings["prefill_tps"] > 0
    assert timings["decode_tps"] > 0
    assert 0 < timings["ttft_s"] <= timings["total_s"]


def test_chat_streamed(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="fake", messages=QUESTION, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1] if chunk.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(ANSWER.encode())
    assert chunks[-2].model_extra["timings"]["decode_tps"] > 0


def test_a_stream_is_server_sent_events_to_the_letter(server: LiveServer) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 2, "stream": True})
    status, headers, answer = server.request("POST", "/v1/completions", body)
    assert status == 200
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    events = answer.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") and "\n" not in event for event in events[:-2])


def test_completion_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="fake", prompt="The capital is", max_tokens=5)
    assert whole.choices[0].text == "Paris"
    assert whole.choices[0].finish_reason == "length"
    pieces = client.completions.create(model="fake", prompt="The capital is", max_tokens=5, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == "Paris"


def test_completion_defaults_to_sixteen_tokens(client: openai.OpenAI) -> None:
    assert client.completions.create(model="fake", prompt="x").usage.completion_tokens == 16


def test_completion_of_token_ids(client: openai.OpenAI) -> None:
    ids = FakeTokenizer().encode("The capital is")
    assert client.completions.create(model="fake", prompt=ids, max_tokens=5).usage.prompt_tokens == len(ids)
    with pytest.raises(openai.BadRequestError, match="token 9999 is outside the vocabulary"):
        client.completions.create(model="fake", prompt=[9999])


def test_stop_strings_end_the_text_before_them(client: openai.OpenAI) -> None:
    for stream in (False, True):
        answer = client.chat.completions.create(model="fake", messages=QUESTION, stop=["als", "never"], stream=stream)
        text = (
            "".join(chunk.choices[0].delta.content or "" for chunk in answer)
            if stream
            else answer.choices[0].message.content
        )
        assert text == "Paris – größer "


def test_max_tokens_is_capped_by_the_context() -> None:
    with live_server(fake_model(FakeEngine(context=128))) as server, server.client() as client:
        answer = client.chat.completions.create(model="fake", messages=QUESTION, max_completion_tokens=2**30)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.total_tokens == 129  # the last token is sampled, its place in the cache is not needed


def test_a_prompt_longer_than_the_context_is_refused_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "a" * 600}])
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"


def test_sixty_thousand_parentheses(server: LiveServer) -> None:
    status, answer = server.post("/v1/completions", {"prompt": "(" * 60_000})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").model_extra["context"] == 512


@pytest.mark.parametrize("name", ["gpt-4", "../fake", "fake/../../etc/passwd", "%2e%2e%2fpasswd", "..."])
def test_other_model_names_are_not_found(server: LiveServer, client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model=name, messages=QUESTION)
    assert caught.value.code == "model_not_found"
    status, _, answer = server.request("GET", f"/v1/models/{name}")
    assert status == 404
    assert "error" in json.loads(answer)


def test_a_model_without_a_template_does_not_chat() -> None:
    with live_server(fake_model(FakeEngine(), template=False)) as server:
        status, answer = server.post("/v1/chat/completions", {"messages": QUESTION})
        assert status == 400
        assert "no chat template" in answer["error"]["message"]


def test_unknown_routes_and_methods_are_openai_shaped(server: LiveServer) -> None:
    for method, path, expected in (
        ("GET", "/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/metrics", 405),
    ):
        status, _, answer = server.request(method, path)
        assert status == expected
        assert set(json.loads(answer)["error"]) == {"message", "type", "param", "code"}


def test_parallel_streams_give_the_text_that_they_give_alone() -> None:
    prompts = [f"{'long ' * (7 * index)}prompt {index}" for index in range(6)]
    engine = FakeEngine(context=512)
    alone = [
        "".join(
            event.text
            for event in generate(
                Session(engine), FakeTokenizer(), GenerationRequest(FakeTokenizer().encode(prompt), 40)
            )
        )
        for prompt in prompts
    ]
    # Slow enough that the first three are still answering when the last of them arrives.
    shared = FakeEngine(context=512, sequences=3, step_delay_s=0.02)

    def ask(prompt: str) -> str:
        with server.client() as client:
            stream = client.completions.create(model="fake", prompt=prompt, max_tokens=40, stream=True)
            return "".join(piece.choices[0].text for piece in stream)

    with live_server(fake_model(shared)) as server, ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, prompts)) == alone
    assert max(len(call) for call in shared.calls) == 3  # they really ran together


def test_the_second_turn_of_a_chat_computes_only_what_is_new() -> None:
    engine = FakeEngine(script="Paris", context=512, sequences=2)
    with live_server(fake_model(engine)) as server, server.client() as client:
        client.chat.completions.create(model="fake", messages=QUESTION)
        before = engine.computed_tokens
        more = [*QUESTION, {"role": "assistant", "content": "Paris"}, {"role": "user", "content": "Sure?"}]
        answer = client.chat.completions.create(model="fake", messages=more)
        held = prompt_length(QUESTION) + len("Paris")
        assert answer.usage.prompt_tokens_details.cached_tokens == held
        assert engine.computed_tokens - before == prompt_length(more) - held + len("Paris")


def test_a_client_that_leaves_its_stream_frees_the_engine_within_one_token() -> None:
    engine = FakeEngine(context=4096, step_delay_s=0.02)
    with live_server(fake_model(engine)) as server:
        with server.client() as client:
            stream = client.chat.completions.create(model="fake", messages=QUESTION, stream=True)
            for _, _chunk in zip(range(4), stream, strict=False):
                pass
            calls = engine.forward_calls
            stream.response.close()
        assert wait_until(lambda: server.idle)
        # One call was under way and one more may have begun before the connection's end was noticed.
        assert engine.forward_calls <= calls + 2
        assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 1})[0] == 200


def leave(server: LiveServer, body: dict[str, object]) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("POST", "/v1/completions", json.dumps(body))
    return connection


def test_a_client_that_leaves_a_plain_request_frees_the_engine_within_one_token() -> None:
    engine = FakeEngine(context=4096, step_delay_s=0.02)
    with live_server(fake_model(engine)) as server:
        connection = leave(server, {"prompt": "x", "max_tokens": 4000})
        assert wait_until(lambda: engine.forward_calls > 3)
        calls = engine.forward_calls
        connection.close()
        assert wait_until(lambda: server.idle)
        assert engine.forward_calls <= calls + 2


def test_leaving_while_a_long_prompt_is_computed_interrupts_it() -> None:
    engine = FakeEngine(context=4096)
    started = threading.Event()
    with live_server(fake_model(engine)) as server:
        engine.step_delay_s = 30  # only an interrupt ends it within the test
        engine.on_forward = lambda _: started.set()
        connection = leave(server, {"prompt": "a long prompt", "max_tokens": 4})
        assert started.wait(5)
        connection.close()
        assert wait_until(lambda: server.idle)
        engine.step_delay_s = 0


def test_leaving_the_queue_leaves_it_at_once() -> None:
    engine = FakeEngine(context=4096, step_delay_s=0.01)
    with live_server(fake_model(engine)) as server:
        first = leave(server, {"prompt": "x", "max_tokens": 4000})
        assert wait_until(lambda: server.worker.running == 1)
        second = leave(server, {"prompt": "y", "max_tokens": 4000})
        assert wait_until(lambda: server.worker.queued == 1)
        second.close()
        assert wait_until(lambda: server.worker.queued == 0)
        assert server.worker.running == 1
        first.close()
        assert wait_until(lambda: server.idle)


def test_a_full_queue_answers_429_with_retry_after() -> None:
    engine = FakeEngine(context=4096, step_delay_s=0.01)
    with live_server(fake_model(engine)) as server:
        waiting = [leave(server, {"prompt": "x", "max_tokens": 4000}) for _ in range(9)]
        assert wait_until(lambda: server.worker.queued == 8)
        status, headers, answer = server.request("POST", "/v1/completions", json.dumps({"prompt": "x"}))
        assert status == 429
        assert 1 <= int(headers["retry-after"]) <= 60
        assert json.loads(answer)["error"]["type"] == "rate_limit_error"
        for connection in waiting:
            connection.close()
        assert wait_until(lambda: server.idle)
        assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 1})[0] == 200


def test_an_engine_error_ends_the_request_and_not_the_server() -> None:
    engine = FakeEngine(script="Paris", fail_at=3)  # call 0 is the smoke token
    with live_server(fake_model(engine)) as server:
        status, answer = server.post("/v1/completions", {"prompt": "x"})
        assert (status, answer["error"]["type"]) == (503, "server_error")
        assert server.post("/v1/completions", {"prompt": "x"})[1]["choices"][0]["text"] == "Paris"
        assert server.request("GET", "/health/ready")[0] == 200


def test_an_engine_error_in_a_stream_is_an_event_that_the_client_understands() -> None:
    with (
        live_server(fake_model(FakeEngine(script="Paris", fail_at=3, step_delay_s=0.02))) as server,
        server.client() as client,
    ):
        stream = client.completions.create(model="fake", prompt="x", stream=True)
        with pytest.raises(openai.APIError, match="the engine failed"):
            list(stream)


def test_a_dead_engine_is_told_by_readiness_and_not_by_liveness() -> None:
    engine = FakeEngine(script="Paris")
    with live_server(fake_model(engine)) as server:
        engine.closed = True
        assert server.post("/v1/completions", {"prompt": "x"})[0] == 503
        assert wait_until(lambda: server.worker.state == "failed")
        assert server.request("GET", "/health/live")[0] == 200
        assert server.request("GET", "/health/ready")[0] == 503
        status, answer = server.post("/v1/completions", {"prompt": "x"})
        assert (status, answer["error"]["code"]) == (503, "engine_unavailable")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_mistake_in_the_engine_thread_answers_everybody_who_waits() -> None:
    engine = FakeEngine(sequences=1)
    with live_server(fake_model(engine)) as server:
        engine.on_forward = lambda chunks: chunks[0].tokens[10**6]  # an IndexError, which nobody expects
        status, answer = server.post("/v1/completions", {"prompt": "x"})
        assert (status, answer["error"]["type"]) == (503, "server_error")
        assert server.request("GET", "/health/ready")[0] == 503
        assert engine.closed


def test_readiness_waits_for_a_first_token() -> None:
    gate = threading.Event()
    engine = FakeEngine(on_forward=lambda _: gate.wait(5) and None)
    threading.Timer(0.2, gate.set).start()
    with live_server(fake_model(engine)) as server:
        assert gate.is_set()
        assert engine.calls[0] == [(0, (ord("H"),), "last")]
        assert server.request("GET", "/health/ready")[0] == 200


def test_the_end_token_is_not_in_the_text(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=QUESTION)
    assert FakeTokenizer().decode([EOS], special=True) not in (answer.choices[0].message.content or "")
