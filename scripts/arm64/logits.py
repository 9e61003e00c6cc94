"""Compute one text's logits with the engine and store them: run on the reference machine and in the ARM image.

usage: logits.py TOKENS.json OUTPUT_DIRECTORY BUNDLE...     prints one JSON object per bundle
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from runtime.engine import Chunk, EngineOptions
from runtime.engines import load_engine
from runtime.model import artifact_of


def main() -> None:
    if os.getpid() == 1:  # qemu cannot end the first process of a container by a signal: a crash would hang
        sys.exit(subprocess.run([sys.executable, *sys.argv], check=False).returncode and 1)
    tokens_file, output, *bundles = (Path(argument) for argument in sys.argv[1:])
    by_family = json.loads(tokens_file.read_text(encoding="ascii"))
    for bundle in bundles:
        tokens = by_family[bundle.name.split("-")[0]]
        options = EngineOptions(context=256, threads_decode=2, threads_prefill=2, batch=64, all_logits=True)
        used_s = time.process_time()
        engine = load_engine(artifact_of(bundle, check_hashes=False)[0], options)
        started = time.perf_counter()
        logits = engine.forward([Chunk(0, tokens, "all")])
        seconds = time.perf_counter() - started
        np.save(output / f"{bundle.name}.npy", logits.astype(np.float32))
        info = engine.info
        facts = {"model": bundle.name, "seconds": round(seconds, 2), "versions": info.versions, "system": info.system}
        facts |= {"cpu_s": round(time.process_time() - used_s, 1), "page_bytes": os.sysconf("SC_PAGESIZE")}
        print(json.dumps(facts), flush=True)
        engine.close()


if __name__ == "__main__":
    main()
