"""The features of the OpenAI API by the official client: choices, probabilities, constraints, tools, token counts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest
from fake_engine import EOS, IM_END, FakeEngine, FakeTokenizer
from live_server import TOOL_TEMPLATE, LiveServer, fake_model, live_server
from pydantic import BaseModel

QUESTION: list[Any] = [{"role": "user", "content": "What is the weather?"}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 9}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather of a city", "parameters": CITY},
}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    """A talker without an end, which only limits and constraints stop."""
    with live_server(fake_model(FakeEngine(context=2048, sequences=4), source=TOOL_TEMPLATE)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with server.client() as made:
        yield made


def refused(call: Any) -> tuple[str, str]:
    """Field and code of the refusal."""
    with pytest.raises(openai.BadRequestError) as caught:
        call()
    return caught.value.param or "", caught.value.code or ""


def test_several_choices_whole_and_streamed(client: openai.OpenAI) -> None:
    common: Any = {"model": "fake", "messages": QUESTION, "max_tokens": 6, "n": 3, "temperature": 2, "seed": 5}
    # The fake is certain of its letter: a bias makes two letters equal, so that the seed decides.
    common["logit_bias"] = {str(ord("x")): 20, str(ord("y")): 20}
    whole = client.chat.completions.create(**common)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert whole.usage is not None
    assert (whole.usage.completion_tokens, whole.usage.prompt_tokens) == (18, client_prompt(QUESTION))
    streamed = ["", "", ""]
    reasons: dict[int, str | None] = {}
    for chunk in client.chat.completions.create(**common, stream=True):
        choice = chunk.choices[0]
        streamed[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    assert streamed == texts
    assert reasons == {0: "length", 1: "length", 2: "length"}


def client_prompt(messages: list[dict[str, str]]) -> int:
    text = "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages)
    return len(FakeTokenizer().encode(text + "<|im_start|>assistant\n"))


def test_choices_of_one_sequence_share_the_prompt() -> None:
    engine = FakeEngine(sequences=1)
    with live_server(fake_model(engine)) as server:
        server.post("/v1/completions", {"prompt": "a long prompt " * 5, "max_tokens": 2, "n": 4})
    assert engine.computed_tokens < 70 + 4 * 3 + 4  # computed once, and one token for each further choice


def test_choices_beyond_the_queue_are_refused_and_leave_nothing_behind() -> None:
    with live_server(fake_model(FakeEngine(sequences=1, step_delay_s=0.02, context=4096))) as server:
        body = {"prompt": "a", "max_tokens": 50, "n": 8}
        with server.client() as client:
            stream = client.completions.create(model="fake", **body, stream=True)  # type: ignore[call-overload]
            next(iter(stream))
            status, document = server.post("/v1/completions", body)
            assert (status, document["error"]["code"]) == (429, "queue_full")
            assert server.worker.queued <= 8
            stream.close()


def test_probabilities_of_a_chat(client: openai.OpenAI) -> None:
    common: Any = {"model": "fake", "messages": QUESTION, "max_tokens": 4, "temperature": 0}
    whole = client.chat.completions.create(**common, logprobs=True, top_logprobs=2).choices[0]
    assert whole.logprobs is not None
    content = whole.logprobs.content
    assert content is not None
    assert "".join(entry.token for entry in content) == whole.message.content
    # One logit of 20 above 259 of 0.
    certain = -math.log(1 + 259 * math.exp(-20))
    assert [entry.logprob for entry in content] == pytest.approx([certain] * 4, abs=1e-6)
    assert [entry.top_logprobs[0].token for entry in content] == [entry.token for entry in content]
    assert content[0].top_logprobs[1].logprob == pytest.approx(certain - 20)
    chunks = client.chat.completions.create(**common, logprobs=True, stream=True)
    streamed = [chunk.choices[0].logprobs for chunk in chunks]
    assert [entry.token for item in streamed if item for entry in item.content or []] == list(
        whole.message.content or ""
    )
    assert client.chat.completions.create(**common).choices[0].logprobs is None


def test_probabilities_of_a_completion(client: openai.OpenAI) -> None:
    choice = client.completions.create(model="fake", prompt="abc", max_tokens=3, logprobs=1, temperature=0).choices[0]
    assert choice.logprobs is not None
    assert "".join(choice.logprobs.tokens or []) == choice.text
    assert choice.logprobs.text_offset == [0, 1, 2]
    assert [list(top) for top in choice.logprobs.top_logprobs or []] == [[letter] for letter in choice.text]


def test_penalties_and_bias_change_the_text(client: openai.OpenAI) -> None:
    common: Any = {"model": "fake", "prompt": "abc", "max_tokens": 5, "temperature": 0}
    plain = client.completions.create(**common).choices[0].text
    forced = client.completions.create(**common, logit_bias={str(ord("!")): 100}).choices[0].text
    assert forced == "!!!!!"
    varied = client.completions.create(**common, logit_bias={"33": 21, "34": 20.5}, frequency_penalty=2).choices[0].text
    assert varied != "!!!!!"
    assert set(varied) & {"!", '"'}
    assert client.completions.create(**common, echo=True).choices[0].text == "abc" + plain
    assert refused(lambda: client.completions.create(**common, logit_bias={"9999": 1})) == (
        "logit_bias",
        "invalid_value",
    )
    assert refused(lambda: client.completions.create(**common, echo=True, logprobs=1))[0] == "echo"


class Person(BaseModel):
    """What a client asks for through its own helper."""

    name: str
    age: int


SHORT = {
    "type": "object",
    "properties": {"word": {"type": "string", "maxLength": 4}, "yes": {"type": "boolean"}},
    "required": ["word", "yes"],
    "additionalProperties": False,
}


def test_a_json_schema_whole_streamed_and_in_choices(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "short", "schema": SHORT, "strict": True}}
    common: Any = {"model": "fake", "messages": QUESTION, "response_format": form, "temperature": 0, "n": 2}
    whole = client.chat.completions.create(**common)
    for choice in whole.choices:
        assert set(json.loads(choice.message.content or "")) == {"word", "yes"}
        assert choice.finish_reason == "stop"
    streamed = ["", ""]
    for chunk in client.chat.completions.create(**common, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == [choice.message.content for choice in whole.choices]


def test_the_clients_own_parser_gets_its_class() -> None:
    with (
        live_server(fake_model(FakeEngine(script='{"name": "Ann", "age": 7}'))) as server,
        server.client() as client,
    ):
        parsed = client.chat.completions.parse(model="fake", messages=QUESTION, response_format=Person)
    assert parsed.choices[0].message.parsed == Person(name="Ann", age=7)


def test_json_mode_and_other_constraints(client: openai.OpenAI) -> None:
    def said(**extra: Any) -> str:
        common: Any = {"model": "fake", "messages": QUESTION, "temperature": 0, "max_tokens": 200}
        return client.chat.completions.create(**common, **extra).choices[0].message.content or ""

    assert said(response_format={"type": "json_object"}).startswith("{")
    assert said(extra_body={"structured_outputs": {"choice": ["yes", "no"]}}) in {"yes", "no"}
    assert said(extra_body={"structured_outputs": {"regex": "[0-9]{3}-[x-z]{2}"}})[3] == "-"
    assert said(extra_body={"structured_outputs": {"grammar": 'start: "a" /[b-d]{2}/ "!"'}})[3] == "!"
    assert json.loads(said(extra_body={"structured_outputs": {"json": SHORT}}))
    stopped = said(extra_body={"structured_outputs": {"regex": "abc-def"}}, stop=["-"])
    assert stopped == "abc"
    text = client.completions.create(
        model="fake", prompt="a", max_tokens=9, extra_body={"structured_outputs": {"regex": "[0-9]{4}"}}
    )
    assert text.choices[0].text.isdigit()


@pytest.mark.parametrize(
    ("extra", "field"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}},
            "response_format.json_schema.schema",
        ),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"json": {"description": "x" * 50_000}}}, "structured_outputs.json"),
        ({"structured_outputs": {"grammar": "banana"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "tools": [CLOCK]}, "structured_outputs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "banana"}}}],
                "tool_choice": "required",
            },
            "tools",
        ),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_its_field(server: LiveServer, extra: dict[str, Any], field: str) -> None:
    status, document = server.post("/v1/chat/completions", {"messages": QUESTION, **extra})
    assert (status, document["error"]["param"]) == (400, field)


def test_a_template_without_tools_refuses_them() -> None:
    with live_server(fake_model(FakeEngine())) as server, server.client() as client:
        field, code = refused(lambda: client.chat.completions.create(model="fake", messages=QUESTION, tools=[WEATHER]))
        assert (field, code) == ("tools", "unsupported_parameter")
        # Tools that must not be used need no support.
        client.chat.completions.create(
            model="fake", messages=QUESTION, tools=[WEATHER], tool_choice="none", max_tokens=2
        )


CALL_TEXT = 'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'


def test_a_call_in_an_answer_whole_and_streamed() -> None:
    with (
        live_server(fake_model(FakeEngine(script=CALL_TEXT, context=1024), source=TOOL_TEMPLATE)) as server,
        server.client() as client,
    ):
        common: Any = {"model": "fake", "messages": QUESTION, "tools": [WEATHER, CLOCK]}
        choice = client.chat.completions.create(**common).choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "Let me see."
        assert choice.message.tool_calls is not None
        call = choice.message.tool_calls[0]
        assert call.type == "function"
        assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Rome"})
        chunks = list(client.chat.completions.create(**common, stream=True))
        deltas = [delta for chunk in chunks for delta in chunk.choices[0].delta.tool_calls or []]
        assert [delta.function.arguments for delta in deltas if delta.function] == ['{"city":"Rome"}']
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Let me see."
        # And back with the result, as the client itself writes the messages.
        answered = [
            *QUESTION,
            choice.message.model_dump(),
            {"role": "tool", "tool_call_id": call.id, "content": "Sunny"},
        ]
        client.chat.completions.create(model="fake", messages=answered, max_tokens=2)
        # Without tools the same words are words.
        plain = client.chat.completions.create(model="fake", messages=QUESTION).choices[0]
        assert (plain.message.content, plain.finish_reason) == (CALL_TEXT, "stop")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_required_call_is_made_whatever_the_model_would_say(client: openai.OpenAI, choice: Any) -> None:
    tools = [WEATHER] if choice == "required" else [CLOCK, WEATHER]
    answer = client.chat.completions.create(
        model="fake",
        messages=QUESTION,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=200,
    ).choices[0]
    assert answer.message.tool_calls is not None
    (call,) = answer.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert len(json.loads(call.function.arguments)["city"]) <= 9
    assert not answer.message.content


def test_tools_and_a_schema_together_allow_either(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "short", "schema": SHORT}}
    choice = client.chat.completions.create(
        model="fake", messages=QUESTION, tools=[WEATHER], response_format=form, temperature=0, max_tokens=200
    ).choices[0]
    assert choice.message.tool_calls or set(json.loads(choice.message.content or "")) == {"word", "yes"}


def test_a_constraint_without_an_end_token_is_the_requests_fault() -> None:
    """The fake's end is a token of its own; a model that has none cannot be held to anything."""
    model = replace(fake_model(FakeEngine()), stop_tokens=frozenset())
    with live_server(model) as server:
        body = {"prompt": "a", "structured_outputs": {"regex": "a+"}}
        status, document = server.post("/v1/completions", body)
        assert (status, document["error"]["param"]) == (400, "structured_outputs.regex")
        assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 2})[0] == 200


def test_tokens_are_counted_and_read_back(server: LiveServer) -> None:
    assert server.post("/tokenize", {"content": "ab</s>"})[1] == {"tokens": [97, 98, EOS], "count": 3}
    assert server.post("/tokenize", {"content": "</s>", "parse_special": False})[1]["count"] == 4
    pieces = server.post("/tokenize", {"content": "aé", "with_pieces": True})[1]["tokens"]
    assert pieces == [{"id": 97, "piece": "a"}, {"id": 0xC3, "piece": [0xC3]}, {"id": 0xA9, "piece": [0xA9]}]
    counted = server.post("/tokenize", {"messages": QUESTION})[1]["count"]
    assert counted == client_prompt(QUESTION)
    assert server.post("/tokenize", {"messages": QUESTION, "tools": [WEATHER]})[1]["count"] > counted
    assert server.post("/detokenize", {"tokens": [97, 0xC3, 0xA9, IM_END]})[1] == {"content": "aé<|im_end|>"}


@pytest.mark.parametrize(
    ("route", "body", "field"),
    [
        ("/tokenize", {}, "content"),
        ("/tokenize", {"content": "a", "messages": QUESTION}, "content"),
        ("/tokenize", {"content": 5}, "content"),
        ("/tokenize", {"content": "a" * 100_000}, "content"),
        ("/tokenize", {"content": "a", "banana": 1}, "banana"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [9999]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
    ],
)
def test_token_routes_name_what_is_wrong(server: LiveServer, route: str, body: dict[str, Any], field: str) -> None:
    status, document = server.post(route, body)
    assert (status, document["error"]["param"]) == (400, field)


def test_nothing_is_left_running(server: LiveServer) -> None:
    assert server.idle
