"""How long an engine's steps take, and from when on one that does not end is taken for hung.

Arithmetic on what was measured; knows neither threads nor processes.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.server.scheduler import BATCH_TOKENS

SILENCE_FLOOR_S = 60.0
"""No limit is shorter: on small boards a grammar's tables, or weights that were evicted, take tens of seconds."""
PATIENCE = 4


@dataclass(frozen=True, slots=True)
class Pace:
    """``steps`` were computed, the slowest in ``slowest_s``, the best at ``token_s`` for each of its tokens."""

    steps: int = 0
    slowest_s: float = 0.0
    token_s: float = 0.0

    def after(self, elapsed_s: float, tokens: int) -> Pace:
        """With one more step. A step without tokens (it was interrupted, or failed) tells nothing of their speed."""
        token_s = elapsed_s / tokens if tokens else self.token_s
        best_s = min(token_s, self.token_s) if self.token_s else token_s
        return Pace(self.steps + 1, max(self.slowest_s, elapsed_s), best_s)

    def silence_limit_s(self, floor_s: float = SILENCE_FLOOR_S) -> float:
        """Seconds without the end of a step after which the engine hangs.

        A step has at most ``BATCH_TOKENS`` tokens and computes them together, so that many times the best token's time
        bounds what a step takes on weights in memory. The slowest step so far, mostly the first one, tells what it
        takes to read them from disk again. Deep contexts, heat and other work are given ``PATIENCE`` times of either.
        """
        return max(floor_s, PATIENCE * max(self.slowest_s, BATCH_TOKENS * self.token_s))
