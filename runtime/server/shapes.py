"""The shapes of answers, for the OpenAPI document. What writes the answers lives elsewhere and makes none of these.

The tests hold every answer of a server against these shapes, in both directions: a member that is missing here or there
is a failure. Knows neither routes nor requests.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from runtime.generate import FinishReason
from runtime.server.replies import Timings
from runtime.server.worker import KvUse, State


def _without_defaults(schema: dict[str, Any]) -> None:
    for member in schema.get("properties", {}).values():
        member.pop("default", None)


class Shape(BaseModel):
    """An object with these members and no others. Those that have a default may be absent."""

    # A default here says that a member may be absent, not what its absence means.
    model_config = ConfigDict(extra="forbid", json_schema_extra=_without_defaults)


class ErrorFacts(Shape):
    """``param`` is the field at fault, dotted when it is nested; ``code`` tells kinds of failures apart."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(Shape):
    """A failure as OpenAI's clients expect it; in a stream the last event."""

    error: ErrorFacts


class OllamaError(Shape):
    """A failure as Ollama's clients expect it; in a stream the last line."""

    error: str


class Liveness(Shape):
    """The server's event loop turns."""

    status: Literal["alive"]


class Readiness(Shape):
    """State of the engine; with several models those of all."""

    status: State
    models: dict[str, str] = {}


class ModelEntry(Shape):
    """A model that is served, with what is known of it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context: int = 0
    parameters: int = 0
    engine: str = ""
    dimensions: int = 0
    task: str = ""
    state: str = ""


class ModelList(Shape):
    """All models that are served."""

    object: Literal["list"]
    data: list[ModelEntry]


class RequestCounts(Shape):
    """Requests that are computed, and that wait."""

    running: int
    queued: int


class TokenCounts(Shape):
    """Tokens since the start; ``cached`` are those of prompts that needed no computation."""

    prefill: int
    cached: int
    decode: int


class MemorySplit(Shape):
    """Memory of a process by kind; null where the system does not tell."""

    rss_bytes: int | None
    pss_bytes: int | None
    anonymous_bytes: int | None
    file_bytes: int | None
    swap_bytes: int | None
    peak_bytes: int | None


class MemoryFacts(Shape):
    """Server and engine apart; ``engine`` is null when it has no process of its own."""

    server: MemorySplit
    engine: MemorySplit | None
    available_bytes: int | None


class VramFacts(Shape):
    """What one model has on a GPU; free, total and used (by all programs) are the device's, null where it tells no
    sizes."""

    model: str
    device: str
    description: str
    gpu_layers: int
    layers: int
    planned_bytes: int
    announced_bytes: int
    free_bytes: int | None
    total_bytes: int | None
    used_bytes: int | None


class MachineFacts(Shape):
    """What sensors tell; null where there are none."""

    temperature_c: float | None
    clock_mhz: float | None
    throttled: list[str] | None
    major_faults: int | None
    swapped_in_pages: int | None


class Predicted(Shape):
    """What the plan predicted for its target."""

    target: str
    ram_bytes: int
    prefill_tps: float | None
    decode_tps: float | None


class ModelCard(Shape):
    """A model for people: ``facts`` are names and values to show in order."""

    name: str
    state: str
    generates: bool
    facts: dict[str, str]
    predicted: Predicted | None


class Status(Shape):
    """The server's figures now. ``time_s`` is a clock that never jumps: two documents tell the rates between them.

    ``vram`` is empty where no GPU takes part."""

    time_s: float
    state: State
    requests: RequestCounts
    tokens: TokenCounts
    kv: KvUse | None
    memory: MemoryFacts
    vram: list[VramFacts]
    machine: MachineFacts
    engine_deaths: int
    models: list[ModelCard]


class CachedTokens(Shape):
    """Tokens of the prompt that needed no computation."""

    cached_tokens: int


class CompletionUsage(Shape):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class WrittenFunction(Shape):
    """A call that the model wrote; ``arguments`` is the text of a JSON object."""

    name: str
    arguments: str


class WrittenCall(Shape):
    """One call. ``index`` is there in streams only."""

    id: str
    type: Literal["function"]
    function: WrittenFunction
    index: int = 0


class TokenEntry(Shape):
    """A token and its probability's logarithm."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(TokenEntry):
    """The token that was taken, and the likeliest ones."""

    top_logprobs: list[TokenEntry]


class ChatLogprobs(Shape):
    """Tokens of a choice, or of a piece of it."""

    content: list[ChosenToken]
    refusal: None


class TextLogprobs(Shape):
    """Tokens of a choice, or of a piece of it, as the older API has them."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


Ending = FinishReason | Literal["tool_calls"]


class AssistantMessage(Shape):
    """The answer."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[WrittenCall] = []


class ChatChoice(Shape):
    """One of the answers."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Ending


class ChatCompletion(Shape):
    """The answer to a chat; ``timings`` is not OpenAI's."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: CompletionUsage
    timings: Timings


class ChatDelta(Shape):
    """What a piece adds."""

    role: Literal["assistant"] = "assistant"
    content: str = ""
    tool_calls: list[WrittenCall] = []


class ChatPieceChoice(Shape):
    """What a piece adds to one of the answers."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Ending | None


class ChatPiece(Shape):
    """One event of a streamed chat. The last ones tell timings, and counts when ``include_usage`` asked for them."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatPieceChoice]
    usage: CompletionUsage | None = None
    timings: Timings | None = None


class TextChoice(Shape):
    """One of the answers."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Ending


class TextCompletion(Shape):
    """The answer to a text completion; ``timings`` is not OpenAI's."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: CompletionUsage
    timings: Timings


class TextPieceChoice(Shape):
    """What a piece adds to one of the answers."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Ending | None


class TextPiece(Shape):
    """One event of a streamed text completion."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextPieceChoice]
    usage: CompletionUsage | None = None
    timings: Timings | None = None


class TokenPiece(Shape):
    """A token with its text, or its bytes when they are no text by themselves."""

    id: int
    piece: str | list[int]


class Tokens(Shape):
    """Token ids; with their pieces when ``with_pieces`` asked for them."""

    tokens: list[int] | list[TokenPiece]
    count: int


class Content(Shape):
    """Text of token ids."""

    content: str


class OllamaCalledFunction(Shape):
    """A call that the model wrote."""

    name: str
    arguments: dict[str, Any]


class OllamaCall(Shape):
    """One call."""

    function: OllamaCalledFunction


class OllamaReply(Shape):
    """The answer, or what a line adds to it."""

    role: Literal["assistant"]
    content: str
    tool_calls: list[OllamaCall] = []


class OllamaEnd(Shape):
    """What both kinds of answers and their lines hold. Those from ``done_reason`` on come with the end only;
    durations are nanoseconds."""

    model: str
    created_at: str
    logprobs: list[ChosenToken] = []
    done: bool
    done_reason: FinishReason | Literal["load"] = "stop"
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0
    prompt_eval_duration: int = 0
    eval_count: int = 0
    eval_duration: int = 0


class OllamaText(OllamaEnd):
    """An answer of ``/api/generate``, or one line of its stream."""

    response: str


class OllamaChat(OllamaEnd):
    """An answer of ``/api/chat``, or one line of its stream. ``response`` is there, and empty, without messages."""

    message: OllamaReply
    response: str = ""


class OllamaDetails(Shape):
    """What Ollama's clients show of a model; empty for one of several that is not loaded."""

    parent_model: str = ""
    format: str = ""
    family: str = ""
    families: list[str] = []
    parameter_size: str = ""
    quantization_level: str = ""


class OllamaTag(Shape):
    """A model. ``digest`` is its file's SHA-256, empty when nobody has computed it."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: OllamaDetails


class OllamaTags(Shape):
    """All models."""

    models: list[OllamaTag]


class OllamaVectors(Shape):
    """One vector for each text, in order; durations in nanoseconds."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OllamaModel(Shape):
    """What is known of a model."""

    modelfile: str
    parameters: str
    template: str
    details: OllamaDetails
    model_info: dict[str, str | int]
    capabilities: list[str]
    modified_at: str


class OllamaVersion(Shape):
    """The version of Ollama's API that is spoken here."""

    version: str


class InputUsage(Shape):
    """Token counts."""

    prompt_tokens: int
    total_tokens: int


class Embedding(Shape):
    """One vector: numbers, or little-endian float32 as base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(Shape):
    """One vector for each input, in order."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: InputUsage


class TaskUsage(InputUsage):
    """Token counts."""

    completion_tokens: int


class Translation(Shape):
    """One translation."""

    object: Literal["translate"]
    index: int
    text: str
    finish_reason: Literal["stop", "length"]


class Translations(Shape):
    """One translation for each text, in order."""

    object: Literal["list"]
    data: list[Translation]
    model: str
    usage: TaskUsage


class MaskWord(Shape):
    """A word for a mask, with its probability."""

    token: int
    word: str
    score: float = Field(ge=0, le=1)


class FilledMasks(Shape):
    """The likeliest words for each mask of a text."""

    object: Literal["fill-mask"]
    index: int
    masks: list[list[MaskWord]]


class FilledTexts(Shape):
    """The masks of each text, in order."""

    object: Literal["list"]
    data: list[FilledMasks]
    model: str
    usage: TaskUsage


class LabelScore(Shape):
    """A label with its probability."""

    label: str
    score: float = Field(ge=0, le=1)


class Labels(Shape):
    """All labels of a text, best first."""

    object: Literal["classify"]
    index: int
    labels: list[LabelScore]


class LabelledTexts(Shape):
    """The labels of each text, in order."""

    object: Literal["list"]
    data: list[Labels]
    model: str
    usage: TaskUsage
