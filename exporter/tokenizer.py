"""The tokenizer of a checkpoint: read, translated into GGUF metadata, and proven to give the same ids there.

Nothing is taken from lists of known models: which of llama.cpp's pre-tokenizers fits is found by asking llama.cpp, and
a tokenizer rebuilt from a GGUF file is compared with that file's own vocabulary. Byte-level BPE, and the one that
SentencePiece writes. Does not know how an artefact is written.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgelm.bundle import TokenIdentity
from edgelm.collector import paused_collector
from edgelm.errors import BundleError, CheckpointError, EngineError, ProofError
from edgelm.progress import Progress
from exporter.architectures import embedding_names
from exporter.checkpoint import Checkpoint
from exporter.gguf_header import encode_header
from exporter.pretokenizers import likely_candidates, rebuild_tokenizer_json
from exporter.token_identity import compare_tokenizers, expected_ids, first_difference, open_tokenizer
from exporter.tokenizer_sentencepiece import MODEL as SENTENCEPIECE
from exporter.tokenizer_sentencepiece import is_sentencepiece, sentencepiece_metadata, space_variants
from exporter.tokenizer_types import CONTROL, NORMAL, UNUSED, USER_DEFINED
from exporter.tokenizer_unigram import CHARSMAP, check_unigram, is_unigram, unigram_metadata, unigram_variants
from exporter.tokenizer_unigram import MODEL as UNIGRAM
from exporter.tokenizer_wordpiece import MODEL as WORDPIECE
from exporter.tokenizer_wordpiece import is_wordpiece, wordpiece_metadata
from exporter.vocabulary import tokenize_with_llama
from runtime.gguf_header import GGUFStrings, read_gguf_header

FILE_LIMIT_BYTES = 128 * 2**20
MAX_VOCABULARY = 2**21
# Role of a special token: name in the Hugging Face files, name in the GGUF keys.
_SPECIAL = (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
# Kinds of vocabulary in a GGUF file, and what each cannot do without.
_GGUF_MODELS: Mapping[Any, str | None] = {"gpt2": "merges", SENTENCEPIECE: "scores", UNIGRAM: "scores", WORDPIECE: None}
# Those that encoders put around a text. llama.cpp begins a text with BOS, whatever a family calls it.
_AROUND = (("cls", "cls"), ("sep", "seperator"), ("mask", "mask"))
_NOT_COPIED = ("tokenizer.huggingface.json",)


@dataclass(frozen=True, slots=True)
class SourceTokenizer:
    """Everything that an artefact needs of a tokenizer.

    ``gguf_metadata`` holds all ``tokenizer.*`` keys as plain Python values: an int is an unsigned 32-bit value, a list
    of ints an array of signed 32-bit ones. ``tokenizer_json`` is the Hugging Face form, without truncation or padding.
    ``vocabulary`` counts embedding rows, unused ones included.
    """

    gguf_metadata: dict[str, Any]
    tokenizer_json: str
    chat_template: str | None
    generation_config: dict[str, Any]
    vocabulary: int


def load_tokenizer(checkpoint: Checkpoint, progress: Progress) -> SourceTokenizer:
    """The tokenizer of a checkpoint, its GGUF form already found or proven by llama.cpp.

    Raises ``CheckpointError`` when it is missing, malformed or of another kind, ``ProofError`` when llama.cpp cannot
    give the same ids.
    """
    source = read_tokenizer(checkpoint)
    if checkpoint.source.kind == "huggingface":
        return _with_pre_tokenizer(source, checkpoint, progress)
    with progress.stage("proving the tokenizer", 1) as stage:
        identity = prove_identity(source, checkpoint.source.path)
        stage.advance()
    if not identity.identical:
        raise ProofError(
            f"the tokenizer rebuilt from {checkpoint.source.path} differs from its vocabulary: "
            f"{identity.first_difference}",
            hint="export from the original Hugging Face checkpoint",
        )
    return source


def read_tokenizer(checkpoint: Checkpoint) -> SourceTokenizer:
    """What the files say, without asking llama.cpp: ``tokenizer.ggml.pre`` of a Hugging Face source is not yet there.

    Raises ``CheckpointError``.
    """
    # One export asks from preflight, export, proof and reference; reading and checking takes most of a second.
    if _last_read and _last_read[0][0] is checkpoint:
        return _last_read[0][1]
    from_gguf = checkpoint.source.kind == "gguf"
    with paused_collector():
        source = _read_gguf(checkpoint.source.path) if from_gguf else _read_directory(checkpoint)
    _last_read[:] = [(checkpoint, source)]
    return source


_last_read: list[tuple[Checkpoint, SourceTokenizer]] = []


def prove_identity(source: SourceTokenizer, artifact_path: Path) -> TokenIdentity:
    """Compare the source tokenizer with the vocabulary inside the artefact, see ``compare_tokenizers``."""
    return compare_tokenizers(source.tokenizer_json, source.vocabulary, artifact_path)


def _with_pre_tokenizer(source: SourceTokenizer, checkpoint: Checkpoint, progress: Progress) -> SourceTokenizer:
    """Try llama.cpp's ways to cut text on a vocabulary-only file until one gives the source's ids on every text."""
    candidates = _candidates(json.loads(source.tokenizer_json))
    corpus = expected_ids(source.tokenizer_json)
    closest: tuple[int, str, str] | None = None
    with (
        tempfile.TemporaryDirectory(prefix="edgelm-vocabulary-") as directory,
        progress.stage("finding the pre-tokenizer", len(candidates)) as stage,
    ):
        path = Path(directory) / "vocabulary.gguf"
        for name, keys in candidates:
            metadata = {**source.gguf_metadata, **keys}
            path.write_bytes(encode_header("llama", metadata, ()))
            stage.advance()
            try:
                found = tokenize_with_llama(path, corpus.asked).ids
            except EngineError as error:
                closest = closest or (len(corpus.texts) + 1, name, error.message)
                continue
            difference = first_difference(corpus, found)
            if difference is None:
                return SourceTokenizer(
                    metadata, source.tokenizer_json, source.chat_template, source.generation_config, source.vocabulary
                )
            wrong = sum(ours != theirs for ours, theirs in zip(corpus.ids, found, strict=True))
            if closest is None or wrong < closest[0]:
                closest = (wrong, name, difference)
    assert closest is not None
    raise ProofError(
        f"no pre-tokenizer of llama.cpp gives the ids of {checkpoint.source.path / 'tokenizer.json'}; "
        f"the closest, {closest[1]!r}, fails on {closest[2]}",
        hint="llama.cpp cannot run this tokenizer; another format may",
    )


def _candidates(document: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What to try, by a name to tell and the keys that it means."""
    if is_sentencepiece(document):
        return space_variants(document)
    if is_wordpiece(document):
        return [("WordPiece", {})]
    if is_unigram(document):
        return unigram_variants(document)
    return [(name, {"tokenizer.ggml.pre": name}) for name in likely_candidates(document["pre_tokenizer"])]


# --- Hugging Face directories


def _read_directory(checkpoint: Checkpoint) -> SourceTokenizer:
    directory = checkpoint.source.path
    path = directory / "tokenizer.json"
    document = _read_json(path)
    if document is None:
        others = [name for name in ("tokenizer.model", "vocab.json") if (directory / name).is_file()]
        raise CheckpointError(
            f"{directory} has no tokenizer.json" + (f", only {others[0]}" if others else ""),
            hint="save it with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
        )
    _check_kind(path, document)
    rows = _embedding_rows(checkpoint)
    _drop_tokens_without_rows(document, rows)
    document["truncation"] = document["padding"] = None  # they belong to training; here they would cut prompts
    tokenizer_json = json.dumps(document, ensure_ascii=False)
    tokenizer = open_tokenizer(tokenizer_json, str(path))
    settings = {**(_read_json(directory / "special_tokens_map.json") or {})}
    settings.update(_read_json(directory / "tokenizer_config.json") or {})
    tokens, types = _vocabulary(path, document, rows)
    chat_template = _chat_template(directory, settings)
    generation_config = _generation_config(directory, checkpoint.config)
    if is_sentencepiece(document):
        words = sentencepiece_metadata(document, tokens, types, str(path))
    elif is_wordpiece(document):
        words = wordpiece_metadata(document, tokens, types, str(path))
    elif is_unigram(document):
        words = unigram_metadata(document, tokens, types, str(path))
    else:
        words = _byte_level_metadata(document, tokens, types, path)
    metadata: dict[str, Any] = {**words, **_special_ids(settings, tokens, generation_config)}
    metadata.update(_added_at_the_ends(tokenizer, settings, metadata))
    if chat_template is not None:
        metadata["tokenizer.chat_template"] = chat_template
    return SourceTokenizer(metadata, tokenizer_json, chat_template, generation_config, len(tokens))


def _byte_level_metadata(
    document: Mapping[str, Any], tokens: list[str], types: list[int], path: Path
) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": _merges(path, document),
        "tokenizer.ggml.add_space_prefix": False,
    }


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > FILE_LIMIT_BYTES:
            raise CheckpointError(f"{path} is larger than {FILE_LIMIT_BYTES} bytes")
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is no table of settings")
    return document


def _check_kind(path: Path, document: Mapping[str, Any]) -> None:
    model = document.get("model")
    if is_unigram(document):
        check_unigram(document, str(path))
        return
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        kind = model.get("type") if isinstance(model, dict) else None
        raise CheckpointError(f"{path} is a tokenizer of type {kind}; only BPE, WordPiece and Unigram are supported")
    rules = json.dumps(document.get("pre_tokenizer"))
    if model.get("dropout"):
        raise CheckpointError(f"{path} drops merges at random (dropout {model['dropout']})", hint="set it to null")
    if is_sentencepiece(document) or is_wordpiece(document):
        return
    if model.get("type", "BPE") != "BPE" or '"ByteLevel"' not in rules:
        kind = f"of type {model.get('type')}"
        raise CheckpointError(f"{path} is {kind}, neither a BPE of bytes nor one that falls back to them")
    changes = _steps(document.get("normalizer"))
    if any(change.get("type") != "NFC" for change in changes):
        raise CheckpointError(f"{path} changes text before tokenizing in a way that llama.cpp cannot: {changes}")


def _steps(normalizer: Any) -> list[Mapping[str, Any]]:
    """What a normalizer does, one after the other: some are sequences of nothing."""
    if normalizer is None:
        return []
    if not isinstance(normalizer, dict):
        return [{"type": repr(normalizer)}]
    parts = normalizer.get("normalizers") if normalizer.get("type") == "Sequence" else None
    return [step for part in parts for step in _steps(part)] if isinstance(parts, list) else [normalizer]


def _embedding_rows(checkpoint: Checkpoint) -> Any:
    """As the tensor has them, which may be more or fewer than the configuration says."""
    for name in embedding_names(checkpoint):
        embedding = checkpoint.tensors.get(name)
        if embedding is not None and embedding.shape:
            return embedding.shape[0]
    return checkpoint.config.get("vocab_size")


def _drop_tokens_without_rows(document: dict[str, Any], rows: Any) -> None:
    """Added tokens beyond the embedding (as of a picture, in the text-only part of a model) can never be computed."""
    added = document.get("added_tokens")
    if not isinstance(added, list) or not isinstance(rows, int):
        return
    gone = {
        item.get("content")
        for item in added
        if isinstance(item, dict) and isinstance(item.get("id"), int) and item["id"] >= rows
    }
    document["added_tokens"] = [item for item in added if not isinstance(item, dict) or item.get("content") not in gone]
    vocabulary = document["model"]["vocab"]
    if isinstance(vocabulary, dict):
        document["model"]["vocab"] = {token: index for token, index in vocabulary.items() if token not in gone}
    else:
        document["model"]["vocab"] = vocabulary[:rows]


def _vocabulary(path: Path, document: Mapping[str, Any], rows: Any) -> tuple[list[str], list[int]]:
    """Tokens by id and their GGUF types; ids without a token, up to the embedding's rows, are filled as unused."""
    by_id = {index: (token, NORMAL) for token, index in _entries(document["model"]["vocab"])}
    for added in document.get("added_tokens") or []:
        by_id[added["id"]] = (added["content"], CONTROL if added["special"] else USER_DEFINED)
    if any(not isinstance(index, int) or not 0 <= index < MAX_VOCABULARY for index in by_id):
        raise CheckpointError(f"{path} has token ids that are no numbers from 0 to {MAX_VOCABULARY - 1}")
    size = max(by_id) + 1 if rows is None else rows
    if not isinstance(size, int) or not max(by_id) < size <= MAX_VOCABULARY:
        raise CheckpointError(
            f"{path} has {max(by_id) + 1} tokens, the model's embedding {size!r} rows",
            hint="the checkpoint's tokenizer and weights do not belong together",
        )
    entries = [by_id.get(index, (f"[PAD{index}]", UNUSED)) for index in range(size)]
    tokens = [token for token, _ in entries]
    if len(set(tokens)) != size or "" in tokens:
        raise CheckpointError(f"{path} has a token that is empty or occurs twice")
    return tokens, [kind for _, kind in entries]


def _entries(vocabulary: Any) -> Iterator[tuple[str, Any]]:
    """Tokens and their ids: a table, or of Unigram a list in the order of ids."""
    if isinstance(vocabulary, Mapping):
        yield from vocabulary.items()
    else:
        yield from ((token, index) for index, (token, _) in enumerate(vocabulary))


def _merges(path: Path, document: Mapping[str, Any]) -> list[str]:
    merges = document["model"].get("merges")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges or []]
    # A generator or a call for each of 50,000 pairs would take longer than reading the file.
    if not pairs or not all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], str)
        for pair in pairs
    ):
        raise CheckpointError(f"{path} has no merges, or some that are no pairs of tokens")
    # A space cannot stand inside a part: the format separates parts by one. Byte-level vocabularies write it as U+0120.
    return [
        f"{first} {second}"
        if " " not in first and " " not in second
        else " ".join(part.replace(" ", "\u0120") for part in (first, second))
        for first, second in pairs
    ]


def _special_ids(
    settings: Mapping[str, Any], tokens: Sequence[str], generation_config: Mapping[str, Any]
) -> dict[str, int]:
    index = {token: position for position, token in enumerate(tokens)}
    ids: dict[str, int] = {}
    for name, key in (*_SPECIAL, *(_AROUND if settings.get("cls_token") else ())):
        token = settings.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        found = index.get(text) if isinstance(text, str) else None
        if found is None:
            candidates = _ids(generation_config.get(f"{name}_token_id"))
            found = next((item for item in candidates if item < len(tokens)), None)
            if name == "eos" and found is None and candidates:
                raise CheckpointError(
                    f"{name}_token_id is {candidates[0]}, outside of the vocabulary of {len(tokens)} tokens",
                    hint="correct it in config.json and generation_config.json: no answer would ever end",
                )
        if found is not None:
            ids[f"tokenizer.ggml.{key}_token_id"] = found
    if "tokenizer.ggml.cls_token_id" in ids:
        ids.setdefault("tokenizer.ggml.bos_token_id", ids["tokenizer.ggml.cls_token_id"])
    # A model may end a turn by another token than a text. Lists name the end of a turn last.
    ends = [item for item in _ids(generation_config.get("eos_token_id")) if item < len(tokens)]
    further = [item for item in ends if item != ids.get("tokenizer.ggml.eos_token_id")]
    if further:
        ids["tokenizer.ggml.eot_token_id"] = further[-1]
    return ids


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int) and not isinstance(item, bool) and item >= 0]


def _added_at_the_ends(tokenizer: Any, settings: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, bool]:
    """Whether BOS and EOS are put around a text: as configured, else as the tokenizer does it."""
    ids = tokenizer.encode("a", add_special_tokens=True).ids
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    added = len(ids) > len(bare)
    behaviour = {
        "bos": added and ids[0] == metadata.get("tokenizer.ggml.bos_token_id"),
        "eos": added and ids[-1] == metadata.get("tokenizer.ggml.eos_token_id"),
    }
    configured = {name: settings.get(f"add_{name}_token") for name in behaviour}
    return {
        f"tokenizer.ggml.add_{name}_token": choice if isinstance(choice, bool) else behaviour[name]
        for name, choice in configured.items()
    }


def _chat_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8") or None
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot read {path}: {error}") from error
    template = settings.get("chat_template") or (_read_json(directory / "chat_template.json") or {}).get(
        "chat_template"
    )
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _generation_config(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    document = _read_json(directory / "generation_config.json")
    names = [f"{name}_token_id" for name, _ in _SPECIAL]
    known = {name: config[name] for name in names if config.get(name) is not None}
    return {**known, **(document or {})}


# --- GGUF files


def _read_gguf(path: Path) -> SourceTokenizer:
    try:
        header = read_gguf_header(path)
        metadata = {
            key: value.tobytes() if key == CHARSMAP and isinstance(value, np.ndarray) else _plain(value)
            for key, value in header.metadata.items()
            if key.startswith("tokenizer.") and key not in _NOT_COPIED
        }
    except BundleError as error:
        raise CheckpointError(error.message, hint=error.hint) from error
    model, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if model not in _GGUF_MODELS or not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        known = ", ".join(f"'{name}'" for name in _GGUF_MODELS)
        raise CheckpointError(f"{path} has a tokenizer of type {model!r}; supported are {known}")
    needed = _GGUF_MODELS[model]
    if needed is not None:
        held = metadata.get(f"tokenizer.ggml.{needed}")
        if not isinstance(held, list) or not held or not isinstance(held[0], float if needed == "scores" else str):
            raise CheckpointError(f"{path} has a vocabulary without {needed}")
        if needed == "scores" and len(held) != len(tokens):
            raise CheckpointError(f"{path} does not give a score to each of its {len(tokens)} tokens")
    types = metadata.setdefault("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise CheckpointError(f"{path} does not give a type to each of its {len(tokens)} tokens")
    ids = {
        f"{name}_token_id": metadata[f"tokenizer.ggml.{key}_token_id"]
        for name, key in _SPECIAL
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    for name, index in ids.items():
        if not isinstance(index, int) or not 0 <= index < len(tokens):
            raise CheckpointError(f"{path} has the {name} {index!r}, outside of its {len(tokens)} tokens")
    eot = metadata.get("tokenizer.ggml.eot_token_id")
    generation_config: dict[str, Any] = dict(ids)
    if eot is not None and "eos_token_id" in ids and eot != ids["eos_token_id"]:
        generation_config["eos_token_id"] = [ids["eos_token_id"], eot]
    template = metadata.get("tokenizer.chat_template")
    return SourceTokenizer(
        metadata,
        rebuild_tokenizer_json(metadata, str(path)),
        template if isinstance(template, str) else None,
        generation_config,
        len(tokens),
    )


def _plain(value: Any) -> Any:
    if isinstance(value, GGUFStrings):
        return list(value)
    return value.tolist() if isinstance(value, np.ndarray) else value
