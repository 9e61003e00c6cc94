"""Speculative decoding: guesses at the next tokens, which the model then checks in one call instead of one call each.

A guess never decides anything. ``runtime.generate`` chooses every token from the model's own logits, by the same
sampler and seed as without guesses, and keeps a guess only where it is what was chosen: greedy text is the same, and
what is sampled has the same distribution, up to the rounding of a call that computes several tokens. Here is only
where guesses come from, and when they are worth their cost. Knows engines; no text, no sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from edgelm.errors import EngineError
from runtime.engine import Chunk, Engine, Logits, common_prefix

DRAFT_TOKENS = 15
"""Guesses that are checked at once, at most: with the token before them a call computes 16."""
DRAFTED_STREAMS = 2
"""Streams that may be running while guesses are made. More fill a call by themselves, and with certain tokens."""
CHECK_COST = 0.3
"""What one more token in a call costs, in calls of one token: 0.23 to 0.33 for calls of 4 to 16 tokens (CPU time of
SmolLM2-135M in Q4_0, Q4_K_M and Q8_0, AVX-512, one thread). Less where memory is slower than arithmetic."""
_LENGTHS = (4, 3, 2)  # tokens that have to be the same before a continuation is copied, longest first
_CATCH_UP_TOKENS = 128  # of a prompt that a drafting model computes between two steps, so that streams keep their pace
_FIRST_GUESSES = 4
_CREDIT = 4.0  # calls of one token that guesses may lose before they pause
_PAUSE_TOKENS, _LONGEST_PAUSE_TOKENS = 16, 256
LEAST_CHANCE = 0.3
"""Of a guess and all before it, by the drafting model itself; with less it is not worth being checked."""


@dataclass(frozen=True, slots=True)
class Draft:
    """Guesses, and what it took to make them in calls of one token of the model that checks them."""

    tokens: list[int]
    cost: float = 0.0


class Drafter(Protocol):
    """Guesses the tokens that follow. It may keep what it computed: the tokens of one generation only ever grow."""

    def draft(self, tokens: Sequence[int], most: int) -> Draft:
        """Up to ``most`` guesses at what follows ``tokens``. Raises ``EngineError``."""
        ...


class PromptLookup:
    """Copies what followed the last time that the latest tokens stood in the sequence. For one generation."""

    def __init__(self) -> None:
        self._behind: dict[tuple[int, ...], int] = {}
        self._read = 0

    def draft(self, tokens: Sequence[int], most: int) -> Draft:
        self._index(tokens)
        for length in _LENGTHS:
            at = self._behind.get(tuple(tokens[-length:])) if len(tokens) > length else None
            if at is not None:
                found = list(tokens[at : at + most])
                period = len(tokens) - at
                while len(found) < most:  # what repeats itself goes on repeating itself
                    found.append(found[-period])
                return Draft(found)
        return Draft([])

    def _index(self, tokens: Sequence[int]) -> None:
        """Note what every run of tokens is followed by; the last run has nothing behind it yet."""
        for end in range(max(self._read, min(_LENGTHS)), len(tokens)):
            for length in _LENGTHS:
                if end >= length:
                    self._behind[tuple(tokens[end - length : end])] = end
        self._read = len(tokens)


class ModelDrafter:
    """Lets a smaller model of the same vocabulary go ahead, greedily and as long as it is sure of itself.

    ``share`` is what one of its calls costs, in calls of the model that checks. It serves as many generations as its
    engine has sequences; of more, each takes the place where least is lost.
    """

    def __init__(self, engine: Engine, share: float, *, least_chance: float = LEAST_CHANCE) -> None:
        self._engine = engine
        self._share = share
        self._least_chance = least_chance
        self._held: list[list[int]] = [[] for _ in range(engine.info.sequences)]
        self._latest: list[int] = list(range(engine.info.sequences))

    def draft(self, tokens: Sequence[int], most: int) -> Draft:
        """Nothing while it has a longer text to read: pieces of that are computed call by call."""
        most = min(most, self._engine.info.context - len(tokens))
        if most < 1:
            return Draft([])
        sequence = self._sequence_for(tokens)
        held = self._held[sequence]
        shared = min(common_prefix(held, tokens), len(tokens) - 1)
        self._engine.truncate(shared, sequence)
        del held[shared:]
        if len(tokens) - shared > _CATCH_UP_TOKENS:
            self._forward(sequence, tokens[shared : shared + _CATCH_UP_TOKENS], "none")
            return Draft([])
        logits = self._forward(sequence, tokens[shared:], "last")
        guesses: list[int] = []
        calls, chance = 1, 1.0
        while True:
            guess = int(logits[-1].argmax())
            chance *= probability(logits[-1], guess)
            if chance < self._least_chance:
                break
            guesses.append(guess)
            if len(guesses) == most:
                break
            logits = self._forward(sequence, [guess], "last")
            calls += 1
        return Draft(guesses, calls * self._share)

    def _sequence_for(self, tokens: Sequence[int]) -> int:
        """Where least is lost and most is saved; among equals the one that was not used for longest."""

        def loss(sequence: int) -> int:
            held = self._held[sequence]
            return len(held) - 2 * common_prefix(held, tokens)

        best = min(self._latest, key=loss)
        self._latest.remove(best)
        self._latest.append(best)
        return best

    def _forward(self, sequence: int, tokens: Sequence[int], wanted: Literal["none", "last"]) -> Logits:
        held = self._held[sequence]
        try:
            logits = self._engine.forward([Chunk(sequence, tokens, wanted)])
        except EngineError:
            del held[self._engine.length(sequence) :]
            raise
        held.extend(tokens)
        return logits


def probability(row: Logits, token: int) -> float:
    """Of a token, by softmax over a row of logits of shape (vocabulary,)."""
    return 1.0 / float(np.exp(row - row[token]).sum(dtype=np.float64))


class _Pace:
    """How many guesses to ask of one drafter. Counts, no clock: the same text has the same calls every time.

    Guesses double while all are right and shrink to what was right otherwise. A balance of what they saved and cost is
    kept; when it is used up, they pause, for longer each time.
    """

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.most = _FIRST_GUESSES
        self._credit = _CREDIT
        self._pause = _PAUSE_TOKENS
        self._paused = 0

    def resting(self) -> bool:
        """Whether this call is one to sit out."""
        if not self._paused:
            return False
        self._paused -= 1
        return True

    def judge(self, draft: Draft, accepted: int) -> None:
        """Count what came of a draft."""
        gain = accepted - draft.cost - CHECK_COST * len(draft.tokens)
        self._credit = min(self._credit + gain, _CREDIT)
        if draft.tokens:
            all_right = accepted == len(draft.tokens)
            self.most = min(2 * self.most, DRAFT_TOKENS) if all_right else max(accepted + 1, 2)
        if gain > 0:
            self._pause = _PAUSE_TOKENS
        if self._credit < 0:
            self._paused, self._credit = self._pause, 1.0
            self._pause = min(2 * self._pause, _LONGEST_PAUSE_TOKENS)


class Drafts:
    """The guesses of one generation, from the first drafter that has any. ``ends`` are tokens that nothing follows.

    ``drafted`` counts guesses that were checked, ``accepted`` those that were right.
    """

    def __init__(self, drafters: Sequence[Drafter], ends: frozenset[int] = frozenset()) -> None:
        self._paces = [_Pace(drafter) for drafter in drafters]
        self._ends = ends
        self._asked: tuple[_Pace, Draft] | None = None
        self.drafted = 0
        self.accepted = 0

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """Guesses at what follows ``tokens``, at most ``most``; replaces the latest ones. Raises ``EngineError``."""
        self._asked = None
        for pace in self._paces:
            wanted = min(pace.most, most)
            if wanted < 1 or pace.resting():
                continue
            draft = pace.drafter.draft(tokens, wanted)
            end = next((at for at, token in enumerate(draft.tokens) if token in self._ends), None)
            if end is not None:
                draft = Draft(draft.tokens[:end], draft.cost)
            if draft.tokens:
                self._asked = pace, draft
                return draft.tokens
            pace.judge(draft, 0)
        return []

    def start_again(self) -> None:
        """The tokens of the generation are no longer those that it had: what was noted of them is of no use."""
        self._asked = None
        for pace in self._paces:
            if isinstance(pace.drafter, PromptLookup):
                pace.drafter = PromptLookup()

    def judge(self, accepted: int) -> None:
        """Tell how many of the latest guesses were right, those behind a wrong one not counted."""
        if self._asked is None:
            return
        pace, draft = self._asked
        self._asked = None
        self.drafted += len(draft.tokens)
        self.accepted += accepted
        pace.judge(draft, accepted)


class Speculation:
    """Where a loaded model's guesses come from: the sequence itself (``lookup``), another model, or one after the
    other. ``close`` frees the other model."""

    def __init__(
        self, *, lookup: bool = False, drafter: Drafter | None = None, close: Callable[[], None] = lambda: None
    ) -> None:
        self._lookup = lookup
        self._drafter = drafter
        self.close = close

    def check(self) -> None:
        """Raise ``EngineError`` when the other model cannot compute one token."""
        if self._drafter is not None:
            self._drafter.draft([0], 1)

    def drafts(self, ends: frozenset[int]) -> Drafts:
        """The guesses of a new generation that ends at one of ``ends``."""
        drafters: list[Drafter] = [PromptLookup()] if self._lookup else []
        return Drafts([*drafters, *([] if self._drafter is None else [self._drafter])], ends)
