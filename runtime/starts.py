"""How long a model takes from nothing to its first token, with its files in the page cache and without.

A cold start is measured in a process of its own, as a user's would be, after the files were dropped from the cache;
what could not be dropped is said. Knows nothing of reports beyond its own record.
``answer_of_child`` runs any module of ours so.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgelm.errors import EdgelmError, EngineError
from edgelm.report import StartRecord
from runtime.engine import EngineOptions
from runtime.page_cache import cached_share, drop_cached
from runtime.waiting import users_environment

TIMEOUT_S = 1800.0
COLD_SHARE = 0.05  # with more than this left in the cache a start is called warm


def model_files(artifact: Path) -> tuple[Path, ...]:
    """The artefact and the data files that belong to it (``model.onnx.data``)."""
    return (artifact, *sorted(artifact.parent.glob(f"{artifact.name}.*")))


def cold_start(path: Path, artifact: Path, options: EngineOptions, prompt_tokens: int) -> StartRecord:
    """Drop the model's files from the page cache, then open it in a child process.

    Raises ``EngineError`` when the child fails.
    """
    files = model_files(artifact)
    try:
        share = drop_cached(files)
    except OSError as error:
        share, note = cached_share(files), f"the page cache could not be dropped: {error.strerror}"
    else:
        note = ""
    if share is None:
        note = note or "this system does not let the page cache be dropped"
    elif share > COLD_SHARE:
        note = (
            note or f"{share:.0%} of the files stayed in the page cache: another process maps them, or they lie in RAM"
        )
    arguments = (str(path), json.dumps(asdict(options)), str(prompt_tokens))
    document = answer_of_child("runtime.starts", arguments, f"a cold start of {path}")
    cold = share is not None and share <= COLD_SHARE
    return StartRecord(kind="cold" if cold else "warm", cached_share=share, note=note, **document)


def answer_of_child(module: str, arguments: Sequence[str], what: str, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """The JSON object that a module of ours prints when it is run in a process of its own.

    ``what`` is what errors call it. Ctrl-C ends the child. Raises ``EngineError`` when it fails, with the ``error`` and
    ``hint`` that it printed if it did, or takes longer than ``timeout_s``.
    """
    command = [sys.executable, "-m", module, *arguments]
    try:
        child = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False, env=users_environment()
        )
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"{what} did not end in {timeout_s:g} s", hint="is the machine busy?") from error
    try:
        document: dict[str, Any] = json.loads(child.stdout)
    except ValueError as error:
        tail = child.stderr.strip().splitlines()[-1:]
        raise EngineError(f"{what} failed: {' '.join(tail)}", hint="see: edgelm doctor") from error
    if "error" in document:
        raise EngineError(document["error"], hint=document["hint"])
    return document


def start(path: Path, options: EngineOptions, prompt_tokens: int) -> dict[str, float | None]:
    """What the child does: open the model and compute a prompt, in seconds."""
    from runtime.model import open_model
    from runtime.points import Runner
    from runtime.sensors import Sampler, Sensors

    began = time.perf_counter()
    model = open_model(path, options)
    open_s = time.perf_counter() - began
    try:
        runner = Runner(model.engine, model.tokenizer, Sampler(Sensors(), 0))
        first_token_s = runner.first_token_s(prompt_tokens) if prompt_tokens else None
        return {"open_s": open_s, "load_s": model.engine.info.load_s, "first_token_s": first_token_s}
    finally:
        model.close()


if __name__ == "__main__":
    try:
        print(json.dumps(start(Path(sys.argv[1]), EngineOptions(**json.loads(sys.argv[2])), int(sys.argv[3]))))
    except EdgelmError as error:
        print(json.dumps({"error": error.message, "hint": error.hint}))
