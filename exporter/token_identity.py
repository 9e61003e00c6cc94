"""Whether two tokenizers give the same ids: a hard corpus through a tokenizer.json and through an artefact.

What llama.cpp has no place for, and leaves to whoever calls it, is done to the texts first, the same for both sides:
``comparable_texts`` says what. Knows neither checkpoints nor how a vocabulary is written.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgelm.bundle import TokenIdentity
from edgelm.errors import CheckpointError
from exporter.texts import hard_corpus
from exporter.tokenizer_sentencepiece import is_sentencepiece
from exporter.tokenizer_unigram import is_unigram
from exporter.tokenizer_wordpiece import LONGEST_WORD, is_wordpiece
from exporter.vocabulary import tokenize_with_llama
from runtime.tokenizer import JsonTokenizer

_NEXT_LINE = "\x85"


def compare_tokenizers(tokenizer_json: str, vocabulary: int, artifact_path: Path) -> TokenIdentity:
    """Encode a hard corpus with a tokenizer.json and with the vocabulary inside an artefact, and compare.

    ``vocabulary`` is the number of tokens that the artefact must have. Special tokens written in the texts are
    recognised, none are added. Raises ``BundleError`` for an invalid artefact, ``EngineError`` when llama.cpp cannot
    load it.
    """
    texts, expected = expected_ids(tokenizer_json)
    answer = tokenize_with_llama(artifact_path, texts)
    difference = first_difference(texts, expected, answer.ids)
    if difference is None and answer.vocabulary != vocabulary:
        difference = f"the source has {vocabulary} tokens, the artefact {answer.vocabulary}"
    return _identity(texts, expected, difference)


def compare_files(tokenizer_json: str, path: Path) -> TokenIdentity:
    """Encode the hard corpus with a tokenizer.json and with another one as the runtime reads it, and compare.

    This is the proof of artefacts without a vocabulary of their own. Raises ``BundleError`` for an unreadable file.
    """
    texts, expected = expected_ids(tokenizer_json)
    tokenizer = JsonTokenizer(path)
    return _identity(
        texts, expected, first_difference(texts, expected, [tuple(map(int, tokenizer.encode(text))) for text in texts])
    )


def _identity(texts: Sequence[str], expected: Sequence[tuple[int, ...]], difference: str | None) -> TokenIdentity:
    return TokenIdentity(
        identical=difference is None,
        texts=len(texts),
        tokens=sum(map(len, expected)),
        first_difference=difference,
    )


def open_tokenizer(tokenizer_json: str, name: str) -> Any:
    """The ``tokenizers.Tokenizer`` of a tokenizer.json. Raises ``CheckpointError`` naming ``name``."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the library raises nothing narrower, whatever is wrong with a document
        raise CheckpointError(f"{name} holds no valid tokenizer: {error}") from error


@functools.lru_cache(maxsize=1)  # asked when the pre-tokenizer is sought and again for the artefact's proof
def expected_ids(tokenizer_json: str) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """The texts of a comparison, and the ids that a tokenizer.json gives them."""
    tokenizer = open_tokenizer(tokenizer_json, "tokenizer.json")
    texts = tuple(comparable_texts(tokenizer, json.loads(tokenizer_json)))
    return texts, tuple(tuple(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)


def comparable_texts(tokenizer: Any, document: Mapping[str, Any]) -> list[str]:
    """The hard corpus, as far as llama.cpp can be asked for the ids of this tokenizer.

    Texts are passed through the tokenizer's normalization first, if it has one that llama.cpp has not. Special tokens
    that swallow spaces beside them (as <mask>) get none. Of WordPiece, llama.cpp drops every mark where Hugging
    Face drops only those without width, and has no longest word: marks with width are left out, longer words cut. Of
    Unigram, one control character is a space to one side only, and becomes one.
    """
    added = tokenizer.get_added_tokens_decoder()
    entries = [added[index] for index in sorted(added)]
    special = [entry.content for entry in entries]
    greedy = {entry.content for entry in entries if entry.lstrip or entry.rstrip}
    texts = list(hard_corpus([token for token in special if token not in greedy]))
    texts += [f"tight{token}tight" for token in sorted(greedy)[:24]]
    # Spaces are a matter of both sides, and tried; Unicode forms have no place in llama.cpp.
    if tokenizer.normalizer is None or is_sentencepiece(document):
        return texts
    texts = [_between(special, text, tokenizer.normalizer.normalize_str) for text in texts]
    if is_unigram(document):
        return [text.replace(_NEXT_LINE, " ") for text in texts]
    return [_between(special, text, _plain_words) for text in texts] if is_wordpiece(document) else texts


def _between(special: Sequence[str], text: str, change: Any) -> str:
    """The text with everything between its special tokens changed."""
    if not special:
        return str(change(text))
    pattern = "(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")"
    return "".join(part if index % 2 else change(part) for index, part in enumerate(re.split(pattern, text)))


def _plain_words(text: str) -> str:
    kept = "".join(character for character in text if unicodedata.category(character) not in ("Mc", "Me"))
    return re.sub(rf"(\S{{{LONGEST_WORD}}})\S+", r"\1", kept)


def first_difference(
    texts: Sequence[str], expected: Sequence[tuple[int, ...]], found: Sequence[tuple[int, ...]]
) -> str | None:
    """The first text whose ids differ, with the place; None when none does."""
    for text, ours, theirs in zip(texts, expected, found, strict=True):
        if ours != theirs:
            pairs = enumerate(zip(ours, theirs, strict=False))
            place = next((index for index, (one, other) in pairs if one != other), min(len(ours), len(theirs)))
            shown = text if len(text) <= 60 else text[:57] + "..."
            return (
                f"text {shown!r}, from token {place} on: the source gives {list(ours[place : place + 6])}, "
                f"the artefact {list(theirs[place : place + 6])}"
            )
    return None
