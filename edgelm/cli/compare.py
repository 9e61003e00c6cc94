"""``edgelm compare``: bundles, reports and targets in one table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelm.cli.console import print_json, print_table

if TYPE_CHECKING:
    from targets.compare import Comparison, Line, Pair

HEADINGS = (
    "model",
    "target",
    "format",
    "quant",
    "size",
    "KL",
    "RAM",
    "prefill t/s",
    "decode t/s",
    "TTFT",
    "J/token",
    "fits",
)
_BEST_OF = {
    "size": "artifact_bytes",
    "KL": "kl_mean",
    "RAM": "ram_bytes",
    "prefill t/s": "prefill_tps",
    "decode t/s": "decode_tps",
    "TTFT": "ttft_s",
    "J/token": "joule_per_token",
}


@click.command(short_help="Put bundles, reports and targets side by side.")
@click.argument("sources", metavar="[REPORT|BUNDLE]...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--target", "targets", multiple=True, metavar="ID|FILE", help="Predict for this device; may be repeated.")
@click.option("--markdown", is_flag=True, help="A Markdown table on stdout.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(sources: tuple[Path, ...], targets: tuple[str, ...], markdown: bool, as_json: bool) -> None:
    """Put bundles and reports side by side, on the machines that measured them and on any target.

    A figure reads "measured (predicted, error)" where a report measured it, "~predicted" elsewhere; * marks the best of
    a column. Reports come from 'edgelm bench -o' on any machine; nothing has to be installed where they are compared.

    \b
    Example:
      edgelm compare bundle --target raspberry-pi-5 --target laptop
      edgelm compare laptop.json pi.json --markdown
    """
    from edgelm.errors import UsageError
    from targets.compare import compare

    if markdown and as_json:
        raise UsageError("--markdown and --json exclude each other")
    comparison = compare(sources, targets)
    if as_json:
        print_json(_document(comparison))
        return
    rows = [_cells(comparison, index) for index in range(len(comparison.lines))]
    if markdown:
        click.echo(_markdown(rows))
    else:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=_title(comparison))
        for heading in HEADINGS:
            table.add_column(heading, overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell, style="bold" if cell.endswith("*") else "") for cell in row))
        print_table(table)
    for note in _remarks(comparison):
        click.echo(note, err=not markdown)


def _title(comparison: Comparison) -> str:
    depth = f", depth {comparison.depth}" if comparison.depth else ""
    return f"prompt of {comparison.prompt_tokens} tokens{depth}; ~ predicted, * best of the column"


def _remarks(comparison: Comparison) -> list[str]:
    remarks = [
        f"{line.model} on {line.target}: {line.fit_reason}" for line in comparison.lines if line.fits in ("no", "pages")
    ]
    remarks += [f"spoilt: {line.model} on {line.target}: {line.spoilt}" for line in comparison.lines if line.spoilt]
    return [*remarks, *comparison.notes]


def _cells(comparison: Comparison, index: int) -> list[str]:
    line = comparison.lines[index]
    cells = {
        "model": line.model,
        "target": line.target + (" (spoilt)" if line.spoilt else ""),
        "format": line.format,
        "quant": line.quant,
        "size": _bytes(line.artifact_bytes),
        "KL": "-" if line.kl_mean is None else f"{line.kl_mean:.4f}",
        "RAM": _pair(line.ram_bytes, _bytes),
        "prefill t/s": _pair(line.prefill_tps, _three),
        "decode t/s": _pair(line.decode_tps, _three),
        "TTFT": _pair(line.ttft_s, lambda value: f"{_three(value)} s"),
        "J/token": "-" if line.joule_per_token is None else f"~{_three(line.joule_per_token)}",
        "fits": line.fits or "-",
    }
    best = {heading for heading, column in _BEST_OF.items() if comparison.best.get(column) == index}
    return [cells[heading] + (" *" if heading in best else "") for heading in HEADINGS]


def _pair(pair: Pair, shown: Any) -> str:
    if pair.measured is None:
        return "-" if pair.predicted is None else f"~{shown(pair.predicted)}"
    if pair.predicted is None or pair.error_pct is None:
        return str(shown(pair.measured))
    return f"{shown(pair.measured)} (~{shown(pair.predicted)}, {pair.error_pct:+.0f} %)"


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _bytes(value: float) -> str:
    from edgelm.units import format_bytes

    return format_bytes(value)


def _markdown(rows: list[list[str]]) -> str:
    def line(cells: Any) -> str:
        return "| " + " | ".join(str(cell).replace("\\", "\\\\").replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(HEADINGS), line("---" for _ in HEADINGS), *(line(row) for row in rows)]) + "\n"


def _document(comparison: Comparison) -> dict[str, Any]:
    document = comparison.model_dump(mode="json")
    document["lines"] = [_line_document(line) for line in comparison.lines]
    return document


def _line_document(line: Line) -> dict[str, Any]:
    document = line.model_dump(mode="json")
    for name in ("ram_bytes", "prefill_tps", "decode_tps", "ttft_s"):
        document[name]["error_pct"] = getattr(line, name).error_pct
    return document
