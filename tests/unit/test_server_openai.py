"""What requests may say: every field is honoured or refused by name; answers are what OpenAI's own types accept."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from runtime.sampling import SamplingOptions
from runtime.server.errors import ApiError
from runtime.server.openai import Answer, ChatRequest, CompletionRequest, Timings, Usage, parse_request

MESSAGES = [{"role": "user", "content": "Hi"}]
TIMINGS = Timings(queue_s=0.0, ttft_s=0.1, prefill_tps=100.0, decode_tps=None, total_s=0.2)


def chat(**fields: Any) -> ChatRequest:
    return parse_request(ChatRequest, {"messages": MESSAGES, **fields})


def refusal(fields: dict[str, Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_request(ChatRequest, {"messages": MESSAGES, **fields})
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", 0),
        ("max_tokens", 2**63),
        ("max_tokens", 10**400),
        ("max_tokens", 1.5),
        ("max_tokens", "5"),
        ("max_tokens", True),
        ("max_completion_tokens", -1),
        ("seed", -1),
        ("seed", 2**63),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", []),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("stream", "yes"),
        ("stream", 1),
        ("stream_options", []),
        ("stop", ""),
        ("stop", 5),
        ("stop", ["a"] * 17),
        ("stop", "x" * 257),
        ("model", 5),
        ("messages", []),
        ("messages", "Hi"),
        ("messages", {}),
    ],
)
def test_a_wrong_value_is_refused_by_its_name(field: str, value: Any) -> None:
    error = refusal({field: value})
    assert (error.param or "").split(".")[0] == field
    assert error.code == "invalid_value"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "robot", "content": "x"}, "messages.0.role"),
        ({"role": "user"}, "messages.0.content"),
        ({"role": "user", "content": 5}, "messages.0.content"),
        ({"role": "user", "content": "x", "name": "Bob"}, "messages.0.name"),
        ({"role": "tool", "content": "x", "tool_call_id": "1"}, "messages.0"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]},
            "messages.0.content.0",
        ),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, "messages.0.content.0.text"),
    ],
)
def test_a_wrong_message_is_refused_by_its_place(message: dict[str, Any], param: str) -> None:
    assert (refusal({"messages": [message]}).param or "").startswith(param)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("n", -1),
        ("n", 2**63),
        ("n", True),
        ("best_of", 2),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -0.5),
        ("logit_bias", {"1": 5}),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("chat_template", "{{ range(10**9) }}"),
        ("chat_template_kwargs", {"x": 1}),
        ("modalities", ["audio"]),
        ("echo", True),
        ("suffix", "x"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(field: str, value: Any) -> None:
    error = refusal({field: value})
    assert (error.param, error.code) == (field, "unsupported_parameter")
    assert field in error.message


def test_what_asks_for_nothing_passes() -> None:
    neutral = {
        "n": 1,
        "logprobs": False,
        "presence_penalty": 0.0,
        "frequency_penalty": 0,
        "logit_bias": {},
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "best_of": None,
        "seed": None,
        "user": "somebody",
        "metadata": {"a": "b"},
    }
    assert chat(**neutral) == chat()


def test_an_unknown_field_is_refused_by_its_name() -> None:
    error = refusal({"temperatur": 0.5})
    assert (error.param, error.code) == ("temperatur", "unknown_parameter")
    assert len(refusal({"x" * 10_000: 1}).message) < 200


def test_sampling_reaches_the_sampler() -> None:
    wanted = chat(temperature=0.5, top_p=0.9, top_k=40, min_p=0.05, repetition_penalty=1.1, seed=7)
    expected = SamplingOptions(temperature=0.5, top_p=0.9, top_k=40, min_p=0.05, repetition_penalty=1.1, seed=7)
    assert wanted.sampling == expected
    assert chat().sampling == SamplingOptions(temperature=1.0)  # OpenAI's default


def test_the_newer_name_of_the_token_limit_wins() -> None:
    assert chat().tokens_wanted is None
    assert chat(max_tokens=5).tokens_wanted == 5
    assert chat(max_tokens=5, max_completion_tokens=7).tokens_wanted == 7


def test_messages_become_what_templates_expect() -> None:
    echoed = {"role": "assistant", "content": "Yes", "refusal": None, "tool_calls": None, "annotations": []}
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    wanted = chat(messages=[{"role": "developer", "content": "Be brief"}, parts, echoed])
    assert [message.template_message for message in wanted.messages] == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "Yes"},
    ]


def test_one_stop_string_or_several() -> None:
    assert chat(stop="a").stop == ["a"]
    assert chat(stop=["a", "b"]).stop == ["a", "b"]
    assert chat(stop=None).stop == []


@pytest.mark.parametrize(
    ("prompt", "expected"), [("a", "a"), (["a"], "a"), ([5, 6], [5, 6]), ([[5, 6]], [5, 6]), ([5], [5])]
)
def test_prompts_as_text_or_ids(prompt: Any, expected: Any) -> None:
    assert parse_request(CompletionRequest, {"prompt": prompt}).prompt_text_or_ids == expected


@pytest.mark.parametrize("prompt", [[], [[]], ["a", "b"], [[1], [2]], [-1], [2**63], ["a", 1], 5, {}, [True], [1.5]])
def test_other_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(ApiError) as caught:
        _ = parse_request(CompletionRequest, {"prompt": prompt}).prompt_text_or_ids
    assert (caught.value.param or "").split(".")[0] == "prompt"


def test_missing_fields_are_named() -> None:
    for kind, field in ((ChatRequest, "messages"), (CompletionRequest, "prompt")):
        with pytest.raises(ApiError) as caught:
            parse_request(kind, {})
        assert caught.value.param == field


def events(data: bytes) -> list[Any]:
    lines = data.decode().split("\n\n")[:-1]
    return [line if line == "data: [DONE]" else json.loads(line.removeprefix("data: ")) for line in lines]


def test_answers_are_openai_types() -> None:
    usage = Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1)
    document = Answer("m", chat=True).whole("Hi", "stop", usage, TIMINGS)
    assert ChatCompletion.model_validate(document).usage.total_tokens == 5
    assert Completion.model_validate(Answer("m", chat=False).whole("Hi", "length", usage, TIMINGS)).model == "m"


def test_streams_are_openai_types() -> None:
    usage = Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=0)
    answer = Answer("m", chat=True, include_usage=True)
    *chunks, done = events(
        answer.opening() + answer.piece("line\nbreak \u2028") + answer.closing("stop", usage, TIMINGS)
    )
    assert done == "data: [DONE]"
    validated = [ChatCompletionChunk.model_validate(chunk) for chunk in chunks]
    assert validated[1].choices[0].delta.content == "line\nbreak \u2028"
    assert [chunk.usage is not None for chunk in validated] == [False, False, False, True]
    plain = Answer("m", chat=False)
    assert plain.opening() == b""
    assert len(events(plain.closing("stop", usage, TIMINGS))) == 2  # no counts unless asked for
