"""Text to token ids and back, on the device.

Two implementations: the ``tokenizers`` library over a bundle's ``tokenizer.json``, and the vocabulary inside a bare
GGUF. The export proves that both give the same ids. Knows nothing of chat templates.
"""

from __future__ import annotations

import codecs
import json
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from edgelm.errors import BundleError, UsageError


class TextTokenizer(Protocol):
    """Encodes text and decodes ids."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of ``text``. ``special`` recognises special tokens written in the text (templates need it).

        Never adds BOS or EOS: the template or the caller writes them.
        """
        ...

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of ``ids``; special tokens are left out unless ``special``; bytes that are no UTF-8 become U+FFFD."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for, empty for a special token. Streaming joins these."""
        ...


class TextDecoder:
    """UTF-8 bytes that arrive in pieces to text: never half a character, what cannot be one becomes U+FFFD."""

    def __init__(self) -> None:
        self._held = b""

    def push(self, piece: bytes) -> str:
        """Characters that are complete with ``piece``."""
        data = self._held + piece
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._held = data[used:]
        return text

    def finish(self) -> str:
        """U+FFFD for a character that was never completed, else nothing."""
        data, self._held = self._held, b""
        return data.decode("utf-8", "replace")


@lru_cache(maxsize=1)
def byte_of_character() -> dict[str, int]:
    """The character that stands for each byte in byte-level BPE vocabularies (GPT-2's bytes_to_unicode), inverted.

    Printable Latin-1 characters stand for themselves, the other bytes for the characters from U+0100 on, in order.
    """
    themselves = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in themselves}
    others = (byte for byte in range(256) if chr(byte) not in table)
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


def _check_text(text: str) -> bytes:
    """The text as UTF-8. Raises ``UsageError`` for lone surrogates, which JSON can carry and UTF-8 cannot."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the text is not valid Unicode: half a surrogate pair at character {error.start}") from error


def ends_added(bare: Sequence[int], whole: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What stands before and behind the ids of a text when special tokens are added to it, given both encodings.

    Raises ``BundleError`` when the text's own ids are not among them.
    """
    for start in range(len(whole) - len(bare) + 1):
        if list(whole[start : start + len(bare)]) == list(bare):
            return tuple(whole[:start]), tuple(whole[start + len(bare) :])
    raise BundleError(f"adding special tokens changes the ids of a text from {list(bare)} to {list(whole)}")


def _decoder_kinds(decoder: dict[str, Any] | None) -> set[str]:
    if not decoder:
        return set()
    kinds = {str(decoder.get("type"))}
    for part in decoder.get("decoders", ()):
        kinds |= _decoder_kinds(part)
    return kinds


class JsonTokenizer:
    """``tokenizer.json`` by the ``tokenizers`` library. Thread-safe.

    Raises ``BundleError`` for files that the library cannot read and for vocabularies whose tokens are neither
    byte-level nor SentencePiece-like, since their bytes would be guesswork. ``opened`` is the library's own
    tokenizer of that very text, if the caller has it.
    """

    def __init__(self, path: Path, opened: Any = None) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = opened or Tokenizer.from_str(path.read_text(encoding="utf-8"))
            # Parsing the whole document again, only to see its decoder, would take 18 MiB for 49,152 tokens.
            decoder = json.loads(self._tokenizer.decoder.__getstate__()) if self._tokenizer.decoder else {}
        except OSError as error:
            raise BundleError(f"cannot read tokenizer {path}: {error.strerror}") from error
        # The library has no exception class of its own: it raises plain Exception for every malformed file.
        except Exception as error:
            raise BundleError(f"{path} is not a tokenizer: {error}", hint="export the bundle again") from error
        kinds = _decoder_kinds(decoder)
        self._byte_level = "ByteLevel" in kinds
        self._continued = str(decoder.get("prefix", "##")) if "WordPiece" in kinds else None
        if not self._byte_level and not kinds & {"ByteFallback", "Metaspace", "Replace", "WordPiece"}:
            raise BundleError(f"{path} has a decoder of unknown kind: {', '.join(sorted(kinds)) or 'none'}")
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {token: b"" if entry.special else entry.content.encode() for token, entry in added.items()}
        self._lock = threading.Lock()
        self._bytes: dict[int, bytes] = dict(self._added)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        _check_text(text)
        with self._lock:  # the switch belongs to the tokenizer, not to the call
            self._tokenizer.encode_special_tokens = not special
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that belong before and behind a whole text, as [CLS] and [SEP], by the file's post-processor."""
        with self._lock:
            self._tokenizer.encode_special_tokens = False
            bare, whole = (self._tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
        return ends_added(bare, whole)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=not special)
        return text

    def token_bytes(self, token: int) -> bytes:
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = self._vocabulary_bytes(token)
        return found

    def _vocabulary_bytes(self, token: int) -> bytes:
        piece: str | None = self._tokenizer.id_to_token(token) if token >= 0 else None
        if piece is None:  # models pad their vocabulary: such an id has logits but no text
            return b""
        if self._byte_level:
            table = byte_of_character()
            if all(character in table for character in piece):
                return bytes(table[character] for character in piece)
            return piece.encode()
        if self._continued is not None:
            return (piece[len(self._continued) :] if piece.startswith(self._continued) else f" {piece}").encode()
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()


class Vocabulary(Protocol):
    """What ``GgufTokenizer`` needs of the engine's vocabulary, as ``engines.llamacpp_vocabulary`` has it."""

    def tokenize(self, text: bytes, *, special: bool) -> list[int]: ...

    def token_bytes(self, token: int, *, special: bool = False) -> bytes: ...

    def detokenize(self, ids: Sequence[int], *, special: bool) -> bytes: ...


class GgufTokenizer:
    """The vocabulary inside a GGUF file, by llama.cpp's own tokenizer. Thread-safe: the vocabulary has one buffer."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        with self._lock:
            return self._vocabulary.tokenize(_check_text(text), special=special)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        with self._lock:
            return self._vocabulary.detokenize(ids, special=special).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        found = self._bytes.get(token)
        if found is None:
            with self._lock:
                found = self._bytes[token] = self._vocabulary.token_bytes(token)
        return found
