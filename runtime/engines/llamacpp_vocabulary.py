"""The vocabulary of a GGUF file, by llama.cpp's own tokenizer: what a bare file needs to turn text into ids and back.

Knows llama.cpp's functions for text, nothing of computing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from edgelm.errors import EngineError
from runtime.tokenizer import ends_added


class LlamaVocabulary:
    """The vocabulary inside a GGUF: text and ids, by llama.cpp's own tokenizer."""

    def __init__(self, library: Any, model: Any, *, owns_model: bool = False) -> None:
        self._library = library
        self._model = model if owns_model else None
        self._vocab = library.llama_model_get_vocab(model)
        self.size: int = library.llama_vocab_n_tokens(self._vocab)
        self.bos: int = library.llama_vocab_bos(self._vocab)
        self.eos: int = library.llama_vocab_eos(self._vocab)
        self.adds_bos: bool = library.llama_vocab_get_add_bos(self._vocab)
        self._buffer = ctypes.create_string_buffer(256)

    def tokenize(self, text: bytes, *, special: bool, framed: bool = False) -> list[int]:
        """Ids of UTF-8 ``text``; ``special`` recognises control tokens written in it, ``framed`` adds those that the
        vocabulary puts around a text."""
        room = len(text) + 8
        while True:
            tokens = (ctypes.c_int32 * room)()
            count = self._library.llama_tokenize(self._vocab, text, len(text), tokens, room, framed, special)
            if count >= 0:
                return list(tokens[:count])
            room = -count

    def frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that belong before and behind a whole text, as [CLS] and [SEP]."""
        return ends_added(self.tokenize(b"a", special=False), self.tokenize(b"a", special=False, framed=True))

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """Bytes of one token; control tokens are empty unless ``special``."""
        if not 0 <= token < self.size:
            raise EngineError(f"token {token} is outside the vocabulary of {self.size}")
        arguments = (0, special)
        count = self._library.llama_token_to_piece(self._vocab, token, self._buffer, len(self._buffer), *arguments)
        if count < 0:
            self._buffer = ctypes.create_string_buffer(-count)
            count = self._library.llama_token_to_piece(self._vocab, token, self._buffer, -count, *arguments)
        return self._buffer.raw[:count]

    def detokenize(self, ids: Sequence[int], *, special: bool) -> bytes:
        """Bytes of ``ids`` as one text."""
        outside = [token for token in ids if not 0 <= token < self.size]
        if outside:
            raise EngineError(f"token {outside[0]} is outside the vocabulary of {self.size}")
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        room = 16 * len(ids) + 64
        while True:
            text = ctypes.create_string_buffer(room)
            flags = (not special, special)
            count = self._library.llama_detokenize(self._vocab, tokens, len(ids), text, room, *flags)
            if count >= 0:
                return text.raw[:count]
            room = -count

    def end_of_generation(self) -> frozenset[int]:
        """All ids that llama.cpp itself treats as the end of an answer."""
        is_end = self._library.llama_vocab_is_eog
        return frozenset(token for token in range(self.size) if is_end(self._vocab, token))

    def close(self) -> None:
        """Free a vocabulary-only model; a vocabulary of an engine lives as long as the engine."""
        if self._model is not None:
            self._library.llama_model_free(self._model)
            self._model = None
