"""One generator of token events for everybody: command line, server, bench and proofs.

Knows the engine seam, sampling and the text decoder; not how events are shown or sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from runtime.engine import Engine
from runtime.sampling import SamplingOptions
from runtime.tokenizer import TextTokenizer

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What to generate from ``prompt`` (token ids, special tokens included).

    Generation ends at any id of ``stop_tokens``, before any text of ``stop`` (which is not emitted), after
    ``max_tokens`` tokens or when the context is full.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: SamplingOptions = SamplingOptions()
    stop: tuple[str, ...] = ()
    stop_tokens: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token. ``text`` is what became certain with it: may be empty (incomplete UTF-8, possible stop).

    Times are seconds since ``generate`` was called; ``prefill_s`` is set on the first event only, ``cached_tokens``
    tells how many prompt tokens were already in the sequence. The last event carries ``finish_reason``; its ``token``
    is None when a stop token or a cancellation ended the generation.
    """

    token: int | None
    text: str
    index: int
    elapsed_s: float
    prefill_s: float | None = None
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class Session:
    """One engine sequence and the tokens that it holds: the only mutable state of a conversation."""

    engine: Engine
    sequence: int = 0
    tokens: list[int] = field(default_factory=list)


def generate(
    session: Session,
    tokenizer: TextTokenizer,
    request: GenerationRequest,
    *,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[TokenEvent]:
    """Generate token by token; ``cancelled`` is asked before every engine call (prefill asks between batches).

    The sequence is truncated to the longest common prefix of what it holds and the prompt, so a chat's second turn
    computes only what is new. Raises ``ContextOverflowError`` when the prompt does not fit.
    """
    raise NotImplementedError
