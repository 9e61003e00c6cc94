"""Whether llama.cpp computes flash attention: as asked, else by what was measured on this processor or one of its kind.

A context has one kind for prompts and tokens, since values lie transposed in the cache of the other. With flash
attention prompts are read faster and no table of all scores is kept; without, some processors generate much faster
behind a long text. Knows no engine. Figures: ``docs/serving.md``, "Flash attention".
"""

from __future__ import annotations

from typing import Final, Literal

from edgelm.bundle import Choice
from edgelm.errors import UsageError
from edgelm.units import format_bytes
from runtime.engine import EngineOptions
from runtime.tiles import TILES, has_tiles
from targets.host import available_memory
from targets.predict import RunSettings, attention_cycles, copied_score_bytes, kv_element_bytes, score_bytes
from targets.profile import TargetProfile
from targets.workload import Workload

ON: Final = "on"
OFF: Final = "off"
READ, WRITTEN = 512, 128
"""Tokens of the exchange that a choice is made for: what ``edgelm bench`` measures."""
_LEAST_GAIN = 0.05  # what is closer is noise of detection
_KNOWN = {
    ON: "reads prompts faster, and is not known to generate slower on this processor",
    OFF: "with AMX generating was measured to be faster without it, beyond short texts",
}
_MOST_OF_FREE = 0.1  # of free memory may scores take before flash attention, which needs none, is taken


def choose_attention(options: EngineOptions, *, on_gpu: bool, scores_bytes: int = 0, held_bytes: int = 0) -> Choice:
    """``on`` or ``off`` with the reason. ``on_gpu`` tells whether layers of the model are on a GPU, ``scores_bytes``
    what attention would keep without flash attention, ``held_bytes`` what else is still to be taken of free memory.

    Raises ``UsageError`` for a cache that cannot be had without.
    """
    check_attention(options)
    if options.flash_attention != "auto":
        return Choice(value=options.flash_attention, reason="asked for")
    if on_gpu:
        return Choice(value=ON, reason="layers are on a GPU")
    if options.kv_type == "q8_0":
        return Choice(value=ON, reason="a KV cache of 8 bits needs it")
    faster = options.faster_attention or (OFF if has_tiles() else ON)
    known = "measured on this machine" if options.faster_attention else _KNOWN[faster]
    if faster == OFF and scores_bytes > _most_for_scores(held_bytes):
        return Choice(value=ON, reason=f"without it scores would take {format_bytes(scores_bytes)}")
    return Choice(value=faster, reason=known)


def _most_for_scores(held_bytes: int) -> float:
    free = int(available_memory().value)
    return min(_MOST_OF_FREE * free, free - held_bytes)


def planned_attention(profile: TargetProfile, workload: Workload, settings: RunSettings) -> bool:
    """Whether a machine of this profile computes flash attention with a model that has its memory to itself: what
    ``choose_attention`` says in a run with the profile as its ``--target``. Without one what was measured is not known
    there. ``settings`` know no more than context, batch and cache."""
    if workload.format != "gguf" or profile.kind == "gpu" or settings.kv_type == "q8_0":
        return True
    faster = measured_attention(profile) or (OFF if TILES in profile.isa else ON)
    scores = score_bytes(workload, settings.context, settings.batch)
    usable = profile.usable_ram_bytes
    cached = workload.kv_elements_per_token * kv_element_bytes(workload, settings) * settings.context
    return faster == ON or scores > min(_MOST_OF_FREE * usable, usable - workload.file_bytes - cached)


def measured_attention(profile: TargetProfile) -> Literal["on", "off"] | None:
    """What is faster on a machine whose kernels were measured with both kinds, None for others.

    In cycles: attention of a prompt of n tokens is n^2 / 2 steps, of m tokens behind it m (n + m / 2), and the rest of
    the work is the same. That threads are shared out a little worse in prompts is left out.
    """
    flash, plain = (attention_cycles(profile, flash=flash) for flash in (True, False))
    if None in (*flash, *plain) or flash == plain:
        return None
    read, written = READ**2 / 2, WRITTEN * (READ + WRITTEN / 2)
    with_it, without = (read * (prefill or 0) + written * (decode or 0) for prefill, decode in (flash, plain))
    return OFF if without < (1 - _LEAST_GAIN) * with_it else ON


def with_copies(
    buffers: dict[str, int], attention: Choice, workload: Workload, options: EngineOptions
) -> dict[str, int]:
    """Bytes of the buffers that an engine announced, and the copies of scores that the CPU makes besides without flash
    attention."""
    if attention.value == ON or "compute" not in buffers:
        return buffers
    return {**buffers, "compute": buffers["compute"] + copied_score_bytes(workload, options.context, options.batch)}


def check_attention(options: EngineOptions) -> None:
    """Raise ``UsageError`` for a cache that cannot be had without flash attention."""
    if options.flash_attention == OFF and options.kv_type == "q8_0":
        raise UsageError(
            "a KV cache of type q8_0 needs flash attention",
            hint="use --flash-attention on, or leave out --kv-type q8_0",
        )
