"""A short measurement of a model in a process of its own, where nothing that the caller has loaded takes part.

python -m runtime.trial MODEL PROMPT_TOKENS GENERATED_TOKENS REPETITIONS
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from edgelm.errors import EdgelmError, EngineError
from edgelm.report import parse_report
from runtime.starts import answer_of_child

_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class TrialSize:
    """What one process measures: tokens of the prompt and behind it, and how often."""

    prompt_tokens: int
    generated_tokens: int
    repetitions: int = 2


@dataclass(frozen=True, slots=True)
class Trial:
    """Medians of one process in tokens per second, and what spoilt them."""

    prefill_tps: float
    decode_tps: float
    spoilt: tuple[str, ...] = ()


def trial(path: Path, size: TrialSize) -> Trial:
    """Measure a bundle as ``edgelm bench`` does. Raises ``EngineError`` when the process fails or takes minutes."""
    arguments = (str(path), str(size.prompt_tokens), str(size.generated_tokens), str(size.repetitions))
    what = f"measuring {path.name}"
    report = parse_report(json.dumps(answer_of_child("runtime.trial", arguments, what, _TIMEOUT_S)), what)
    if report.prefill_tps is None or report.decode_tps is None:
        raise EngineError(f"{what} was ended before there was a figure")
    return Trial(report.prefill_tps.median, report.decode_tps.median, report.warnings)


def _measure(path: Path, size: TrialSize) -> str:
    """What the child does; the report as JSON."""
    from runtime.bench import BenchOptions, bench

    options = BenchOptions(
        prompts=(size.prompt_tokens,), generated_tokens=size.generated_tokens, repetitions=size.repetitions
    )
    return bench(path, options).model_dump_json()


if __name__ == "__main__":
    try:
        print(_measure(Path(sys.argv[1]), TrialSize(*map(int, sys.argv[2:5]))))
    except EdgelmError as error:
        print(json.dumps({"error": error.message, "hint": error.hint}))
