"""The server through LangChain's OpenAI client, as most applications meet it: chat, stream, tools, schema, vectors."""

from __future__ import annotations

from typing import Any

import pytest
from fake_encoder import FakeEncoder, fake_encoder_model, live_embedding_server, vector_of
from fake_engine import BOS, EOS, FakeEngine
from live_server import TOOL_TEMPLATE, LiveServer, fake_model, live_server
from pydantic import BaseModel, SecretStr

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'


class Person(BaseModel):
    """A person."""

    name: str
    age: int


def get_weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"Sunny in {city}"


def chat_model(server: LiveServer) -> Any:
    from langchain_openai import ChatOpenAI  # half a second, and only here

    return ChatOpenAI(model="fake", base_url=f"{server.url}/v1", api_key=SecretStr("none"), max_retries=0)


@pytest.fixture(autouse=True)
def _no_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANGSMITH_TRACING", "false")


def test_chat_and_stream() -> None:
    with live_server(fake_model(FakeEngine(script="Hello there."))) as server:
        model = chat_model(server)
        answer = model.invoke([("system", "Be brief"), ("human", "Hi")])
        assert answer.content == "Hello there."
        assert answer.usage_metadata["output_tokens"] == 12
        assert "".join(str(piece.content) for piece in model.stream("Hi")) == "Hello there."


def test_tools_and_their_results() -> None:
    with live_server(fake_model(FakeEngine(script=CALL, context=2048), source=TOOL_TEMPLATE)) as server:
        model = chat_model(server).bind_tools([get_weather])
        asked: list[Any] = [("human", "Weather in Rome?")]
        answer = model.invoke(asked)
        (call,) = answer.tool_calls
        assert (call["name"], call["args"]) == ("get_weather", {"city": "Rome"})
        streamed = None
        for piece in model.stream(asked):
            streamed = piece if streamed is None else streamed + piece
        assert streamed is not None
        assert streamed.tool_calls[0]["args"] == {"city": "Rome"}
        result = {"role": "tool", "tool_call_id": call["id"], "content": get_weather(**call["args"])}
        assert model.invoke([*asked, answer, result]).tool_calls


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(method: str) -> None:
    text = '{"name": "Ann", "age": 7}'
    script = (
        text if method == "json_schema" else f'<tool_call>\n{{"name": "Person", "arguments": {text}}}\n</tool_call>'
    )
    with live_server(fake_model(FakeEngine(script=script, context=2048), source=TOOL_TEMPLATE)) as server:
        assert chat_model(server).with_structured_output(Person, method=method).invoke("Who?") == Person(
            name="Ann", age=7
        )


def test_vectors() -> None:
    from langchain_openai import OpenAIEmbeddings

    with live_embedding_server(fake_encoder_model(FakeEncoder())) as server:
        # Its check of lengths counts tokens of OpenAI's vocabularies, which it would have to download.
        model = OpenAIEmbeddings(
            model="fake", base_url=f"{server.url}/v1", api_key=SecretStr("none"), check_embedding_ctx_length=False
        )
        texts = ["abc", "another"]
        assert model.embed_documents(texts) == [vector_of([BOS, *text.encode(), EOS]) for text in texts]
        assert model.embed_query("abc") == vector_of([BOS, *b"abc", EOS])
