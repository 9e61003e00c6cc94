"""A scripted engine and a byte-level tokenizer: the whole suite runs on them without a model.

``FakeEngine`` keeps real sequences and refuses what the real engine refuses. Its logits depend on nothing but the
tokens of the sequence: at the position of ``script[i]`` after a prompt it prefers ``script[i]``, else a token computed
from the last one, so a test can foresee every token and a wrongly reused prefix shows in the text.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from edgelm.errors import ContextOverflowError, EngineError
from runtime.engine import Chunk, EngineInfo, EngineInterruptedError, Logits, State
from targets.vram import Device, OffloadPlan, VramParts

BOS, EOS, IM_START, IM_END = 256, 257, 258, 259
SPECIAL = {BOS: "<s>", EOS: "</s>", IM_START: "<|im_start|>", IM_END: "<|im_end|>"}
VOCABULARY = 256 + len(SPECIAL)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class FakeTokenizer:
    """Token ``n`` below 256 is byte ``n``; four special tokens follow."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        ids: list[int] = []
        while text:
            token = next((token for token, name in SPECIAL.items() if special and text.startswith(name)), None)
            if token is None:
                ids.extend(text[0].encode())
                text = text[1:]
            else:
                ids.append(token)
                text = text[len(SPECIAL[token]) :]
        return ids

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        pieces = [SPECIAL[token].encode() if special and token in SPECIAL else self.token_bytes(token) for token in ids]
        return b"".join(pieces).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""


def next_letter(tokens: Sequence[int]) -> int:
    """The continuation without a script: a lower-case letter that depends on every token before it."""
    return ord("a") + sum((index + 1) * token for index, token in enumerate(tokens)) % 26


@dataclass
class FakeEngine:
    """``runtime.engine.Engine`` without a model.

    ``script`` is what is generated after any prompt (a string means its bytes and EOS); without a script the text is
    ``next_letter`` of all tokens, endless. The prompt ends where a call brings more than one token, or where the first
    token after ``truncate`` comes. ``step_delay_s`` is slept in every call, in slices so that ``interrupt`` works;
    ``fail_at`` names the call (counted from 0) that raises ``EngineError``. ``on_forward`` is called with the chunks
    of every call before it computes.
    """

    script: str | Sequence[int] | None = None
    context: int = 256
    sequences: int = 1
    step_delay_s: float = 0.0
    fail_at: int | None = None
    all_logits: bool = True
    on_forward: Callable[[Sequence[Chunk]], None] | None = None
    calls: list[list[tuple[int, tuple[int, ...], str]]] = field(default_factory=list)
    closed: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.script, str):
            self.script = [*self.script.encode(), EOS]
        self.held: list[list[int]] = [[] for _ in range(self.sequences)]
        self._prompt_lengths = [0] * self.sequences
        self._prompt_open = [True] * self.sequences
        self._interrupted = threading.Event()

    @property
    def forward_calls(self) -> int:
        return len(self.calls)

    @property
    def computed_tokens(self) -> int:
        return sum(len(tokens) for call in self.calls for _, tokens, _ in call)

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            engine="fake",
            versions={"fake": "1"},
            model_name="fake",
            architecture="fake",
            vocabulary=VOCABULARY,
            context=self.context,
            context_trained=max(self.context, 4096),
            sequences=self.sequences,
            threads_decode=1,
            threads_prefill=1,
            weights_bytes=1000,
            kv_bytes=2000,
            parameters=1000,
            load_s=0.001,
            system="fake",
        )

    def forward(self, chunks: Sequence[Chunk]) -> Logits:
        if self.closed:
            raise EngineError("the engine is closed")
        self._interrupted.clear()
        self._check(chunks)
        if self.on_forward is not None:
            self.on_forward(chunks)
        call = self.forward_calls
        self.calls.append([(chunk.sequence, tuple(chunk.tokens), chunk.logits) for chunk in chunks])
        self._sleep()
        if call == self.fail_at:
            for chunk in chunks:
                self.truncate(0, chunk.sequence)
            raise EngineError("the fake engine was told to fail")
        rows = [row for chunk in chunks for row in self._append(chunk)]
        return np.array(rows, np.float32).reshape(len(rows), VOCABULARY)

    def _check(self, chunks: Sequence[Chunk]) -> None:
        if len({chunk.sequence for chunk in chunks}) != len(chunks):
            raise EngineError("a sequence was given twice in one call")
        for chunk in chunks:
            if len(chunk.tokens) == 0:
                raise EngineError(f"no tokens were given for sequence {chunk.sequence}")
            if self.length(chunk.sequence) + len(chunk.tokens) > self.context:
                raise ContextOverflowError(f"sequence {chunk.sequence} does not fit the context of {self.context}")
            if not all(0 <= token < VOCABULARY for token in chunk.tokens):
                raise EngineError(f"a token is outside the vocabulary of {VOCABULARY}")
            if chunk.logits == "all" and not self.all_logits:
                raise EngineError("logits of all positions need an engine loaded with all_logits")

    def _sleep(self) -> None:
        if self.step_delay_s and self._interrupted.wait(self.step_delay_s):
            self._interrupted.clear()
            raise EngineInterruptedError("the computation was interrupted")

    def _append(self, chunk: Chunk) -> list[list[float]]:
        held = self.held[chunk.sequence]
        if len(chunk.tokens) > 1 or self._prompt_open[chunk.sequence]:
            self._prompt_lengths[chunk.sequence] = len(held) + len(chunk.tokens)
            self._prompt_open[chunk.sequence] = chunk.logits == "none"
        rows: list[list[float]] = []
        for token in chunk.tokens:
            held.append(int(token))
            rows.append(self._row(chunk.sequence))
        return {"none": [], "last": rows[-1:], "all": rows}[chunk.logits]

    def _row(self, sequence: int) -> list[float]:
        held = self.held[sequence]
        generated = len(held) - self._prompt_lengths[sequence]
        if self.script is None:
            preferred = next_letter(held)
        elif 0 <= generated < len(self.script):
            preferred = int(self.script[generated])
        else:
            preferred = EOS
        row = [0.0] * VOCABULARY
        row[preferred] = 20.0
        return row

    def length(self, sequence: int = 0) -> int:
        if not 0 <= sequence < self.sequences:
            raise EngineError(f"there is no sequence {sequence}: the engine keeps {self.sequences}")
        return len(self.held[sequence])

    def truncate(self, length: int, sequence: int = 0) -> None:
        if not 0 <= length <= self.length(sequence):
            raise EngineError(f"cannot truncate sequence {sequence} of {self.length(sequence)} tokens to {length}")
        del self.held[sequence][length:]
        self._prompt_open[sequence] = True

    def interrupt(self) -> None:
        self._interrupted.set()

    def close(self) -> None:
        self.closed = True


class ShiftingEngine(FakeEngine):
    """A fake that is a ``Shifter``."""

    def discard(self, start: int, end: int, sequence: int = 0) -> bool:
        if not 0 <= start < end <= self.length(sequence):
            raise EngineError(f"cannot forget {start} to {end} of {self.length(sequence)} tokens")
        del self.held[sequence][start:end]
        return True


class KeepingEngine(FakeEngine):
    """A fake that is a ``StateKeeper``: a state is its tokens, four bytes each."""

    def state(self, sequence: int = 0) -> State:
        return np.array(self.held[sequence], np.int32).view(np.uint8)

    def restore(self, state: State, length: int, sequence: int = 0) -> None:
        tokens = state.view(np.int32).tolist() if len(state) % 4 == 0 else []
        self.held[sequence] = tokens if len(tokens) == length else []
        self._prompt_open[sequence] = True
        if len(tokens) != length:
            raise EngineError(f"{len(state)} bytes are no state of {length} tokens")


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    """Poll ``condition`` until it holds; False when it does not within ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.005)
    return condition()


CARD = Device("CUDA0", "a card", "CUDA", "gpu", 6_000_000_000, 8_000_000_000)


@dataclass
class GpuEngine(FakeEngine):
    """The scripted engine with 2 of its 3 layers on ``card``, of which 100 bytes fewer are free at every look."""

    card: Device | None = CARD
    looks: int = 0

    @property
    def info(self) -> EngineInfo:
        plan = OffloadPlan(2, 3, self.card, VramParts(700, 200, 100), "all of it that fits")
        buffers = {"vram_weights": 690, "vram_kv": 200, "vram_compute": 60, "compute": 5}
        return replace(super().info, offload=plan, buffers=buffers)

    def device_now(self) -> Device | None:
        self.looks += 1
        return self.card and replace(self.card, free_bytes=self.card.free_bytes - 100 * self.looks)
