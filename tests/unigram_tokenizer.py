"""Unigram tokenizers trained by SentencePiece itself, in the two forms that converters write them."""

from __future__ import annotations

import base64
import io
import json
from functools import lru_cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal

Style = Literal["xlm-roberta", "t5"]
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
PIECES = 500
MASK = "<mask>"


@lru_cache
def trained() -> tuple[bytes, tuple[tuple[str, float], ...]]:
    """A SentencePiece model of ``PIECES`` pieces (serialised), and its pieces with their scores."""
    import sentencepiece

    written = io.BytesIO()
    lines = " ".join(topics.values())[:100_000].split("\n")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, vocab_size=PIECES, model_type="unigram", minloglevel=2
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    pieces = tuple((model.id_to_piece(index), model.get_score(index)) for index in range(PIECES))
    return written.getvalue(), pieces


def _field(message: bytes, number: int) -> bytes:
    """The last length-delimited field of that number in a protocol buffer."""
    found, position = b"", 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(message):
        key = varint()
        if key & 7 == 2:
            length = varint()
            if key >> 3 == number:
                found = message[position : position + length]
            position += length
        elif key & 7 == 0:
            varint()
        else:
            position += {1: 8, 5: 4}[key & 7]
    return found


def document(style: Style) -> dict[str, Any]:
    """tokenizer.json with the pieces behind ``SPECIAL``, and ``MASK`` at the end."""
    model, pieces = trained()
    charsmap = base64.b64encode(_field(_field(model, 3), 2)).decode()  # normalizer_spec.precompiled_charsmap
    table = {"type": "Precompiled", "precompiled_charsmap": charsmap}
    spaces = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    if style == "xlm-roberta":
        steps = [table, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]
        pre_tokenizer: dict[str, Any] = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, spaces]}
        ends = ("<s>", "</s>")
    else:
        strip = {"type": "Strip", "strip_left": False, "strip_right": True}
        steps = [table, strip, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "\u2581"}]
        pre_tokenizer = spaces
        ends = ("", "</s>")
    vocabulary = [[token, 0.0] for token in SPECIAL] + [[piece, score] for piece, score in pieces[3:]] + [[MASK, 0.0]]
    flags = {"single_word": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": index, "content": token, "lstrip": False, **flags} for index, token in enumerate(SPECIAL)]
    added.append({"id": len(vocabulary) - 1, "content": MASK, "lstrip": True, **flags})
    template = [{"SpecialToken": {"id": ends[0], "type_id": 0}}] if ends[0] else []
    template += [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": ends[1], "type_id": 0}}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": template,
            "pair": template,
            "special_tokens": {
                token: {"id": token, "ids": [SPECIAL.index(token)], "tokens": [token]} for token in ends if token
            },
        },
        "decoder": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always"},
        "model": {"type": "Unigram", "unk_id": 3, "vocab": vocabulary, "byte_fallback": False},
    }


ROWS = len(SPECIAL) + PIECES - 3 + 1


def write_unigram(directory: Path, style: Style) -> None:
    """Replace the tokenizer of a checkpoint of ``ROWS`` rows or more."""
    (directory / "tokenizer.json").write_text(json.dumps(document(style)), encoding="utf-8")
    names = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "unk": "<unk>", "pad": "<pad>", "mask": MASK}
    config = {f"{name}_token": token for name, token in names.items() if style != "t5" or name in ("eos", "unk", "pad")}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    for name in ("special_tokens_map.json", "generation_config.json"):
        (directory / name).unlink(missing_ok=True)
