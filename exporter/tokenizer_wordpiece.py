"""WordPiece, the tokenizer of BERT and its kin: between tokenizer.json and llama.cpp's "bert".

Hugging Face marks pieces that continue a word ("##ing"), llama.cpp those that begin one ("▁play"). Words are found
alike: cleaned, lower-cased and stripped of accents as BERT's normalizer says, cut at spaces and punctuation. llama.cpp
has no limit on the length of a word, which Hugging Face replaces by the unknown token beyond 100 characters; whoever
compares leaves those out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgelm.errors import CheckpointError
from exporter.tokenizer_types import CONTROL, NORMAL, UNKNOWN, UNUSED

MODEL = "bert"
SPACE = "\u2581"
CONTINUED = "##"
LONGEST_WORD = 100
_LOWERCASE, _ACCENTS = "tokenizer.ggml.normalizer.lowercase", "tokenizer.ggml.normalizer.strip_accents"


def is_wordpiece(document: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is of this kind."""
    model = document.get("model")
    return isinstance(model, Mapping) and model.get("type") == "WordPiece"


def check_wordpiece(document: Mapping[str, Any], name: str) -> None:
    """Raises ``CheckpointError`` for settings that llama.cpp has no place for."""
    model, normalizer = document["model"], document.get("normalizer")
    prefix = model.get("continuing_subword_prefix", CONTINUED)
    if prefix != CONTINUED:
        raise CheckpointError(f"{name} marks the pieces that continue a word by {prefix!r}, not by '{CONTINUED}'")
    if (document.get("pre_tokenizer") or {}).get("type") != "BertPreTokenizer":
        raise CheckpointError(f"{name} does not cut text into words as BERT does, and llama.cpp does nothing else")
    if not isinstance(normalizer, Mapping) or normalizer.get("type") != "BertNormalizer":
        raise CheckpointError(f"{name} does not clean text as BERT does, and llama.cpp does nothing else")
    for setting in ("clean_text", "handle_chinese_chars"):
        if normalizer.get(setting) is False:
            raise CheckpointError(f"{name} has {setting} switched off, which llama.cpp cannot do")


def wordpiece_metadata(
    document: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], name: str
) -> dict[str, Any]:
    """The keys of a GGUF vocabulary. Raises ``CheckpointError`` for settings and tokens that it cannot hold."""
    check_wordpiece(document, name)
    normalizer, unknown = document["normalizer"], document["model"].get("unk_token", "[UNK]")
    if unknown not in tokens:
        raise CheckpointError(f"{name} has no unknown token {unknown!r} in its vocabulary")
    kinds = [UNKNOWN if token == unknown else kind for token, kind in zip(tokens, types, strict=True)]
    words = [token if kind in (CONTROL, UNKNOWN) else _marked(token) for token, kind in zip(tokens, kinds, strict=True)]
    if len(set(words)) != len(words):
        repeated = next(word for index, word in enumerate(words) if word in words[:index])
        raise CheckpointError(f"{name} has two tokens that llama.cpp would both call {repeated!r}")
    lowercase = bool(normalizer.get("lowercase", True))
    accents = normalizer.get("strip_accents")
    return {
        "tokenizer.ggml.model": MODEL,
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": kinds,
        _LOWERCASE: lowercase,
        _ACCENTS: lowercase if accents is None else bool(accents),
    }


def _marked(token: str) -> str:
    return token[len(CONTINUED) :] if token.startswith(CONTINUED) and token != CONTINUED else SPACE + token


def rebuilt_parts(metadata: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Model, normalizer, pre-tokenizer and decoder of a tokenizer.json for a GGUF vocabulary of this kind."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 100)
    if not isinstance(unknown, int) or not 0 <= unknown < len(tokens):
        raise CheckpointError(f"{name} has the unknown token {unknown!r}, outside of its {len(tokens)} tokens")
    vocabulary = {}
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        plain = kind in (CONTROL, UNKNOWN, UNUSED) or index == unknown
        begins = token.startswith(SPACE) and kind == NORMAL
        vocabulary[token if plain else token[len(SPACE) :] if begins else CONTINUED + token] = index
    lowercase = metadata.get(_LOWERCASE, True)
    return {
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": metadata.get(_ACCENTS, lowercase),
            "lowercase": lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": CONTINUED, "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": tokens[unknown],
            "continuing_subword_prefix": CONTINUED,
            "max_input_chars_per_word": LONGEST_WORD,
            "vocab": vocabulary,
        },
    }
