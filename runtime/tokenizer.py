"""Text to token ids and back, on the device.

Two implementations: the ``tokenizers`` library over a bundle's ``tokenizer.json``, and the vocabulary inside a bare
GGUF. The export proves that both give the same ids. Knows nothing of chat templates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


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
