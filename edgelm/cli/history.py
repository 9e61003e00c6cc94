"""``edgelm history``: earlier runs of ``edgelm bench`` on this machine, and what became slower."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgelm.cli.console import print_json, print_table
from edgelm.errors import UsageError
from edgelm.units import format_bytes

if TYPE_CHECKING:
    from targets.history import Entry


@click.command(short_help="List earlier measurements and regressions.")
@click.argument("model", required=False)
@click.option("--last", type=click.IntRange(min=1), default=20, show_default=True, help="At most this many runs.")
@click.option("--run", "identity", metavar="ID", help="Take this run alone.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the report of --run here.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(model: str | None, last: int, identity: str | None, output: Path | None, as_json: bool) -> None:
    """List the runs of 'edgelm bench' that this machine remembers, of MODEL (a name, bundle or file) or of all.

    The change compares a run's decode speed with the earlier valid runs of the same model, settings and machine; a
    regression is slower by 5 % and by more than those differ. Runs are kept in
    $XDG_DATA_HOME/edgelm/history.jsonl and nowhere else; EDGELM_NO_HISTORY=1 or bench --no-history keeps none.

    \b
    Example:
      edgelm history bundle
      edgelm history --run 1a2b3c4d -o before.json
    """
    from targets.history import document, entries, history_path, one, select

    if output is not None and identity is None:
        raise UsageError("-o needs --run ID", hint="list the ids with: edgelm history")
    found = select(entries(), model)
    found = [one(found, identity)] if identity else found[-last:]
    if output is not None:
        output.write_text(found[0].report.model_dump_json(indent=2) + "\n", encoding="utf-8")
        click.echo(f"wrote {output}", err=True)
    if as_json:
        print_json({"path": str(history_path()), "runs": [document(entry) for entry in found]})
        return
    if not found:
        click.echo(f"no runs in {history_path()}; 'edgelm bench' adds them", err=True)
        return
    _print(found)


def _print(found: list[Entry]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for heading in ("id", "when", "model", "threads"):
        table.add_column(heading)
    for heading in ("prefill", "decode", "change", "peak RSS"):
        table.add_column(heading, justify="right")
    table.add_column("labels")
    for entry in found:
        report = entry.report
        change = "-" if entry.change is None else f"{entry.change:+.1%} of {entry.earlier}"
        table.add_row(
            entry.id,
            report.created[:16],
            f"{report.model.name} {report.model.quant}",
            str(report.settings.threads_decode),
            f"{report.prefill_tps.median:.1f}" if report.prefill_tps else "-",
            f"{report.decode_tps.median:.1f}" if report.decode_tps else "-",
            Text(f"{change} REGRESSION", style="bold red") if entry.regression else Text(change),
            format_bytes(report.memory.rss_peak_bytes),
            ", ".join(dict.fromkeys(label.kind for label in report.labels)) or "-",
        )
    print_table(table)
