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
from runtime.engine import EngineInfo, common_prefix
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
ANSWER_SHARE = 4
"""Of the context, a quarter at most is kept free for an answer when turns are left out."""
OTHER_WORDS = "\N{REFERENCE MARK}"
"""What nobody's question is likely to begin with."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What to submit, one request for each choice, and how the answers are read. ``dropped_messages`` of the
    conversation were left out because the rest filled the context."""

    requests: tuple[GenerationRequest, ...]
    calls: Callable[[], ToolCallReader] | None = None
    echo: str = ""
    dropped_messages: int = 0


@dataclass(frozen=True, slots=True)
class Wish:
    """What all APIs can ask in common, in the engine's words. ``max_tokens`` None is as many as fit. ``drops`` lets the
    oldest turns of a conversation that does not fit be left out, ``shifts`` an answer go on in a full context."""

    sampling: SamplingOptions
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    choices: int = 1
    grammar: str = ""
    drops: bool = False
    shifts: bool = False


class Preparer:
    """Prepares requests for one model. Thread-safe. Every method raises ``ApiError`` naming the field at fault.

    ``marks_shared`` tells requests which of their tokens others are likely to begin with."""

    def __init__(self, model: PromptingModel, info: EngineInfo, *, marks_shared: bool = False) -> None:
        self.model = model
        self._info = info
        self._marks_shared = marks_shared
        self._shared: tuple[str, list[int]] = "", []
        self._form: ToolForm = tool_form(model.chat_template.source if model.chat_template else "")
        self._marks: tuple[tuple[int, str], ...] | None = None

    def chat(self, wanted: ChatRequest) -> Prepared:
        """A request in OpenAI's words."""
        auto = wanted.truncation == "auto"
        if not auto:
            self.check_length(sum(message.characters for message in wanted.messages), "messages")
        tools = wanted.offered_tools
        grammar = self._chat_grammar(wanted, tools)
        wish = replace(_wish(wanted, grammar), drops=auto, shifts=auto)
        return self.conversation(wanted.template_messages, tools, wish)

    def complete(self, wanted: CompletionRequest) -> Prepared:
        """A text completion in OpenAI's words."""
        prompt = wanted.prompt_text_or_ids
        ids = self.text_ids(prompt, "prompt") if isinstance(prompt, str) else self._checked_ids(prompt, "prompt")
        grammar = self._structured(wanted.structured_outputs) if wanted.structured_outputs is not None else ""
        wish = replace(_wish(wanted, grammar), shifts=wanted.truncation == "auto")
        echo = ""
        if wanted.echo:
            echo = prompt if isinstance(prompt, str) else self.model.tokenizer.decode(ids)
        return Prepared(self.requests(ids, wish, "prompt"), echo=echo)

    def conversation(self, messages: Sequence[dict[str, Any]], tools: Sequence[Tool], wish: Wish) -> Prepared:
        """A chat whose messages are as the template wants them."""
        dropped, ids = self._fitting(messages, tools, wish) if wish.drops else (0, self.chat_ids(messages, tools))
        shared = self._shared_tokens(ids, messages, tools) if self._marks_shared or wish.shifts else 0
        requests = self.requests(ids, wish, "messages", shared)
        if not tools:
            return Prepared(requests, dropped_messages=dropped)
        names = frozenset(tool.name for tool in tools)
        requests = tuple(replace(request, spelled=self._spelled_marks()) for request in requests)
        return Prepared(requests, calls=lambda: ToolCallReader(self._form, names), dropped_messages=dropped)

    def _fitting(self, messages: Sequence[dict[str, Any]], tools: Sequence[Tool], wish: Wish) -> tuple[int, list[int]]:
        """How many messages have to be left out for the rest, and room for an answer, to fit; the tokens of the rest.

        Whole turns are left out, oldest first: a result without its call, or an answer without its question, would
        say nothing. Leading system messages and the newest turn stay. Without a way to fit it is the least that is
        possible, which the request is then refused for.
        """
        context = self._info.context
        answer = min(wish.max_tokens or context, context // ANSWER_SHARE)
        lead = _leading(messages)
        turns = [at for at in range(lead, len(messages)) if messages[at]["role"] == "user"] or [lead]
        # Tokenizing what cannot fit would take time from others. Every place to cut is a turn, but for the first.
        characters = prompt_characters_limit(context)
        sizes = [len(str(message)) for message in messages]
        cuts = [lead, *turns[1:]]
        while len(cuts) > 1 and sum(sizes[:lead]) + sum(sizes[cuts[0] :]) > characters:
            del cuts[0]
        self.check_length(sum(sizes[:lead]) + sum(sizes[cuts[0] :]), "messages")

        def tokens(cut: int) -> list[int]:
            return self.chat_ids([*messages[:lead], *messages[cut:]], tools)

        ids = tokens(cuts[0])
        if len(ids) <= context - answer:
            return cuts[0] - lead, ids
        # More is left out than has to be, in steps, so that the next turns of the chat cut at the same place and find
        # in the cache what this one computed.
        step = max(context // ANSWER_SHARE, 1)
        least = -(-(len(ids) - (context - answer)) // step) * step
        low, high = 1, len(cuts) - 1
        found = {len(cuts) - 1: tokens(cuts[-1])} if high else {0: ids}
        while low < high:
            middle = (low + high) // 2
            found[middle] = tokens(cuts[middle])
            if len(ids) - len(found[middle]) >= least:
                high = middle
            else:
                low = middle + 1
        return cuts[high] - lead, found[high]

    def _shared_tokens(self, ids: list[int], messages: Sequence[dict[str, Any]], tools: Sequence[Tool]) -> int:
        """Tokens at the beginning of a conversation that do not depend on what anybody says in it: those of tools, of
        leading system messages, and of the template itself. Found by comparison with another conversation, since only
        the template knows."""
        lead = list(messages[: _leading(messages)])
        key, known = self._shared
        if key != f"{lead}{tools}" or common_prefix(known, ids) < len(known):  # the template may tell the date
            try:
                other = self.chat_ids([*lead, {"role": "user", "content": OTHER_WORDS}], tools)
            except ApiError:  # a template that refuses it
                return 0
            known = other[: common_prefix(other, ids)]
            self._shared = f"{lead}{tools}", known
        return min(len(known), len(ids) - 1)

    def requests(self, prompt: list[int], wish: Wish, param: str, shared: int = 0) -> tuple[GenerationRequest, ...]:
        """One request for each choice, as far as the context reaches; ``param`` is where the prompt came from and
        ``shared`` how many of its tokens other prompts are likely to begin with.

        A seed counts up from choice to choice, since equal seeds would give equal answers.
        """
        if not prompt:
            raise ApiError(400, f"{param}: it is empty", param=param, code="invalid_value")
        outside = next((token for token, _ in wish.sampling.logit_bias if token >= self._info.vocabulary), None)
        if outside is not None:
            raise self._outside(outside, "logit_bias")
        # The last token is sampled but never computed, so one more than the free places can be generated.
        room = self._info.context - len(prompt) + 1
        most = wish.max_tokens or room
        kept = shared or (self.model.bos is not None and prompt[0] == self.model.bos)
        first = GenerationRequest(
            prompt=prompt,
            max_tokens=max(1, most if wish.shifts else min(most, room)),
            sampling=wish.sampling,
            stop=wish.stop,
            stop_tokens=self.model.stop_tokens,
            logprobs=wish.logprobs,
            grammar=wish.grammar,
            keep=min(int(kept), self._info.context - 2) if wish.shifts else None,
            shared=shared,
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


def _wish(wanted: ChatRequest | CompletionRequest, grammar: str) -> Wish:
    stop = tuple(wanted.stop)
    return Wish(wanted.sampling, wanted.tokens_wanted, stop, wanted.logprobs_wanted, wanted.n, grammar)


def _leading(messages: Sequence[dict[str, Any]]) -> int:
    """How many system messages a conversation begins with."""
    return next((at for at, message in enumerate(messages) if message["role"] != "system"), len(messages))


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
