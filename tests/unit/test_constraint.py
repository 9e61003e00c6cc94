"""Constraints: what they allow, on bytes; and that a hostile grammar is refused in one sentence and little time."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import numpy as np
import pytest
from fake_engine import EOS, VOCABULARY, FakeEngine, FakeTokenizer

from edgelm.errors import UsageError
from runtime.constraint import (
    ConstraintError,
    ConstraintVocabulary,
    choice_grammar,
    json_schema_grammar,
    lark_grammar,
    regex_grammar,
)
from runtime.generate import GenerationRequest, Session, answer, generate
from runtime.sampling import SamplingOptions
from runtime.server.openai import INTEGER_LIMIT

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {"node": {"type": "object", "properties": {"child": {"$ref": "#/$defs/node"}}}},
    "$ref": "#/$defs/node",
}


@pytest.fixture(scope="module")
def vocabulary() -> ConstraintVocabulary:
    return ConstraintVocabulary(FakeTokenizer(), VOCABULARY, frozenset({EOS}))


def accepts(vocabulary: ConstraintVocabulary, grammar: str, text: str) -> bool:
    """Whether ``text`` and then the end is a way through the grammar, mask by mask."""
    constraint = vocabulary.constraint(grammar)
    row = np.zeros(VOCABULARY, np.float32)
    for byte in text.encode():
        if constraint.finished or not np.isfinite(constraint.masked(row)[byte]):
            return False
        constraint.accept(byte)
    return constraint.finished or bool(np.isfinite(constraint.masked(row)[EOS]))


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ('{"name":"Ann","age":7}', True),
        ('{"name": "Ann", "age": 7}', True),
        ('{\n    "name": "Änn",\n    "age": 150\n}', True),
        ('{"name": "Ann"}', False),
        ('{"name": "Ann", "age": 151}', False),
        ('{"name": "Ann", "age": 7, "x": 1}', False),
        ("[]", False),
        ("", False),
    ],
)
def test_json_schema(vocabulary: ConstraintVocabulary, text: str, right: bool) -> None:
    assert accepts(vocabulary, json_schema_grammar(PERSON), text) is right


@pytest.mark.parametrize(
    ("grammar", "right", "wrong"),
    [
        (regex_grammar(r"[0-9]{3}-[a-c]+"), "123-abc", "12-abc"),
        (choice_grammar(["yes", "no", 'a "quoted"\nline / ü']), 'a "quoted"\nline / ü', "maybe"),
        (lark_grammar('start: pair ("," pair)*\npair: /[a-z]+/ "=" /[0-9]+/'), "a=1,bc=22", "a=1,"),
        (json_schema_grammar({"type": "object"}), '{"a": [1, {"b": null}]}', "[1]"),
        (json_schema_grammar(TREE), '{"child": {"child": {}}}', '{"child": 1}'),
    ],
)
def test_every_kind_of_grammar(vocabulary: ConstraintVocabulary, grammar: str, right: str, wrong: str) -> None:
    assert accepts(vocabulary, grammar, right)
    assert not accepts(vocabulary, grammar, wrong)


def endless(required: list[str]) -> dict[str, Any]:
    node = {"type": "object", "properties": {"a": {"$ref": "#/$defs/n"}}, "required": required}
    return {"$defs": {"n": node}, "$ref": "#/$defs/n"}


def wide(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"property_number_{index}": {"type": "string"} for index in range(count)}}


DOUBLING = "\n".join(f"A{index + 1}: A{index} A{index}" for index in range(30))
ALL_OF = {"allOf": [{"oneOf": [{"properties": {f"{x}{i}": {"type": "string"}}} for x in "ab"]} for i in range(20)]}


@pytest.mark.parametrize(
    "compile_it",
    [
        lambda: json_schema_grammar(wide(1500)),  # more than 50 KB
        lambda: json_schema_grammar(wide(800)),
        lambda: json_schema_grammar({"$ref": "#"}),
        lambda: json_schema_grammar(endless(["a"])),
        lambda: json_schema_grammar({"type": "array", "items": {"$ref": "#"}, "minItems": 1}),
        lambda: json_schema_grammar({"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 2}}, "$ref": "#/$defs/a"}),
        lambda: json_schema_grammar({"$ref": "http://127.0.0.1:1/schema.json"}),
        lambda: json_schema_grammar({"$ref": "file:///etc/passwd"}),
        lambda: json_schema_grammar({"type": "banana"}),
        lambda: json_schema_grammar({"type": "array", "uniqueItems": True}),
        lambda: json_schema_grammar({"type": "string", "pattern": "(?=x)a"}),
        lambda: json_schema_grammar(ALL_OF),
        lambda: regex_grammar("(" * 60_000 + "a" + ")" * 60_000),
        lambda: regex_grammar("(" * 1000 + "a" + ")" * 1000),
        lambda: regex_grammar("(a"),
        lambda: regex_grammar(r"(a)\1"),
        lambda: lark_grammar("start: A30\n" + 'A0: "a" | "b"\n' + DOUBLING),
        lambda: lark_grammar("start: " + "(" * 8000 + '"a"' + ")" * 8000),
        lambda: lark_grammar("start: start"),
        lambda: lark_grammar("banana"),
        lambda: lark_grammar(""),
    ],
)
def test_what_cannot_be_enforced_is_refused_quickly(compile_it: Any) -> None:
    started = time.process_time()
    with pytest.raises(UsageError) as caught:
        compile_it()
    assert time.process_time() - started < 3  # tenths of a second when nobody else computes
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    "regex", ["(a+)+$", "((a{1,100}){1,100}){1,100}", "(.*a){1,300}.{400}", r"\p{L}{1,1000}\w{1,100}", "(a|a?)+b"]
)
def test_a_costly_regex_ends_its_own_request_at_worst(vocabulary: ConstraintVocabulary, regex: str) -> None:
    """Nothing catastrophic: there is no backtracking, and what grows is bounded."""
    random = np.random.default_rng(1)
    row = np.zeros(VOCABULARY, np.float32)
    started = time.process_time()
    with contextlib.suppress(ConstraintError, UsageError):
        constraint = vocabulary.constraint(regex_grammar(regex))
        for _ in range(50):
            allowed = np.flatnonzero(np.isfinite(constraint.masked(row)))
            token = int(random.choice(allowed))
            if token == EOS:
                break
            constraint.accept(token)
    assert time.process_time() - started < 10


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_model_that_wants_to_say_something_else_says_what_the_schema_allows(temperature: float) -> None:
    """The fake prefers letters; within a schema of bounded strings it ends by itself, and the answer is valid."""
    schema = {
        "type": "object",
        "properties": {"word": {"type": "string", "maxLength": 5}, "flag": {"type": "boolean"}},
        "required": ["word", "flag"],
        "additionalProperties": False,
    }
    request = GenerationRequest(
        prompt=[1, 2, 3],
        max_tokens=200,
        sampling=SamplingOptions(temperature=temperature, seed=3),
        stop_tokens=frozenset({EOS}),
        grammar=json_schema_grammar(schema),
        logprobs=0,
    )
    events = list(generate(Session(FakeEngine()), FakeTokenizer(), request))
    result = answer(iter(events), 3)
    value = json.loads(result.text)
    assert set(value) == {"word", "flag"}
    assert len(value["word"]) <= 5
    assert result.finish_reason == "stop"
    # The end is known from the grammar: no engine call is spent on asking the model for it.
    assert events[-1].token == ord("}")


def test_a_constraint_leaves_the_model_its_choice() -> None:
    request = GenerationRequest(
        [1], 50, stop_tokens=frozenset({EOS}), grammar=choice_grammar(["hello", "help", "hell no"])
    )
    engine = FakeEngine(script="help is near")
    assert answer(generate(Session(engine), FakeTokenizer(), request), 1).text == "help"


def test_compiled_grammars_are_kept_apart(vocabulary: ConstraintVocabulary) -> None:
    grammar = choice_grammar(["ab", "cd"])
    first, second = vocabulary.constraint(grammar), vocabulary.constraint(grammar)
    first.accept(ord("a"))
    assert np.isfinite(second.masked(np.zeros(VOCABULARY, np.float32))[ord("c")])
    for index in range(40):
        vocabulary.constraint(choice_grammar([str(index)]))
    assert accepts(vocabulary, grammar, "cd")


def test_a_model_without_an_end_cannot_be_constrained() -> None:
    with pytest.raises(ConstraintError, match="ends an answer"):
        ConstraintVocabulary(FakeTokenizer(), VOCABULARY, frozenset({INTEGER_LIMIT}))
