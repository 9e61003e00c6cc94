"""From what a request asks to what the engine is to generate: prompts, tools, grammars, limits.

Knows the model's words and the requests' fields; not HTTP, and not how answers are written. Everything here may take
a while (templates, tokenizing, grammars), so the routes call it in a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from edgelm.errors import ContextOverflowError, EdgelmError
from runtime.constraint import (
    choice_grammar,
    constraint_vocabulary,
    json_schema_grammar,
    lark_grammar,
    regex_grammar,
)
from runtime.engine import EngineInfo
from runtime.generate import GenerationRequest, check_request
from runtime.model import LoadedModel, PromptingModel
from runtime.sampling import SamplingOptions
from runtime.server.errors import ApiError
from runtime.server.limits import prompt_characters_limit
from runtime.server.openai import (
    ChatRequest,
    CompletionRequest,
    NamedTool,
    ResponseFormat,
    StructuredOutputs,
)
from runtime.server.worker import NotReadyError
from runtime.tools import Tool, ToolCallReader, ToolForm, spelled_marks, tool_call_grammar, tool_form

_Made = TypeVar("_Made")
ANY_OBJECT: dict[str, Any] = {"type": "object"}


@dataclass(frozen=True, slots=True)
class Prepared:
    """What to submit, one request for each choice, and how the answers are read."""

    requests: tuple[GenerationRequest, ...]
    calls: Callable[[], ToolCallReader] | None = None
    echo: str = ""


@dataclass(frozen=True, slots=True)
class Wish:
    """What all APIs can ask in common, in the engine's words. ``max_tokens`` None is as many as fit."""

    sampling: SamplingOptions
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    choices: int = 1
    grammar: str = ""


class Preparer:
    """Prepares requests for one model. Thread-safe. Every method raises ``ApiError`` naming the field at fault."""

    def __init__(self, model: PromptingModel, info: EngineInfo) -> None:
        self.model = model
        self._info = info
        self._form: ToolForm = tool_form(model.chat_template.source if model.chat_template else "")
        self._marks: tuple[tuple[int, str], ...] | None = None

    def chat(self, wanted: ChatRequest) -> Prepared:
        """A request in OpenAI's words."""
        self.check_length(sum(message.characters for message in wanted.messages), "messages")
        tools = wanted.offered_tools
        grammar = self._chat_grammar(wanted, tools)
        wish = Wish(
            wanted.sampling, wanted.tokens_wanted, tuple(wanted.stop), wanted.logprobs_wanted, wanted.n, grammar
        )
        return self.conversation(wanted.template_messages, tools, wish)

    def complete(self, wanted: CompletionRequest) -> Prepared:
        """A text completion in OpenAI's words."""
        prompt = wanted.prompt_text_or_ids
        ids = self.text_ids(prompt, "prompt") if isinstance(prompt, str) else self._checked_ids(prompt, "prompt")
        grammar = self._structured(wanted.structured_outputs) if wanted.structured_outputs is not None else ""
        wish = Wish(
            wanted.sampling, wanted.tokens_wanted, tuple(wanted.stop), wanted.logprobs_wanted, wanted.n, grammar
        )
        echo = ""
        if wanted.echo:
            echo = prompt if isinstance(prompt, str) else self.model.tokenizer.decode(ids)
        return Prepared(self.requests(ids, wish, "prompt"), echo=echo)

    def conversation(self, messages: Sequence[dict[str, Any]], tools: Sequence[Tool], wish: Wish) -> Prepared:
        """A chat whose messages are as the template wants them."""
        ids = self.chat_ids(messages, tools)
        if not tools:
            return Prepared(self.requests(ids, wish, "messages"))
        names = frozenset(tool.name for tool in tools)
        requests = (replace(request, spelled=self._spelled_marks()) for request in self.requests(ids, wish, "messages"))
        return Prepared(tuple(requests), calls=lambda: ToolCallReader(self._form, names))

    def requests(self, prompt: list[int], wish: Wish, param: str) -> tuple[GenerationRequest, ...]:
        """One request for each choice, as far as the context reaches; ``param`` is where the prompt came from.

        A seed counts up from choice to choice, since equal seeds would give equal answers.
        """
        if not prompt:
            raise ApiError(400, f"{param}: it is empty", param=param, code="invalid_value")
        outside = next((token for token, _ in wish.sampling.logit_bias if token >= self._info.vocabulary), None)
        if outside is not None:
            raise self._outside(outside, "logit_bias")
        # The last token is sampled but never computed, so one more than the free places can be generated.
        room = self._info.context - len(prompt) + 1
        first = GenerationRequest(
            prompt=prompt,
            max_tokens=max(1, min(wish.max_tokens or room, room)),
            sampling=wish.sampling,
            stop=wish.stop,
            stop_tokens=self.model.stop_tokens,
            logprobs=wish.logprobs,
            grammar=wish.grammar,
        )
        try:
            check_request(first, self._info.context)
        except ContextOverflowError as error:
            raise ApiError(400, error.message, param=param, code="context_length_exceeded") from error
        seed = wish.sampling.seed
        if seed is None:
            return (first,) * wish.choices
        seeded = (replace(wish.sampling, seed=seed + index) for index in range(wish.choices))
        return tuple(replace(first, sampling=sampling) for sampling in seeded)

    def text_ids(self, text: str, param: str, *, plain: bool = True, special: bool = False) -> list[int]:
        """Token ids of a text: as a prompt with what it has to start with, or (``plain`` off) nothing but the text."""
        self.check_length(len(text), param)
        if plain:
            return self._named(param, lambda: self.model.text_prompt(text))
        return self._named(param, lambda: self.model.tokenizer.encode(text, special=special))

    def chat_ids(self, messages: Sequence[dict[str, Any]], tools: Sequence[Tool]) -> list[int]:
        """Token ids of a conversation, tools included."""
        template = self.model.chat_template
        if tools and template is not None and not template.uses_tools:
            message = "tools: the chat template of this model cannot show tools to it"
            raise ApiError(400, message, param="tools", code="unsupported_parameter")
        self.check_length(sum(len(str(tool.parameters)) + len(tool.description) for tool in tools), "tools")
        documents = [tool.template_document for tool in tools] or None
        return self._named("messages", lambda: self.model.chat_prompt(messages, documents))

    def text_of(self, tokens: list[int]) -> str:
        """The text of token ids, special tokens written out."""
        return self.model.tokenizer.decode(self._checked_ids(tokens, "tokens"), special=True)

    def schema_grammar(self, schema: dict[str, Any], param: str) -> str:
        """A grammar for a JSON schema."""
        return self._grammar(param, lambda: json_schema_grammar(schema))

    def check_length(self, characters: int, param: str) -> None:
        """Refuse what cannot fit into the context before any time is spent on it."""
        limit = prompt_characters_limit(self._info.context)
        if characters > limit:
            message = (
                f"{param}: {characters} characters are more than fit; the context holds {self._info.context} tokens"
            )
            raise ApiError(400, message, param=param, code="context_length_exceeded")

    def _chat_grammar(self, wanted: ChatRequest, tools: Sequence[Tool]) -> str:
        """What the answer is held to by its format, its constraint and the choice of tools together."""
        form, structured = wanted.response_format, wanted.structured_outputs
        schema, param = _format_schema(form)
        if structured is not None and (schema is not None or tools):
            other = "tools" if tools else "response_format"
            message = f"structured_outputs: it cannot be combined with {other}"
            raise ApiError(400, message, param="structured_outputs", code="invalid_value")
        if structured is not None:
            return self._structured(structured)
        choice = wanted.tool_choice
        if choice in ("auto", "none") and (schema is None or not tools):
            return "" if schema is None else self.schema_grammar(schema, param)
        named = choice.function.name if isinstance(choice, NamedTool) else None
        allowed = [tool for tool in tools if named is None or tool.name == named]
        if not allowed:
            reason = "tools are needed" if named is None else "there is no tool of that name"
            raise ApiError(400, f"tool_choice: {reason}", param="tool_choice", code="invalid_value")
        answer = schema if choice == "auto" else None
        several = wanted.parallel_tool_calls and named is None
        return self._grammar(
            "tools",
            lambda: tool_call_grammar(allowed, self._form, self._spelled_marks(), several=several, answer=answer),
        )

    def _structured(self, wanted: StructuredOutputs) -> str:
        kinds = {
            "json": wanted.json_,
            "regex": wanted.regex,
            "choice": wanted.choice,
            "grammar": wanted.grammar,
        }
        given = [name for name, value in kinds.items() if value is not None]
        if len(given) != 1:
            message = "structured_outputs: exactly one of json, regex, choice, grammar"
            raise ApiError(400, message, param="structured_outputs", code="invalid_value")
        param = f"structured_outputs.{given[0]}"
        if wanted.json_ is not None:
            return self.schema_grammar(wanted.json_, param)
        if wanted.choice is not None:
            choices = wanted.choice
            return self._grammar(param, lambda: choice_grammar(choices))
        if wanted.regex is not None:
            regex = wanted.regex
            return self._grammar(param, lambda: regex_grammar(regex))
        return self._grammar(param, lambda: lark_grammar(wanted.grammar or ""))

    def _grammar(self, param: str, make: Callable[[], str]) -> str:
        """A grammar, and the vocabulary that it will need, which is built once and here rather than by the scheduler
        while others wait for their tokens."""

        def prepared() -> str:
            # An engine in a process of its own builds the vocabulary there.
            if isinstance(self.model, LoadedModel):
                constraint_vocabulary(self.model.tokenizer, self._info.vocabulary, self.model.stop_tokens)
            return make()

        return self._named(param, prepared)

    def _spelled_marks(self) -> tuple[tuple[int, str], ...]:
        """Special tokens of the vocabulary that mark calls; found out when the first call can come."""
        if self._marks is None:
            self._marks = spelled_marks(self._form, self.model.tokenizer)
        return self._marks

    def _checked_ids(self, ids: list[int], param: str) -> list[int]:
        outside = next((token for token in ids if not 0 <= token < self._info.vocabulary), None)
        if outside is not None:
            raise self._outside(outside, param)
        return ids

    def _outside(self, token: int, param: str) -> ApiError:
        message = f"{param}: token {token} is outside the vocabulary of {self._info.vocabulary}"
        return ApiError(400, message, param=param, code="invalid_value")

    def _named(self, param: str, make: Callable[[], _Made]) -> _Made:
        """Run ``make`` and name ``param`` when it fails."""
        try:
            return make()
        except NotReadyError:
            raise
        except EdgelmError as error:
            raise ApiError(400, f"{param}: {error.message}", param=param, code="invalid_value") from error


def _format_schema(form: ResponseFormat | None) -> tuple[dict[str, Any] | None, str]:
    """The schema that a response format asks for, and the field that it stands in."""
    if form is None or form.type == "text":
        return None, "response_format"
    if form.type == "json_object":
        return ANY_OBJECT, "response_format"
    if form.json_schema is None:
        message = "response_format.json_schema: field required"
        raise ApiError(400, message, param="response_format.json_schema", code="invalid_value")
    return form.json_schema.schema_, "response_format.json_schema.schema"
