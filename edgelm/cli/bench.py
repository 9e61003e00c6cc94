"""``edgelm bench``: a measured report of a bundle on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgelm.cli.console import print_json, print_table, stderr_progress
from edgelm.errors import UsageError
from edgelm.units import format_bytes

if TYPE_CHECKING:
    from edgelm.report import Report, Samples
    from runtime.engine import KvType


@click.command(short_help="Measure speed and memory of a bundle on this machine.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-p", "--prompt-tokens", type=click.IntRange(min=0), default=512, show_default=True)
@click.option("-n", "--generated-tokens", type=click.IntRange(min=0), default=128, show_default=True)
@click.option("-r", "--repetitions", type=click.IntRange(1, 1000), default=5, show_default=True)
@click.option("--threads", type=click.IntRange(1, 512), help="Threads for decode [default: asks the machine].")
@click.option("--threads-prefill", type=click.IntRange(1, 512), help="Threads for prefill [default: as --threads].")
@click.option("--depth", type=click.IntRange(min=0), default=0, show_default=True, help="Tokens already in the cache.")
@click.option(
    "--kv-type",
    type=click.Choice(["f16", "q8_0"]),
    default="f16",
    show_default=True,
    help="Type of the KV cache; q8_0 takes half the memory (llama.cpp only).",
)
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the report (JSON) here.")
@click.option("--json", "as_json", is_flag=True, help="The report on stdout.")
@click.option("--markdown", is_flag=True, help="A Markdown table on stdout.")
def command(
    bundle: Path,
    prompt_tokens: int,
    generated_tokens: int,
    repetitions: int,
    threads: int | None,
    threads_prefill: int | None,
    depth: int,
    kv_type: KvType,
    output: Path | None,
    as_json: bool,
    markdown: bool,
) -> None:
    """Measure prefill, decode, time to first token, load time and memory of BUNDLE (a bundle or a .gguf file).

    A run that something disturbed is reported with a warning and marked as not valid.

    \b
    Example:
      edgelm bench bundle -o report.json
      edgelm bench bundle -p 128 -n 64 --depth 1024 --markdown
    """
    from runtime.bench import BenchOptions, bench

    if as_json and markdown:
        raise UsageError("--json and --markdown exclude each other")
    if output is not None and not output.parent.is_dir():
        raise UsageError(f"the directory of {output} does not exist")
    options = BenchOptions(
        prompt_tokens=prompt_tokens,
        generated_tokens=generated_tokens,
        repetitions=repetitions,
        depth=depth,
        threads_decode=threads or 0,
        threads_prefill=threads_prefill or threads or 0,
        kv_type=kv_type,
    )
    report = bench(bundle, options, stderr_progress())
    if output is not None:
        output.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if as_json:
        print_json(report.model_dump(mode="json"))
    elif markdown:
        click.echo(_markdown(_rows(report)))
    else:
        _print(report)
    for warning in report.warnings:
        click.echo(f"warning: {warning}", err=True)


def _rows(report: Report) -> list[tuple[str, str, str]]:
    """Figure, measured, predicted."""
    from targets.predict import load_text

    settings, memory, predicted = report.settings, report.memory, report.predicted
    depth = f" at depth {settings.depth}" if settings.depth else ""
    rows = [
        (
            f"prefill {settings.prompt_tokens}{depth} (tok/s)",
            _samples(report.prefill_tps),
            _rate(predicted.prefill_tps if predicted else None),
        ),
        (
            f"decode {settings.generated_tokens}{depth} (tok/s)",
            _samples(report.decode_tps),
            _rate(predicted.decode_tps if predicted else None),
        ),
        ("time to first token (s)", _samples(report.ttft_s, digits=3), "-"),
        ("load (s)", f"{report.load_s:.2f}", load_text(predicted) if predicted else "-"),
        (
            "memory, peak resident",
            format_bytes(memory.rss_peak_bytes),
            format_bytes(predicted.ram_bytes) if predicted else "-",
        ),
        ("  anonymous / file", f"{format_bytes(memory.anonymous_bytes)} / {format_bytes(memory.file_bytes)}", "-"),
        ("  weights / KV cache", f"{format_bytes(memory.weights_bytes)} / {format_bytes(memory.kv_bytes)}", "-"),
    ]
    return [(figure, measured, said) for figure, measured, said in rows if measured != "-"]


def _samples(samples: Samples | None, digits: int = 1) -> str:
    if samples is None:
        return "-"
    return f"{samples.median:.{digits}f} ({samples.p5:.{digits}f} to {samples.p95:.{digits}f})"


def _rate(tps: float | None) -> str:
    return "-" if tps is None else f"{tps:.1f}"


def _markdown(rows: list[tuple[str, str, str]]) -> str:
    lines = ["| figure | measured | predicted |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {figure.strip()} | {measured} | {said} |" for figure, measured, said in rows)])


def _print(report: Report) -> None:
    from rich.table import Table

    settings = report.settings
    threads = f"{settings.threads_decode} threads"
    if settings.threads_prefill != settings.threads_decode:
        threads = f"{settings.threads_decode} threads for decode, {settings.threads_prefill} for prefill"
    valid = "" if report.valid else ", NOT VALID"
    table = Table(title=f"{report.model.name} {report.model.quant} on {report.host.cpu}, {threads}{valid}")
    table.add_column("figure")
    table.add_column("measured: median (5 % to 95 %)", justify="right")
    table.add_column("predicted", justify="right")
    for row in _rows(report):
        table.add_row(*row)
    print_table(table)
