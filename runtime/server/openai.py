"""The OpenAI vocabulary: what requests may say. ``replies`` writes the answers.

Pure data in, pure data out. A field of OpenAI's API that this server cannot honour is refused by name unless it asks
for nothing; no field is accepted and dropped, apart from labels that ask for no behaviour (``user``, ``metadata``).
Knows nothing of HTTP, engines or tokens.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic_core
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)

from runtime.generate import LOGPROBS_LIMIT
from runtime.sampling import SamplingOptions
from runtime.server.errors import ApiError
from runtime.server.limits import (
    BIAS_COUNT_LIMIT,
    CHOICE_COUNT_LIMIT,
    JSON_DEPTH_LIMIT,
    MESSAGE_COUNT_LIMIT,
    STOP_COUNT_LIMIT,
    STOP_LENGTH_LIMIT,
    TOOL_COUNT_LIMIT,
    check_depth,
)
from runtime.tools import NO_PARAMETERS, Tool

COMPLETION_TOKENS_DEFAULT = 16
INTEGER_LIMIT = 2**31 - 1
SEED_LIMIT = 2**63 - 1
NAME_LENGTH_LIMIT = 256
CHOICE_TEXT_LIMIT = 256

# Fields of the API that are not offered, with the values that ask for nothing and therefore pass (``Body``).
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "reasoning_effort": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "verbosity": (),
    "web_search_options": (),
}
_NULL: dict[str, Any] = {"type": "null"}
_LABELS = frozenset(
    {"metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier", "user"}
)


class StrictModel(BaseModel):
    """Takes what is listed and nothing else, without conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class EchoedModel(StrictModel):
    """Clients echo answers back with every absent field as null or empty; absent they are, whatever their name."""

    @model_validator(mode="before")
    @classmethod
    def _without_nothing(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: item for name, item in value.items() if item is not None and item != []}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return _permitting(handler, core_schema, [_NULL, {"type": "array", "maxItems": 0}])


_Text = Annotated[str, Field(min_length=1)]


class TextPart(StrictModel):
    """One piece of a message; text is the only kind."""

    type: Literal["text"]
    text: str


class CalledFunction(StrictModel):
    """The function of a call: its name and the text of a JSON object."""

    name: str = Field(min_length=1, max_length=NAME_LENGTH_LIMIT)
    arguments: str


class MessageToolCall(StrictModel):
    """A call that the assistant made earlier."""

    id: str = Field(max_length=NAME_LENGTH_LIMIT)
    type: Literal["function"] = "function"
    function: CalledFunction

    def template_document(self, place: str) -> dict[str, Any]:
        """With the arguments as an object, which templates write in their own way. Raises ``ApiError``."""
        param = f"{place}.function.arguments"
        try:
            arguments = pydantic_core.from_json(self.function.arguments, allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"{param}: not JSON: {error}", param=param, code="invalid_value") from error
        if not isinstance(arguments, dict) or not check_depth(arguments):
            message = f"{param}: not an object at most {JSON_DEPTH_LIMIT} levels deep"
            raise ApiError(400, message, param=param, code="invalid_value")
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


class Message(EchoedModel):
    """One message of a chat. Parts are joined by ``text``. Only calls of tools may stand without a content."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=MESSAGE_COUNT_LIMIT)] | None = None
    tool_calls: Annotated[list[MessageToolCall], Field(max_length=TOOL_COUNT_LIMIT)] = []
    tool_call_id: str | None = Field(default=None, max_length=NAME_LENGTH_LIMIT)
    name: str | None = Field(default=None, max_length=NAME_LENGTH_LIMIT)

    @property
    def text(self) -> str:
        if self.content is None:
            return ""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    @property
    def characters(self) -> int:
        """Size of everything in it that reaches the model."""
        return len(self.text) + sum(len(call.function.name + call.function.arguments) for call in self.tool_calls)

    def template_message(self, place: str) -> dict[str, Any]:
        """As chat templates expect it; ``developer`` is OpenAI's newer word for ``system``. Raises ``ApiError``."""
        self._check(place)
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.text}
        if self.tool_calls:
            calls = enumerate(self.tool_calls)
            message["tool_calls"] = [call.template_document(f"{place}.tool_calls.{index}") for index, call in calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            message["name"] = self.name
        return message

    def _check(self, place: str) -> None:
        """What belongs to which role."""
        wrong = ""
        if self.content is None and not self.tool_calls:
            wrong = "content"
        elif self.tool_calls and self.role != "assistant":
            wrong = "tool_calls"
        elif (self.tool_call_id is not None) != (self.role == "tool"):
            wrong = "tool_call_id"
        elif self.name is not None and self.role != "tool":
            wrong = "name"
        if wrong:
            missing = getattr(self, wrong) is None
            message = f"{place}.{wrong}: " + ("field required" if missing else f"not allowed for role {self.role}")
            raise ApiError(400, message, param=f"{place}.{wrong}", code="invalid_value")


class ToolFunction(StrictModel):
    """A function to offer. ``strict`` changes nothing: arguments are enforced whenever a call is."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: dict(NO_PARAMETERS))
    strict: bool | None = None


class ToolEntry(StrictModel):
    """One entry of ``tools``; functions are the only kind."""

    type: Literal["function"]
    function: ToolFunction


class NamedFunction(StrictModel):
    """The name in ``tool_choice``."""

    name: str


class NamedTool(StrictModel):
    """``tool_choice`` that asks for one function."""

    type: Literal["function"]
    function: NamedFunction


class NamedSchema(StrictModel):
    """``response_format.json_schema``. It is always enforced, ``strict`` or not; name and description are labels."""

    name: str = Field(max_length=NAME_LENGTH_LIMIT)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(StrictModel):
    """What the answer has to be: any text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class StructuredOutputs(StrictModel):
    """Constraints beyond OpenAI's, under vLLM's names; exactly one of them."""

    json_: dict[str, Any] | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Annotated[list[_Text], Field(min_length=1, max_length=CHOICE_TEXT_LIMIT)] | None = None
    grammar: str | None = None


def _boolean(value: Any) -> Any:
    """A literal of Python takes 0 for False."""
    if not isinstance(value, bool):
        raise ValueError("Input should be a valid boolean")
    return value


class StreamOptions(StrictModel):
    """``include_usage`` asks for one more event with the token counts. Obfuscation padding is never sent."""

    include_usage: bool = False
    include_obfuscation: Annotated[Literal[False], BeforeValidator(_boolean)] = False


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


StopText = Annotated[str, Field(min_length=1, max_length=STOP_LENGTH_LIMIT)]
StopTexts = Annotated[
    list[StopText],
    Field(max_length=STOP_COUNT_LIMIT),
    BeforeValidator(
        _listed, json_schema_input_type=StopText | Annotated[list[StopText], Field(max_length=STOP_COUNT_LIMIT)]
    ),
]
ModelName = Annotated[str, Field(max_length=NAME_LENGTH_LIMIT)]
TokenId = Annotated[int, Field(ge=0, le=INTEGER_LIMIT)]
_TokenCount = Annotated[int, Field(ge=1, le=INTEGER_LIMIT)]
_Bias = Annotated[float, Field(ge=-100, le=100)]
_TokenText = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


class Body(StrictModel):
    """A request's body. ``labels`` are fields that ask for no behaviour and are not looked at, ``unsupported`` those
    that this server cannot honour, with the values that ask for nothing."""

    labels: ClassVar[frozenset[str]] = frozenset()
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = _permitting(handler, core_schema, [_NULL])
        properties = handler.resolve_ref_schema(schema).setdefault("properties", {})
        properties |= {name: {"description": "Read by nobody."} for name in sorted(cls.labels)}
        properties |= {name: {"enum": [None, *values]} for name, values in sorted(cls.unsupported.items())}
        return schema


class _Sampled(Body):
    """What both kinds of completion may ask. The sampling fields beyond OpenAI's are those of ``SamplingOptions``."""

    labels: ClassVar[frozenset[str]] = _LABELS
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = _UNSUPPORTED

    model: ModelName | None = None
    n: int = Field(default=1, ge=1, le=CHOICE_COUNT_LIMIT)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    stop: StopTexts = []
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, le=INTEGER_LIMIT)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=10)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: Annotated[dict[_TokenText, _Bias], Field(max_length=BIAS_COUNT_LIMIT)] = {}
    structured_outputs: StructuredOutputs | None = None
    seed: int | None = Field(default=None, ge=0, le=SEED_LIMIT)
    truncation: Literal["auto", "disabled"] = "disabled"

    @property
    def sampling(self) -> SamplingOptions:
        return SamplingOptions(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple((int(token), bias) for token, bias in self.logit_bias.items()),
            seed=self.seed,
        )


class ChatRequest(_Sampled):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MESSAGE_COUNT_LIMIT)]
    max_tokens: _TokenCount | None = None
    max_completion_tokens: _TokenCount | None = None
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=LOGPROBS_LIMIT)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[ToolEntry], Field(max_length=TOOL_COUNT_LIMIT)] = []
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True

    @property
    def logprobs_wanted(self) -> int | None:
        """Likeliest tokens to tell of, None when no probability was asked for. Raises ``ApiError``."""
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs: it needs logprobs", param="top_logprobs", code="invalid_value")
        return self.top_logprobs if self.logprobs else None

    @property
    def template_messages(self) -> list[dict[str, Any]]:
        """The conversation for a chat template. Raises ``ApiError`` naming the message that is wrong."""
        return [message.template_message(f"messages.{index}") for index, message in enumerate(self.messages)]

    @property
    def offered_tools(self) -> list[Tool]:
        """The functions that the model may call in this answer; none for ``tool_choice`` none."""
        if self.tool_choice == "none":
            return []
        functions = [entry.function for entry in self.tools]
        return [Tool(function.name, function.description, function.parameters) for function in functions]

    @property
    def tokens_wanted(self) -> int | None:
        """Most tokens to generate, None for as many as fit. The newer field wins, as at OpenAI."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class CompletionRequest(_Sampled):
    """Body of ``POST /v1/completions``: one prompt, as text or as token ids, alone or in a list of one."""

    prompt: str | list[TokenId] | Annotated[list[str], Field(min_length=1, max_length=1)] | list[list[TokenId]]
    max_tokens: _TokenCount = COMPLETION_TOKENS_DEFAULT
    logprobs: int | None = Field(default=None, ge=0, le=LOGPROBS_LIMIT)
    echo: bool = False

    @property
    def logprobs_wanted(self) -> int | None:
        """Likeliest tokens to tell of. Raises ``ApiError`` for those of the prompt, which are not kept."""
        if self.echo and self.logprobs is not None:
            message = "echo: probabilities of the prompt are not offered; ask for echo or logprobs"
            raise ApiError(400, message, param="echo", code="unsupported_parameter")
        return self.logprobs

    @property
    def tokens_wanted(self) -> int | None:
        return self.max_tokens

    @property
    def prompt_text_or_ids(self) -> str | list[int]:
        """The one prompt. Raises ``ApiError`` when a list holds none or several."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return prompt
        if all(isinstance(item, int) for item in prompt) and prompt:
            return [item for item in prompt if isinstance(item, int)]
        if len(prompt) != 1:
            raise ApiError(400, "prompt: exactly one prompt per request", param="prompt", code="invalid_value")
        first = prompt[0]
        if isinstance(first, int) or not first:
            raise ApiError(400, "prompt: it is empty", param="prompt", code="invalid_value")
        return first


_Request = TypeVar("_Request", bound=Body)


def parse_request(kind: type[_Request], document: Any) -> _Request:
    """A validated request. Raises ``ApiError`` 400 naming the first field that is wrong, unknown or not supported."""
    if not isinstance(document, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_type")
    fields: dict[str, Any] = {}
    for name, value in document.items():
        if value is None or name in kind.labels:
            continue
        if name in kind.model_fields:
            fields[name] = value
        elif name not in kind.unsupported:
            raise ApiError(400, f"unknown field {name[:64]!r}", param=name[:64], code="unknown_parameter")
        elif not _asks_nothing(value, kind.unsupported[name]):
            raise ApiError(400, f"{name} is not supported by this server", param=name, code="unsupported_parameter")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _as_api_error(error) from error


def _permitting(handler: GetJsonSchemaHandler, core_schema: Any, nothing: list[dict[str, Any]]) -> dict[str, Any]:
    """The JSON schema of a model that takes ``nothing`` for every field that may be absent, known or not."""
    schema = handler(core_schema)
    document = handler.resolve_ref_schema(schema)
    for name, field in document.get("properties", {}).items():
        if name not in document.get("required", ()):
            outer = {key: field.pop(key) for key in ("title", "default", "description") if key in field}
            kinds = [kind for kind in field.pop("anyOf", [field]) if kind and kind not in nothing]
            document["properties"][name] = {"anyOf": [*kinds, *nothing], **outer}
    document["additionalProperties"] = nothing[0] if len(nothing) == 1 else {"anyOf": nothing}
    return schema


def _asks_nothing(value: Any, neutrals: tuple[Any, ...]) -> bool:
    """Equality that keeps booleans and numbers apart: ``n: true`` is not ``n: 1``."""
    return any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in neutrals)


def _as_api_error(error: ValidationError) -> ApiError:
    """Names the deepest place that failed; of a union's alternatives that is the one that came nearest."""
    first = max(
        error.errors(include_url=False, include_context=False, include_input=False), key=lambda e: len(e["loc"])
    )
    # Pydantic puts names of types (``list[...]``, ``TextPart``) between the keys of a union; a client knows only keys.
    parts = [str(part) for part in first["loc"] if isinstance(part, int) or (part.islower() and part.isidentifier())]
    parts = [part for part in parts if part not in {"str", "int", "none", "auto", "required"}]
    param = ".".join(parts)
    return ApiError(400, f"{param}: {first['msg']}", param=param, code="invalid_value")
