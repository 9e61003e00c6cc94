"""Whether llama.cpp computes flash attention: as asked, else by the processor and by what was measured on it.

A context has one kind for prompts and tokens, since values lie transposed in the cache of the other. With flash
attention prompts are read faster and no table of all scores is kept; without, some processors generate faster behind a
long text. Knows no engine. Figures: ``docs/serving.md``, "Flash attention".
"""

from __future__ import annotations

from typing import Final

from edgelm.bundle import Choice
from edgelm.errors import UsageError
from runtime.engine import EngineOptions

ON: Final = "on"
OFF: Final = "off"


def choose_attention(options: EngineOptions, *, on_gpu: bool) -> Choice:
    """``on`` or ``off`` with the reason; ``on_gpu`` tells whether layers of the model are on a GPU.

    Raises ``UsageError`` for a cache that cannot be had without.
    """
    check_attention(options)
    if options.flash_attention != "auto":
        return Choice(value=options.flash_attention, reason="asked for")
    if on_gpu:
        return Choice(value=ON, reason="layers are on a GPU")
    if options.kv_type == "q8_0":
        return Choice(value=ON, reason="a KV cache of 8 bits needs it")
    return Choice(value=ON, reason="reads prompts faster and needs less memory")


def check_attention(options: EngineOptions) -> None:
    """Raise ``UsageError`` for a cache that cannot be had without flash attention."""
    if options.flash_attention == OFF and options.kv_type == "q8_0":
        raise UsageError(
            "a KV cache of type q8_0 needs flash attention",
            hint="use --flash-attention on, or leave out --kv-type q8_0",
        )
