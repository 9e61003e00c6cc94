"""A model ready to answer: engine, tokenizer, chat template and stop tokens, from a bundle or a bare GGUF file.

``run``, ``serve`` and ``bench`` all open models here, so they agree on contexts, names and ends of answers. Knows
where things are stored; neither how they are made nor how answers are shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgelm.bundle import MANIFEST_NAME, Bundle, Choice, Manifest, open_bundle
from edgelm.errors import BundleError, DoesNotFitError, EdgelmError, UsageError
from edgelm.units import format_bytes
from runtime.attention import OFF
from runtime.chat import ChatTemplate, Message
from runtime.engine import Engine, EngineInfo, EngineOptions
from runtime.engines.llamacpp import kv_bytes_per_token, load_engine, load_library
from runtime.engines.llamacpp_vocabulary import LlamaVocabulary
from runtime.engines.onnx_foreign import foreign_context
from runtime.foreign import foreign_model, foreign_texts
from runtime.gguf_header import GGUFHeader, read_gguf_header, workload_from_gguf
from runtime.memory import snapshot
from runtime.offload import offload_of, repacked_bytes
from runtime.speculative import DRAFT_TOKENS, DRAFTED_STREAMS, ModelDrafter, Speculation
from runtime.tokenizer import GgufTokenizer, JsonTokenizer, TextTokenizer
from targets.host import available_memory
from targets.predict import score_bytes

DEFAULT_CONTEXT = 4096  # of a bare GGUF file, when it was trained for as much
TOKENIZER_NAME = "tokenizer.json"
TEMPLATE_NAME = "chat_template.jinja"
GENERATION_NAME = "generation_config.json"
_SMALL_FILE_BYTES = 2**20
_PROCESS_BYTES = 64 * 2**20  # interpreter, tokenizer and the buffers of a small batch
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


@dataclass(frozen=True, slots=True)
class PromptingModel:
    """What turns messages and text into prompts, wherever the engine is. ``bos`` is the token that plain text has to
    start with, None for most models.

    ``manifest`` is None for a bare model file, ``chat_template`` None for base models.
    """

    name: str
    tokenizer: TextTokenizer
    chat_template: ChatTemplate | None
    stop_tokens: frozenset[int]
    bos: int | None
    manifest: Manifest | None

    def chat_prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """Token ids of a conversation up to the place where the assistant answers; ``tools`` as templates want them.

        Raises ``UsageError`` when the model has no chat template or the template refuses the messages.
        """
        if self.chat_template is None:
            raise UsageError(f"{self.name} has no chat template", hint="it completes text: use a plain prompt")
        return self.tokenizer.encode(self.chat_template.render(messages, tools=tools))

    def text_prompt(self, text: str) -> list[int]:
        """Token ids of plain text to continue; special tokens written in it are not recognised."""
        ids = self.tokenizer.encode(text, special=False)
        return ids if self.bos is None else [self.bos, *ids]


@dataclass(frozen=True, slots=True)
class LoadedModel(PromptingModel):
    """Everything that answering needs, in this process. ``artifact`` is the model file, ``speculation`` where guesses
    at the next tokens come from, if they were asked for."""

    artifact: Path
    engine: Engine
    speculation: Speculation | None = None

    @property
    def info(self) -> EngineInfo:
        """What the engine says of itself."""
        return self.engine.info

    def close(self) -> None:
        """Free the engine, and the model that drafts for it."""
        if self.speculation is not None:
            self.speculation.close()
        self.engine.close()


def artifact_of(path: Path, *, check_hashes: bool = True) -> tuple[Path, Bundle | None]:
    """The model file behind a bundle directory, a bare ``.gguf`` or a folder with an ONNX decoder of others, and the
    bundle if it is one.

    Raises ``BundleError`` when it is neither, or when the bundle is damaged.
    """
    if path.is_dir():
        foreign = foreign_model(path)
        if foreign is not None:
            return foreign, None
        bundle = open_bundle(path, check_hashes=check_hashes)
        return bundle.artifact_path, bundle
    if not path.exists():
        raise BundleError(f"{path} does not exist", hint="give a bundle directory or a .gguf file")
    if path.name == MANIFEST_NAME:
        raise BundleError(f"{path} is a manifest", hint=f"give its directory: {path.parent}")
    return path, None


def holds_encoder(path: Path) -> bool:
    """Whether a bundle directory or a bare file holds an encoder, hashes unchecked. Raises ``BundleError``."""
    artifact, bundle = artifact_of(path, check_hashes=False)
    return is_encoder(artifact, bundle.manifest if bundle else None)


def is_encoder(artifact: Path, manifest: Manifest | None) -> bool:
    """Whether a model makes vectors of texts: by its bundle's manifest, or by the header of a bare ``.gguf`` file.

    Raises ``BundleError`` for a header that is malformed.
    """
    if manifest is not None:
        return manifest.encoder is not None
    if artifact.suffix == ".onnx":
        return False
    metadata = read_gguf_header(artifact).metadata
    return metadata.get(f"{metadata.get('general.architecture')}.attention.causal") is False


def open_model(path: Path, options: EngineOptions) -> LoadedModel:
    """Load a bundle directory or a bare ``.gguf`` file.

    ``options.context`` of 0 means: what the bundle's plan chose, or for a bare file what the model was trained for,
    at most ``DEFAULT_CONTEXT``. ``options.lookup`` and ``options.draft`` load what speculative decoding needs. Raises
    ``BundleError``, ``UsageError``, ``EngineError``, and ``DoesNotFitError`` when the memory that is free now is too
    small.
    """
    if not options.lookup and not options.draft:
        return _open_alone(path, options)
    model = _open_alone(path, replace(options, logits_rows=DRAFT_TOKENS + 1))
    try:
        return replace(model, speculation=_speculation(model, options))
    except EdgelmError:
        model.close()
        raise


def _speculation(model: LoadedModel, options: EngineOptions) -> Speculation:
    """What was asked for, loaded. Raises ``UsageError`` for models that it cannot work with."""
    check_speculation(model, None)
    if not options.draft:
        return Speculation(lookup=options.lookup)
    draft = _open_draft(Path(options.draft), model, options)
    try:
        check_speculation(model, draft)
    except UsageError:
        draft.close()
        raise
    # Decoding waits for memory: what a model reads for a token is what its call takes.
    drafter = ModelDrafter(draft.engine, draft.info.weights_bytes / max(model.info.weights_bytes, 1))
    return Speculation(lookup=options.lookup, drafter=drafter, close=draft.engine.close)


def check_speculation(model: LoadedModel, draft: LoadedModel | None) -> None:
    """Raise ``UsageError`` when a model cannot take guesses back, or not take those of ``draft``.

    Guesses are token ids: they mean something only where both models say the same with them.
    """
    for checked in (model, *([] if draft is None else [draft])):
        if not checked.info.truncates:
            raise UsageError(
                f"{checked.name} cannot take back a wrong guess: models of architecture {checked.info.architecture} "
                "keep a state that forgets nothing",
                hint="leave out --lookup and --draft",
            )
    if draft is None:
        return
    sizes = draft.info.vocabulary, model.info.vocabulary
    difference = "" if sizes[0] == sizes[1] else f"{sizes[0]} tokens against {sizes[1]}"
    if not difference:
        ours, theirs = model.tokenizer.token_bytes, draft.tokenizer.token_bytes
        other = next((token for token in range(sizes[0]) if ours(token) != theirs(token)), None)
        difference = "" if other is None else f"token {other} is {theirs(other)!r} against {ours(other)!r}"
    if difference:
        raise UsageError(
            f"{draft.name} cannot draft for {model.name}: it has another vocabulary ({difference})",
            hint="use a model of the same family, for example one that edgelm compress made of it",
        )


def _open_draft(path: Path, model: LoadedModel, options: EngineOptions) -> LoadedModel:
    """The drafting model, with as much of the context as it was made for, beside the model that is loaded already."""
    artifact, bundle = artifact_of(path)
    longest = planned_context(None, bundle)[0] if bundle and artifact.suffix == ".onnx" else model.info.context
    if artifact.suffix == ".gguf" and artifact.is_file():
        metadata = read_gguf_header(artifact).metadata
        trained = metadata.get(f"{metadata.get('general.architecture')}.context_length")
        longest = min(longest, trained) if isinstance(trained, int) and trained > 0 else longest
    wanted = replace(
        options,
        context=min(model.info.context, longest),
        sequences=min(options.sequences, DRAFTED_STREAMS),
        kv_type="f16",
        flash_attention="auto" if artifact.suffix == ".onnx" else options.flash_attention,
        mmap=options.mmap or artifact.suffix == ".onnx",
        lookup=False,
        draft="",
    )
    try:
        return _open_alone(path, wanted, beside_bytes=model.info.weights_bytes + model.info.kv_bytes)
    except UsageError as error:
        raise UsageError(f"--draft: {error.message}", hint=error.hint) from error


def _open_alone(path: Path, options: EngineOptions, *, beside_bytes: int = 0) -> LoadedModel:
    """Without another model; ``beside_bytes`` are those of one that is loaded already."""
    artifact, bundle = artifact_of(path)
    if is_encoder(artifact, bundle.manifest if bundle else None):
        raise UsageError(
            f"{path} is an encoder: it makes vectors of texts and generates none",
            hint="edgelm run BUNDLE TEXT prints the vector, edgelm serve answers /v1/embeddings",
        )
    if bundle is not None and bundle.manifest.task is not None:
        raise UsageError(
            f"{path} is for the task {bundle.manifest.task.kind} and does not continue texts",
            hint="edgelm run BUNDLE TEXT and edgelm serve BUNDLE do that task",
        )
    if artifact.suffix == ".onnx":
        if options.gpu_layers > 0 or options.gpu:
            raise UsageError(f"{path} is an ONNX model: --gpu-layers and --gpu are for GGUF", hint="leave them out")
        if options.flash_attention != "auto":
            raise UsageError(f"{path} is an ONNX model: --flash-attention is for GGUF", hint="leave it out")
        if options.host_repack is not None and not beside_bytes:
            raise UsageError(f"{path} is an ONNX model: --host-repack is for GGUF", hint="leave it out")
        return _open_onnx(artifact, bundle, options)
    header = read_gguf_header(artifact)
    if options.context == 0:
        options = replace(options, context=planned_context(header, bundle)[0])
    offload = offload_of(load_library(), header, options, artifact.name)
    if options.host_repack is not None and offload.device is None and not beside_bytes:
        raise UsageError(
            f"--host-repack is for weights that stay with the CPU beside a GPU; {offload.sentence()}",
            hint="leave it out: without a GPU they are rearranged anyway",
        )
    copied_bytes = repacked_bytes(header, options, offload)
    sizes = {"beside_bytes": beside_bytes, "on_gpu_bytes": offload.spared_bytes, "copied_bytes": copied_bytes}
    check_memory(artifact, header, options, **sizes)
    template = _chat_template(header, bundle)
    tokenizer_path = bundle.file(TOKENIZER_NAME) if bundle else None
    tokenizer: TextTokenizer | None = JsonTokenizer(tokenizer_path) if tokenizer_path else None
    engine = load_engine(artifact, options)
    vocabulary = engine.vocabulary
    return LoadedModel(
        name=bundle.manifest.name if bundle else artifact.stem,
        artifact=artifact,
        engine=engine,
        tokenizer=tokenizer or GgufTokenizer(vocabulary),
        chat_template=template,
        stop_tokens=_stop_tokens(vocabulary, bundle),
        bos=vocabulary.bos if vocabulary.adds_bos and vocabulary.bos >= 0 else None,
        manifest=bundle.manifest if bundle else None,
    )


def _open_foreign(artifact: Path, options: EngineOptions) -> LoadedModel:
    """An ONNX decoder that others exported: what is known of tokens stands in files beside it."""
    from runtime.engines.onnx import load_any_engine

    texts = foreign_texts(artifact)
    tokenizer = JsonTokenizer(texts.tokenizer)
    start = tokenizer.encode(texts.special_tokens.get("bos_token", "")) if texts.adds_bos else []
    return LoadedModel(
        name=artifact.parent.resolve().name,
        artifact=artifact,
        engine=load_any_engine(artifact, replace(options, context=options.context or foreign_context(artifact.parent))),
        tokenizer=tokenizer,
        chat_template=ChatTemplate(texts.template, texts.special_tokens) if texts.template else None,
        stop_tokens=texts.stop_tokens,
        bos=start[0] if len(start) == 1 else None,
        manifest=None,
    )


def _open_onnx(artifact: Path, bundle: Bundle | None, options: EngineOptions) -> LoadedModel:
    """An ONNX model: its tokenizer stands beside it in the bundle, its metadata tell what else there is of tokens."""
    if bundle is None:
        return _open_foreign(artifact, options)
    tokenizer_path = bundle.file(TOKENIZER_NAME)
    if tokenizer_path is None:
        raise BundleError(f"{artifact} has no tokenizer with it", hint="export the bundle again")
    from runtime.engines.onnx import load_engine as load_onnx_engine
    from runtime.engines.onnx import read_token_notes

    if options.context == 0:
        options = replace(options, context=planned_context(None, bundle)[0])
    notes = read_token_notes(artifact)
    template_path, generation_path = bundle.file(TEMPLATE_NAME), bundle.file(GENERATION_NAME)
    source = _small_text(template_path) if template_path else ""
    tokenizer = JsonTokenizer(tokenizer_path)
    return LoadedModel(
        name=bundle.manifest.name,
        artifact=artifact,
        engine=load_onnx_engine(artifact, options),
        tokenizer=tokenizer,
        chat_template=ChatTemplate(source, notes.special_tokens) if source else None,
        stop_tokens=notes.stop_tokens | (generation_end(generation_path) if generation_path else frozenset()),
        bos=notes.bos,
        manifest=bundle.manifest,
    )


def memory_for_model() -> Choice:
    """Bytes that this process can hold in all, with the reason: what is free, and what it holds already."""
    free = available_memory()
    return Choice(value=int(free.value) + snapshot().anonymous_bytes, reason=free.reason)


def check_memory(
    artifact: Path,
    header: GGUFHeader,
    options: EngineOptions,
    *,
    beside_bytes: int = 0,
    on_gpu_bytes: int = 0,
    copied_bytes: int = 0,
) -> None:
    """Refuse a model whose weights and caches exceed the memory that is free now; ``beside_bytes`` of it are taken by
    another model of this process, ``on_gpu_bytes`` of the model's own are held by a GPU instead, ``copied_bytes`` are
    there twice: rearranged for the CPU beside it.

    Mapped weights that do not fit would be read from the disk again for every token, and copied ones would swap: a
    small board is lost to both for minutes. Raises ``DoesNotFitError`` naming what is needed and what is there.
    """
    workload = workload_from_gguf(header)
    per_token = kv_bytes_per_token(workload.kv_elements_per_token, options.kv_type) * options.sequences
    fixed = workload.file_bytes + _PROCESS_BYTES + beside_bytes - on_gpu_bytes + copied_bytes
    if options.flash_attention == OFF:
        fixed += score_bytes(workload, options.context, options.batch)
    needed = fixed + per_token * options.context
    free = memory_for_model()
    if needed <= int(free.value):
        return
    fits = max(int((int(free.value) - fixed) / per_token) // 256 * 256, 0) if per_token else 0
    hint = f"use --context {fits}" if fits >= 256 else "use a smaller model or quantisation, or free memory"
    if copied_bytes and needed - copied_bytes <= int(free.value):
        hint = "leave out --host-repack" + (f", or {hint}" if fits >= 256 else "")
    raise DoesNotFitError(
        f"{artifact.name} needs {format_bytes(int(needed))}: weights {format_bytes(workload.file_bytes)}, cache for "
        f"{options.context} tokens x {options.sequences} {format_bytes(int(per_token * options.context))}, process "
        f"{format_bytes(_PROCESS_BYTES)}{f', the other model {format_bytes(beside_bytes)}' if beside_bytes else ''}; "
        f"{f'{format_bytes(on_gpu_bytes)} of it on the GPU; ' if on_gpu_bytes else ''}"
        f"{f'{format_bytes(copied_bytes)} once more, rearranged; ' if copied_bytes else ''}{free.reason}",
        hint=hint,
    )


def planned_context(header: GGUFHeader | None, bundle: Bundle | None) -> tuple[int, str]:
    """Tokens kept when nobody asks for a number, with the reason: a bundle's plan, or a bare file's own header."""
    if bundle is not None:
        return int(bundle.manifest.plan.context.value), "the bundle's plan"
    metadata = header.metadata if header is not None else {}
    trained = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if isinstance(trained, int) and 0 < trained < DEFAULT_CONTEXT:
        return trained, "what the model was trained for"
    return DEFAULT_CONTEXT, "the usual context of a bare file"


def _chat_template(header: GGUFHeader, bundle: Bundle | None) -> ChatTemplate | None:
    path = bundle.file(TEMPLATE_NAME) if bundle else None
    source = _small_text(path) if path else header.metadata.get("tokenizer.chat_template")
    return ChatTemplate(source, special_token_texts(header.metadata)) if isinstance(source, str) and source else None


def special_token_texts(metadata: Mapping[str, Any]) -> dict[str, str]:
    """``bos_token``, ``eos_token`` ... as chat templates know them, from a GGUF's metadata."""
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    texts: dict[str, str] = {}
    for name, key in _SPECIAL.items():
        token = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token, int) and 0 <= token < len(tokens):
            texts[name] = str(tokens[token])
    return texts


def _stop_tokens(vocabulary: LlamaVocabulary, bundle: Bundle | None) -> frozenset[int]:
    """What llama.cpp takes for an end of generation, and what the source's generation config names."""
    path = bundle.file(GENERATION_NAME) if bundle else None
    return vocabulary.end_of_generation() | (generation_end(path) if path else frozenset())


def generation_end(path: Path) -> frozenset[int]:
    """``eos_token_id`` of a ``generation_config.json``: one id, several or none. Raises ``BundleError``."""
    try:
        document = json.loads(_small_text(path))
    except ValueError as error:
        raise BundleError(f"{path} is not JSON: {error}", hint="export the bundle again") from error
    ids = document.get("eos_token_id") if isinstance(document, dict) else None
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(isinstance(token, int) and token >= 0 for token in listed):
        raise BundleError(f"{path}: eos_token_id is neither a token id nor a list of them: {ids!r}")
    return frozenset(listed)


def _small_text(path: Path) -> str:
    if path.stat().st_size > _SMALL_FILE_BYTES:
        raise BundleError(f"{path} has more than {_SMALL_FILE_BYTES} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise BundleError(f"{path} is not UTF-8 text") from error
