"""Whether a bundle talks as its source does: the same prompts from its template, and an answer that ends by itself.

The bundle's own files are read as the runtime reads them. Prompts are compared with those of transformers where it is
installed and the source is a Hugging Face directory, else with the source's own template text. Knows conversations, not
what a good answer is.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgelm.bundle import ChatProof
from edgelm.errors import BundleError, ProofError, UsageError
from edgelm.progress import Progress
from exporter.checkpoint import Checkpoint
from exporter.device import ON_CPU, Placement
from exporter.quality import artifact_context
from exporter.tokenizer import SourceTokenizer
from runtime.chat import ChatTemplate
from runtime.engine import EngineOptions
from runtime.engines import load_engine
from runtime.generate import GenerationRequest, Session, answer, generate
from runtime.model import generation_end, special_token_texts
from runtime.sampling import SamplingOptions
from runtime.tokenizer import JsonTokenizer

TEMPLATE, TOKENIZER, GENERATION = "chat_template.jinja", "tokenizer.json", "generation_config.json"
QUESTION = "What is the capital of France? Answer in one short sentence."
ANSWER_TOKENS = 160
_CONTEXT = 512
REFUSED = "the template refuses it"

Conversation = Sequence[Mapping[str, str]]
CONVERSATIONS: tuple[Conversation, ...] = (
    ({"role": "user", "content": QUESTION},),
    ({"role": "system", "content": "You answer in French."}, {"role": "user", "content": "Hello"}),
    (
        {"role": "user", "content": "  spaces around, and two\n\nlines \n"},
        {"role": "assistant", "content": "Yes: ü, 漢字, 😀."},
        {"role": "user", "content": "{{ braces }} <|im_end|> </s> <b>&amp;</b>"},
    ),
    ({"role": "user", "content": ""}, {"role": "assistant", "content": ""}),
)


def prove_chat(
    directory: Path,
    artifact: Path,
    checkpoint: Checkpoint,
    words: SourceTokenizer,
    progress: Progress,
    *,
    placement: Placement = ON_CPU,
) -> ChatProof | None:
    """The proof for a bundle's files, the answer computed as ``placement`` has it; None for models without a template.

    Raises ``ProofError`` when a prompt differs, ``BundleError`` and ``EngineError`` when the files cannot be used.
    """
    if words.chat_template is None:
        return None
    path = directory / TEMPLATE
    if not path.is_file():
        raise ProofError(f"the source has a chat template, and there is no {path.name} in the bundle")
    names = special_token_texts(words.gguf_metadata)
    template = ChatTemplate(path.read_text(encoding="utf-8"), names)
    with progress.stage("proving the chat template", len(CONVERSATIONS) + 1) as stage:
        compared_with, expected = _expected(checkpoint, words, names)
        for conversation, (prompt, whole) in zip(CONVERSATIONS, expected, strict=True):
            for text, generation_prompt in ((prompt, True), (whole, False)):
                found = _rendered(template, conversation, add_generation_prompt=generation_prompt)
                if found != text:
                    told = f"{text!r} by {compared_with}, {found!r} by the bundle"
                    raise ProofError(
                        f"the bundle's chat template renders {conversation!r} otherwise: {told}",
                        hint="no bundle is good whose prompts differ: every answer would be spoilt",
                    )
            stage.advance()
        context = min(_CONTEXT, artifact_context(artifact, checkpoint))
        options = EngineOptions(context=context, gpu_layers=placement.gpu_layers, gpu=placement.gpu)
        text, tokens, stopped = _smoke(directory, artifact, template, words, options)
        stage.advance()
    return ChatProof(
        compared_with=compared_with,
        conversations=len(CONVERSATIONS),
        prompt=QUESTION,
        answer=text,
        answer_tokens=tokens,
        stopped=stopped,
    )


def _rendered(template: ChatTemplate, conversation: Conversation, *, add_generation_prompt: bool) -> str:
    try:
        return template.render(conversation, add_generation_prompt=add_generation_prompt)
    except UsageError:
        return REFUSED


def _expected(
    checkpoint: Checkpoint, words: SourceTokenizer, names: Mapping[str, str]
) -> tuple[str, list[tuple[str, str]]]:
    """Who says what prompts have to be, and every conversation with and without the head of the answer."""
    if checkpoint.source.kind == "huggingface" and importlib.util.find_spec("transformers") is not None:
        told = _by_transformers(checkpoint)
        if told is not None:
            return told
    assert words.chat_template is not None
    template = ChatTemplate(words.chat_template, names)
    found = [
        (_rendered(template, item, add_generation_prompt=True), _rendered(template, item, add_generation_prompt=False))
        for item in CONVERSATIONS
    ]
    return "the source's template", found


def _by_transformers(checkpoint: Checkpoint) -> tuple[str, list[tuple[str, str]]] | None:
    """None for a tokenizer that transformers cannot load, or in which it finds no template."""
    import jinja2
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            checkpoint.source.path, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, LookupError, ImportError, AttributeError, TypeError, RuntimeError):
        return None
    if tokenizer.chat_template is None:
        return None

    def rendered(conversation: Conversation, generation_prompt: bool) -> str:
        given: list[dict[str, Any]] = [dict(message) for message in conversation]
        try:
            return str(tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=generation_prompt))
        except (jinja2.TemplateError, TypeError, ValueError):
            return REFUSED

    name = f"transformers {transformers.__version__}"
    return name, [(rendered(item, True), rendered(item, False)) for item in CONVERSATIONS]


def _smoke(
    directory: Path, artifact: Path, template: ChatTemplate, words: SourceTokenizer, options: EngineOptions
) -> tuple[str, int, bool]:
    """The greedy answer to ``QUESTION``, its tokens, and whether the model ended it; no answer where none has room."""
    tokenizer = JsonTokenizer(directory / TOKENIZER)
    try:
        prompt = tokenizer.encode(template.render(CONVERSATIONS[0]))
    except UsageError as error:
        raise BundleError(f"the chat template refuses a plain question: {error.message}") from error
    ends = generation_end(directory / GENERATION) if (directory / GENERATION).is_file() else frozenset()
    own = words.gguf_metadata.get("tokenizer.ggml.eos_token_id")
    stop_tokens = ends | ({own} if isinstance(own, int) else set())
    room = min(ANSWER_TOKENS, options.context - len(prompt))
    if room < 1:
        return "", 0, False
    engine = load_engine(artifact, options)
    try:
        request = GenerationRequest(prompt, room, SamplingOptions(temperature=0.0), stop_tokens=frozenset(stop_tokens))
        found = answer(generate(Session(engine), tokenizer, request), len(prompt))
    finally:
        engine.close()
    return found.text, found.completion_tokens, found.finish_reason == "stop"
