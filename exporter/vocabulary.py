"""Asks llama.cpp itself how the vocabulary inside a GGUF file tokenizes, in a child process.

libllama aborts the process on some malformed vocabularies, so it never loads an unproven one in ours. The child is this
module run as a script: a JSON request on stdin, a JSON answer on stdout. Does not know what the ids should be.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelm.errors import EngineError
from runtime.gguf_header import read_gguf_header

CHILD_TIMEOUT_S = 300
_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class VocabularyAnswer:
    """What the library said: number of tokens in the vocabulary, and the ids of every text that was asked."""

    vocabulary: int
    ids: tuple[tuple[int, ...], ...]


def tokenize_with_llama(path: Path, texts: Sequence[str]) -> VocabularyAnswer:
    """Ids of ``texts`` by the vocabulary in a GGUF file: special tokens in text recognised, none added.

    Raises ``BundleError`` when the header is invalid, ``EngineError`` when llama.cpp refuses the vocabulary or dies.
    """
    read_gguf_header(path)
    request = json.dumps({"path": str(path.resolve()), "texts": list(texts)})
    try:
        done = subprocess.run(
            [sys.executable, "-m", "exporter.vocabulary"],
            input=request.encode("utf-8"),
            capture_output=True,
            timeout=CHILD_TIMEOUT_S,
            cwd=_ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"llama.cpp did not tokenize with {path} within {CHILD_TIMEOUT_S} s") from error
    if done.returncode != 0:
        raise EngineError(f"llama.cpp cannot use the vocabulary of {path}: {_reason(done)}")
    answer = json.loads(done.stdout)
    return VocabularyAnswer(answer["vocabulary"], tuple(tuple(ids) for ids in answer["ids"]))


def _reason(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = [line.strip() for line in done.stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower() or "what()" in line or "GGML_ASSERT" in line]
    words = (telling or lines or ["it gave no reason"])[-1]
    if done.returncode < 0:
        return f"it died of {signal.Signals(-done.returncode).name} ({words})"
    return words


def _serve(request: dict[str, Any]) -> dict[str, Any]:
    import llama_cpp.llama_cpp as library

    library.llama_backend_init()
    parameters = library.llama_model_default_params()
    parameters.vocab_only = True
    model = library.llama_model_load_from_file(request["path"].encode(), parameters)
    if not model:
        sys.exit("error: llama.cpp refused to load it")
    vocabulary = library.llama_model_get_vocab(model)
    ids = [_tokenize(library, vocabulary, text.encode("utf-8")) for text in request["texts"]]
    return {"vocabulary": library.llama_vocab_n_tokens(vocabulary), "ids": ids}


def _tokenize(library: Any, vocabulary: Any, text: bytes) -> list[int]:
    room = len(text) + 8  # a token stands for one byte or more
    buffer = (ctypes.c_int32 * room)()
    count = library.llama_tokenize(vocabulary, text, len(text), buffer, room, False, True)
    if count < 0:
        sys.exit(f"error: a text of {len(text)} bytes became {-count} tokens")
    return list(buffer[:count])


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_serve(json.load(sys.stdin))))
