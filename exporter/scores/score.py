"""Scores of a bundle in tasks of lm-eval: which tasks, how many questions, what came out.

Tasks that need no network come from ``offline_tasks``, all others from lm-eval by name, with data from the hub. Knows
how a model is opened and lm-eval's evaluator; not how scores are shown.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelm.bundle import Record
from edgelm.errors import MissingDependencyError, UsageError
from edgelm.progress import SILENT, Progress
from runtime.engine import EngineOptions
from runtime.model import open_model

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task

OFFLINE_NAMES = ("doc-ending", "doc-word")


@dataclass(frozen=True, slots=True)
class ScoreOptions:
    """``tasks`` by name. ``limit`` takes the first so many questions of each, None all. ``shots`` None is what the
    task says; ``chat`` writes questions in the bundle's chat template. ``context`` 0 is the bundle's own."""

    tasks: tuple[str, ...] = OFFLINE_NAMES
    limit: int | None = None
    shots: int | None = None
    chat: bool = False
    context: int = 0
    threads: int = 0


class Score(Record):
    """One figure of one task; ``stderr`` is lm-eval's, None where it gives none. ``questions`` were asked."""

    task: str
    metric: str
    value: float
    stderr: float | None
    questions: int
    higher_is_better: bool | None


class ScoreReport(Record):
    """All figures of a run, with what made them."""

    model: str
    engine: str
    lm_eval: str
    shots: int | None
    limit: int | None
    chat: bool
    scores: tuple[Score, ...]


def score(bundle: Path, options: ScoreOptions, progress: Progress = SILENT) -> ScoreReport:
    """Ask ``bundle`` the questions of all tasks.

    Raises ``MissingDependencyError`` without lm-eval, ``UsageError`` for tasks that are unknown or out of reach, and
    what ``open_model`` raises.
    """
    if find_spec("lm_eval") is None:
        raise MissingDependencyError(
            "task scores need lm-eval, which is not installed", hint="pip install 'edgelm[scores]'"
        )
    with _silent_library():
        return _score(bundle, options, progress)


@contextmanager
def _silent_library() -> Iterator[None]:
    """lm-eval prints to stdout, draws bars on pipes, warns of every default that it takes, and estimates standard
    errors in a pool of processes, which are copies of this one with a model in it."""
    settings = {"TQDM_DISABLE": "1", "DISABLE_MULTIPROC": "1"}
    before = {name: os.environ.get(name) for name in settings}
    logger = logging.getLogger("lm_eval")
    level = logger.level
    os.environ.update(settings)
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _score(bundle: Path, options: ScoreOptions, progress: Progress) -> ScoreReport:
    from exporter.scores.engine_lm import ROWS, EngineLM

    with progress.stage("reading tasks", len(options.tasks)) as stage:
        tasks = []
        for name in options.tasks:
            tasks += _task(name)
            stage.advance()
    threads = options.threads
    wanted = EngineOptions(context=options.context, threads_decode=threads, threads_prefill=threads, logits_rows=ROWS)
    model = open_model(bundle, wanted)
    try:
        results = _evaluate(EngineLM(model, progress), tasks, options)
        engine = f"{model.info.engine} {' '.join(model.info.versions.values())}".strip()
        name = model.name
    finally:
        model.close()
    return ScoreReport(
        model=name,
        engine=engine,
        lm_eval=version("lm_eval"),
        shots=options.shots,
        limit=options.limit,
        chat=options.chat,
        scores=tuple(_scores(results)),
    )


def _evaluate(model: Any, tasks: Sequence[Any], options: ScoreOptions) -> Mapping[str, Any]:
    from lm_eval.evaluator import simple_evaluate

    results: Mapping[str, Any] | None = simple_evaluate(
        model,
        tasks=list(tasks),
        num_fewshot=options.shots,
        limit=options.limit,
        bootstrap_iters=1000,
        log_samples=False,
        apply_chat_template=options.chat,
    )
    assert results is not None  # None is what other ranks of a distributed run get
    return results


def _task(name: str) -> list[Task | Group]:
    """What stands behind a name: a task, a group of them, or all that carry it as a tag."""
    from exporter.scores.offline_tasks import offline_task

    if name in OFFLINE_NAMES:
        return [offline_task(name)]
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    if name not in manager.all_tasks:
        offline = ", ".join(OFFLINE_NAMES)
        raise UsageError(
            f"there is no task '{name}'", hint=f"without a network: {offline}; all others: lm_eval ls tasks"
        )
    try:
        loaded = manager.load([name])
    except (OSError, ValueError, ConnectionError) as error:
        # The hub's client raises one of these for data that it can neither fetch nor find in its cache.
        where = "the hub is switched off" if os.environ.get("HF_HUB_OFFLINE") else "the hub cannot be reached"
        raise UsageError(
            f"the data of task '{name}' are not here and {where}: {str(error).splitlines()[0]}",
            hint=f"tasks that need no network: {', '.join(OFFLINE_NAMES)}",
        ) from error
    groups = loaded.get("groups", {})
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def _scores(results: Mapping[str, Any]) -> list[Score]:
    found = []
    for task, figures in results["results"].items():
        counted = results["n-samples"].get(task, {}).get("effective", 0)
        better = results["higher_is_better"].get(task, {})
        for key, value in figures.items():
            metric, _, which = key.partition(",")
            if not which or metric.endswith("_stderr") or isinstance(value, str):
                continue
            error = figures.get(f"{metric}_stderr,{which}")
            found.append(
                Score(
                    task=task,
                    metric=metric if which == "none" else f"{metric} ({which})",
                    value=float(value),
                    stderr=float(error) if isinstance(error, int | float) else None,
                    questions=counted,
                    higher_is_better=better.get(metric),
                )
            )
    return found
