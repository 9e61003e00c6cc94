"""Compute one text's logits with the engine and store them: run on the reference machine and in the ARM image.

usage: logits.py TOKENS.json OUTPUT_DIRECTORY MODEL.gguf...     prints one JSON object per model
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from runtime.engine import Chunk, EngineOptions
from runtime.engines.llamacpp import load_engine


def main() -> None:
    tokens_file, output, *models = (Path(argument) for argument in sys.argv[1:])
    by_family = json.loads(tokens_file.read_text(encoding="ascii"))
    for model in models:
        tokens = by_family[model.stem.split("-")[0]]
        options = EngineOptions(context=256, threads_decode=2, threads_prefill=2, batch=64, all_logits=True)
        engine = load_engine(model, options)
        started = time.perf_counter()
        logits = engine.forward([Chunk(0, tokens, "all")])
        seconds = time.perf_counter() - started
        np.save(output / f"{model.stem}.npy", logits.astype(np.float32))
        info = engine.info
        facts = {"model": model.stem, "seconds": round(seconds, 2), "versions": info.versions, "system": info.system}
        print(json.dumps(facts), flush=True)
        engine.close()


if __name__ == "__main__":
    main()
