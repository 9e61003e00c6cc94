"""From logits to a token: repetition penalty, temperature, top-k, top-p, min-p, seed.

Pure numpy on one row of logits; knows neither engines nor text.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How the next token is chosen. ``temperature`` 0 is greedy and ignores the rest but the penalty.

    ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 switch these filters off; ``repetition_penalty`` 1 likewise, it looks at
    the last ``repetition_window`` tokens. ``seed`` None draws a fresh one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_window: int = 64
    seed: int | None = None
