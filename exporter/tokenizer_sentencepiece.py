"""SentencePiece-like BPE (Llama 2, TinyLlama, Mistral, Phi 3, Gemma): between tokenizer.json and llama.cpp's "llama".

Hugging Face merges pairs by rank, llama.cpp joins neighbours whose common token has the highest score. Both agree when
every way to build a token has a merge and ranks follow the merged tokens, as converters from SentencePiece write them;
whoever uses this proves it. Byte-level BPE is not this module's business.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from edgelm.errors import CheckpointError
from exporter.tokenizer_types import BYTE, NORMAL, UNKNOWN

SPACE = "\u2581"
MODEL = "llama"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def is_sentencepiece(document: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is a BPE that falls back to bytes and marks spaces."""
    model = document.get("model")
    if not isinstance(model, Mapping) or model.get("type", "BPE") != "BPE" or not model.get("byte_fallback"):
        return False
    return '"ByteLevel"' not in json.dumps(document.get("pre_tokenizer"))


def sentencepiece_metadata(
    document: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], name: str
) -> dict[str, Any]:
    """The keys of a GGUF vocabulary: tokens, types and scores. Raises ``CheckpointError`` for missing bytes."""
    unknown = document["model"].get("unk_token")
    known = set(tokens)
    missing = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in known]
    if missing:
        raise CheckpointError(f"{name} has no token for the byte {missing[0]}, and {len(missing) - 1} more are missing")
    kinds = [
        UNKNOWN if token == unknown else BYTE if kind == NORMAL and _BYTE_TOKEN.fullmatch(token) else kind
        for token, kind in zip(tokens, types, strict=True)
    ]
    ranks = _ranks(document["model"].get("merges"), name)
    return {
        "tokenizer.ggml.model": MODEL,
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [-float(ranks.get(token, len(ranks))) for token in tokens],
        "tokenizer.ggml.add_space_prefix": _adds_space(document),
    }


def _ranks(merges: Any, name: str) -> dict[str, int]:
    """The order in which tokens are built: that of their first merge, gaps closed."""
    if not isinstance(merges, list):
        raise CheckpointError(f"{name} has no merges")
    ranks: dict[str, int] = {}
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise CheckpointError(f"{name} has the merge {merge!r}, which is no pair of tokens")
        ranks.setdefault(pair[0] + pair[1], len(ranks))
    return ranks


def _adds_space(document: Mapping[str, Any]) -> bool:
    rules = json.dumps([document.get("normalizer"), document.get("pre_tokenizer")])
    return '"Prepend"' in rules or ('"Metaspace"' in rules and '"prepend_scheme": "never"' not in rules)


def prepend_scheme(document: Mapping[str, Any]) -> str | None:
    """When Metaspace puts a space in front of a text that has none: ``first``, ``always``, or None for never.

    llama.cpp's setting knows no such condition, so whoever asks it writes the space.
    """
    pre_tokenizer = document.get("pre_tokenizer")
    if not is_sentencepiece(document) or not isinstance(pre_tokenizer, Mapping):
        return None
    if pre_tokenizer.get("type") != "Metaspace":
        return None
    scheme = pre_tokenizer.get("prepend_scheme", "always" if pre_tokenizer.get("add_prefix_space", True) else "never")
    return None if scheme == "never" else str(scheme)


def space_variants(document: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What to try: a space in front of texts or none, the likelier first."""
    if prepend_scheme(document) is not None:
        # Prompts of a chat begin with a special token, where Metaspace adds no space but llama.cpp's setting would.
        return [("spaces as the text has them", {"tokenizer.ggml.add_space_prefix": False})]
    likely = _adds_space(document)
    labels = {True: "a space in front", False: "no space in front"}
    return [(labels[choice], {"tokenizer.ggml.add_space_prefix": choice}) for choice in (likely, not likely)]


def rebuilt_parts(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Model, normalizer, pre-tokenizer and decoder of a tokenizer.json for a GGUF vocabulary with scores."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    scores = metadata["tokenizer.ggml.scores"]
    adds_space = metadata.get("tokenizer.ggml.add_space_prefix", True)
    by_token = {token: index for index, token in enumerate(tokens)}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = [{"type": "Prepend", "prepend": SPACE}] if adds_space else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if adds_space else []
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": by_token,
            "merges": merges_of(by_token, types, scores),
        },
    }


def merges_of(by_token: Mapping[str, int], types: Sequence[int], scores: Sequence[float]) -> list[list[str]]:
    """Every pair of tokens that makes a normal one, the best scores first."""
    found: list[tuple[float, int, int, list[str]]] = []
    for token, index in by_token.items():
        if types[index] != NORMAL or len(token) < 2:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in by_token and right in by_token:
                found.append((-scores[index], by_token[left], by_token[right], [left, right]))
    found.sort(key=lambda item: item[:3])
    return [pair for *_, pair in found]
