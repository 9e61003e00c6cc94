"""What an encoder's artefact lost: its vectors beside those of the unquantised model, for the same token ids.

The evaluation text is cut into passages of many lengths, up to the longest that the model was tuned for. The reference
is transformers in float32 with pooling done here, or the same checkpoint unquantised in the engine. Figures: cosine
between both vectors of each passage, the largest difference of any number of them, and how often the nearest other
passage is the same one, which is what vectors are for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelm.bundle import EmbeddingQuality, EncoderRecord, Pooling, TokenIdentity
from edgelm.errors import EngineError, ProofError, UsageError
from edgelm.progress import Progress
from exporter.architectures import describe
from exporter.architectures.base import EncoderDescription
from exporter.checkpoint import Checkpoint
from exporter.device import ON_CPU, DeviceChoice, Placement
from exporter.quality import computed_by
from exporter.reference import ReferenceChoice, open_transformers_encoder, transformers_obstacle, unquantised_file
from exporter.texts import Text, evaluation_text
from exporter.token_identity import open_tokenizer
from exporter.tokenizer import read_tokenizer
from runtime.embedding import unit_length
from runtime.encoder import EncoderOptions, Vectors
from runtime.engines import load_encoder
from runtime.tokenizer import ends_added

PASSAGES = 120
SHORTEST = 4
Embed = Callable[[Sequence[Sequence[int]]], Vectors]


@dataclass(frozen=True, slots=True)
class Reference:
    """The unquantised model: what the manifest calls it, and ids to pooled vectors that are not normalised."""

    name: str
    embed: Embed


def measure(
    artifact: Path,
    checkpoint: Checkpoint,
    identity: TokenIdentity,
    evaluation: Path | None,
    progress: Progress,
    *,
    reference: ReferenceChoice = "auto",
    placement: Placement = ON_CPU,
) -> EmbeddingQuality:
    """Compare an artefact with its checkpoint over passages of evaluation text.

    ``evaluation`` is a text file of the user, None the default text; ``placement`` is where both models compute. Raises
    ``UsageError`` when the text is unusable or too short, ``EngineError`` when a model cannot be run,
    ``DoesNotFitError`` when a GPU holds less than is to go there and ``ProofError`` when the artefact computes no
    numbers.
    """
    encoder = describe(checkpoint).encoder
    assert encoder is not None
    text = evaluation_text(evaluation)
    passages = cut_passages(text, checkpoint, encoder.context)
    with open_reference(checkpoint, encoder, reference, progress, device=placement.device) as original:
        expected = embed_all(original.embed, passages, "computing the reference", progress)
        name = original.name
    found, by = _artifact_vectors(artifact, encoder, passages, progress, placement)
    measured = compare(expected, found, name, text, sum(map(len, passages)), identity)
    return measured.model_copy(update={"computed_by": by})


def compare(
    expected: Vectors, found: Vectors, reference: str, text: Text, tokens: int, identity: TokenIdentity
) -> EmbeddingQuality:
    """Figures of two sets of vectors (texts, dimensions). Raises ``ProofError`` for vectors that are no numbers."""
    return EmbeddingQuality(
        reference=reference,
        text=text.name,
        text_sha256=text.sha256,
        texts=len(found),
        tokens=tokens,
        token_identity=identity,
        **asdict(figures(expected, found)),
    )


@dataclass(frozen=True, slots=True)
class Figures:
    """Of two sets of vectors, see ``EmbeddingQuality``."""

    cosine_mean: float
    cosine_p1: float
    cosine_min: float
    error_max: float
    nearest_agreement: float


def figures(expected: Vectors, found: Vectors) -> Figures:
    """Compare vectors (texts, dimensions) row by row. Raises ``ProofError`` for those that are no numbers."""
    if not (np.isfinite(expected).all() and np.isfinite(found).all()):
        raise ProofError("the artefact or its reference computes vectors that are no finite numbers")
    ours, theirs = unit_length(found).astype(np.float64), unit_length(expected).astype(np.float64)
    cosines = np.minimum(np.einsum("ij,ij->i", ours, theirs), 1.0)
    return Figures(
        cosine_mean=float(cosines.mean()),
        cosine_p1=float(np.quantile(cosines, 0.01)),
        cosine_min=float(cosines.min()),
        error_max=float(np.abs(ours - theirs).max()),
        nearest_agreement=float((_nearest(ours) == _nearest(theirs)).mean()),
    )


def _nearest(vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """For each row the other row that it has the largest cosine with."""
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -2.0)
    nearest: npt.NDArray[np.int64] = cosines.argmax(axis=1)
    return nearest


def cut_passages(text: Text, checkpoint: Checkpoint, context: int) -> list[list[int]]:
    """Ids of ``PASSAGES`` neighbouring passages, special tokens around each; lengths go up to ``context`` and start
    anew. Raises ``UsageError`` when the text is too short."""
    tokenizer = open_tokenizer(read_tokenizer(checkpoint).tokenizer_json, "tokenizer.json")
    bare, whole = (tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
    prefix, suffix = ends_added(bare, whole)
    ids = tokenizer.encode(text.content, add_special_tokens=False).ids
    room = context - len(prefix) - len(suffix)
    lengths = itertools.cycle(_lengths(room))
    passages, start = list[list[int]](), 0
    for length in itertools.islice(lengths, PASSAGES):
        passages.append([*prefix, *ids[start : start + length], *suffix])
        start += length
    if start > len(ids):
        raise UsageError(
            f"{text.name} has {len(ids)} tokens; {start} are needed for {PASSAGES} passages",
            hint="give a longer text, or none to use the default one",
        )
    return passages


def _lengths(room: int) -> list[int]:
    """Lengths from a few tokens to all that fit, each about 1.6 times the one before."""
    found, length = [], float(SHORTEST)
    while length < room:
        found.append(int(length))
        length *= 1.6
    return [*found, room]


def embed_all(embed: Embed, passages: Sequence[Sequence[int]], what: str, progress: Progress) -> Vectors:
    """Vectors (passages, dimensions) of all passages, told as a stage."""
    parts = []
    with progress.stage(what, len(passages), unit="texts") as stage:
        for start in range(0, len(passages), 8):
            parts.append(embed(passages[start : start + 8]))
            stage.advance(len(parts[-1]))
    return np.concatenate(parts)


def encoder_options(context: int, placement: Placement) -> EncoderOptions:
    """How an encoder's artefact is loaded for its proof."""
    return EncoderOptions(context=context, gpu_layers=placement.gpu_layers, gpu=placement.gpu)


def _artifact_vectors(
    artifact: Path,
    encoder: EncoderDescription,
    passages: Sequence[Sequence[int]],
    progress: Progress,
    placement: Placement,
) -> tuple[Vectors, str | None]:
    """The artefact's vectors, and what computed them where a GPU was to."""
    loaded = load_encoder(artifact, encoder_options(encoder.context, placement))
    try:
        if loaded.info.dimensions != encoder.record.dimensions:
            raise EngineError(
                f"the artefact makes vectors of {loaded.info.dimensions} numbers, not {encoder.record.dimensions}"
            )
        by = computed_by(loaded.info.offload) if placement.gpu_layers else None
        return embed_all(loaded.encode, passages, "measuring quality", progress), by
    finally:
        loaded.close()


# --- references


@contextmanager
def open_reference(
    checkpoint: Checkpoint,
    encoder: EncoderDescription,
    choice: ReferenceChoice,
    progress: Progress,
    *,
    device: DeviceChoice = "auto",
) -> Iterator[Reference]:
    """The unquantised encoder: transformers when it can be had, on ``device``, else the engine, as ``choice`` allows.

    Raises ``CheckpointError`` and ``DoesNotFitError`` as ``exporter.reference`` does.
    """
    insisted = choice == "transformers" or device == "cuda"
    if choice != "engine" and (insisted or transformers_obstacle(checkpoint) is None):
        with open_transformers_encoder(checkpoint, progress, device=device) as (name, model):
            yield Reference(name, embedder(model, encoder.record))
        return
    with unquantised_file(checkpoint, describe(checkpoint), progress) as (path, kind):
        loaded = load_encoder(path, EncoderOptions(context=encoder.context))
        try:
            yield Reference(f"{loaded.info.engine} {kind}", loaded.encode)
        finally:
            loaded.close()


def embedder(model: Any, record: EncoderRecord) -> Embed:
    """Ids to pooled vectors by transformers, one sequence at a time: nothing is padded and no mask can be wrong."""

    def embed(sequences: Sequence[Sequence[int]]) -> Vectors:
        import torch

        rows = []
        with torch.inference_mode():
            for ids in sequences:
                states = (
                    model(torch.tensor([list(ids)], device=model.device)).last_hidden_state[0].float().cpu().numpy()
                )
                rows.append(pool(states, record.pooling))
        return np.stack(rows)

    return embed


def pool(states: npt.NDArray[np.float32], pooling: Pooling) -> npt.NDArray[np.float32]:
    """One vector of the vectors (tokens, dimensions) of a sequence."""
    if pooling == "mean":
        mean: npt.NDArray[np.float32] = states.mean(axis=0, dtype=np.float64).astype(np.float32)
        return mean
    token: npt.NDArray[np.float32] = states[0 if pooling == "cls" else -1]
    return token
