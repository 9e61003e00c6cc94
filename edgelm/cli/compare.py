"""``edgelm compare``: bundles, reports and targets in one table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelm.cli.console import print_json, print_table

if TYPE_CHECKING:
    from targets.compare import Comparison, Line


@click.command(short_help="Put bundles, reports and targets side by side.")
@click.argument("sources", metavar="[REPORT|BUNDLE]...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--target", "targets", multiple=True, metavar="ID|FILE", help="Predict for this device; may be repeated.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write one HTML page with a picture.")
@click.option("--markdown", is_flag=True, help="A Markdown table on stdout.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(
    sources: tuple[Path, ...], targets: tuple[str, ...], html: Path | None, markdown: bool, as_json: bool
) -> None:
    """Put bundles and reports side by side, on the machines that measured them and on any target.

    Of exactly two reports the second is judged against the first, figure by figure: faster, slower or no difference
    (Mann-Whitney test and the interval of the change), and never from a run that a label calls spoilt.

    A figure reads "measured (predicted, error)" where a report measured it, "~predicted" elsewhere; * marks the best of
    a column. Reports come from 'edgelm bench -o' on any machine; nothing has to be installed where they are compared.
    The page of --html works offline and needs matplotlib: pip install 'edgelm[report]'.

    \b
    Example:
      edgelm compare bundle --target raspberry-pi-5 --target laptop --html page.html
      edgelm compare laptop.json pi.json --markdown
    """
    from edgelm.errors import UsageError
    from targets.compare import compare
    from targets.report.table import changes_lines, remarks
    from targets.report.table import markdown as as_markdown

    if markdown and as_json:
        raise UsageError("--markdown and --json exclude each other")
    comparison = compare(sources, targets)
    if html is not None:
        write_page(html, comparison)
    if as_json:
        print_json(_document(comparison))
        return
    if markdown:
        click.echo(as_markdown(comparison))
    else:
        _print(comparison)
    for line in changes_lines(comparison, as_markdown=markdown):
        click.echo(line)
    for note in remarks(comparison):
        click.echo(note, err=not markdown)


def write_page(path: Path, comparison: Comparison) -> None:
    """Write the HTML page of a comparison. Raises ``UsageError`` when it cannot be written."""
    from edgelm.errors import UsageError
    from targets.report.page import html_page

    page = html_page(comparison)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    click.echo(f"wrote {path}", err=True)


def _print(comparison: Comparison) -> None:
    from rich.table import Table
    from rich.text import Text

    from targets.report.table import cells, headings, title

    table = Table(title=title(comparison))
    for heading in headings(comparison):
        table.add_column(heading, overflow="fold")
    for index in range(len(comparison.lines)):
        row = cells(comparison, index)
        table.add_row(*(Text(cell.marked, style="bold" if cell.best else "") for cell in row))
    print_table(table)


def _document(comparison: Comparison) -> dict[str, Any]:
    document = comparison.model_dump(mode="json")
    document["lines"] = [_line_document(line) for line in comparison.lines]
    return document


def _line_document(line: Line) -> dict[str, Any]:
    document = line.model_dump(mode="json")
    for name in ("ram_bytes", "prefill_tps", "decode_tps", "ttft_s", "load_s"):
        document[name]["error_pct"] = getattr(line, name).error_pct
    return document
