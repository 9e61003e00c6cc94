"""From logits to a token: bias, penalties, constraint, temperature, top-k, top-p, min-p, seed; and its probability.

Pure numpy on one row of logits; knows neither engines nor text. The order is that of llama.cpp's default chain:
logit bias, penalties, constraint, top-k, top-p, min-p, temperature, draw. Filters that
need sorted probabilities sort only the few tokens that can survive, so that a token costs well under 200 microseconds
at a vocabulary of 49,152.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgelm.errors import EngineError, UsageError

_DISTANCES = (3.0, 6.0, 12.0)  # logits below the best: where the candidates of a filter are looked for first
_BLOCK = 512  # weights summed at once
_FEW = 256  # so many are sorted without a thought


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How the next token is chosen. ``temperature`` 0 is greedy and ignores the rest but penalties and bias.

    ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 switch these filters off; ``repetition_penalty`` 1 likewise, it looks at
    the last ``repetition_window`` tokens, those of the prompt included. ``presence_penalty`` is taken from the logit
    of every token generated so far, ``frequency_penalty`` once for each time. ``logit_bias`` holds pairs of a token
    and what is added to its logit. ``seed`` None draws a fresh one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_window: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None


class Constrained(Protocol):
    """What a sampler needs of a constraint (``runtime.constraint.Constraint``)."""

    def masked(self, logits_row: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]: ...

    def accept(self, token: int) -> None: ...


def check_sampling(options: SamplingOptions) -> None:
    """Raise ``UsageError`` naming the first field whose value makes no sense."""
    _check("temperature", options.temperature, 0.0, 100.0)
    _check("top_k", options.top_k, 0, 2**31 - 1)
    _check("top_p", options.top_p, 0.0, 1.0)
    _check("min_p", options.min_p, 0.0, 1.0)
    _check("repetition_penalty", options.repetition_penalty, 0.01, 100.0)
    _check("repetition_window", options.repetition_window, 0, 2**31 - 1)
    _check("presence_penalty", options.presence_penalty, -100.0, 100.0)
    _check("frequency_penalty", options.frequency_penalty, -100.0, 100.0)
    for token, bias in options.logit_bias:
        _check("logit_bias", token, 0, 2**31 - 1)
        _check("logit_bias", bias, -100.0, 100.0)
    if options.top_p == 0.0:
        raise UsageError("top_p must be above 0", hint="use temperature 0 for greedy decoding")
    if options.seed is not None:
        _check("seed", options.seed, 0, 2**64 - 1)


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also false for NaN
        raise UsageError(f"{name} must be between {low:g} and {high:g}, not {value}")


class Sampler:
    """Picks tokens one after another; the same options with the same ``seed`` pick the same tokens.

    It remembers what it picked, for the penalties and for ``constraint``. Raises ``UsageError`` for options that make
    no sense.
    """

    def __init__(self, options: SamplingOptions, constraint: Constrained | None = None) -> None:
        check_sampling(options)
        self.options = options
        self._constraint = constraint
        self._picked: Counter[int] = Counter()
        # Seeding takes as long as some tokens' choices.
        self._random = np.random.default_rng(options.seed) if options.temperature else None
        self._counts = bool(options.presence_penalty or options.frequency_penalty)
        repeats = options.repetition_penalty != 1.0
        self._adjusts = bool(options.logit_bias) or repeats or self._counts or constraint is not None

    @property
    def is_argmax(self) -> bool:
        """Whether every choice is the likeliest token of the model's own logits."""
        return self._random is None and not self._adjusts

    def pick(self, logits_row: npt.NDArray[np.float32], recent_tokens: Sequence[int] = ()) -> int:
        """The next token for logits of shape (vocabulary,), which are not written.

        ``recent_tokens`` are the tokens so far, the latest last; only the repetition penalty looks at them. Raises
        ``EngineError`` when the logits hold NaN, or nothing but minus infinity.
        """
        row = self._adjusted(logits_row, recent_tokens) if self._adjusts else logits_row
        token = int(row.argmax())
        highest: float = row.item(token)
        if not math.isfinite(highest):  # argmax returns the first NaN when there is one
            raise EngineError("the model computed no finite logits", hint="check the file with: edgelm verify")
        if self._random is not None:
            token = self._draw(row, highest)
        if self._constraint is not None:
            self._constraint.accept(token)
        if self._counts:
            self._picked[token] += 1
        return token

    def _adjusted(self, logits_row: npt.NDArray[np.float32], recent_tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """The row after bias, penalties and constraint; itself when there are none."""
        options = self.options
        if options.logit_bias:
            logits_row = np.array(logits_row)
            for token, bias in options.logit_bias:
                logits_row[token] += bias
        if options.repetition_penalty != 1.0 and options.repetition_window:
            logits_row = _penalise(logits_row, recent_tokens[-options.repetition_window :], options.repetition_penalty)
        if self._picked:
            logits_row = np.array(logits_row)
            for token, count in self._picked.items():
                logits_row[token] -= options.presence_penalty + count * options.frequency_penalty
        return logits_row if self._constraint is None else self._constraint.masked(logits_row)

    def _draw(self, row: npt.NDArray[np.float32], highest: float) -> int:
        """Draw from softmax(logits / temperature) of what the filters leave of a row whose largest logit is given."""
        assert self._random is not None
        tokens, logits = _candidates(row, highest, self.options)
        weights = np.exp((logits - np.float32(highest)) / np.float32(self.options.temperature))
        index = _draw_index(weights, self._random.random())
        return index if tokens is None else int(tokens[index])


def token_logprobs(logits_row: npt.NDArray[np.float32], token: int, top: int) -> list[tuple[int, float]]:
    """Tokens and natural logarithms of their probabilities: the chosen one, then the ``top`` likeliest, best first.

    Of the model's own distribution, which no option of sampling has touched. The row has shape (vocabulary,).
    """
    highest = float(logits_row.max())
    total = highest + math.log(float(np.exp(logits_row - np.float32(highest)).sum(dtype=np.float64)))
    likeliest: npt.NDArray[np.intp] = np.empty(0, np.intp)
    if top > 0:
        likeliest = _top_k(logits_row, highest, min(top, len(logits_row)))
        likeliest = likeliest[np.argsort(-logits_row[likeliest], kind="stable")]
    return [(index, float(logits_row[index]) - total) for index in [token, *likeliest.tolist()]]


def _penalise(logits: npt.NDArray[np.float32], recent_tokens: Sequence[int], penalty: float) -> npt.NDArray[np.float32]:
    """Divide positive logits of recent tokens by ``penalty``, multiply the others (Keskar et al. 2019)."""
    if not len(recent_tokens):
        return logits
    penalised: npt.NDArray[np.float32] = np.array(logits)
    recent = np.unique(np.asarray(recent_tokens, dtype=np.intp))
    values = penalised[recent]
    penalised[recent] = np.where(values > 0, values / penalty, values * penalty)
    return penalised


def _candidates(
    logits: npt.NDArray[np.float32], highest: float, options: SamplingOptions
) -> tuple[npt.NDArray[np.intp] | None, npt.NDArray[np.float32]]:
    """Token ids and logits that survive top-k, top-p and min-p; None for the ids when no filter is on."""
    tokens: npt.NDArray[np.intp] | None = None
    if 0 < options.top_k < len(logits):
        tokens = _top_k(logits, highest, options.top_k)
        logits = logits[tokens]
    if options.top_p < 1.0:
        kept = _nucleus(logits, highest, options.top_p)
        tokens, logits = (kept if tokens is None else tokens[kept]), logits[kept]
    if options.min_p > 0.0:
        kept = np.flatnonzero(logits >= np.float32(highest + math.log(options.min_p)))
        tokens, logits = (kept if tokens is None else tokens[kept]), logits[kept]
    return tokens, logits


def _top_k(logits: npt.NDArray[np.float32], highest: float, k: int) -> npt.NDArray[np.intp]:
    """Ids of the ``k`` largest logits, in no order."""
    for distance in _DISTANCES:
        near = np.flatnonzero(logits > np.float32(highest - distance))
        if len(near) >= k:
            return near[np.argpartition(logits[near], len(near) - k)[len(near) - k :]]
    return np.argpartition(logits, len(logits) - k)[len(logits) - k :]


def _nucleus(logits: npt.NDArray[np.float32], highest: float, top_p: float) -> npt.NDArray[np.intp]:
    """Indices of the most likely tokens that together reach ``top_p``: the one that crosses it, and its equals, too.

    A quickselect by weight: the half in which the crossing lies is searched on, so nothing large is ever sorted.
    """
    weights = np.exp(logits - np.float32(highest))
    wanted = top_p * float(weights.sum())
    above, active = 0.0, weights
    for distance in _DISTANCES:
        near = weights[weights > np.float32(math.exp(-distance))]
        if float(near.sum()) >= wanted:
            active = near
            break
    while len(active) > _FEW:
        pivot = active.mean()
        upper = active[active > pivot]
        upper_sum = float(upper.sum())
        if len(upper) == 0:
            break
        if above + upper_sum >= wanted:
            active = upper
        else:
            above += upper_sum
            active = active[active <= pivot]
    ordered = np.sort(active)[::-1]
    crossing = int(np.searchsorted(above + np.cumsum(ordered, dtype=np.float64), wanted, side="left"))
    return np.flatnonzero(weights >= ordered[min(crossing, len(ordered) - 1)])


def _draw_index(weights: npt.NDArray[np.float32], uniform: float) -> int:
    """The index drawn by ``uniform`` in [0, 1) with probabilities proportional to ``weights``.

    Many weights are summed in blocks first: a cumulative sum over a whole vocabulary costs more than all the rest.
    """
    if len(weights) <= 2 * _BLOCK:
        cumulative = np.cumsum(weights, dtype=np.float64)
        return min(int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right")), len(weights) - 1)
    starts = np.arange(0, len(weights), _BLOCK)
    sums = np.add.reduceat(weights, starts)
    cumulative = np.cumsum(sums, dtype=np.float64)
    point = uniform * cumulative[-1]
    block = min(int(np.searchsorted(cumulative, point, side="right")), len(starts) - 1)
    inside = (point - (cumulative[block] - sums[block])) / float(sums[block])
    start = int(starts[block])
    return start + _draw_index(weights[start : start + _BLOCK], min(max(inside, 0.0), 1.0))
