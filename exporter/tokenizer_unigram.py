"""Unigram, the tokenizer that SentencePiece writes for T5, XLM-RoBERTa and multilingual sentence models: between
tokenizer.json and llama.cpp's "t5".

Both look for the likeliest way to write a text in tokens. How a text is cleaned first is a compiled table that both
read, and what is done about spaces is tried by whoever uses this, and proven. Knows no other kinds of tokenizers.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from typing import Any

from edgelm.errors import CheckpointError
from exporter.tokenizer_types import UNKNOWN

MODEL = "t5"
SPACE = "\u2581"
CHARSMAP = "tokenizer.ggml.precompiled_charsmap"
_PREFIX, _MERGED = "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.remove_extra_whitespaces"
_NEVER = -10000.0  # the score of rows without a token


def is_unigram(document: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is of this kind."""
    model = document.get("model")
    return isinstance(model, Mapping) and model.get("type") == "Unigram"


def check_unigram(document: Mapping[str, Any], name: str) -> None:
    """Raises ``CheckpointError`` for a vocabulary that is malformed or that llama.cpp has no place for."""
    model = document["model"]
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, list) or not all(
        isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], (int, float))
        for item in vocabulary
    ):
        raise CheckpointError(f"{name} has a vocabulary that is no list of tokens and scores")
    if model.get("byte_fallback"):
        raise CheckpointError(f"{name} falls back to bytes, which llama.cpp's unigram tokenizer cannot")
    unknown = model.get("unk_id")
    if not isinstance(unknown, int) or not 0 <= unknown < len(vocabulary):
        raise CheckpointError(f"{name} has the unknown token {unknown!r}, outside of its {len(vocabulary)} tokens")


def unigram_metadata(
    document: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], name: str
) -> dict[str, Any]:
    """The keys of a GGUF vocabulary, without those about spaces. Raises ``CheckpointError``."""
    check_unigram(document, name)
    model = document["model"]
    scores = [float(score) for _, score in model["vocab"]][: len(tokens)]
    scores += [_NEVER] * (len(tokens) - len(scores))
    kinds = [UNKNOWN if index == model["unk_id"] else kind for index, kind in enumerate(types)]
    charsmap = _charsmap(document.get("normalizer"), name)
    return {
        "tokenizer.ggml.model": MODEL,
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.unknown_token_id": model["unk_id"],
        **({CHARSMAP: charsmap} if charsmap else {}),
    }


def _charsmap(normalizer: Any, name: str) -> bytes:
    """The compiled table among the steps of a normalizer; empty when there is none."""
    if not isinstance(normalizer, Mapping):
        return b""
    if normalizer.get("type") == "Sequence":
        parts = [_charsmap(part, name) for part in normalizer.get("normalizers") or ()]
        return next((part for part in parts if part), b"")
    if normalizer.get("type") != "Precompiled":
        return b""
    try:
        return base64.b64decode(normalizer.get("precompiled_charsmap") or "", validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise CheckpointError(f"{name} has a table of characters that is no base64: {error}") from error


def unigram_variants(document: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What to try about spaces, by a name to tell and the keys that it means; the likeliest first."""
    rules = json.dumps([document.get("normalizer"), document.get("pre_tokenizer")])
    merged = '"WhitespaceSplit"' in rules or " {2,}" in rules
    prefix = '"prepend_scheme": "never"' not in rules
    tries = [(prefix, merged), (prefix, not merged), (not prefix, merged), (not prefix, not merged)]
    return [
        (
            f"{'a' if front else 'no'} space in front, spaces {'merged' if one else 'kept'}",
            {_PREFIX: front, _MERGED: one},
        )
        for front, one in tries
    ]


def rebuilt_parts(metadata: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Model, normalizer, pre-tokenizer and decoder of a tokenizer.json for a GGUF vocabulary of this kind."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 2)
    if not isinstance(unknown, int) or not 0 <= unknown < len(tokens):
        raise CheckpointError(f"{name} has the unknown token {unknown!r}, outside of its {len(tokens)} tokens")
    charsmap = metadata.get(CHARSMAP)
    table = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()} if charsmap else None
    prefix, merged = metadata.get(_PREFIX, False), metadata.get(_MERGED, False)
    spaces = {
        "type": "Metaspace",
        "replacement": SPACE,
        "prepend_scheme": "always" if prefix or merged else "never",
        "split": True,
    }
    return {
        "normalizer": table,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, spaces]}
        if merged
        else spaces,
        "decoder": {key: value for key, value in spaces.items() if key != "split"},
        "model": {
            "type": "Unigram",
            "unk_id": unknown,
            "vocab": [[token, score] for token, score in zip(tokens, scores, strict=True)],
            "byte_fallback": False,
        },
    }
