"""What an artefact with a task lost: its outcomes beside those of transformers in float32, for the same token ids.

Passages of the evaluation text are translated, get a word masked, or are classified. Both sides choose greedily.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelm.bundle import TaskQuality, TaskRecord, TokenIdentity
from edgelm.errors import ProofError, UsageError
from edgelm.progress import Progress
from exporter.checkpoint import Checkpoint
from exporter.device import DeviceChoice, exact_float32, memory_errors, resolve_device
from exporter.optimum_graphs import open_task_model
from exporter.optimum_tasks import DECODER, TASKS, TOKENIZER
from exporter.reference import reference_name
from exporter.texts import evaluation_text
from runtime.engines.onnx_seq2seq import Seq2SeqEngine
from runtime.tasks import HeadModel, TaskOptions, greedy, task_ids
from runtime.tokenizer import JsonTokenizer

PASSAGES = 25
WRITTEN = 32
_WORDS = (3, 6, 10, 16, 28)
Rows = npt.NDArray[np.float64]


@dataclass
class _Found:
    """Figures of all passages so far."""

    agreed: list[bool] = field(default_factory=list)
    first: list[bool] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)

    def add(self, reference: Rows, ours: Rows) -> None:
        """Scores before softmax, (predictions, choices) each. Raises ``ProofError`` for what is no number."""
        if not (np.isfinite(reference).all() and np.isfinite(ours).all()):
            raise ProofError("the artefact or its reference computes scores that are no finite numbers")
        expected, found = _log_softmax(reference), _log_softmax(ours)
        self.divergences += np.maximum((np.exp(expected) * (expected - found)).sum(axis=1), 0).tolist()
        self.first += (reference.argmax(axis=1) == ours.argmax(axis=1)).tolist()


def measure(
    artifact: Path,
    checkpoint: Checkpoint,
    record: TaskRecord,
    identity: TokenIdentity,
    evaluation: Path | None,
    progress: Progress,
    *,
    device: DeviceChoice = "auto",
) -> TaskQuality:
    """Compare an artefact with its checkpoint. ``evaluation`` is a text file of the user, None the default text;
    ``device`` is where transformers computes.

    Raises ``UsageError`` for an unusable text, ``EngineError``, ``CheckpointError``, ``ProofError`` and what
    ``resolve_device`` raises.
    """
    text = evaluation_text(evaluation)
    words = JsonTokenizer(artifact.parent / TOKENIZER)
    compared = _translations if record.kind == "translate" else _heads
    found = _Found()
    place = str(resolve_device(device).value)
    with (
        open_task_model(checkpoint, TASKS[record.kind], progress) as model,
        exact_float32(),
        memory_errors("this model", "use --device cpu"),
    ):
        import transformers

        model.to(place)
        passages = list(_passages(text.content, lambda passage: task_ids(words, record, passage)))
        with progress.stage("measuring quality", len(passages), unit="texts") as stage:
            for _ in compared(artifact, record, model, passages, found):
                stage.advance()
        name = reference_name(model, transformers.__version__)
    return TaskQuality(
        reference=name,
        text=text.name,
        text_sha256=text.sha256,
        texts=len(found.agreed),
        predictions=len(found.first),
        agreement=float(np.mean(found.agreed)),
        top1_agreement=float(np.mean(found.first)),
        kl_mean=float(np.mean(found.divergences)),
        kl_max=float(np.max(found.divergences)),
        token_identity=identity,
    )


def _passages(text: str, encode: Callable[[str], list[int]]) -> Iterator[list[int]]:
    """Ids of neighbouring passages of few to some words. Raises ``UsageError`` for a text that is too short."""
    words, start = text.split(), 0
    for index in range(PASSAGES):
        count = _WORDS[index % len(_WORDS)]
        if start + count > len(words):
            raise UsageError("the text to measure on is too short", hint="give a longer one, or none")
        yield encode(" ".join(words[start : start + count]))
        start += count


def _translations(
    artifact: Path, record: TaskRecord, model: Any, passages: Sequence[list[int]], found: _Found
) -> Iterator[None]:
    """Greedy answers of both, and scores of ours along the reference's answer."""
    import torch

    assert record.seq2seq is not None
    rules = record.seq2seq
    engine = Seq2SeqEngine(artifact, artifact.parent / DECODER)
    try:
        for ids in passages:
            cut = ids[: engine.context]
            with torch.inference_mode():
                expected = _reference_answer(model, cut, rules.max_tokens, record)
                inputs = [rules.start_token, *expected[:-1]]
                read, wrote = (torch.tensor([row], device=model.device) for row in (cut, inputs))
                scores = model(input_ids=read, decoder_input_ids=wrote).logits[0]
            engine.read(cut)
            ours = np.stack([engine.write(token) for token in inputs])
            found.add(scores.double().cpu().numpy(), ours.astype(np.float64))
            engine.read(cut)
            found.agreed.append(greedy(engine.write, rules, min(rules.max_tokens, WRITTEN)) == expected)
            yield
    finally:
        engine.close()


def _reference_answer(model: Any, ids: Sequence[int], most: int, record: TaskRecord) -> list[int]:
    """transformers' own greedy generation, without the token that it starts from."""
    import torch

    rules = record.seq2seq
    assert rules is not None
    written = model.generate(
        torch.tensor([list(ids)], device=model.device),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=model.device),
        do_sample=False,
        num_beams=1,
        max_new_tokens=min(most, WRITTEN),
        max_length=None,
        forced_eos_token_id=None,  # where the limit cuts an answer is no matter of the model
    )
    answer: list[int] = written[0].tolist()[1:]
    return answer


def _heads(
    artifact: Path, record: TaskRecord, model: Any, passages: Sequence[list[int]], found: _Found
) -> Iterator[None]:
    """Words at a mask in the middle of each passage, or its labels."""
    import torch

    words = JsonTokenizer(artifact.parent / TOKENIZER)
    ours = HeadModel(artifact, "proof", record, words, TaskOptions())
    try:
        for passage in passages:
            ids = list(passage[: ours.context])
            place = len(ids) // 2
            if record.mask_token is not None:
                ids[place] = record.mask_token
            with torch.inference_mode():
                scores = model(input_ids=torch.tensor([ids], device=model.device)).logits[0].double().cpu().numpy()
            mine = ours.logits(ids).astype(np.float64)
            if record.mask_token is not None:
                scores, mine = scores[place : place + 1], mine[place : place + 1]
            else:
                scores, mine = scores[None], mine[None]
            found.add(scores, mine)
            found.agreed.append(found.first[-1])
            yield
    finally:
        ours.close()


def _log_softmax(scores: Rows) -> Rows:
    shifted = scores - scores.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
