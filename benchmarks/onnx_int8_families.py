"""Where the loss of `int8` comes from on tiny random models of every family: rounded activations, weights, blocks.

Models are those of docs/onnx-architectures.md, each with several seeds and with matrices as transformers initialises
them, of deviation 0.7 over the root of their width (near trained models), and of 1.3. Mean KL to transformers' own
logits in float32, over the longest prompt: as exported, the same file with exact activations, and both with blocks of
16. KL is no timing: a busy machine changes nothing. Families that only transformers 5 knows need its environment
(`make test-transformers5`).

    python benchmarks/onnx_int8_families.py --seeds 3
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from measure import save

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from exporter.checkpoint import open_checkpoint, open_source
from tests.onnx_parity import CALM, ONNX_ROWS, engine_logits, random_text, write_model
from tests.parity import VOCABULARY, Row, distance, known_to_transformers, make_checkpoint, transformers_logits

GAINS = {"init": None, "0.7": CALM, "1.3": 1.3}
QUANTS = {"int8": "int8", "blocks of 16": "int8-16"}
LIMIT = 2e-3
_EXACT = 1  # accuracy level: activations stay float32


def measured(row: Row, gain: str, seed: int, directory: Path) -> Iterator[dict[str, Any]]:
    """Rows of one model."""
    context, length = max(zip(row.contexts, row.lengths, strict=True))
    tokens = np.random.default_rng(1).integers(3, VOCABULARY, length).tolist()
    model = make_checkpoint(row, directory / "model", seed=seed, gain=GAINS[gain])
    checkpoint = open_checkpoint(open_source(str(directory / "model")))
    theirs = transformers_logits(model, tokens)
    for name, quant in QUANTS.items():
        path = write_model(checkpoint, directory / quant, quant, context, random_text())
        found = {"kl": distance(engine_logits(path, tokens, context)[0], theirs).kl_mean}
        exact(path)
        found["kl_exact"] = distance(engine_logits(path, tokens, context)[0], theirs).kl_mean
        case = {"family": row.name, "model_type": row.model_type, "matrices": gain, "seed": seed, "blocks": name}
        yield case | {"spread": float(theirs.std())} | found


def exact(path: Path) -> None:
    """Let a graph's matrices read activations as they are."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = _EXACT
    path.write_bytes(model.SerializeToString())


def summarise(rows: list[dict[str, Any]]) -> None:
    """The worst seed and the mean of seeds, by family; how many families are within the limit."""
    for gain in GAINS:
        here = [row for row in rows if row["matrices"] == gain and row["blocks"] == "int8"]
        families = list(dict.fromkeys(row["family"] for row in here))
        for field in ("kl", "kl_exact"):
            worst = {name: max(row[field] for row in here if row["family"] == name) for name in families}
            over = [f"{name} {worst[name]:.1e}" for name in families if worst[name] >= LIMIT]
            told = f"{gain}, {field}: worst {max(worst.values(), default=0):.1e}, {len(over)} of {len(families)}"
            print(f"{told} families have a seed at or above {LIMIT:g}: {', '.join(over)}")
        for name in families:
            cells = []
            for blocks in QUANTS:
                mine = [item for item in rows if (item["family"], item["matrices"]) == (name, gain)]
                mine = [item for item in mine if item["blocks"] == blocks]
                cells += [statistics.fmean(item[field] for item in mine) for field in ("kl", "kl_exact")]
            print(f"| {name} | {gain} | " + " | ".join(f"{cell:.1e}" for cell in cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--matrices", action="append", choices=list(GAINS), help="only these")
    parser.add_argument("--label", default="", help="in the name of the file of rows")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    for item in filter(known_to_transformers, ONNX_ROWS):
        for gain in arguments.matrices or GAINS:
            for seed in range(arguments.seeds):
                with tempfile.TemporaryDirectory(prefix="onnx-int8-") as directory:
                    rows += measured(item, gain, seed, Path(directory))
        save("-".join(filter(None, ("onnx_int8_families", arguments.label))), rows)
        print(item.name, flush=True)
    summarise(rows)


if __name__ == "__main__":
    main()
