"""The likeliest token chosen where logits are computed: llama.cpp's greedy sampler at the end of a context's graph.

On a GPU that spares a copy of a row of logits and a search in it, which the CPU's caches know nothing of: what small
models lose between two tokens. While a sampler is set its sequence has no logits. Knows tokens, no texts.

By its sources ggml's ``argmax`` makes token 0 (CPU, Vulkan) or -1 (CUDA) of logits that are no numbers, and passes
over single ones. A NaN on a model's way makes the mean of its last norm one and so every logit; some logits alone are
none where the head's own weights are broken, for every text alike. So the first choice of an engine is made from
logits, and token 0 or less is looked up there: ``doubted``. Not for every generation: changing to logits and back has
llama.cpp plan its graphs twice, 6 ms, where 128 tokens of a 135M gain 4 ms at most. What stays unseen: single logits
that overflow in some texts only.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any, Final

from runtime.engine import Chunk, Engine

DOUBTED: Final = 64
"""Choices made from logits after a doubt: a model that often means token 0 is not changed to and fro."""


class GraphChoice:
    """Sets and takes away the sampler of one sequence at a time. Each change has llama.cpp plan its graphs again."""

    def __init__(self, library: Any, context: Any) -> None:
        self._library, self._context = library, context
        self._chain: Any = None
        # A prototype of its own: an address costs far less than a ctypes pointer with its type.
        prototype = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32)
        self._sampled = prototype(ctypes.cast(library.llama_get_sampled_token_ith, ctypes.c_void_p).value or 0)
        self.sequence: int | None = None
        """Whose tokens are chosen in the graph, None: nobody's."""
        self.doubted = 1
        """How many of the next choices are to be made from logits, where they show whether they are numbers."""

    def begin(self, sequence: int) -> bool:
        """From the next computation on a sequence has tokens instead of logits; False where that cannot be had."""
        self.end()
        library = self._library
        # A chain can be set once in its life.
        chain = library.llama_sampler_chain_init(library.llama_sampler_chain_default_params())
        library.llama_sampler_chain_add(chain, library.llama_sampler_init_greedy())
        if not library.llama_set_sampler(self._context, sequence, chain):
            library.llama_sampler_free(chain)
            return False
        self._chain, self.sequence = chain, sequence
        return True

    def end(self) -> None:
        """Logits again, for every sequence."""
        if self.sequence is not None:
            self._library.llama_set_sampler(self._context, self.sequence, None)
            self._library.llama_sampler_free(self._chain)
            self._chain = self.sequence = None

    def from_logits(self, engine: Engine, chunk: Chunk) -> int | None:
        """Append a chunk and choose by ``argmax``; None, and nothing was appended, when that logit is no number."""
        before = engine.length(chunk.sequence)
        row = engine.forward([chunk])[0]
        token = int(row.argmax())
        if math.isfinite(row.item(token)):  # argmax returns the first NaN when there is one
            self.doubted -= 1
            return token
        engine.truncate(before, chunk.sequence)
        return None

    def token(self) -> int:
        """The choice for the last position that was computed, once it is there; below 0 when nothing was chosen."""
        token: int = self._sampled(self._context, -1)
        return token
