"""Runs llama.cpp's convert_hf_to_gguf.py over several checkpoints in one process: loading torch takes longest.

    python tests/converter_child.py LLAMA_CPP [CHECKPOINT RESULT]...

Prints one JSON line for each: null, or the error. The script knows tokenizers by a table of hashes, in which those
trained on the spot are not: they are written as byte-level BPE under a name that fits them. Imports nothing of ours.
"""

from __future__ import annotations

import importlib
import json
import logging
import pkgutil
import sys
import warnings
from pathlib import Path
from typing import Any


def main() -> None:
    sources, jobs = Path(sys.argv[1]), sys.argv[2:]
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    sys.path[:0] = [str(sources / "gguf-py"), str(sources)]
    import gguf
    from conversion import base

    package = importlib.import_module("conversion")
    for item in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"conversion.{item.name}")

    def set_vocab(self: Any) -> None:
        self._set_vocab_gpt2()

    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "smollm"
    for checkpoint, result in zip(jobs[::2], jobs[1::2], strict=True):
        hparams = base.ModelBase.load_hparams(Path(checkpoint), False)
        try:
            known = base.ModelBase.from_model_architecture(hparams["architectures"][0])
            model = type(known.__name__, (known,), {"set_vocab": set_vocab, "model_arch": known.model_arch})
            model(Path(checkpoint), gguf.LlamaFileType.ALL_F32, Path(result)).write()
            told = None
        except (AssertionError, KeyError, ValueError, NotImplementedError) as error:
            told = f"{type(error).__name__}: {error}"
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
