"""Continuous batching in its simple form: one engine call per step for every sequence that has something to compute.

Each step gives every running sequence its next token and spends what is left of the batch on prompts that wait,
in pieces, so that running streams keep their pace. Synchronous and single-threaded; the worker drives it. The meaning
of a generation (sampling, stop strings, text) is that of ``runtime.generate``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from edgelm.errors import EdgelmError, EngineError, UsageError
from runtime.constraint import ConstraintError
from runtime.engine import Chunk, Engine, Logits, PrefixCopier, StateKeeper
from runtime.generate import Continuation, GenerationRequest, Session, Step, TokenEvent, next_chunk, take_rows
from runtime.server.metrics import Metrics
from runtime.server.prompt_files import PromptFiles
from runtime.speculative import DRAFTED_STREAMS, Drafts, Speculation
from runtime.tokenizer import TextTokenizer

BATCH_TOKENS = 512
SHARED_PREFILL_TOKENS = 128
# llama.cpp copies a whole cache, used or not: some milliseconds for a small model and tenths of a second for a large
# one, always less than computing this many tokens.
COPY_GAIN_TOKENS = 32
# A file is read and hashed in well under a millisecond per token; computing one takes a small board five to a hundred.
LOAD_GAIN_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Failure:
    """Ends a job that the engine or the server could not finish; ``by_request`` when the request itself was why."""

    message: str
    by_request: bool = False


def failure_of(error: EdgelmError) -> Failure:
    """What a job is told of an error that ended it alone."""
    return Failure(error.message, by_request=isinstance(error, (ConstraintError, UsageError)))


JobEvent = TokenEvent | Failure


@dataclass(slots=True, eq=False)
class Job:
    """One generation from its submission on. ``cancelled`` may be set by anybody; the rest belongs to the worker.

    ``deliver`` is called in the worker's thread and must not block. Times are those of ``time.monotonic``.
    """

    request: GenerationRequest
    deliver: Callable[[JobEvent], None]
    submitted_s: float = field(default_factory=time.monotonic)
    admitted_s: float | None = None
    cancelled: bool = False

    @property
    def queue_s(self) -> float:
        """Seconds between submission and admission, 0 while queued."""
        return 0.0 if self.admitted_s is None else self.admitted_s - self.submitted_s


@dataclass(slots=True, eq=False)
class _Run:
    """A job on its sequence. ``pending`` are the tokens to compute next: what is left of the prompt, or one token,
    behind which ``drafts`` may have guesses, or many to be read again. When the sequence holds ``save_at`` tokens, they
    are kept on disk (0: never)."""

    job: Job
    session: Session
    continuation: Continuation
    pending: Sequence[int]
    cached_tokens: int
    drafts: Drafts | None
    save_at: int = 0
    index: int = 0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    intervals: int = 0

    @property
    def reads(self) -> bool:
        """Whether tokens are computed that are known already: the prompt, or what a full context had to give up."""
        return self.index == 0 or len(self.pending) > 1

    def piece(self, room: int) -> Sequence[int]:
        """The next tokens to read, at most ``room`` and not beyond those that are kept on disk."""
        to_save = self.save_at - len(self.session.tokens)
        return self.pending[: min(room, to_save) if to_save > 0 else room]


class Scheduler:
    """Runs up to ``engine.info.sequences`` jobs together. Sequences keep their tokens afterwards, as a prefix cache;
    ``prompts`` keeps what prompts share on disk, too."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: TextTokenizer,
        metrics: Metrics,
        *,
        batch_tokens: int = BATCH_TOKENS,
        speculation: Speculation | None = None,
        prompts: PromptFiles | None = None,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._batch_tokens = batch_tokens
        self._speculation = speculation
        self._prompts = prompts
        self._free = [Session(engine, sequence) for sequence in range(engine.info.sequences)]
        self._runs: list[_Run] = []
        self.mean_job_s = 1.0

    @property
    def running(self) -> int:
        return len(self._runs)

    @property
    def kv_tokens(self) -> int:
        """Tokens that all sequences hold; may be asked from any thread."""
        sessions = [*self._free, *(run.session for run in list(self._runs))]
        return sum(len(session.tokens) for session in sessions)

    @property
    def only_decodes(self) -> bool:
        """Whether there are runs and none of them reads."""
        return bool(self._runs) and not any(run.reads for run in self._runs)

    @property
    def has_room(self) -> bool:
        return bool(self._free)

    def runs_only(self, job: Job) -> bool:
        """Whether ``job`` is running and no other; may be asked from any thread."""
        return [run.job for run in self._runs] == [job]

    def admit(self, job: Job) -> None:
        """Give a job the free sequence where the least is lost: what it holds that the job does not share.

        A job whose options turn out to make no sense fails at once and takes none.
        """
        prompt = job.request.prompt
        try:
            continuation = Continuation(job.request, self._tokenizer, self._engine.info)
        except EdgelmError as error:
            self._metrics.generations.labels("failed").inc()
            job.deliver(failure_of(error))
            return
        session = min(self._free, key=lambda free: (_loss(free, prompt), free.sequence))
        cached = self._take_prefix(session, prompt)
        self._free.remove(session)
        job.admitted_s = time.monotonic()
        self._metrics.queue_wait_s.observe(job.queue_s)
        self._metrics.cached_tokens.inc(cached)
        drafts = None if self._speculation is None else self._speculation.drafts(job.request.stop_tokens)
        run = _Run(job, session, continuation, prompt[cached:], cached, drafts)
        if self._prompts is not None and self._prompts.wants(prompt[: job.request.shared]):
            run.save_at = job.request.shared
        self._runs.append(run)

    def _take_prefix(self, session: Session, prompt: Sequence[int]) -> int:
        """Leave in a free sequence what the prompt begins with, from wherever it can be had; tells how much that is."""
        # The last token of the prompt is always computed, because its logits choose the first answer token.
        most = len(prompt) - 1
        cached = min(session.shared(prompt), most)
        others = [run.session for run in self._runs] + [free for free in self._free if free is not session]
        best = max(others, key=lambda other: other.shared(prompt), default=session)
        copied = min(best.shared(prompt), most)
        engine = self._engine
        copies = isinstance(engine, PrefixCopier) and copied - cached >= COPY_GAIN_TOKENS
        if self._load_prefix(session, prompt, (copied if copies else cached) + LOAD_GAIN_TOKENS):
            copies, cached = False, min(session.shared(prompt), most)
        try:
            if isinstance(engine, PrefixCopier) and copies:
                engine.copy_prefix(best.sequence, session.sequence, copied)
                session.tokens[:] = best.tokens[:copied]
                session.exact = None
            else:
                engine.truncate(cached, session.sequence)
        except EngineError:
            # Recurrent models cannot go back to the middle of a sequence; what is left of it is what counts.
            pass
        cached = engine.length(session.sequence)
        session.cut(cached)
        return cached

    def _load_prefix(self, session: Session, prompt: Sequence[int], least: int) -> bool:
        """Put what the prompt begins with into a free sequence from disk, where that gives at least so many tokens."""
        engine = self._engine
        if self._prompts is None or not isinstance(engine, StateKeeper):
            return False
        found = self._prompts.load(prompt[:-1], least)
        if found is None:
            return False
        tokens, state = found
        try:
            engine.restore(state, len(tokens), session.sequence)
        except EngineError as error:
            # Rare: the engine has still to copy into this sequence, or takes no state that its own version made.
            session.cut(engine.length(session.sequence))
            self._prompts.complain("not restored", error.message)
            return False
        session.tokens[:], session.exact = tokens, None
        return True

    def _save_prefix(self, run: _Run) -> None:
        """Keep on disk what a sequence holds, all of which other prompts are likely to begin with."""
        run.save_at = 0
        tokens, engine = list(run.session.tokens), self._engine
        if self._prompts is None or not isinstance(engine, StateKeeper) or not self._prompts.wants(tokens):
            return
        try:
            self._prompts.save(tokens, engine.state(run.session.sequence))
        except (EngineError, MemoryError) as error:
            self._prompts.complain("not saved", str(error) or "not enough memory")

    def step(self) -> int:
        """End what was cancelled, compute one batch, deliver its tokens; how many tokens it had.

        Raises ``EngineError``; after an ``EngineInterruptedError`` the step can simply be repeated.
        """
        for run in [run for run in self._runs if run.job.cancelled]:
            self._end(run, Step(None, run.continuation.finish(), "cancelled"))
        batch = self._batch()
        if not batch:
            return 0
        tokens = sum(len(chunk.tokens) for _, chunk in batch)
        logits = self._engine.forward([chunk for _, chunk in batch])
        self._metrics.batch_requests.observe(len(batch))
        self._metrics.batch_tokens.observe(tokens)
        row = 0
        for run, chunk in batch:
            if run.reads:
                run.pending = run.pending[len(chunk.tokens) :]
                self._metrics.prefill_tokens.inc(len(chunk.tokens))
            if chunk.logits == "none":
                run.session.tokens.extend(chunk.tokens)
                if len(run.session.tokens) == run.save_at:
                    self._save_prefix(run)
                continue
            count = len(chunk.tokens) if chunk.logits == "all" else 1
            self._take(run, chunk, logits[row : row + count])
            row += count
        return tokens

    def fail(self, failure: Failure) -> None:
        """End every running job with ``failure``. What the sequences hold is unknown then, so they start afresh."""
        for run in list(self._runs):
            self._fail_one(run, failure)
        for session in self._free:
            self._engine.truncate(0, session.sequence)
            session.cut(0)

    def _batch(self) -> list[tuple[_Run, Chunk]]:
        """Every run that decodes gets its token, with guesses where few are running, then prompts in order of admission
        get what is left."""
        few = len(self._runs) <= DRAFTED_STREAMS
        for run in self._runs:
            if not run.reads:
                again = run.continuation.make_room(run.session, run.drafts)
                run.pending = [*again, *run.pending]
        batch = [
            (run, next_chunk(run.session, run.continuation, run.pending[0], run.drafts if few else None))
            for run in self._runs
            if not run.reads
        ]
        room = self._batch_tokens - sum(len(chunk.tokens) for _, chunk in batch)
        if batch:
            room = min(room, SHARED_PREFILL_TOKENS)
        for run in self._runs:
            if run.reads and room > 0:
                piece = run.piece(room)
                room -= len(piece)
                wanted: Literal["none", "last"] = "last" if len(piece) == len(run.pending) else "none"
                batch.append((run, Chunk(run.session.sequence, piece, wanted)))
        # llama.cpp computes neighbours together and splits the batch elsewhere: eight streams out of order took 3 times
        # as long as the same in order.
        return sorted(batch, key=lambda item: item[1].sequence)

    def _take(self, run: _Run, chunk: Chunk, rows: Logits) -> None:
        """Choose tokens from a chunk's rows of logits and deliver what comes of them, by the rules of ``generate``."""
        drafts = run.drafts if len(rows) > 1 else None
        try:
            steps = take_rows(run.session, run.continuation, chunk, rows, drafts)
        except EngineError as error:
            self._observe_token(run)
            self._fail_one(run, failure_of(error))
            return
        if drafts is not None:
            self._metrics.drafted_tokens.inc(len(rows) - 1)
            self._metrics.accepted_tokens.inc(len(steps) - 1)
        for step in steps:
            self._observe_token(run)
            if step.finish_reason is not None or step.token is None:
                self._end(run, step)
                return
            self._deliver(run, step)
            run.pending = (step.token,)

    def _observe_token(self, run: _Run) -> None:
        now = time.monotonic()
        if run.index == 0:
            self._metrics.ttft_s.observe(now - run.job.submitted_s)
            run.first_token_s = now
            computed, since = len(run.job.request.prompt) - run.cached_tokens, run.job.admitted_s or run.job.submitted_s
            if now > since:
                self._metrics.prefill_rate.observe(computed / (now - since))
        else:
            self._metrics.inter_token_s.observe(now - run.last_token_s)
            run.intervals += 1
        run.last_token_s = now

    def _fail_one(self, run: _Run, failure: Failure) -> None:
        """End a job whose own logits were of no use; its sequence starts afresh."""
        self._release(run)
        self._engine.truncate(0, run.session.sequence)
        run.session.cut(0)
        self._metrics.generations.labels("failed").inc()
        run.job.deliver(failure)

    def _end(self, run: _Run, step: Step) -> None:
        self._release(run)
        if run.last_token_s > run.first_token_s:
            self._metrics.decode_rate.observe(run.intervals / (run.last_token_s - run.first_token_s))
        self._metrics.generations.labels(step.finish_reason or "stop").inc()
        self._deliver(run, step)

    def _release(self, run: _Run) -> None:
        self._runs.remove(run)
        self._free.append(run.session)
        if run.job.admitted_s is not None:
            self.mean_job_s += 0.2 * (time.monotonic() - run.job.admitted_s - self.mean_job_s)

    def _deliver(self, run: _Run, step: Step) -> None:
        job = run.job
        now = time.monotonic()
        if step.token is not None:
            self._metrics.decode_tokens.inc()
        job.deliver(
            TokenEvent(
                token=step.token,
                text=step.text,
                number=run.index,
                elapsed_s=now - job.submitted_s,
                prefill_s=now - job.admitted_s if run.index == 0 and job.admitted_s is not None else None,
                cached_tokens=run.cached_tokens,
                finish_reason=step.finish_reason,
                logprobs=step.logprobs,
                drafted_tokens=run.drafts.drafted if run.drafts else 0,
                accepted_tokens=run.drafts.accepted if run.drafts else 0,
                shifted_tokens=run.continuation.shifted,
            )
        )
        run.index += 1


def _loss(free: Session, prompt: Sequence[int]) -> int:
    """Tokens that a sequence would lose by taking a prompt, less those that it saves.

    Among equals the lowest number is taken: llama.cpp computes sequences together up to the highest one in use.
    """
    return len(free.tokens) - 2 * free.shared(prompt)
