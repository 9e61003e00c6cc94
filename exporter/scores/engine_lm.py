"""A loaded model as lm-eval wants to see one: log-likelihoods of continuations, and greedy or sampled answers.

The same engine and the same ``generate()`` that serve answers are asked, so a score is one of the artefact, not of the
checkpoint. Knows the engine seam and lm-eval's requests; neither tasks nor how scores are shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from edgelm.errors import UsageError
from edgelm.progress import SILENT, Progress
from runtime.chat import Message
from runtime.engine import Chunk, Logits, common_prefix
from runtime.generate import GenerationRequest, Session, answer, generate
from runtime.model import LoadedModel
from runtime.sampling import SamplingOptions

ROWS = 64  # positions whose logits are taken at once; the engine has to be loaded with as many ``logits_rows``
ANSWER_TOKENS = 256  # where a task says nothing, as for every model of lm-eval
SAMPLING = ("temperature", "top_k", "top_p", "min_p")
OTHER_SETTINGS = {"until", "max_gen_toks", "do_sample", "repetition_penalty"}


@dataclass(frozen=True, slots=True)
class Continuation:
    """Token ids of a text and, behind them, of what is judged."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class EngineLM(LM):  # type: ignore[misc]  # lm-eval carries no types
    """``model`` answers for lm-eval. One sequence is used; what neighbouring requests share is computed once."""

    def __init__(self, model: LoadedModel, progress: Progress = SILENT) -> None:
        super().__init__()
        self._model, self._progress = model, progress
        self._session = Session(model.engine)

    @property
    def tokenizer_name(self) -> str:
        """Part of lm-eval's cache keys."""
        return self._model.name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the bundle's own template writes it. Raises ``UsageError`` without one."""
        template = self._model.chat_template
        if template is None:
            raise UsageError(f"{self._model.name} has no chat template", hint="leave out --chat")
        messages: list[Message] = [{"role": item["role"], "content": item["content"]} for item in chat_history]
        return template.render(messages, add_generation_prompt=add_generation_prompt)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Sum of natural log-probabilities of each continuation, and whether greedy decoding would write it."""
        pairs = [self._split(*request.args) for request in requests]
        return self._judge(pairs, "judging answers")

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-probability of whole texts, in windows as long as the context allows."""
        start = self._start_token()
        windows: list[Continuation] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            tokens = self._model.tokenizer.encode(request.args[0], special=False)
            rolling = get_rolling_token_windows(tokens, start, self._model.info.context, 1)
            for context, continuation in map(make_disjoint_window, rolling):
                windows.append(Continuation(tuple(context), tuple(continuation)))
                owners.append(index)
        sums = [0.0] * len(requests)
        for owner, (logprob, _greedy) in zip(owners, self._judge(windows, "reading texts"), strict=True):
            sums[owner] += logprob
        return sums

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """An answer to each prompt, up to a stop text or the model's own end."""
        answers = []
        with self._progress.stage("answering", len(requests), unit="prompts") as stage:
            for request in requests:
                answers.append(self._answer(*request.args))
                stage.advance()
        return answers

    def _answer(self, prompt: str, settings: Mapping[str, Any]) -> str:
        unknown = sorted(settings.keys() - OTHER_SETTINGS - set(SAMPLING))
        if unknown:
            raise UsageError(f"the task asks for the generation setting {unknown[0]}, which this engine does not have")
        most = int(settings.get("max_gen_toks", ANSWER_TOKENS))
        room = self._model.info.context - most
        if room < 1:
            raise UsageError(f"an answer of {most} tokens leaves no room for a prompt", hint="give a larger --context")
        until = settings.get("until") or ()
        sampled = bool(settings.get("do_sample", float(settings.get("temperature", 0)) > 0))
        options = {name: settings[name] for name in SAMPLING if name in settings} if sampled else {}
        penalty = float(settings.get("repetition_penalty", 1.0))
        # A prompt that is too long loses its beginning: what is asked stands at its end.
        request = GenerationRequest(
            self._encode(prompt)[-room:],
            most,
            SamplingOptions(**options, repetition_penalty=penalty, seed=0),
            stop=(until,) if isinstance(until, str) else tuple(until),
            stop_tokens=self._model.stop_tokens,
        )
        return answer(generate(self._session, self._model.tokenizer, request), len(request.prompt)).text

    def _encode(self, text: str) -> list[int]:
        """Special tokens are recognised: rendered templates hold them."""
        bos = self._model.bos
        ids = self._model.tokenizer.encode(text)
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def _start_token(self) -> int:
        """What stands before a text of which every token is judged."""
        if self._model.bos is not None:
            return self._model.bos
        if not self._model.stop_tokens:
            raise UsageError(f"{self._model.name} names neither a first nor a last token: its texts have no beginning")
        return min(self._model.stop_tokens)

    def _split(self, context: str, continuation: str) -> Continuation:
        """Ids of both, cut where the context ends. Blanks at its end belong to the continuation, as in other models of
        lm-eval: a token rarely ends in one."""
        if not context:
            ids = self._model.tokenizer.encode(continuation, special=False)
            return self._fitting([self._start_token()], ids)
        bare = context.rstrip()
        continuation, context = context[len(bare) :] + continuation, bare
        whole, first = self._encode(context + continuation), self._encode(context)
        return self._fitting(first, whole[len(first) :])

    def _fitting(self, context: Sequence[int], continuation: Sequence[int]) -> Continuation:
        """The last token is predicted and never read, so one more than the context fits."""
        room = self._model.info.context + 1 - len(continuation)
        if room < 1:
            raise UsageError(
                f"an answer of {len(continuation)} tokens is longer than the context of {self._model.info.context}",
                hint="give a larger --context",
            )
        return Continuation(tuple(context[-room:]), tuple(continuation))

    def _judge(self, pairs: Sequence[Continuation], name: str) -> list[tuple[float, bool]]:
        """In the order of their contexts, so that those that begin alike follow one another."""
        found: dict[int, tuple[float, bool]] = {}
        with self._progress.stage(name, len(pairs), unit="texts") as stage:
            for index in sorted(range(len(pairs)), key=lambda index: pairs[index].context):
                found[index] = self._judge_one(pairs[index])
                stage.advance()
        return [found[index] for index in range(len(pairs))]

    def _judge_one(self, pair: Continuation) -> tuple[float, bool]:
        targets = pair.continuation
        if not targets:
            return 0.0, True
        read = [*pair.context, *targets[:-1]]
        first = len(pair.context) - 1  # this position predicts the first judged token
        session, engine = self._session, self._model.engine
        shared = min(common_prefix(session.tokens, read), first) if self._model.info.truncates else 0
        engine.truncate(shared, session.sequence)
        session.tokens[:] = []  # empty, should the engine fail on the way
        if shared < first:
            engine.forward([Chunk(session.sequence, read[shared:first], "none")])
        logprob, greedy = 0.0, True
        for start in range(first, len(read), ROWS):
            step = read[start : start + ROWS]
            rows = engine.forward([Chunk(session.sequence, step, "all")])
            wanted = np.asarray(targets[start - first : start - first + len(step)])
            logprob += float(log_probabilities(rows, wanted).sum())
            greedy = greedy and bool((rows.argmax(axis=1) == wanted).all())
        session.tokens[:] = read
        return logprob, greedy


def log_probabilities(
    rows: Logits, tokens: np.ndarray[Any, np.dtype[np.int64]]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Natural log-probability of ``tokens`` (n) under logits (n, vocabulary), in float64."""
    chosen = rows[np.arange(len(tokens)), tokens].astype(np.float64)
    highest = rows.max(axis=1)
    spread = np.exp(rows - highest[:, None]).sum(axis=1, dtype=np.float64)
    return np.asarray(chosen - highest - np.log(spread))
