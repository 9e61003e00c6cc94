"""``edgelm score``: how many questions of a task a bundle answers rightly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgelm.cli.console import print_json, print_table, stderr_progress

if TYPE_CHECKING:
    from exporter.scores.score import ScoreReport


@click.command(short_help="Let a bundle do tasks, and count what it gets right.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="NAME",
    help="A task of lm-eval, or doc-ending or doc-word, which need no network; again for more [default: these two].",
)
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many questions of each task.")
@click.option(
    "--shots", type=click.IntRange(min=0), help="Answered examples before each question [default: the task's]."
)
@click.option("--chat", is_flag=True, help="Write questions in the bundle's chat template.")
@click.option("--context", type=click.IntRange(min=16), help="Tokens [default: the bundle's own].")
@click.option("--threads", type=click.IntRange(1, 512), help="[default: asks the machine].")
@click.option("--json", "as_json", is_flag=True, help="The scores as one JSON object on stdout.")
def command(
    bundle: Path,
    tasks: tuple[str, ...],
    limit: int | None,
    shots: int | None,
    chat: bool,
    context: int | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Ask BUNDLE (a bundle or a .gguf file) the questions of lm-eval's tasks, through the engine that serves it.

    doc-ending (which of four sentences ends this paragraph?) and doc-word (its last word) are made from Python's own
    documentation. Needs lm-eval: pip install 'edgelm[scores]'.

    \b
    Example:
      edgelm score bundle
      edgelm score bundle --task doc-ending --limit 100 --json
      edgelm score bundle --task arc_easy --task hellaswag --limit 200
    """
    from exporter.scores.score import OFFLINE_NAMES, ScoreOptions, score

    options = ScoreOptions(tasks or OFFLINE_NAMES, limit, shots, chat, context or 0, threads or 0)
    report = score(bundle, options, stderr_progress())
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        _print(report)


def _print(report: ScoreReport) -> None:
    from rich.table import Table

    table = Table(title=f"{report.model}, {report.engine}, lm-eval {report.lm_eval}")
    for heading in ("task", "metric", "value", "standard error", "questions"):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    for item in report.scores:
        better = {True: " (higher is better)", False: " (lower is better)", None: ""}[item.higher_is_better]
        error = "" if item.stderr is None else f"{item.stderr:.4f}"
        table.add_row(item.task, f"{item.metric}{better}", f"{item.value:.4f}", error, str(item.questions))
    print_table(table)
