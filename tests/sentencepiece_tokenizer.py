"""A tokenizer as converters from SentencePiece write it: bytes to fall back to, spaces marked, every merge listed."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from exporter.tokenizer_sentencepiece import merges_of
from exporter.tokenizer_types import BYTE, NORMAL

Style = Literal["llama", "gemma", "metaspace", "mistral"]
SPECIAL = ("<unk>", "<s>", "</s>")
LEARNED = 500
VOCABULARY = len(SPECIAL) + 256 + LEARNED


@lru_cache
def _learned() -> tuple[str, ...]:
    """Characters and merged tokens, in the order in which they were learned."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=LEARNED + 1, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator([" ".join(topics.values())[:150_000]], trainer)
    vocabulary = tokenizer.get_vocab()
    return tuple(sorted(vocabulary, key=lambda token: vocabulary[token]))[1:]


def document(style: Style) -> dict[str, Any]:
    """tokenizer.json of one of the forms that are met; ``mistral`` is that of Mistral 7B v0.3."""
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *_learned()]
    by_token = {token: index for index, token in enumerate(tokens)}
    types = [BYTE if index < len(SPECIAL) + 256 else NORMAL for index in range(len(tokens))]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    forms: dict[Style, tuple[Any, Any]] = {
        "llama": ({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, replace]}, None),
        "gemma": (
            replace,
            {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
        ),
        "metaspace": (
            None,
            {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": False},
        ),
        "mistral": (
            None,
            {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False},
        ),
    }
    normalizer, pre_tokenizer = forms[style]
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    strip = [] if style == "gemma" else [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": token, **flags} for index, token in enumerate(SPECIAL)],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": by_token,
            "merges": merges_of(by_token, types, [-float(index) for index in range(len(tokens))]),
        },
    }


def write_sentencepiece(directory: Path, style: Style) -> None:
    """Replace the tokenizer of a checkpoint of ``VOCABULARY`` rows."""
    (directory / "tokenizer.json").write_text(json.dumps(document(style)), encoding="utf-8")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    (directory / "special_tokens_map.json").unlink(missing_ok=True)
    (directory / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
