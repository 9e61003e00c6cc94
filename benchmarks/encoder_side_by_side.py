"""Texts per second of an encoder's bundle against transformers or optimum in float32, in turn, same texts and threads.

Needs the export extra, ``--peer optimum`` (an ``ORTModelForFeatureExtraction`` of the same checkpoint) the optimum one.
The peer gets its texts sorted by length and padded in batches, as sentence-transformers does.

    edgelm export MODEL -o f32 --quant F32 && edgelm export MODEL -o q8 --quant Q8_0
    python benchmarks/encoder_side_by_side.py MODEL f32 q8 --rounds 15
    edgelm export MODEL -o fp32 --format onnx --quant fp32 && edgelm export MODEL -o int8 --format onnx --quant int8
    python benchmarks/encoder_side_by_side.py MODEL fp32 int8 --peer optimum --rounds 15
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from measure import save

from edgelm.progress import SILENT
from exporter.architectures import describe
from exporter.checkpoint import open_checkpoint, open_source
from exporter.embedding_quality import cut_passages
from exporter.optimum_graphs import silent
from exporter.reference import open_transformers_encoder
from exporter.texts import evaluation_text
from runtime.embedding import open_encoder, unit_length
from runtime.encoder import EncoderOptions, Vectors

BATCH = 32
Sequences = Sequence[Sequence[int]]


def padded_batches(model: Any, sequences: Sequences) -> Vectors:
    """Mean-pooled vectors of length one."""
    import torch

    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    vectors = np.empty((len(sequences), model.config.hidden_size), np.float32)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        longest = max(len(sequences[index]) for index in chosen)
        ids = torch.zeros(len(chosen), longest, dtype=torch.long)
        mask = torch.zeros(len(chosen), longest, dtype=torch.long)
        for row, index in enumerate(chosen):
            ids[row, : len(sequences[index])] = torch.tensor(list(sequences[index]))
            mask[row, : len(sequences[index])] = 1
        with torch.inference_mode():
            states = model(input_ids=ids, attention_mask=mask).last_hidden_state
        vectors[chosen] = ((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).numpy()
    return unit_length(vectors)


@contextmanager
def open_optimum(source: Path, threads: int) -> Iterator[tuple[str, Any]]:
    """Optimum's own model over ONNX Runtime, exported here, on as many threads as the others."""
    import onnxruntime
    from optimum.onnxruntime import ORTModelForFeatureExtraction

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    with silent():
        model = ORTModelForFeatureExtraction.from_pretrained(
            source, export=True, session_options=settings, local_files_only=True
        )
    yield f"optimum {version('optimum-onnx')}", model


def timed(embed: Callable[[Sequences], Vectors], sequences: Sequences) -> tuple[float, Vectors]:
    started = time.perf_counter()
    vectors = embed(sequences)
    return time.perf_counter() - started, vectors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", help="the checkpoint")
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--peer", choices=["transformers", "optimum"], default="transformers")
    parser.add_argument("--texts", type=int, default=120, help="at most; of the evaluation text")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    checkpoint = open_checkpoint(open_source(arguments.source))
    encoder = describe(checkpoint).encoder
    assert encoder is not None
    assert encoder.record.pooling == "mean"
    sequences = cut_passages(evaluation_text(), checkpoint, encoder.context)[: arguments.texts]
    tokens = sum(map(len, sequences))
    models = {path.name: open_encoder(path, EncoderOptions(threads=arguments.threads)) for path in arguments.bundles}
    rows: list[dict[str, Any]] = []
    opened = (
        open_optimum(checkpoint.source.path, arguments.threads)
        if arguments.peer == "optimum"
        else open_transformers_encoder(checkpoint, SILENT, device="cpu")
    )
    with opened as (name, peer):
        import torch

        torch.set_num_threads(arguments.threads)
        sides: dict[str, Callable[[Sequences], Vectors]] = {name: lambda ids: padded_batches(peer, ids)}
        sides |= {label: model.embed_ids for label, model in models.items()}
        expected = padded_batches(peer, sequences)
        for embed in sides.values():
            embed(sequences[:8])
        for number in range(arguments.rounds):
            for side in list(sides) if number % 2 else reversed(list(sides)):
                seconds, vectors = timed(sides[side], sequences)
                cosine = float(np.einsum("ij,ij->i", vectors, expected).min())
                rates = {"texts_per_s": len(sequences) / seconds, "tokens_per_s": tokens / seconds}
                rows.append(
                    {"round": number, "side": side, "threads": arguments.threads, **rates, "cosine_min": cosine}
                )
            path = save("encoder_side_by_side", rows)
    for model in models.values():
        model.close()
    summarise(rows, list(sides))
    print(f"raw rows: {path}")


def summarise(rows: list[dict[str, Any]], sides: list[str]) -> None:
    """Medians of each side, and the median of the ratios to the first one, round by round."""
    print("| side | texts/s | tokens/s | ratio | least cosine |\n|---|---|---|---|---|")
    speeds = {side: [row["tokens_per_s"] for row in rows if row["side"] == side] for side in sides}
    for side in sides:
        ratio = statistics.median(ours / peer for ours, peer in zip(speeds[side], speeds[sides[0]], strict=True))
        texts = statistics.median(row["texts_per_s"] for row in rows if row["side"] == side)
        cosine = min(row["cosine_min"] for row in rows if row["side"] == side)
        print(f"| {side} | {texts:.1f} | {statistics.median(speeds[side]):.0f} | {ratio:.2f} | {cosine:.6f} |")


if __name__ == "__main__":
    main()
