"""What a student learns from: windows of token ids from texts, from conversations, or from the teacher's own words.

Texts are cut into consecutive windows and never overlap with what evaluates; ``writing`` samples the teacher's own
words. Knows tokens; does not know how they are used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgelm.errors import UsageError
from exporter.calibration import read_conversations
from exporter.token_identity import open_tokenizer
from exporter.tokenizer import SourceTokenizer

Ids = npt.NDArray[np.int32]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Corpus:
    """Windows (n, length) of token ids, and what the model card says of each of their sources."""

    windows: Ids
    sources: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Of all ids in their order."""
        return hashlib.sha256(np.ascontiguousarray(self.windows).tobytes()).hexdigest()


def from_texts(paths: Sequence[Path | None], words: SourceTokenizer, length: int) -> Corpus:
    """Windows of texts (.txt or anything else) and of JSON lines; None stands for the built-in text.

    Raises ``UsageError`` when a file is unusable or all together hold no window.
    """
    encoder = open_tokenizer(words.tokenizer_json, "tokenizer.json")
    parts: list[Ids] = []
    sources = []
    for path in paths:
        text = read_conversations(path, words)
        ids = np.asarray(encoder.encode(text.content, add_special_tokens=False).ids, dtype=np.int32)
        count = len(ids) // length
        parts.append(ids[: count * length].reshape(count, length))
        sources.append(f"{text.name}: {count * length} tokens, SHA-256 {text.sha256}")
    windows = np.concatenate(parts)
    if not len(windows):
        raise UsageError(
            f"the training text holds fewer than {length} tokens: nothing to learn from",
            hint="give longer texts, or a shorter --length",
        )
    return Corpus(windows, tuple(sources))


def written_by_teacher(windows: Ids, how: str, seed: int) -> Corpus:
    """What the teacher wrote, with what the model card says of it."""
    return Corpus(windows, (f"the teacher's own words: {windows.size} tokens, {how}, seed {seed}",))


def together(one: Corpus, other: Corpus) -> Corpus:
    """Both, one after the other."""
    return Corpus(np.concatenate([one.windows, other.windows]), (*one.sources, *other.sources))


def batches(windows: int, batch: int, seed: int, first_step: int) -> Iterator[Indices]:
    """Indices (batch) of the windows of every step from ``first_step`` on, without end.

    Each pass over the windows has its own order, which follows from the seed alone: a resumed run goes on as it would
    have.
    """
    step = first_step
    while True:
        positions = np.arange(step * batch, (step + 1) * batch)
        passes = positions // windows
        orders = {
            int(number): np.random.default_rng([seed, int(number)]).permutation(windows) for number in set(passes)
        }
        yield np.asarray([orders[int(number)][at % windows] for number, at in zip(passes, positions, strict=True)])
        step += 1
