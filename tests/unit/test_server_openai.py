"""What requests may say: every field is honoured or refused by name; answers are what OpenAI's own types accept."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from runtime.generate import FinishReason, LikelyToken, TokenEvent, TokenLogprobs
from runtime.sampling import SamplingOptions
from runtime.server.errors import ApiError
from runtime.server.openai import ChatRequest, CompletionRequest, parse_request
from runtime.server.replies import Answer, Form, Timings, Usage
from runtime.tools import ToolCallReader

MESSAGES = [{"role": "user", "content": "Hi"}]
TIMINGS = Timings(queue_s=0.0, ttft_s=0.1, prefill_tps=100.0, decode_tps=None, total_s=0.2)


def called(arguments: str) -> dict[str, Any]:
    return {"id": "a1", "type": "function", "function": {"name": "f", "arguments": arguments}}


CALL = called('{"x": 1}')


def chat(**fields: Any) -> ChatRequest:
    return parse_request(ChatRequest, {"messages": MESSAGES, **fields})


def refusal(fields: dict[str, Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        _ = parse_request(ChatRequest, {"messages": MESSAGES, **fields}).template_messages
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
        ("n", 0),
        ("n", -1),
        ("n", 9),
        ("n", 2**63),
        ("n", True),
        ("logprobs", 3),
        ("top_logprobs", 21),
        ("top_logprobs", -1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", float("nan")),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", [1]),
        ("logit_bias", {str(token): 1 for token in range(1025)}),
        ("tools", [{"type": "web_search"}]),
        ("tools", [{"type": "function"}]),
        ("tools", [{"type": "function", "function": {"name": "a b"}}]),
        ("tools", [{"type": "function", "function": {"name": "f"}}] * 129),
        ("tool_choice", "always"),
        ("tool_choice", {"type": "function"}),
        ("response_format", {"type": "xml"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}),
        ("structured_outputs", {"regex": 5}),
        ("structured_outputs", {"choice": []}),
        ("stream", "yes"),
        ("stream", 1),
        ("stream_options", []),
        ("stream_options", {"include_obfuscation": 0}),
        ("stream_options", {"include_obfuscation": True}),
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
        ({"role": "user", "content": None}, "messages.0.content"),
        ({"role": "user", "content": "x", "tool_call_id": "1"}, "messages.0.tool_call_id"),
        ({"role": "tool", "content": "x"}, "messages.0.tool_call_id"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "messages.0.tool_calls"),
        ({"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}, "messages.0.tool_calls.0.type"),
        ({"role": "assistant", "tool_calls": [called("{")]}, "messages.0.tool_calls.0.function.arguments"),
        ({"role": "assistant", "tool_calls": [called("[]")]}, "messages.0.tool_calls.0.function.arguments"),
        ({"role": "assistant", "tool_calls": [called("[" * 60_000)]}, "messages.0.tool_calls.0.function.arguments"),
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
        ("best_of", 2),
        ("chat_template", "{{ range(10**9) }}"),
        ("chat_template_kwargs", {"x": 1}),
        ("modalities", ["audio"]),
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
    assert chat(**neutral) == chat(tools=[], response_format={"type": "text"})


def test_an_unknown_field_is_refused_by_its_name() -> None:
    error = refusal({"temperatur": 0.5})
    assert (error.param, error.code) == ("temperatur", "unknown_parameter")
    assert len(refusal({"x" * 10_000: 1}).message) < 200


def test_sampling_reaches_the_sampler() -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1, "seed": 7}
    penalties = {"presence_penalty": 0.5, "frequency_penalty": -0.5}
    expected = SamplingOptions(**fields, **penalties, logit_bias=((5, -100.0), (7, 2.5)))  # type: ignore[arg-type]
    assert chat(**fields, **penalties, logit_bias={"5": -100, "7": 2.5}).sampling == expected


def test_probabilities_are_asked_for_in_two_ways() -> None:
    assert chat().logprobs_wanted is None
    assert chat(logprobs=True).logprobs_wanted == 0
    assert chat(logprobs=True, top_logprobs=3).logprobs_wanted == 3
    with pytest.raises(ApiError) as caught:
        _ = chat(top_logprobs=3).logprobs_wanted
    assert caught.value.param == "top_logprobs"
    assert parse_request(CompletionRequest, {"prompt": "a", "logprobs": 2}).logprobs_wanted == 2
    assert chat().sampling == SamplingOptions(temperature=1.0)  # OpenAI's default


def test_the_newer_name_of_the_token_limit_wins() -> None:
    assert chat().tokens_wanted is None
    assert chat(max_tokens=5).tokens_wanted == 5
    assert chat(max_tokens=5, max_completion_tokens=7).tokens_wanted == 7


def test_messages_become_what_templates_expect() -> None:
    echoed = {"role": "assistant", "content": "Yes", "refusal": None, "tool_calls": None, "annotations": []}
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    wanted = chat(messages=[{"role": "developer", "content": "Be brief"}, parts, echoed])
    assert wanted.template_messages == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "Yes"},
    ]


def test_calls_and_their_results_become_what_templates_expect() -> None:
    result = {"role": "tool", "content": "7", "tool_call_id": "a1"}
    assistant, tool = chat(
        messages=[{"role": "assistant", "content": None, "tool_calls": [CALL]}, result]
    ).template_messages
    function = {"name": "f", "arguments": {"x": 1}}
    assert assistant["tool_calls"] == [{"id": "a1", "type": "function", "function": function}]
    assert tool == {"role": "tool", "content": "7", "tool_call_id": "a1"}


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


def said(text: str, reason: FinishReason | None = None, logprob: float | None = None) -> TokenEvent:
    logprobs = None
    if logprob is not None:
        rivals = (LikelyToken(120, -0.5, (120,)), LikelyToken(121, -float("inf"), (121,)))
        logprobs = TokenLogprobs(LikelyToken(ord(text[0]), logprob, tuple(text.encode()[:1])), rivals)
    return TokenEvent(ord(text[0]) if text else None, text, 0, 0.1, finish_reason=reason, logprobs=logprobs)


def form(*, chat: bool = True, include_usage: bool = False, echo: str = "", tools: bool = False) -> Form:
    calls = (lambda: ToolCallReader("hermes", frozenset({"f"}))) if tools else None
    return Form("m", chat, include_usage, echo, calls)


USAGE = Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1)
TOOL_TEXT = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


def test_answers_are_openai_types() -> None:
    choices = [[said("H"), said("i", "stop")], [said("H"), said("o", "length")]]
    document = ChatCompletion.model_validate(Answer(form()).whole(choices, USAGE, TIMINGS))
    assert document.usage is not None
    assert document.usage.total_tokens == 5
    assert [choice.message.content for choice in document.choices] == ["Hi", "Ho"]
    assert [choice.finish_reason for choice in document.choices] == ["stop", "length"]
    plain = Completion.model_validate(Answer(form(chat=False, echo="> ")).whole(choices, USAGE, TIMINGS))
    assert [choice.text for choice in plain.choices] == ["> Hi", "> Ho"]


def test_streams_are_openai_types() -> None:
    answer = Answer(form(include_usage=True))
    data = answer.pieces(0, [said("line\nbreak \u2028"), said("", "stop")]) + answer.closing(USAGE, TIMINGS)
    *chunks, done = events(data)
    assert done == "data: [DONE]"
    validated = [ChatCompletionChunk.model_validate(chunk) for chunk in chunks]
    assert validated[1].choices[0].delta.content == "line\nbreak \u2028"
    assert [chunk.usage is not None for chunk in validated] == [False, False, False, True]
    assert chunks[2]["timings"]["ttft_s"] == 0.1
    plain = Answer(form(chat=False))
    # No counts unless asked for.
    assert len(events(plain.pieces(0, [said("a"), said("", "stop")]) + plain.closing(USAGE, TIMINGS))) == 3


def test_streamed_choices_end_each_for_itself() -> None:
    answer = Answer(form())
    data = answer.pieces(1, [said("a", "length")]) + answer.pieces(0, [said("b"), said("c", "stop")])
    chunks = events(data + answer.closing(USAGE, TIMINGS))[:-1]
    seen = [(chunk["choices"][0]["index"], chunk["choices"][0]["finish_reason"]) for chunk in chunks]
    assert [item for item in seen if item[1]] == [(1, "length"), (0, "stop")]
    assert ["timings" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_calls_are_openai_types_whole_and_streamed() -> None:
    whole = ChatCompletion.model_validate(Answer(form(tools=True)).whole([[said(TOOL_TEXT, "stop")]], USAGE, TIMINGS))
    message = whole.choices[0].message
    assert message.content is None
    assert message.tool_calls is not None
    assert message.tool_calls[0].type == "function"
    assert message.tool_calls[0].function.arguments == '{"x":1}'
    assert whole.choices[0].finish_reason == "tool_calls"
    answer = Answer(form(tools=True))
    letters = [said(letter) for letter in "See: " + TOOL_TEXT + TOOL_TEXT]
    data = answer.pieces(0, [*letters, said("", "stop")]) + answer.closing(USAGE, TIMINGS)
    chunks = [ChatCompletionChunk.model_validate(chunk) for chunk in events(data)[:-1]]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "See:"
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [call.index for call in calls] == [0, 1]
    assert len({call.id for call in calls}) == 2
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_probabilities_are_openai_types() -> None:
    tokens = [said("x", logprob=-0.25), said("é", logprob=-2.0), said("", "stop")]
    chat_answer = ChatCompletion.model_validate(Answer(form()).whole([tokens], USAGE, TIMINGS))
    assert chat_answer.choices[0].logprobs is not None
    content = chat_answer.choices[0].logprobs.content
    assert content is not None
    assert (content[0].token, content[0].logprob, content[0].bytes) == ("x", -0.25, [120])
    assert [top.logprob for top in content[0].top_logprobs] == [-0.5, -9999.0]
    plain = Completion.model_validate(Answer(form(chat=False)).whole([tokens], USAGE, TIMINGS))
    assert plain.choices[0].logprobs is not None
    assert plain.choices[0].logprobs.token_logprobs == [-0.25, -2.0]
    assert plain.choices[0].logprobs.text_offset == [0, 1]
    assert plain.choices[0].logprobs.tokens == ["x", "bytes:\\xc3"]  # half a character, as OpenAI spells it
    answer = Answer(form())
    data = answer.pieces(0, [said("", None), *tokens]) + answer.closing(USAGE, TIMINGS)
    streamed = [ChatCompletionChunk.model_validate(chunk).choices[0].logprobs for chunk in events(data)[:-1]]
    assert [item.content[0].logprob for item in streamed if item and item.content] == [-0.25, -2.0]
