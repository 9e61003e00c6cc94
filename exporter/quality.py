"""What an artefact lost: its predictions beside those of the unquantised model, on the same text, in lockstep.

Both models read the same windows chunk by chunk; every chunk's logits are compared and forgotten: memory is constant
and nothing is written to disk. Figures: KL(reference || artefact) per predicted token, agreement of the likeliest
token, perplexity of both. Knows the engine seam and the reference, not how either computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, exp
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgelm.bundle import Quality, TokenIdentity
from edgelm.errors import ProofError, UsageError
from edgelm.progress import Progress
from exporter.architectures import describe
from exporter.checkpoint import Checkpoint
from exporter.device import ON_CPU, Placement
from exporter.reference import BATCH, EngineModel, ReferenceChoice, ScoringModel, open_reference
from exporter.texts import Text, evaluation_text
from exporter.token_identity import open_tokenizer
from exporter.tokenizer import read_tokenizer
from runtime.engine import EngineOptions, Logits
from runtime.engines import load_engine
from runtime.engines.onnx import context_limit
from targets.vram import OffloadPlan

MIN_TOKENS = 2000
"""Fewer predictions make a p99 of fewer than 20 values."""
WINDOW = 512
MIN_CONTEXT = 32
"""Predictions from fewer tokens than this are computed but not counted: text never starts that cold in use."""
_ROWS = 16
_BLOCK = 64  # positions per block of a confidence interval

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Figures of n positions, each array of length n: KL in nats, log-probabilities of the true next token."""

    kl: Doubles
    log_probability: Doubles
    log_probability_reference: Doubles
    agrees: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens that both models read from an empty context; predictions from ``first`` on are counted."""

    tokens: tuple[int, ...]
    first: int

    @property
    def predictions(self) -> int:
        return len(self.tokens) - 1 - self.first


def measure(
    artifact_path: Path,
    checkpoint: Checkpoint,
    identity: TokenIdentity,
    evaluation: Path | None,
    progress: Progress,
    *,
    reference: ReferenceChoice = "auto",
    tokens: int = MIN_TOKENS,
    placement: Placement = ON_CPU,
) -> Quality:
    """Compare an artefact with its checkpoint over at least ``tokens`` predictions of evaluation text.

    ``evaluation`` is a text file of the user, None the default text. Raises ``UsageError`` when the text
    is unusable or too short or a GPU is asked for that is not there, ``DoesNotFitError`` when it holds less than that,
    ``EngineError`` when a model cannot be run and ``ProofError`` when the artefact computes no numbers.
    """
    text = evaluation_text(evaluation)
    windows = _windows(text, checkpoint, artifact_context(artifact_path, checkpoint), tokens)
    length = max(len(window.tokens) for window in windows)
    read = [window.tokens for window in windows]
    with open_reference(checkpoint, length, reference, progress, device=placement.device, windows=read) as original:
        engine = load_engine(artifact_path, engine_options(length, placement))
        try:
            comparison = compare_models(original, EngineModel(engine), windows, progress)
        finally:
            engine.close()
        name = original.name
    return Quality(
        reference=name,
        computed_by=computed_by(engine.info.offload) if placement.gpu_layers else None,
        text=text.name,
        text_sha256=text.sha256,
        tokens=len(comparison.kl),
        kl_mean=float(comparison.kl.mean()),
        kl_mean_interval=_interval(comparison.kl),
        kl_p90=float(np.quantile(comparison.kl, 0.90)),
        kl_p99=float(np.quantile(comparison.kl, 0.99)),
        kl_max=float(comparison.kl.max()),
        top1_agreement=float(comparison.agrees.mean()),
        ppl=exp(-float(comparison.log_probability.mean())),
        ppl_interval=_ppl_interval(comparison.log_probability),
        ppl_reference=exp(-float(comparison.log_probability_reference.mean())),
        token_identity=identity,
    )


def engine_options(context: int, placement: Placement) -> EngineOptions:
    """How the artefact is loaded for a measurement with windows of ``context`` tokens."""
    gpu_layers, gpu = placement.gpu_layers, placement.gpu
    return EngineOptions(
        context=context, batch=BATCH, all_logits=True, gpu_layers=gpu_layers, gpu=gpu, flash_attention="on"
    )


def computed_by(plan: OffloadPlan | None) -> str | None:
    """What computed an artefact's layers, for people."""
    if plan is None or plan.device is None:
        return None if plan is None else plan.sentence()
    return f"{plan.gpu_layers} of {plan.most} layers on {plan.device.name} ({plan.device.description})"


def within(quality: Quality, recorded: Quality) -> bool | None:
    """Whether a mean KL lies in the recorded one's 95 % interval; None for another text, or one without interval."""
    if recorded.kl_mean_interval is None or recorded.text_sha256 != quality.text_sha256:
        return None
    low, high = recorded.kl_mean_interval
    return low <= quality.kl_mean <= high


def _interval(values: Doubles) -> tuple[float, float]:
    """95 % interval of a mean of positions in text, from means of blocks: neighbours are not independent."""
    blocks = values[: len(values) // _BLOCK * _BLOCK].reshape(-1, _BLOCK).mean(axis=1)
    mean = float(values.mean())
    half = 1.96 * float(blocks.std(ddof=1)) / len(blocks) ** 0.5 if len(blocks) > 1 else float("inf")
    half = min(half, max(abs(mean), 1.0))  # JSON has no infinity
    return mean - half, mean + half


def _ppl_interval(log_probability: Doubles) -> tuple[float, float]:
    low, high = _interval(-log_probability)
    return exp(low), exp(high)


def compare_models(
    reference: ScoringModel, artifact: ScoringModel, windows: Sequence[Window], progress: Progress
) -> Comparison:
    """Read every window with both models and compare each counted prediction. Raises ``ProofError``."""
    if reference.vocabulary != artifact.vocabulary:
        raise ProofError(
            f"the artefact has {artifact.vocabulary} tokens, its reference {reference.vocabulary}: not comparable"
        )
    parts: list[Comparison] = []
    with progress.stage("measuring quality", sum(len(window.tokens) for window in windows), unit="tokens") as stage:
        for window in windows:
            reference.reset()
            artifact.reset()
            for start in range(0, len(window.tokens) - 1, BATCH):
                end = min(start + BATCH, len(window.tokens) - 1)
                chunk = window.tokens[start:end]
                expected, found = reference.append(chunk), artifact.append(chunk)
                skipped = max(0, window.first - start)
                if skipped < len(chunk):
                    targets = np.asarray(window.tokens[start + 1 + skipped : end + 1])
                    parts.append(compare_logits(expected[skipped:], found[skipped:], targets))
                stage.advance(len(chunk))
            stage.advance()
    return Comparison(
        kl=np.concatenate([part.kl for part in parts]),
        log_probability=np.concatenate([part.log_probability for part in parts]),
        log_probability_reference=np.concatenate([part.log_probability_reference for part in parts]),
        agrees=np.concatenate([part.agrees for part in parts]),
    )


def compare_logits(reference: Logits, artifact: Logits, targets: npt.NDArray[np.int64]) -> Comparison:
    """Compare logits (n, vocabulary) of the same positions; ``targets`` (n) are the tokens that really came next.

    KL(p || q) = sum over the vocabulary of p (log p - log q), in float64, p being the reference. Raises ``ProofError``
    for logits that are no finite numbers.
    """
    count = len(targets)
    kl, found, expected = np.empty(count), np.empty(count), np.empty(count)
    for start in range(0, count, _ROWS):  # a float64 copy of a whole chunk would be the largest thing in memory
        rows = slice(start, min(start + _ROWS, count))
        log_p, log_q = log_softmax(reference[rows]), log_softmax(artifact[rows])
        kl[rows] = np.einsum("ij,ij->i", np.exp(log_p), log_p - log_q)
        index = np.arange(log_p.shape[0])
        expected[rows], found[rows] = log_p[index, targets[rows]], log_q[index, targets[rows]]
    if not (np.isfinite(kl).all() and np.isfinite(found).all()):
        raise ProofError("the artefact or its reference computes logits that are no finite numbers")
    agrees = reference.argmax(axis=1) == artifact.argmax(axis=1)
    # Rounding may leave -1e-17 where both are equal.
    return Comparison(np.maximum(kl, 0.0), found, expected, agrees)


def log_softmax(logits: Logits) -> Doubles:
    """Log-probabilities in float64, shifted by the row's maximum so that nothing overflows. Shape (n, vocabulary)."""
    with np.errstate(invalid="ignore"):  # infinite logits become NaN, which the caller refuses
        shifted = logits.astype(np.float64)
        shifted -= shifted.max(axis=1, keepdims=True)
        shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def artifact_context(artifact_path: Path, checkpoint: Checkpoint) -> int:
    """The longest context of an artefact, which for an ONNX file may be less than the model was trained for."""
    if artifact_path.suffix != ".onnx":
        return describe(checkpoint).dimensions.context_trained
    return context_limit(artifact_path)


def _windows(text: Text, checkpoint: Checkpoint, context: int, tokens: int) -> list[Window]:
    source = read_tokenizer(checkpoint)
    ids = open_tokenizer(source.tokenizer_json, "tokenizer.json").encode(text.content, add_special_tokens=False).ids
    bos = source.gguf_metadata.get("tokenizer.ggml.bos_token_id")
    prefix = (bos,) if source.gguf_metadata.get("tokenizer.ggml.add_bos_token") and bos is not None else ()
    length = min(WINDOW, context)
    return cut_windows(ids, tokens, length=length, prefix=prefix, name=text.name)


def cut_windows(
    ids: Sequence[int], tokens: int, *, length: int, prefix: tuple[int, ...] = (), name: str = "the text"
) -> list[Window]:
    """Windows spread evenly over a text, without overlap, that hold at least ``tokens`` counted predictions together.

    Raises ``UsageError`` when the text is too short for that.
    """
    first = min(MIN_CONTEXT, length // 2) - 1
    taken = length - len(prefix)
    count = ceil(tokens / (length - 1 - first))
    if len(ids) < count * taken:
        raise UsageError(
            f"{name} has {len(ids)} tokens; {count * taken} are needed for {tokens} counted predictions",
            hint="give a longer text, or none to use the default one",
        )
    pitch = len(ids) // count
    return [Window((*prefix, *ids[start : start + taken]), first) for start in range(0, count * pitch, pitch)]


def windows_between(ids: Sequence[int], tokens: int, *, length: int, wanted: int) -> list[tuple[int, ...]]:
    """``wanted`` pieces of ``length`` token ids from the gaps that ``cut_windows`` leaves, without a prefix.

    Text of the same kind that is not counted there; none when the gaps are too small.
    """
    count = len(cut_windows(ids, tokens, length=length))
    pitch = len(ids) // count
    if pitch < 2 * length or count < wanted:
        return []
    gaps = [round(index * (count - 1) / max(wanted - 1, 1)) for index in range(wanted)]
    starts = (gap * pitch + pitch // 2 for gap in gaps)
    return [tuple(ids[start : start + length]) for start in starts]
