"""Asks llama.cpp itself how the vocabulary inside a GGUF file tokenizes, in a child process.

libllama aborts the process on some malformed vocabularies, so it never loads an unproven one in ours. The child is
``exporter.vocabulary_child``. Does not know what the ids should be.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
            [sys.executable, "-m", "exporter.vocabulary_child"],
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
