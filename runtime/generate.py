"""One generator of token events for everybody: command line, server, bench and proofs.

Knows the engine seam, sampling and the text decoder; not how events are shown or sent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from edgelm.errors import ContextOverflowError, EngineError, UsageError
from runtime.constraint import Constraint, constraint_vocabulary
from runtime.engine import Chooser, Chunk, Engine, EngineInfo, EngineInterruptedError, Logits, Shifter, common_prefix
from runtime.sampling import Sampler, SamplingOptions, token_logprobs
from runtime.speculative import Drafts, Speculation
from runtime.tokenizer import TextDecoder, TextTokenizer

FinishReason = Literal["stop", "length", "cancelled"]
Computed = tuple[Chunk, Logits | int]  # what was computed, and what came of it: logits, or the likeliest token alone
LOGPROBS_LIMIT = 20
PREFILL_STEP_TOKENS = 512  # prompt tokens computed between two looks at the cancellation


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What to generate from ``prompt`` (token ids, special tokens included).

    Generation ends at any id of ``stop_tokens``, before any text of ``stop`` (which is not emitted), after
    ``max_tokens`` tokens, when the context is full, or when ``grammar`` (of ``runtime.constraint``, "" for none) is
    satisfied and allows nothing more. ``logprobs`` is how many of the likeliest tokens each event tells the
    probability of, 0 for the chosen one alone, None for nothing. ``spelled`` are special tokens that are part of the
    text, with their spelling: a model may mark tool calls with them. ``keep`` lets the generation go on in a full
    context: all but so many tokens at the beginning are then forgotten by halves, oldest first. The first ``shared``
    tokens of the prompt are likely to begin other prompts too.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stop: tuple[str, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    logprobs: int | None = None
    grammar: str = ""
    spelled: tuple[tuple[int, str], ...] = ()
    keep: int | None = None
    shared: int = 0


@dataclass(frozen=True, slots=True)
class LikelyToken:
    """A token, the natural logarithm of its probability, and the bytes of its text (none for special tokens)."""

    token: int
    logprob: float
    text: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The model's own probabilities, before any option of sampling: of the token that was chosen, and of the likeliest
    ones, best first."""

    chosen: LikelyToken
    top: tuple[LikelyToken, ...] = ()


class TokenEvent(NamedTuple):  # made for every token: a frozen dataclass takes a call for each field
    """One generated token. ``text`` is what became certain with it: may be empty (incomplete UTF-8, possible stop).

    Times are seconds since ``generate`` was called; ``prefill_s`` is set on the first event only, ``cached_tokens``
    tells how many prompt tokens were already in the sequence. The last event carries ``finish_reason``; its ``token``
    is None when a stop token or a cancellation ended the generation. ``drafted_tokens`` and ``accepted_tokens`` count
    the guesses of speculative decoding so far, and those among them that were right; ``shifted_tokens`` were forgotten
    so far to go on in a full context.
    """

    token: int | None
    text: str
    number: int
    elapsed_s: float
    prefill_s: float | None = None
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    logprobs: TokenLogprobs | None = None
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    shifted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole generation in figures. ``ttft_s`` is the time to the first token, all times from ``generate`` on."""

    text: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    finish_reason: FinishReason
    prefill_s: float | None
    ttft_s: float | None
    decode_s: float
    decode_steps: int
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def prefill_tps(self) -> float | None:
        """Prompt tokens computed (not those found in the cache) per second."""
        return (self.prompt_tokens - self.cached_tokens) / self.prefill_s if self.prefill_s else None

    @property
    def decode_tps(self) -> float | None:
        """Tokens per second after the first one, which belongs to the prompt; None for fewer than two."""
        return self.decode_steps / self.decode_s if self.decode_steps and self.decode_s > 0 else None


@dataclass(slots=True)
class Session:
    """One engine sequence and the tokens that it holds: the only mutable state of a conversation.

    Behind the first ``exact`` tokens (None: nowhere) the engine holds what it computed with tokens in view that were
    forgotten since; no other prompt may build upon that.
    """

    engine: Engine
    sequence: int = 0
    tokens: list[int] = field(default_factory=list)
    exact: int | None = None

    def shared(self, prompt: Sequence[int]) -> int:
        """Leading tokens of ``prompt`` that the sequence holds as if it had computed nothing else."""
        shared = common_prefix(self.tokens, prompt)
        return shared if self.exact is None else min(shared, self.exact)

    def cut(self, length: int) -> None:
        """Note that the sequence holds its first ``length`` tokens and no more."""
        del self.tokens[length:]
        if self.exact is not None and length <= self.exact:
            self.exact = None


def answer(
    events: Iterator[TokenEvent], prompt_tokens: int, on_text: Callable[[str], None] = lambda _text: None
) -> Answer:
    """Run a generation to its end, handing on every piece of text, and sum it up."""
    pieces: list[str] = []
    first = last = None
    for event in events:
        first, last = first or event, event
        if event.text:
            pieces.append(event.text)
            on_text(event.text)
    if first is None or last is None or last.finish_reason is None:
        raise EngineError("a generation ended without saying why")
    completion_tokens = last.number + (last.token is not None)
    # The event of a cancellation comes instead of an engine call, every other event after one.
    steps = last.number - (last.finish_reason == "cancelled")
    return Answer(
        text="".join(pieces),
        prompt_tokens=prompt_tokens,
        cached_tokens=first.cached_tokens,
        completion_tokens=completion_tokens,
        finish_reason=last.finish_reason,
        prefill_s=first.prefill_s,
        ttft_s=first.elapsed_s if first.token is not None else None,
        decode_s=last.elapsed_s - first.elapsed_s,
        decode_steps=max(steps, 0),
        drafted_tokens=last.drafted_tokens,
        accepted_tokens=last.accepted_tokens,
    )


class StopScanner:
    """Finds stop strings in text that arrives in pieces, holding back what may still become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is certain now, and whether a stop string was reached; nothing after the stop is ever returned."""
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max((overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back and can no longer become a stop string, since nothing follows."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class TokenText:
    """From tokens to certain text: joins bytes, keeps half characters and possible stop strings back."""

    def __init__(
        self, tokenizer: TextTokenizer, stop: Sequence[str] = (), spelled: Sequence[tuple[int, str]] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._spelled = {token: text.encode() for token, text in spelled}
        self._decoder = TextDecoder()
        self._scanner = StopScanner(stop)
        self._stops = bool(stop)

    def push(self, token: int) -> tuple[str, bool]:
        """Text that became certain with ``token``, and whether a stop string was reached."""
        piece = self._spelled.get(token) or self._tokenizer.token_bytes(token)
        text = self._decoder.push(piece)
        return self._scanner.push(text) if self._stops else (text, False)

    def finish(self) -> tuple[str, bool]:
        """The rest when no token follows: an incomplete character shows as U+FFFD."""
        text, stopped = self._scanner.push(self._decoder.finish())
        return text + self._scanner.flush(), stopped


class Step(NamedTuple):
    """What came of one row of logits. The last step of a generation has a ``finish_reason``."""

    token: int | None
    text: str
    finish_reason: FinishReason | None = None
    logprobs: TokenLogprobs | None = None


class Continuation:
    """The meaning of a request, row of logits by row of logits: sampling, text, stops and limits.

    Whoever computes the rows decides when and with what else; the steps are the same. Raises ``UsageError`` for
    options that make no sense and ``ConstraintError`` for a grammar that cannot be enforced.
    """

    def __init__(self, request: GenerationRequest, tokenizer: TextTokenizer, info: EngineInfo) -> None:
        outside = next((token for token, _ in request.sampling.logit_bias if token >= info.vocabulary), None)
        if outside is not None:
            raise UsageError(f"logit_bias: token {outside} is outside the vocabulary of {info.vocabulary}")
        self._request = request
        self._tokenizer = tokenizer
        self._context = info.context
        self._constraint: Constraint | None = None
        if request.grammar:
            vocabulary = constraint_vocabulary(tokenizer, info.vocabulary, request.stop_tokens)
            self._constraint = vocabulary.constraint(request.grammar)
        self._sampler = Sampler(request.sampling, self._constraint)
        self._text = TokenText(tokenizer, request.stop, request.spelled)
        self._generated = 0
        self.forgets = request.keep is not None  # whether a full context goes on
        self.shifted = 0  # tokens that were forgotten to make room
        self._rows: Logits | None = None
        self._only_row: Logits | None = None

    def only_row(self, rows: Logits) -> Logits:
        """``rows[0]`` of logits of shape (1, vocabulary). Engines hand out the same array again and again, then the row
        is the one of the last time: making it takes a while when a step has left nothing in the caches."""
        if rows is not self._rows or self._only_row is None:
            self._rows, self._only_row = rows, rows[0]
        return self._only_row

    def take(self, row: Logits, held: Sequence[int]) -> Step:
        """Choose a token from a row of shape (vocabulary,); ``held`` are all tokens before it, the prompt included.

        Raises ``EngineError`` when the row holds no finite value, ``ConstraintError`` when the grammar gives up.
        """
        return self.go_on(self._sampler.pick(row, held), held, row)

    @property
    def needs_no_logits(self) -> bool:
        """Whether the likeliest token is all that this request wants to know."""
        return self._sampler.is_argmax and self._request.logprobs is None

    def go_on(self, token: int, held: Sequence[int], row: Logits | None = None) -> Step:
        """What comes of a token that was chosen behind ``held``, from a ``row`` if anybody wants probabilities."""
        request = self._request
        if token in request.stop_tokens:
            return Step(None, self.finish(), "stop")
        logprobs = None
        if request.logprobs is not None and row is not None:
            logprobs = self._logprobs(row, token, request.logprobs)
        self._generated += 1
        piece, stopped = self._text.push(token)
        complete = self._constraint is not None and self._constraint.finished
        ends = request.keep is None and len(held) == self._context
        full = complete or self._generated == request.max_tokens or ends
        if full and not stopped:
            rest, stopped = self._text.finish()
            piece += rest
        if stopped or full:
            return Step(token, piece, "stop" if stopped or complete else "length", logprobs)
        return Step(token, piece, None, logprobs)

    def room(self, held: Sequence[int]) -> int:
        """How many tokens may still be chosen before a limit ends the generation, behind the tokens ``held``."""
        return min(self._request.max_tokens - self._generated, self._context + 1 - len(held))

    def make_room(self, session: Session, drafts: Drafts | None) -> list[int]:
        """In a full context, forget the older half of what stands behind the tokens to keep.

        What has to be computed again before anything else is returned: nothing where the engine moves it in place,
        and all behind the gap where it cannot. Raises ``EngineError``.
        """
        keep, held = self._request.keep, len(session.tokens)
        if keep is None or held < self._context:
            return []
        end = keep + max((held - keep) // 2, 1)
        rest = session.tokens[end:]
        self.shifted += end - keep
        if drafts is not None:
            drafts.start_again()
        engine = session.engine
        if isinstance(engine, Shifter) and engine.discard(keep, end, session.sequence):
            session.tokens[keep:end] = []
            session.exact = keep
            return []
        # A model whose state forgets nothing begins anew.
        kept = keep if engine.info.truncates else 0
        again = [*session.tokens[kept:keep], *rest]
        engine.truncate(kept, session.sequence)
        session.cut(kept)
        return again

    def finish(self) -> str:
        """Text that was held back, when nothing follows."""
        return self._text.finish()[0]

    def _logprobs(self, row: Logits, token: int, top: int) -> TokenLogprobs:
        chosen, *likeliest = (
            LikelyToken(index, logprob, tuple(self._tokenizer.token_bytes(index)))
            for index, logprob in token_logprobs(row, token, top)
        )
        return TokenLogprobs(chosen, tuple(likeliest))


def next_chunk(session: Session, continuation: Continuation, token: int, drafts: Drafts | None) -> Chunk:
    """What to compute after ``token`` was chosen: the token and guesses at what follows it, if there are any.

    Raises ``EngineError`` when a drafting model fails.
    """
    guesses: list[int] = []
    if drafts is not None:
        tokens = [*session.tokens, token]
        guesses = drafts.propose(tokens, continuation.room(tokens) - 1)
    return Chunk(session.sequence, [token, *guesses], "all" if guesses else "last")


def take_rows(
    session: Session, continuation: Continuation, chunk: Chunk, rows: Logits | int, drafts: Drafts | None
) -> list[Step]:
    """What comes of the rows of a chunk that the session's sequence holds now and its tokens do not yet. In place of
    rows the token that an engine chose itself.

    Every token is chosen from the model's own logits, with the tokens before it as they were chosen. Rows behind the
    first guess that differs from the choice are of no use; the sequence forgets their tokens. Raises what
    ``Continuation.take`` raises.
    """
    if isinstance(rows, int):
        session.tokens.extend(chunk.tokens)
        return [continuation.go_on(rows, session.tokens)]
    if len(chunk.tokens) == 1 and drafts is None:
        session.tokens.append(chunk.tokens[0])
        return [continuation.take(continuation.only_row(rows), session.tokens)]
    certain = len(chunk.tokens) - len(rows)
    session.tokens.extend(chunk.tokens[:certain])
    steps: list[Step] = []
    try:
        for token, row in zip(chunk.tokens[certain:], rows, strict=True):
            if steps and (steps[-1].finish_reason is not None or steps[-1].token != token):
                break
            session.tokens.append(token)
            steps.append(continuation.take(row, session.tokens))
    finally:
        if len(steps) < len(rows):
            session.engine.truncate(len(session.tokens), session.sequence)
    if drafts is not None:
        drafts.judge(len(steps) - 1)
    return steps


def prepare_grammar(request: GenerationRequest, tokenizer: TextTokenizer, vocabulary: int) -> None:
    """Build what constraints of this tokenizer need, once and now, rather than between two tokens of other requests."""
    if request.grammar:
        constraint_vocabulary(tokenizer, vocabulary, request.stop_tokens)


def check_request(request: GenerationRequest, context: int) -> None:
    """Raise ``UsageError`` for requests that make no sense, ``ContextOverflowError`` for prompts that do not fit."""
    if len(request.prompt) == 0:
        raise UsageError("the prompt is empty", hint="give at least one token")
    if request.max_tokens < 1:
        raise UsageError(f"max_tokens must be at least 1, not {request.max_tokens}")
    if "" in request.stop:
        raise UsageError("a stop string is empty")
    if request.logprobs is not None and not 0 <= request.logprobs <= LOGPROBS_LIMIT:
        raise UsageError(f"logprobs must be between 0 and {LOGPROBS_LIMIT}, not {request.logprobs}")
    if request.keep is not None and not 0 <= request.keep <= context - 2:
        raise UsageError(f"keep must leave room for two of {context} tokens, {request.keep} does not")
    if not 0 <= request.shared <= len(request.prompt):
        raise UsageError(f"shared must be between 0 and the prompt's {len(request.prompt)}, not {request.shared}")
    if len(request.prompt) > context:
        raise ContextOverflowError(
            f"the prompt has {len(request.prompt)} tokens, the context holds {context}",
            hint="shorten the prompt or use a larger --context",
        )


def generate(
    session: Session,
    tokenizer: TextTokenizer,
    request: GenerationRequest,
    *,
    cancelled: Callable[[], bool] = lambda: False,
    speculation: Speculation | None = None,
) -> Iterator[TokenEvent]:
    """Generate token by token; ``cancelled`` is asked before every engine call (prefill asks between batches). With
    ``speculation`` a call gives several tokens where its guesses are right.

    The sequence is truncated to the longest common prefix of what it holds and the prompt, so a chat's second turn
    computes only what is new. When the engine is interrupted the generation counts as cancelled. Raises
    ``UsageError`` and ``ContextOverflowError`` (a prompt that does not fit) at once, ``EngineError`` while running.
    """
    started = time.perf_counter()
    check_request(request, session.engine.info.context)
    continuation = Continuation(request, tokenizer, session.engine.info)
    drafts = None if speculation is None else speculation.drafts(request.stop_tokens)
    return _events(session, continuation, request.prompt, cancelled, drafts, started)


def _events(
    session: Session,
    continuation: Continuation,
    prompt: Sequence[int],
    cancelled: Callable[[], bool],
    drafts: Drafts | None,
    started: float,
) -> Iterator[TokenEvent]:
    prefill_s: float | None = None
    index = cached = 0

    def event(step: Step) -> TokenEvent:
        first = index == 0
        return TokenEvent(
            token=step.token,
            text=step.text,
            number=index,
            elapsed_s=time.perf_counter() - started,
            prefill_s=prefill_s if first else None,
            cached_tokens=cached if first else 0,
            finish_reason=step.finish_reason,
            logprobs=step.logprobs,
            drafted_tokens=drafts.drafted if drafts else 0,
            accepted_tokens=drafts.accepted if drafts else 0,
            shifted_tokens=continuation.shifted,
        )

    cached = _reuse(session, prompt)
    chooser = _chooser(session.engine) if drafts is None and continuation.needs_no_logits else None
    found = _prefill(session, prompt[cached:], cancelled, chooser)
    prefill_s = time.perf_counter() - started
    while found is not None:
        chunk, logits = found
        latest = 0
        for step in take_rows(session, continuation, chunk, logits, drafts):
            yield event(step)
            if step.finish_reason is not None or step.token is None:
                return
            index += 1
            latest = step.token
        found = None if cancelled() else _go_on(session, continuation, latest, drafts, cancelled, chooser)
    yield event(Step(None, continuation.finish(), "cancelled"))


def _go_on(
    session: Session,
    continuation: Continuation,
    token: int,
    drafts: Drafts | None,
    cancelled: Callable[[], bool],
    chooser: Chooser | None,
) -> Computed | None:
    """Compute what follows ``token``, with room made for it; None when cancelled or interrupted on the way."""
    again = continuation.make_room(session, drafts) if continuation.forgets else []
    if again:
        return _prefill(session, [*again, token], cancelled, chooser)
    if drafts is None:
        return _forward(session, Chunk(session.sequence, [token]), chooser)
    return _forward(session, next_chunk(session, continuation, token, drafts))


def _reuse(session: Session, prompt: Sequence[int]) -> int:
    """Truncate the session to the prefix that it shares with the prompt; the last prompt token is always computed.

    A model whose state forgets nothing starts anew unless all that it holds begins the prompt.
    """
    shared = min(session.shared(prompt), len(prompt) - 1)
    if shared < len(session.tokens) and not session.engine.info.truncates:
        shared = 0
    try:
        session.engine.truncate(shared, session.sequence)
    except EngineError:
        session.cut(session.engine.length(session.sequence))
        raise
    session.cut(shared)
    return shared


def _chooser(engine: Engine) -> Chooser | None:
    """The engine, when it had better choose the likeliest token itself."""
    return engine if isinstance(engine, Chooser) and engine.chooses else None


def _prefill(
    session: Session, tokens: Sequence[int], cancelled: Callable[[], bool], chooser: Chooser | None
) -> Computed | None:
    """The last chunk of ``tokens`` with what came of it, None when cancelled on the way."""
    for start in range(0, len(tokens), PREFILL_STEP_TOKENS):
        if cancelled():
            return None
        step = tokens[start : start + PREFILL_STEP_TOKENS]
        last = start + len(step) == len(tokens)
        found = _forward(session, Chunk(session.sequence, step, "last" if last else "none"), chooser)
        if found is None or last:
            return found
        session.tokens.extend(step)
    return None


def _forward(session: Session, chunk: Chunk, chooser: Chooser | None = None) -> Computed | None:
    """Compute a chunk; None when the engine was interrupted. After a failure the session is empty."""
    try:
        if chooser is not None:
            token = chooser.likeliest(chunk)
            if token is not None:
                return chunk, token
        return chunk, session.engine.forward([chunk])
    except EngineInterruptedError:
        return None
    except EngineError:
        session.cut(session.engine.length(session.sequence))
        raise
