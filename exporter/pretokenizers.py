"""Pre-tokenizers by the names that GGUF files give them, and a ``tokenizer.json`` rebuilt from a GGUF vocabulary.

A GGUF names how text is cut into words before merging and leaves the rules to the reader. The rules here are those of
the published tokenizers of each family; whoever uses a rebuilt tokenizer proves it against llama.cpp first. What
SentencePiece writes is put together by ``tokenizer_sentencepiece``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgelm.errors import CheckpointError
from exporter import tokenizer_unigram, tokenizer_wordpiece
from exporter.tokenizer_sentencepiece import rebuilt_parts
from exporter.tokenizer_types import CONTROL, UNKNOWN, USER_DEFINED

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_BYTES_ONLY = {**_BYTE_LEVEL, "use_regex": False}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


_ACCENTED_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_MARKED_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _cased(ending: str, digits: str) -> str:
    """Words cut where small letters turn into capitals, with an ending that stays, and runs of digits."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    front = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{front}{upper}*{lower}+{ending}|{front}{upper}+{lower}*{ending}|\p{{N}}{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


@dataclass(frozen=True, slots=True)
class _Family:
    """How one family of tokenizers cuts text. ``ignore_merges``: a word that is a token is not merged up to it."""

    names: tuple[str, ...]
    pre_tokenizer: Mapping[str, Any]
    normalizer: Mapping[str, Any] | None = None
    ignore_merges: bool = False


def _sequence(*parts: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def _split(regex: str) -> Mapping[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


_FAMILIES = (
    _Family(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4"), _BYTE_LEVEL),
    _Family(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        _sequence({"type": "Digits", "individual_digits": True}, _BYTE_LEVEL),
    ),
    _Family(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2", "pixtral", "midm-2.0", "glm4", "glm5"),
        _sequence(_split(_WORDS % "{1,3}"), _BYTES_ONLY),
        ignore_merges=True,
    ),
    _Family(("dbrx", "smaug-bpe", "chatglm-bpe"), _sequence(_split(_WORDS % "{1,3}"), _BYTES_ONLY)),
    _Family(
        ("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez"),
        _sequence(_split(_WORDS % ""), _BYTES_ONLY),
        normalizer={"type": "NFC"},
    ),
    _Family(
        ("qwen35",),
        _sequence(_split(_ACCENTED_WORDS), _BYTES_ONLY),
        normalizer={"type": "NFC"},
    ),
    _Family(("tekken",), _sequence(_split(_cased("", "")), _BYTES_ONLY), ignore_merges=True),
    _Family(("gpt-4o", "llama4", "kanana2"), _sequence(_split(_cased(_SHORT, "{1,3}")), _BYTES_ONLY)),
    _Family(
        ("deepseek-v3", "hunyuan-dense", "joyai-llm"),
        _sequence(_split(r"\p{N}{1,3}"), _split("[一-龥\u3040-ゟ゠-ヿ]+"), _split(_MARKED_WORDS), _BYTES_ONLY),
    ),
)

# One name for every way of cutting that llama.cpp knows for byte-level BPE, the common ones first.
_CANDIDATES = (
    "gpt-2", "smollm", "llama-bpe", "qwen2", "dbrx", "gpt-4o", "tekken", "deepseek-llm", "deepseek-coder",
    "deepseek-v3", "falcon", "bloom", "viking", "superbpe", "bailingmoe", "seed-coder", "kimi-k2", "qwen35",
    "minicpm5", "exaone-moe", "youtu", "afmoe", "jais-2", "tiny_aya", "spark2_5", "ufakzeka", "default",
)  # fmt: skip


def likely_candidates(pre_tokenizer: Any) -> tuple[str, ...]:
    """Names to try for a ``pre_tokenizer`` of a tokenizer.json, the likeliest first. All are tried in the end."""
    rules = json.dumps(pre_tokenizer)
    if '"Digits"' in rules:
        first = "smollm"
    elif r"\\p{N}{1,3}" in rules:
        first = "llama-bpe"
    elif '"Split"' in rules:
        first = "qwen2"
    else:
        first = "gpt-2"
    return (first, *(name for name in _CANDIDATES if name != first))


def rebuild_tokenizer_json(metadata: Mapping[str, Any], name: str) -> str:
    """``tokenizer.json`` for the vocabulary in the ``tokenizer.*`` metadata (plain lists) of the GGUF file ``name``.

    Raises ``CheckpointError`` when the merges are no pairs, or text is cut in a way not known here.
    """
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokens, types),
        "post_processor": _post_processor(metadata, tokens),
        **_parts(metadata, name),
    }
    return json.dumps(document, ensure_ascii=False)


def _parts(metadata: Mapping[str, Any], name: str) -> dict[str, Any]:
    if metadata.get("tokenizer.ggml.model") == tokenizer_wordpiece.MODEL:
        return tokenizer_wordpiece.rebuilt_parts(metadata, name)
    if metadata.get("tokenizer.ggml.model") == tokenizer_unigram.MODEL:
        return tokenizer_unigram.rebuilt_parts(metadata, name)
    return rebuilt_parts(metadata) if "tokenizer.ggml.scores" in metadata else _byte_level_parts(metadata, name)


def _byte_level_parts(metadata: Mapping[str, Any], name: str) -> dict[str, Any]:
    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    pre = metadata.get("tokenizer.ggml.pre")
    family = next((family for family in _FAMILIES if pre in family.names), None)
    if family is None:
        known = ", ".join(name for family in _FAMILIES for name in family.names)
        raise CheckpointError(
            f"{name} cuts text by the pre-tokenizer {pre!r}, unknown to EdgeLM (known: {known})",
            hint="export from the original Hugging Face checkpoint",
        )
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": family.ignore_merges,
        "vocab": {token: index for index, token in enumerate(tokens)}, "merges": _pairs(merges, name),
    }  # fmt: skip
    return {
        "normalizer": family.normalizer,
        "pre_tokenizer": family.pre_tokenizer,
        "decoder": _BYTE_LEVEL,
        "model": model,
    }


def _pairs(merges: Sequence[str], name: str) -> list[list[str]]:
    pairs = [merge.split(" ") for merge in merges]
    for merge, pair in zip(merges, pairs, strict=True):
        if len(pair) != 2:
            raise CheckpointError(f"{name} has the merge {merge!r}, which is no pair of tokens")
    return pairs


def _added_tokens(tokens: Sequence[str], types: Sequence[int]) -> list[dict[str, Any]]:
    return [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != USER_DEFINED,
        }
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]


def _post_processor(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Any] | None:
    """Adds BOS in front and EOS behind when the vocabulary asks for it and special tokens are asked for."""
    front, behind = _ends(metadata)
    if front is None and behind is None:
        return None
    first, second = ({"Sequence": {"id": which, "type_id": number}} for number, which in enumerate("AB"))

    def around(text: Mapping[str, Any], number: int) -> list[Any]:
        ends = [{"SpecialToken": {"id": tokens[end], "type_id": number}} if end is not None else None
                for end in (front, behind)]  # fmt: skip
        return [part for part in (ends[0], text, ends[1]) if part is not None]

    used = [end for end in (front, behind) if end is not None]
    return {
        "type": "TemplateProcessing",
        "single": around(first, 0),
        "pair": [*around(first, 0), *around(second, 1)],
        "special_tokens": {tokens[end]: {"id": tokens[end], "ids": [end], "tokens": [tokens[end]]} for end in used},
    }


def _ends(metadata: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Ids that llama.cpp puts before and behind a text, None for no such. WordPiece always has both."""

    def named(name: str) -> int | None:
        return metadata.get(f"tokenizer.ggml.{name}_token_id")

    if metadata.get("tokenizer.ggml.model") == tokenizer_wordpiece.MODEL:
        return named("bos"), named("seperator")
    front, behind = (metadata.get(f"tokenizer.ggml.add_{name}_token") for name in ("bos", "eos"))
    return named("bos") if front else None, named("eos") if behind else None
