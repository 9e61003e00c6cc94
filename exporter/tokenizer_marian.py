"""Marian's two SentencePiece models and its list of ids, as two tokenizer.json files.

The source model cuts a text into pieces, the list gives their ids; pieces without an id become the unknown token. As a
unigram the position of a piece is its id, so the first file has the list's places and, behind them, pieces without id.
What the list has beside the source's pieces (the target's words) must never be cut, and is kept under names that no
text holds. The second file has the list's own names and only ever decodes.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelm.bundle import TokenIdentity
from edgelm.errors import CheckpointError
from exporter.optimum_graphs import silent
from exporter.texts import hard_corpus
from exporter.token_identity import open_tokenizer

_SPACE = "\u2581"
_LIMIT_BYTES = 64 * 2**20
_NORMAL, _UNKNOWN = 1, 2  # SentencePiece's types of pieces
_UNREACHABLE = -1e6


@dataclass(frozen=True, slots=True)
class MarianWords:
    """Both files, how many ids the model has, and the one for what it does not know."""

    source_json: str
    target_json: str
    vocabulary: int
    unknown: int


def is_marian(directory: Path) -> bool:
    """Whether a checkpoint has its words in Marian's form only."""
    return (directory / "source.spm").is_file() and not (directory / "tokenizer.json").is_file()


def read_marian(directory: Path) -> MarianWords:
    """Read the words of a checkpoint. Raises ``CheckpointError`` naming the file that is missing or malformed."""
    ids = _ids(directory / "vocab.json")
    settings = _table(directory / "tokenizer_config.json")
    if settings.get("separate_vocabs"):
        raise CheckpointError(f"{directory} has two lists of ids, which is not supported")
    model = _pieces(directory / "source.spm")
    names = [""] * len(ids)
    for name, index in ids.items():
        names[index] = name
    unknown, end = ids.get("<unk>"), ids.get("</s>")
    if unknown is None or end is None:
        raise CheckpointError(f"{directory / 'vocab.json'} has no <unk> or no </s>")
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == _NORMAL}
    rows = [
        [name, scores[name]] if name in scores else [f"\0{index}", _UNREACHABLE] for index, name in enumerate(names)
    ]
    rows[unknown] = ["<unk>", 0.0]
    rows += [[name, score] for name, score in scores.items() if name not in ids]
    special = [_special(name, ids[name]) for name in ("</s>", "<unk>", "<pad>") if name in ids]
    special += [_special(name, index) for name, index in ids.items() if name.startswith(">>") and name.endswith("<<")]
    for entry in special:
        rows[entry["id"]] = [entry["content"], 0.0]
    around: dict[str, Any] = {
        "type": "TemplateProcessing",
        "special_tokens": {"</s>": {"id": "</s>", "ids": [end], "tokens": ["</s>"]}},
    }
    around["single"] = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    around["pair"] = [*around["single"], {"Sequence": {"id": "B", "type_id": 0}}]
    spaces = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "always", "split": False}
    document = {
        "version": "1.0",
        "added_tokens": sorted(special, key=lambda entry: entry["id"]),
        "normalizer": _normalizer(model),
        "pre_tokenizer": spaces,
        "post_processor": around,
        "decoder": spaces,
        "model": {"type": "Unigram", "unk_id": unknown, "vocab": rows, "byte_fallback": False},
    }
    target = dict(document, normalizer=None, post_processor=None)
    target["model"] = {"type": "Unigram", "unk_id": unknown, "vocab": [[name, 0.0] for name in names]}
    return MarianWords(
        json.dumps(document, ensure_ascii=False), json.dumps(target, ensure_ascii=False), len(ids), unknown
    )


def prove_marian(directory: Path, words: MarianWords) -> TokenIdentity:
    """Encode texts with transformers' tokenizer of the checkpoint and with the first file, and compare.

    Characters that the source model has no piece for are left out, since Marian looks them up among the target's words.
    Raises ``CheckpointError`` when transformers cannot read the tokenizer.
    """
    try:
        with silent():
            from transformers import MarianTokenizer

            original = MarianTokenizer.from_pretrained(directory, local_files_only=True)
    except (ImportError, OSError, ValueError, KeyError, AssertionError, RuntimeError) as error:
        raise CheckpointError(f"transformers cannot read the tokenizer of {directory}: {error}") from error
    ours = open_tokenizer(words.source_json, "tokenizer.json")
    texts = [_known(original, text) for text in hard_corpus([])]
    difference, tokens = None, 0
    for text in (text for text in texts if text.strip()):
        theirs = original(text).input_ids
        found = [token if token < words.vocabulary else words.unknown for token in ours.encode(text).ids]
        tokens += len(theirs)
        if difference is None and found != theirs:
            difference = f"text {text[:60]!r}: the source gives {theirs[:12]}, the artefact {found[:12]}"
    return TokenIdentity(identical=difference is None, texts=len(texts), tokens=tokens, first_difference=difference)


def _known(original: Any, text: str) -> str:
    """The text without what the source model has no piece for, nor what Marian takes for the code of a language."""
    spm = original.spm_source
    unknown = spm.unk_id()
    kept = (character for character in text if character not in "<>" and unknown not in spm.encode(character))
    return original.normalize("".join(kept)) if text else text


def _normalizer(model: Any) -> dict[str, Any]:
    spec = model.normalizer_spec
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        table = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": table})
    if spec.remove_extra_whitespaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    return {"type": "Sequence", "normalizers": steps}


def _special(name: str, index: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": name, **flags}


def _ids(path: Path) -> Mapping[str, int]:
    table = _table(path)
    values: Sequence[Any] = sorted(value if isinstance(value, int) else -1 for value in table.values())
    if not table or list(values) != list(range(len(table))):
        raise CheckpointError(f"{path} does not number its tokens from 0 on")
    return table


def _table(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LIMIT_BYTES:
            raise CheckpointError(f"{path} is larger than {_LIMIT_BYTES} bytes")
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is no table")
    return document


def _pieces(path: Path) -> Any:
    """A SentencePiece model file, read by the message definition that transformers brings."""
    with silent():
        from google.protobuf.message import DecodeError
        from transformers.convert_slow_tokenizer import import_protobuf

        model = import_protobuf().ModelProto()
    try:
        if path.stat().st_size > _LIMIT_BYTES:
            raise CheckpointError(f"{path} is larger than {_LIMIT_BYTES} bytes")
        model.ParseFromString(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except DecodeError as error:
        raise CheckpointError(f"{path} is no SentencePiece model: {error}") from error
    if model.trainer_spec.model_type != 1 or not model.normalizer_spec.escape_whitespaces:
        raise CheckpointError(f"{path} is no unigram model that marks spaces")
    return model
