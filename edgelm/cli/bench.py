"""``edgelm bench``: a measured report of a bundle on this machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelm.cli.bench_page import print_report
from edgelm.cli.console import (
    flash_attention_option,
    gpu_layers_option,
    gpu_option,
    host_repack_option,
    print_json,
    provider_option,
    stderr_progress,
)
from edgelm.errors import UsageError

if TYPE_CHECKING:
    from edgelm.progress import Progress
    from edgelm.report import Report
    from runtime.bench import BenchOptions
    from runtime.engine import FlashAttention, KvType

INTERRUPTED = 130


class Counts(click.ParamType[tuple[int, ...]]):
    """``512`` or ``128,512,2048``; ``auto`` where it is allowed, as an empty tuple."""

    name = "N[,N...]"

    def __init__(self, least: int, *, auto: bool = False) -> None:
        self._least, self._auto = least, auto

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        if self._auto and value == "auto":
            return ()
        if not re.fullmatch(r"\d{1,7}(,\d{1,7})*", str(value)):
            self.fail(f"'{value}' is no number and no list such as 128,512", param, ctx)
        counts = tuple(int(part) for part in str(value).split(","))
        if min(counts) < self._least:
            self.fail(f"{min(counts)} is less than {self._least}", param, ctx)
        return counts


class Seconds(click.ParamType[float]):
    """``90``, ``30s``, ``5m`` or ``1h`` as seconds."""

    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d{1,6}(?:\.\d+)?)([smh]?)", str(value))
        if match is None or float(match[1]) == 0:
            self.fail(f"'{value}' is no time; write for example 30s or 5m", param, ctx)
        return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


class Repetitions(click.ParamType[int]):
    """A number, or ``auto`` as 0."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if value == "auto":
            return 0
        if not re.fullmatch(r"\d{1,4}", str(value)) or not 1 <= int(value) <= 1000:
            self.fail(f"'{value}' is neither 'auto' nor between 1 and 1000", param, ctx)
        return int(value)


@click.command(short_help="Measure speed and memory of a bundle on this machine.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-p", "--prompt-tokens", type=Counts(0), default="512", show_default=True)
@click.option("-n", "--generated-tokens", type=click.IntRange(min=0), default=128, show_default=True)
@click.option(
    "-r",
    "--repetitions",
    type=Repetitions(),
    default=5,
    show_default=True,
    help="auto: until medians are known to 2 %.",
)
@click.option("--max-time", type=Seconds(), help="Start no round of repetitions after this [default for auto: 60s].")
@click.option(
    "--threads",
    type=Counts(1, auto=True),
    help="For decode; a list sweeps, auto tries and takes the fastest [default: asks the machine].",
)
@click.option("--threads-prefill", type=click.IntRange(1, 512), help="Threads for prefill [default: as --threads].")
@click.option(
    "--kv-type",
    type=click.Choice(["f16", "q8_0"]),
    default="f16",
    show_default=True,
    help="Type of the KV cache; q8_0 takes half the memory (llama.cpp only).",
)
@provider_option
@click.option("--lookup", is_flag=True, help="Guess tokens by what followed the same ones earlier.")
@click.option(
    "--draft",
    type=click.Path(path_type=Path),
    metavar="BUNDLE",
    help="Let a smaller model of the same vocabulary guess tokens.",
)
@gpu_layers_option
@gpu_option
@host_repack_option
@flash_attention_option
@click.option(
    "--write-profile", type=click.Path(path_type=Path, dir_okay=False), help="Keep what auto found in this profile."
)
@click.option("--depth", type=Counts(0), default="0", show_default=True, help="Tokens already in the cache.")
@click.option("--sequences", type=Counts(1), default="1", show_default=True, help="Sequences decoded together.")
@click.option("--sustained", type=Seconds(), help="Decode this long besides, and show the speed over time.")
@click.option("--cold", is_flag=True, help="Also start without the page cache.")
@click.option("--wait", type=click.Choice(["auto", "spin", "passive"]), default="auto", help="How threads wait.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the report (JSON) here.")
@click.option("--json", "shape", flag_value="json", help="The report on stdout.")
@click.option("--jsonl", "shape", flag_value="jsonl", help="A JSON line per point, with llama-bench's names.")
@click.option("--csv", "shape", flag_value="csv", help="The same as CSV.")
@click.option("--markdown", "shape", flag_value="markdown", help="A Markdown table with llama-bench's columns.")
@click.option("--no-history", is_flag=True, help="Do not remember this run (see: edgelm history).")
def command(
    bundle: Path,
    prompt_tokens: tuple[int, ...],
    generated_tokens: int,
    repetitions: int,
    max_time: float | None,
    threads: tuple[int, ...] | None,
    threads_prefill: int | None,
    kv_type: KvType,
    provider: tuple[str, ...],
    lookup: bool,
    draft: Path | None,
    gpu_layers: int,
    gpu: str,
    host_repack: bool | None,
    flash_attention: FlashAttention,
    write_profile: Path | None,
    depth: tuple[int, ...],
    sequences: tuple[int, ...],
    sustained: float | None,
    cold: bool,
    wait: str,
    output: Path | None,
    shape: str | None,
    no_history: bool,
) -> int:
    """Measure prefill, decode, time to first token, starts and memory of BUNDLE (a bundle or a .gguf file).

    Lists make a sweep: every prompt and the generated tokens are measured at every depth. A run that something
    disturbed (throttling, a CPU quota, other programs, swapping, Ctrl-C) is labelled with the reason and not valid.

    \b
    Example:
      edgelm bench bundle -o report.json
      edgelm bench bundle -p 128,512 --depth 0,2048 -r auto --markdown
      edgelm bench bundle --threads auto --write-profile me.toml
      edgelm bench bundle --sustained 5m
    """
    from runtime.bench import BenchOptions, bench
    from runtime.waiting import ask

    if output is not None and not output.parent.is_dir():
        raise UsageError(f"the directory of {output} does not exist")
    if write_profile is not None and threads != ():
        raise UsageError("--write-profile needs --threads auto", hint="only then are thread counts tried")
    if wait != "auto":
        ask("spin" if wait == "spin" else "passive")
    options = BenchOptions(
        prompts=prompt_tokens,
        generated_tokens=generated_tokens,
        depths=depth,
        sequences=sequences,
        threads_decode=threads or (0,),
        threads_prefill=threads_prefill or 0,
        repetitions=repetitions,
        kv_type=kv_type,
        lookup=lookup,
        draft=str(draft or ""),
        providers=provider,
        gpu_layers=gpu_layers,
        gpu=gpu,
        host_repack=host_repack,
        flash_attention=flash_attention,
        max_time_s=max_time or (60.0 if repetitions == 0 else None),
        sustained_s=sustained or 0.0,
        cold=cold,
    )
    progress = stderr_progress()
    if threads == ():
        options = _with_best_threads(bundle, options, write_profile, progress)
    report = bench(bundle, options, progress)
    if output is not None:
        output.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if not no_history:
        _remember(report)
    _show(report, shape)
    for label in report.labels:
        click.echo(f"warning: {label.kind}: {label.reason}", err=True)
    for note in report.notes:
        click.echo(f"note: {note}", err=True)
    return INTERRUPTED if report.settings.stopped_by == "interrupt" else 0


def _with_best_threads(
    bundle: Path, options: BenchOptions, write_profile: Path | None, progress: Progress
) -> BenchOptions:
    from dataclasses import replace

    from runtime.bench import best_threads
    from targets.report.threads import keep_threads

    found = best_threads(bundle, options, progress)
    for count, prefill, decode in found.tried:
        click.echo(f"{count} threads: prefill {prefill:.1f} tok/s, decode {decode:.1f} tok/s", err=True)
    click.echo(f"taken: {found.decode} for decode, {found.prefill} for prefill", err=True)
    if write_profile is not None:
        keep_threads(write_profile, found.decode, found.prefill, bundle.name)
        click.echo(f"wrote {write_profile}", err=True)
    return replace(options, threads_decode=(found.decode,), threads_prefill=options.threads_prefill or found.prefill)


def _remember(report: Report) -> None:
    from targets.history import remember, wanted

    if not wanted():
        return
    try:
        remember(report)
    except OSError as error:
        click.echo(f"note: not remembered: {error.filename}: {error.strerror}", err=True)


def _show(report: Report, shape: str | None) -> None:
    from targets.report.bench_table import csv_text, json_lines, markdown

    if shape == "json":
        print_json(report.model_dump(mode="json"))
    elif shape == "jsonl":
        click.echo(json_lines(report))
    elif shape == "csv":
        click.echo(csv_text(report))
    elif shape == "markdown":
        click.echo(markdown(report))
    else:
        print_report(report)
