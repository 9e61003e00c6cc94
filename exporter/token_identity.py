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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelm.bundle import TokenIdentity
from edgelm.collector import paused_collector
from edgelm.errors import CheckpointError
from exporter.texts import hard_corpus
from exporter.tokenizer_sentencepiece import SPACE, is_sentencepiece, prepend_scheme
from exporter.tokenizer_unigram import is_unigram
from exporter.tokenizer_wordpiece import LONGEST_WORD, is_wordpiece
from exporter.vocabulary import tokenize_with_llama
from runtime.tokenizer import JsonTokenizer

_NEXT_LINE = "\x85"


@dataclass(frozen=True, slots=True)
class Corpus:
    """Texts, the same as llama.cpp is asked for them, and the ids that a tokenizer.json gives.

    ``asked`` differs where the spaces in front of a text depend on the text, which llama.cpp has no rule for.
    """

    texts: tuple[str, ...]
    asked: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]


def compare_tokenizers(tokenizer_json: str, vocabulary: int, artifact_path: Path) -> TokenIdentity:
    """Encode a hard corpus with a tokenizer.json and with the vocabulary inside an artefact, and compare.

    ``vocabulary`` is the number of tokens that the artefact must have. Special tokens written in the texts are
    recognised, none are added. Raises ``BundleError`` for an invalid artefact, ``EngineError`` when llama.cpp cannot
    load it.
    """
    corpus = expected_ids(tokenizer_json)
    answer = tokenize_with_llama(artifact_path, corpus.asked)
    difference = first_difference(corpus, answer.ids)
    if difference is None and answer.vocabulary != vocabulary:
        difference = f"the source has {vocabulary} tokens, the artefact {answer.vocabulary}"
    return _identity(corpus, difference)


def compare_files(tokenizer_json: str, path: Path) -> TokenIdentity:
    """Encode the hard corpus with a tokenizer.json and with another one as the runtime reads it, and compare.

    This is the proof of artefacts without a vocabulary of their own. Raises ``BundleError`` for an unreadable file.
    """
    corpus = expected_ids(tokenizer_json)
    # The same bytes make the same tokenizer. Opening them a second time would hold up all other threads for 0.1 s.
    same = path.is_file() and path.read_bytes() == tokenizer_json.encode()
    tokenizer = JsonTokenizer(path, open_tokenizer(tokenizer_json, path.name) if same else None)
    found = [tuple(map(int, tokenizer.encode(text))) for text in corpus.texts]
    return _identity(corpus, first_difference(corpus, found))


def _identity(corpus: Corpus, difference: str | None) -> TokenIdentity:
    return TokenIdentity(
        identical=difference is None,
        texts=len(corpus.texts),
        tokens=sum(map(len, corpus.ids)),
        first_difference=difference,
    )


def open_tokenizer(tokenizer_json: str, name: str) -> Any:
    """The ``tokenizers.Tokenizer`` of a tokenizer.json, for reading only: who asks for the same gets the same.

    Raises ``CheckpointError`` naming ``name``.
    """
    try:
        return _opened(tokenizer_json)
    except Exception as error:  # the library raises nothing narrower, whatever is wrong with a document
        raise CheckpointError(f"{name} holds no valid tokenizer: {error}") from error


@functools.lru_cache(maxsize=1)  # opening one of 49,152 tokens takes 0.15 s, and an export asks again and again
def _opened(tokenizer_json: str) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokenizer_json)


@functools.lru_cache(maxsize=1)  # asked when the pre-tokenizer is sought and again for the artefact's proof
def expected_ids(tokenizer_json: str) -> Corpus:
    """What two tokenizers are compared on."""
    with paused_collector():
        tokenizer, document = open_tokenizer(tokenizer_json, "tokenizer.json"), json.loads(tokenizer_json)
    texts = tuple(comparable_texts(tokenizer, document))
    scheme = prepend_scheme(document)
    asked = texts
    if scheme is not None:
        special = [entry.content for entry in tokenizer.get_added_tokens_decoder().values()]
        asked = tuple(_with_spaces(special, text, everywhere=scheme == "always") for text in texts)
    return Corpus(texts, asked, tuple(tuple(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts))


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
    return "".join(part if index % 2 else change(part) for index, part in enumerate(_split(special, text)))


def _split(special: Sequence[str], text: str) -> list[str]:
    """What stands between special tokens, at even places, and those themselves."""
    if not special:
        return [text]
    return re.split("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")", text)


def _plain_words(text: str) -> str:
    kept = "".join(character for character in text if unicodedata.category(character) not in ("Mc", "Me"))
    return re.sub(rf"(\S{{{LONGEST_WORD}}})\S+", r"\1", kept)


def _with_spaces(special: Sequence[str], text: str, *, everywhere: bool) -> str:
    """The text with the space that Metaspace puts in front of a beginning, or of everything between special tokens, and
    never of what begins with one."""
    parts = _split(special, text)
    for index in range(0, len(parts) if everywhere else 1, 2):
        if parts[index] and parts[index][0] not in (" ", SPACE):
            parts[index] = f" {parts[index]}"
    return "".join(parts)


def first_difference(corpus: Corpus, found: Sequence[tuple[int, ...]]) -> str | None:
    """The first text whose ids differ, with the place; None when none does."""
    for text, ours, theirs in zip(corpus.texts, corpus.ids, found, strict=True):
        if ours != theirs:
            pairs = enumerate(zip(ours, theirs, strict=False))
            place = next((index for index, (one, other) in pairs if one != other), min(len(ours), len(theirs)))
            shown = text if len(text) <= 60 else text[:57] + "..."
            return (
                f"text {shown!r}, from token {place} on: the source gives {list(ours[place : place + 6])}, "
                f"the artefact {list(theirs[place : place + 6])}"
            )
    return None
