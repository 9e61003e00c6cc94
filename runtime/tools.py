"""Tool calls as models write them: found in an answer while it is written, and enforced where they are required.

Three forms cover the common templates: ``hermes`` (also Qwen) puts JSON between ``<tool_call>`` marks, ``mistral`` puts
a list after ``[TOOL_CALLS]``, ``json`` (Llama 3) answers with nothing but an object. Knows text and schemas; nothing of
HTTP or of how a template shows tools to the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pydantic_core

from runtime.constraint import check_finite, checked_grammar, json_rule
from runtime.generate import overlap
from runtime.tokenizer import TextTokenizer

ToolForm = Literal["hermes", "mistral", "json"]
NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_OPENING = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]", "json": "<|python_tag|>"}
_CLOSING = "</tool_call>"


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. ``parameters`` is the JSON schema of its one argument, an object."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: NO_PARAMETERS)

    @property
    def template_document(self) -> dict[str, Any]:
        """As chat templates expect it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model wrote. ``arguments`` is the text of a JSON object."""

    name: str
    arguments: str


def tool_form(template: str) -> ToolForm:
    """The form in which a model with this chat template writes its calls."""
    if "<tool_call>" in template:
        return "hermes"
    return "mistral" if "[TOOL_CALLS]" in template else "json"


def spelled_marks(form: ToolForm, tokenizer: TextTokenizer) -> tuple[tuple[int, str], ...]:
    """Marks of the form that are single special tokens of the vocabulary: they have to appear in the text."""
    marks = [_OPENING[form], *([_CLOSING] if form == "hermes" else [])]
    encoded = [(tokenizer.encode(mark), mark) for mark in marks]
    return tuple((ids[0], mark) for ids, mark in encoded if len(ids) == 1 and not tokenizer.token_bytes(ids[0]))


def tool_call_grammar(
    tools: Sequence[Tool],
    form: ToolForm,
    spelled: Sequence[tuple[int, str]],
    *,
    several: bool,
    answer: Mapping[str, Any] | None = None,
) -> str:
    """A grammar for calls of ``tools`` and nothing else, one or ``several``; or for a value of the schema ``answer``.

    Raises ``UsageError`` when the schema of a tool cannot be enforced.
    """
    marks = {mark: f"<[{token}]>" for token, mark in spelled}
    key = "parameters" if form == "json" else "arguments"
    rules: list[str] = []
    for index, tool in enumerate(tools):
        check_finite(tool.parameters)
        opening = f'{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "{key}": '
        rules.append(f'call_{index}: {json.dumps(opening, ensure_ascii=False)} arguments_{index} "}}"')
        rules.append(f"arguments_{index}: {json_rule(tool.parameters)}")
    rules.append("call: " + " | ".join(f"call_{index}" for index in range(len(tools))))
    if form == "hermes":
        opening, closing = (marks.get(mark) or json.dumps(mark) for mark in (_OPENING[form], _CLOSING))
        rules.append(f'marked: {opening} "\\n" call "\\n" {closing}')
        rules.append("calls: marked" + (' ("\\n" marked)*' if several else ""))
    elif form == "mistral":
        opening = marks.get(_OPENING[form]) or json.dumps(_OPENING[form])
        rules.append(f'calls: {opening} "[" call' + (' (", " call)*' if several else "") + ' "]"')
    else:
        rules.append("calls: call" + (' ("; " call)*' if several else ""))
    rules.append("start: calls" if answer is None else f"start: calls | answer\nanswer: {json_rule(answer)}")
    return checked_grammar("\n".join(rules))


class ToolCallReader:
    """Separates calls from other text as it arrives. What looks like a call and is none stays text."""

    def __init__(self, form: ToolForm, names: frozenset[str]) -> None:
        self._form = form
        self._names = names
        self._opening = _OPENING[form]
        self._closing = _CLOSING if form == "hermes" else ""
        self._buffer = ""
        self._inside = False
        self._begun = False  # some text was given out, or a call was found

    def push(self, text: str) -> list[str | ToolCall]:
        """Text and whole calls that are certain with ``text``, in order."""
        self._buffer += text
        return self._read(final=False)

    def finish(self) -> list[str | ToolCall]:
        """The rest, when nothing follows."""
        return self._read(final=True)

    def _read(self, *, final: bool) -> list[str | ToolCall]:
        found: list[str | ToolCall] = []
        while self._buffer:
            part = self._call(final=final) if self._inside else self._text(final=final)
            if part is None:
                break
            found.extend(part)
        return found

    def _text(self, *, final: bool) -> list[str | ToolCall] | None:
        """Text before the next call; None when more has to come first. White space in front of a call is no text."""
        text = self._buffer
        start = text.find(self._opening)
        if start < 0 and self._form == "json" and not self._begun and text.lstrip()[:1] == "{":
            start = 0
        if start >= 0:
            before = text[:start].rstrip()
            self._buffer, self._inside = text[start:], True
        else:
            keep = 0 if final else overlap(text, self._opening)
            before = text[: len(text) - keep]
            before = before if final and not before.isspace() else before.rstrip()
            self._buffer = "" if final else text[len(before) :]
        self._begun = self._begun or bool(before)
        if before:
            return [before]
        return [] if self._inside or final else None

    def _call(self, *, final: bool) -> list[str | ToolCall] | None:
        end = self._buffer.find(self._closing) if self._closing else -1
        if end < 0 and not final:
            return None
        raw = self._buffer if end < 0 else self._buffer[: end + len(self._closing)]
        self._buffer, self._inside, self._begun = self._buffer[len(raw) :], False, True
        body = raw.removeprefix(self._opening)
        calls = self._parsed(body.removesuffix(self._closing) if self._closing else body)
        return [*calls] if calls else [raw]

    def _parsed(self, body: str) -> list[ToolCall]:
        """The calls in JSON text; none when any part of it is not a call of a known tool."""
        bodies = [body] if self._form != "json" else re.split(r"\s*;\s*(?=\{)", body)
        try:
            # pydantic's parser has a bound on nesting; the standard library's would exhaust the stack.
            values = [pydantic_core.from_json(part.strip()) for part in bodies]
        except ValueError:
            return []
        listed = [item for value in values for item in (value if isinstance(value, list) else [value])]
        calls = [self._as_call(item) for item in listed]
        return [call for call in calls if call is not None] if None not in calls else []

    def _as_call(self, item: Any) -> ToolCall | None:
        if not isinstance(item, dict) or item.get("name") not in self._names:
            return None
        arguments = item.get("arguments", item.get("parameters", {}))
        if isinstance(arguments, str):
            try:
                arguments = pydantic_core.from_json(arguments)
            except ValueError:
                return None
        if not isinstance(arguments, dict):
            return None
        return ToolCall(item["name"], pydantic_core.to_json(arguments, inf_nan_mode="null").decode())
