"""Ollama's routes, token counting and the models' cards: what the server answers besides OpenAI's completions.

Knows the model's facts and the requests' words; how a generation is submitted is handed in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from runtime.engine import EngineInfo
from runtime.model import PromptingModel
from runtime.server.answering import GenerationResponse
from runtime.server.errors import ApiError
from runtime.server.limits import BODY_LIMIT_BYTES, MESSAGE_COUNT_LIMIT, TOOL_COUNT_LIMIT, parse_json
from runtime.server.ollama import (
    VERSION_SPOKEN,
    ChatBody,
    GenerateBody,
    OllamaAnswer,
    OllamaForm,
    ShowBody,
    loaded_document,
    timestamp,
)
from runtime.server.openai import Body, Message, ModelName, TokenId, ToolEntry, parse_request
from runtime.server.prepare import Prepared, Preparer, Wish
from runtime.server.replies import Writer
from runtime.tools import Tool

if TYPE_CHECKING:
    from runtime.server.app import Service


class TokenizeBody(Body):
    """Body of ``POST /tokenize``: a text, or a conversation as it would be sent to ``/v1/chat/completions``.

    As llama.cpp's server has it: ``add_special`` puts the token in front that prompts start with, ``parse_special``
    recognises special tokens written in the text, ``with_pieces`` tells the text of every token.
    """

    model: ModelName | None = None
    content: str | None = None
    messages: list[Message] = Field(default=[], max_length=MESSAGE_COUNT_LIMIT)
    tools: list[ToolEntry] = Field(default=[], max_length=TOOL_COUNT_LIMIT)
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeBody(Body):
    """Body of ``POST /detokenize``."""

    model: ModelName | None = None
    tokens: Annotated[list[TokenId], Field(max_length=BODY_LIMIT_BYTES)]


class TokenRoutes:
    """``/tokenize`` and ``/detokenize``."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def tokenize(self, request: Request) -> Response:
        wanted = parse_request(TokenizeBody, parse_json(await request.body()))
        self._service.check_model(wanted.model)
        if (wanted.content is None) == (not wanted.messages):
            raise ApiError(400, "content: exactly one of content and messages", param="content", code="invalid_value")
        tokens = await self._service.in_thread(lambda: self._tokens(wanted))
        return JSONResponse({"tokens": tokens, "count": len(tokens)})

    async def detokenize(self, request: Request) -> Response:
        wanted = parse_request(DetokenizeBody, parse_json(await request.body()))
        self._service.check_model(wanted.model)
        text = await self._service.in_thread(lambda: self._service.preparer.text_of(wanted.tokens))
        return JSONResponse({"content": text})

    def _tokens(self, wanted: TokenizeBody) -> list[Any]:
        ids = self._ids(wanted)
        if not wanted.with_pieces:
            return list(ids)
        pieces = {token: self._piece(token) for token in set(ids)}
        return [{"id": token, "piece": pieces[token]} for token in ids]

    def _ids(self, wanted: TokenizeBody) -> list[int]:
        preparer = self._service.preparer
        if wanted.content is None:
            preparer.check_length(sum(message.characters for message in wanted.messages), "messages")
            messages = [message.template_message(f"messages.{at}") for at, message in enumerate(wanted.messages)]
            functions = [entry.function for entry in wanted.tools]
            tools = [Tool(function.name, function.description, function.parameters) for function in functions]
            return preparer.chat_ids(messages, tools)
        preparer.check_length(len(wanted.content), "content")
        ids = preparer.text_ids(wanted.content, "content", plain=False, special=wanted.parse_special)
        bos = self._service.model.bos
        return [bos, *ids] if wanted.add_special and bos is not None else ids

    def _piece(self, token: int) -> str | list[int]:
        """The token's text, or its bytes when they are no text by themselves, as llama.cpp's server has it."""
        data = self._service.model.tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return list(data)


class OllamaRoutes:
    """Everything under ``/api/``."""

    def __init__(self, service: Service) -> None:
        self._service = service

    @property
    def _model(self) -> PromptingModel:
        return self._service.model

    @property
    def _info(self) -> EngineInfo:
        return self._service.info

    async def version(self, _: Request) -> Response:
        return JSONResponse({"version": VERSION_SPOKEN})

    async def tags(self, _: Request) -> Response:
        name = self._model.name
        entry = {
            "name": name,
            "model": name,
            "modified_at": timestamp(self._service.created),
            "size": self._info.weights_bytes,
            "digest": self._digest(),
            "details": self._details(),
        }
        return JSONResponse({"models": [entry]})

    async def show(self, request: Request) -> Response:
        wanted = parse_request(ShowBody, parse_json(await request.body()))
        for name in [name for name in (wanted.model, wanted.name) if name is not None] or [""]:
            self._check_model(name)
        template = self._model.chat_template
        tools = ["tools"] if template is not None and template.uses_tools else []
        architecture = self._info.architecture
        document = {
            "modelfile": "",
            "parameters": "",
            "template": template.source if template is not None else "",
            "details": self._details(),
            "model_info": {
                "general.architecture": architecture,
                "general.parameter_count": self._info.parameters,
                f"{architecture}.context_length": self._info.context_trained,
                "edgelm.context": self._info.context,
            },
            "capabilities": ["completion", *tools],
            "modified_at": timestamp(self._service.created),
        }
        return JSONResponse(document)

    async def generate(self, request: Request) -> Response | GenerationResponse:
        wanted = parse_request(GenerateBody, parse_json(await request.body()))
        self._check_model(wanted.model)
        if not wanted.prompt:
            return JSONResponse(loaded_document(self._model.name))
        prepared = await self._service.in_thread(lambda: self._prepared_text(wanted))
        return self._answer(request, prepared, chat=False, stream=wanted.stream)

    async def chat(self, request: Request) -> Response | GenerationResponse:
        wanted = parse_request(ChatBody, parse_json(await request.body()))
        self._check_model(wanted.model)
        if not wanted.messages:
            message = {"message": {"role": "assistant", "content": ""}}
            return JSONResponse(loaded_document(self._model.name) | message)
        prepared = await self._service.in_thread(lambda: self._prepared_chat(wanted))
        return self._answer(request, prepared, chat=True, stream=wanted.stream)

    def _answer(self, request: Request, prepared: Prepared, *, chat: bool, stream: bool) -> GenerationResponse:
        form = OllamaForm(self._model.name, chat, self._info.load_s, prepared.calls)
        writer: Writer = OllamaAnswer(form)
        return self._service.respond(request, prepared, writer, stream=stream)

    def _prepared_text(self, wanted: GenerateBody) -> Prepared:
        preparer = self._service.preparer
        wish = self._wish(preparer, wanted)
        if wanted.raw and wanted.system:
            raise ApiError(400, "system: raw leaves no place for it", param="system", code="invalid_value")
        if wanted.raw or self._model.chat_template is None:
            return Prepared(preparer.requests(preparer.text_ids(wanted.prompt, "prompt"), wish, "prompt"))
        preparer.check_length(len(wanted.prompt) + len(wanted.system), "prompt")
        system = [{"role": "system", "content": wanted.system}] if wanted.system else []
        return preparer.conversation([*system, {"role": "user", "content": wanted.prompt}], [], wish)

    def _prepared_chat(self, wanted: ChatBody) -> Prepared:
        preparer = self._service.preparer
        if not wanted.truncate:
            preparer.check_length(sum(message.characters for message in wanted.messages), "messages")
        tools = wanted.offered_tools
        if tools and wanted.schema_wanted is not None:
            raise ApiError(400, "format: it cannot be combined with tools", param="format", code="invalid_value")
        messages = [message.template_message for message in wanted.messages]
        return preparer.conversation(messages, tools, self._wish(preparer, wanted))

    def _wish(self, preparer: Preparer, wanted: GenerateBody | ChatBody) -> Wish:
        schema = wanted.schema_wanted
        return Wish(
            sampling=wanted.options.sampling(self._info.context),
            max_tokens=wanted.tokens_wanted(self._info.context),
            stop=tuple(wanted.options.stop),
            logprobs=wanted.logprobs_wanted,
            grammar="" if schema is None else preparer.schema_grammar(schema, "format"),
            drops=isinstance(wanted, ChatBody) and wanted.truncate,
            shifts=wanted.shift,
        )

    def _check_model(self, name: str) -> None:
        """Ollama's clients add a tag to every name that has none."""
        self._service.check_model(name.removesuffix(":latest"))

    def _details(self) -> dict[str, Any]:
        manifest, info = self._model.manifest, self._info
        return {
            "parent_model": "",
            "format": "onnx" if info.engine == "onnxruntime" else "gguf",
            "family": info.architecture,
            "families": [info.architecture],
            "parameter_size": f"{info.parameters / 1e6:.1f}M",
            "quantization_level": manifest.plan.quant if manifest is not None else "",
        }

    def _digest(self) -> str:
        """The artefact's SHA-256 from the manifest; a bare file has none."""
        manifest = self._model.manifest
        if manifest is None:
            return ""
        return next((record.sha256 for record in manifest.files if record.name == manifest.artifact), "")
