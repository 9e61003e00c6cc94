"""What graphs that compute with float16 lose: tiny random models of every family, and whole exports of checkpoints.

Families are those of docs/onnx-architectures.md, with matrices as transformers initialises them and near those of
trained models; KL is to transformers' own logits in float32, of a prompt at once and of its last tokens one by one.
Checkpoints are exported and proven as by `edgelm export`. With `--provider` each bundle's logits and speed are also
compared between the CPU and that provider, which is what is to be run where there is a GPU. KL is no timing: a busy
machine changes nothing.

    python benchmarks/onnx_float16.py
    python benchmarks/onnx_float16.py --no-families CHECKPOINT demo:smollm2
    python benchmarks/onnx_float16.py --no-families --provider cuda CHECKPOINT
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measure import save

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from exporter.checkpoint import open_checkpoint, open_source
from exporter.options import ExportOptions
from exporter.pipeline import export
from runtime.engine import Chunk, EngineOptions
from runtime.engines.onnx import load_engine
from runtime.probe import kl_divergence
from tests.onnx_parity import CALM, DECODED, ONNX_ROWS, engine_logits, write_model
from tests.parity import VOCABULARY, Row, distance, known_to_transformers, make_checkpoint, transformers_logits

FAMILY_QUANTS = ("fp16", "int8-fp16")
QUANTS = ("fp16", "int8-fp16", "int4-fp16")
PROMPT, GENERATED = 512, 64


def family(row: Row, directory: Path) -> Iterator[dict[str, Any]]:
    """Rows of one family, over its longest prompt."""
    context, length = max(zip(row.contexts, row.lengths, strict=True))
    tokens = np.random.default_rng(1).integers(3, VOCABULARY, length).tolist()
    for name, gain in (("init", None), ("0.7", CALM)):
        model = make_checkpoint(row, directory / name, gain=gain)
        checkpoint = open_checkpoint(open_source(str(directory / name)))
        theirs = transformers_logits(model, tokens)
        for quant in FAMILY_QUANTS:
            path = write_model(checkpoint, directory / f"{name}-{quant}", quant, context)
            prompt, decoded = engine_logits(path, tokens, context)
            yield {
                "family": row.name,
                "model_type": row.model_type,
                "matrices": name,
                "quant": quant,
                "tokens": length,
                "kl_prompt": distance(prompt, theirs).kl_mean,
                "kl_one_by_one": distance(decoded, theirs[-DECODED:]).kl_mean,
            }


def proof(source: str, quant: str, directory: Path) -> dict[str, Any]:
    """What the proof of a whole export says."""
    bundle = export(ExportOptions(source, format="onnx", quant=quant), directory)
    found = bundle.manifest.quality
    assert found is not None
    return {
        "source": source.rstrip("/").rpartition("/")[2],
        "quant": quant,
        "artifact_bytes": bundle.manifest.artifact_bytes,
        **found.model_dump(
            include={"kl_mean", "kl_mean_interval", "kl_p99", "kl_max", "top1_agreement", "tokens", "reference"}
        ),
    }


def side(path: Path, providers: Sequence[str]) -> tuple[Any, float, float, str]:
    """Logits of a prompt and of tokens one by one, seconds of both, and what the engine says of itself."""
    options = EngineOptions(context=PROMPT + GENERATED, all_logits=True, providers=tuple(providers))
    engine = load_engine(path, options)
    tokens = np.random.default_rng(2).integers(3, engine.info.vocabulary, PROMPT + GENERATED).tolist()
    engine.forward([Chunk(0, tokens[:PROMPT])])  # kernels are chosen at their first use
    engine.forward([Chunk(0, tokens[PROMPT : PROMPT + 1])])
    engine.truncate(0)
    started = time.perf_counter()
    found = [engine.forward([Chunk(0, tokens[:PROMPT], "all")]).copy()]
    middle = time.perf_counter()
    found += [engine.forward([Chunk(0, [token])]).copy() for token in tokens[PROMPT:]]
    ended = time.perf_counter()
    engine.close()
    return np.concatenate(found), middle - started, ended - middle, engine.info.system


def compared(path: Path, providers: Sequence[str]) -> dict[str, Any]:
    """The CPU beside other providers, on the same bundle."""
    expected, *cpu = side(path, ("cpu",))
    logits, prompt_s, decode_s, told = side(path, providers)
    return {
        "providers": list(providers),
        "engine": told,
        "kl_mean": float(np.mean([kl_divergence(*pair) for pair in zip(expected, logits, strict=True)])),
        "prefill_tps": PROMPT / prompt_s,
        "decode_tps": GENERATED / decode_s,
        "cpu_prefill_tps": PROMPT / cpu[0],
        "cpu_decode_tps": GENERATED / cpu[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("sources", nargs="*", help="checkpoints to export and prove")
    parser.add_argument("--no-families", action="store_true", help="leave out the tiny models")
    parser.add_argument("--quant", action="append", default=[], help="only these of the sources")
    parser.add_argument("--provider", action="append", default=[], help="compare with this provider, best first")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any], name: str) -> None:
        rows.append(row)
        print(row, flush=True)
        save(name, rows)

    for item in () if arguments.no_families else filter(known_to_transformers, ONNX_ROWS):
        with tempfile.TemporaryDirectory(prefix="onnx-float16-") as directory:
            for row in family(item, Path(directory)):
                keep(row, "onnx_float16-families")
    rows.clear()
    for source in arguments.sources:
        for quant in arguments.quant or QUANTS:
            with tempfile.TemporaryDirectory(prefix="onnx-float16-") as directory:
                row = proof(source, quant, Path(directory) / "bundle")
                if arguments.provider:
                    row |= {"beside": compared(Path(directory) / "bundle" / "model.onnx", arguments.provider)}
                keep(row, "onnx_float16" + "".join(f"-{name}" for name in arguments.provider))


if __name__ == "__main__":
    main()
