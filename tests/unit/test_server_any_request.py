"""Whatever JSON comes: every request of the API is prepared, or refused by an ``ApiError`` below 500."""

from __future__ import annotations

from typing import Any

import pytest
from fake_engine import FakeEngine
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import TOOL_TEMPLATE, fake_model

from runtime.generate import Continuation
from runtime.server.errors import ApiError
from runtime.server.ollama import ChatBody, GenerateBody, ShowBody
from runtime.server.openai import Body, ChatRequest, CompletionRequest, parse_request
from runtime.server.prepare import Prepared, Preparer, Wish
from runtime.server.routes import DetokenizeBody, TokenizeBody

MODEL = fake_model(FakeEngine(context=512), source=TOOL_TEMPLATE)
PREPARER = Preparer(MODEL, MODEL.info, marks_shared=True)
KINDS: list[type[Body]] = [
    ChatRequest,
    CompletionRequest,
    ChatBody,
    GenerateBody,
    ShowBody,
    TokenizeBody,
    DetokenizeBody,
]

SCALARS = st.none() | st.booleans() | st.integers(-(2**64), 2**64) | st.floats(allow_nan=False) | st.text(max_size=6)
# Values that get far: the parser's own words, in the right place or a wrong one.
WORDS = st.sampled_from(["user", "tool", "assistant", "json", "json_object", "json_schema", "required", "auto", "none"])
FUNCTION = st.fixed_dictionaries(
    {"name": st.sampled_from(["f", "g h", ""])}, optional={"parameters": SCALARS | st.just({})}
)
CALL = st.fixed_dictionaries(
    {"id": SCALARS, "function": st.fixed_dictionaries({"name": st.just("f"), "arguments": SCALARS | st.just("{}")})}
)
MESSAGE = st.fixed_dictionaries(
    {"role": WORDS}, optional={"content": SCALARS, "tool_calls": st.lists(CALL, max_size=2), "tool_call_id": SCALARS}
)
FORMAT = st.fixed_dictionaries(
    {"type": WORDS},
    optional={"json_schema": st.fixed_dictionaries({"name": st.just("x"), "schema": st.dictionaries(WORDS, SCALARS)})},
)
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "messages": st.lists(MESSAGE, max_size=3),
    "model": st.just("fake"),
    "prompt": st.text(max_size=5) | st.lists(st.integers(-1, 300), max_size=4),
    "tools": st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": FUNCTION}), max_size=2),
    "tool_choice": WORDS | st.just({"type": "function", "function": {"name": "f"}}),
    "response_format": FORMAT,
    "structured_outputs": st.dictionaries(st.sampled_from(["json", "regex", "choice", "grammar"]), SCALARS, max_size=2),
    "format": WORDS | st.dictionaries(WORDS, SCALARS, max_size=2),
    "options": st.dictionaries(st.sampled_from(["num_ctx", "seed", "stop", "top_k", "mirostat"]), SCALARS, max_size=3),
    "logit_bias": st.dictionaries(st.integers(-1, 300).map(str), st.floats(-200, 200), max_size=3),
    "truncation": st.sampled_from(["auto", "disabled"]),
    "content": st.text(max_size=5),
    "tokens": st.lists(st.integers(-1, 300), max_size=4),
}


def document(kind: type[Body]) -> st.SearchStrategy[dict[str, Any]]:
    fields = {name: LIKELY.get(name, SCALARS) | SCALARS for name in kind.model_fields}
    required = {name: LIKELY[name] for name in ("messages", "prompt", "model") if name in fields}
    others = {name: value for name, value in fields.items() if name not in required}
    return st.fixed_dictionaries(required, optional=others)


def prepared(wanted: Body) -> Prepared | None:
    if isinstance(wanted, ChatRequest):
        return PREPARER.chat(wanted)
    if isinstance(wanted, CompletionRequest):
        return PREPARER.complete(wanted)
    if isinstance(wanted, ChatBody):
        wish = Wish(
            wanted.options.sampling(512),
            wanted.tokens_wanted(512),
            tuple(wanted.options.stop),
            drops=wanted.truncate,
            shifts=wanted.shift,
        )
        return PREPARER.conversation([m.template_message for m in wanted.messages], wanted.offered_tools, wish)
    return None


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_document_is_prepared_or_refused(kind: type[Body], data: st.DataObject) -> None:
    try:
        made = prepared(parse_request(kind, data.draw(document(kind))))
    except ApiError as error:
        refusal: ApiError | None = error
        made = None
    else:
        refusal = None
    assert refusal is None or 400 <= refusal.status < 500
    for request in made.requests if made is not None else ():
        # What was accepted is something that the scheduler can begin with.
        Continuation(request, MODEL.tokenizer, MODEL.info)
