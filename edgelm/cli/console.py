"""What the commands share for showing things: progress bars on stderr, tables on stdout, JSON, option types.

Knows rich and click; decides nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table

from edgelm.errors import UsageError
from edgelm.progress import SILENT, Progress, Stage
from edgelm.units import parse_size

WIDE = 160


class SizeType(click.ParamType[int]):
    """``2GB``, ``1.5GiB`` or bytes, as an int of bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_size(str(value))
        except UsageError as error:
            self.fail(f"{error.message}; {error.hint}", param, ctx)


class GpuLayersType(click.ParamType[int]):
    """``auto`` or a number of layers, as ``EngineOptions.gpu_layers`` has it: -1 is as many as fit."""

    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value)
        if text in ("auto", "-1"):
            return -1
        if not text.isdecimal() or len(text) > 6:
            self.fail(f"'{text}' is neither auto nor a number of layers", param, ctx)
        return int(text)


SIZE = SizeType()
gpu_layers_option = click.option(
    "--gpu-layers",
    type=GpuLayersType(),
    default="auto",
    show_default=True,
    metavar="auto|N",
    help="Layers that a GPU computes; auto: as many as its memory holds (GGUF only).",
)
gpu_option = click.option(
    "--gpu", default="", metavar="NAME", help="Which GPU, as doctor names it [default: the one with most free memory]."
)
host_repack_option = click.option(
    "--host-repack/--no-host-repack",
    default=None,
    help="Beside a GPU: rearrange the weights that stay with the CPU for its kernels. On an H200's host Q4_0 and Q8_0 "
    "generated 0.99 to 1.85 times as fast, k-quants mostly slower, and prompts took 1.8 to 16 times as long (GGUF "
    "only).  [default: no]",
)
flash_attention_option = click.option(
    "--flash-attention",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Of llama.cpp (GGUF only); auto: off on processors with AMX, on elsewhere, or as a --target was measured.",
)
device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where torch computes; auto: on a GPU when torch sees one that holds the model.",
)


provider_option = click.option(
    "--provider",
    multiple=True,
    metavar="NAME",
    help="What ONNX Runtime computes with (cuda, openvino, ...), best first; the CPU takes what is left only when cpu "
    "is named last.  [default: cpu]",
)


class _RichStage:
    def __init__(self, bar: RichProgress, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def advance(self, amount: int = 1) -> None:
        self._bar.advance(self._task, amount)

    def tell(self, text: str) -> None:
        self._bar.update(self._task, told=text)


class _RichBars:
    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, name: str, total: int | None = None, *, unit: str = "") -> Iterator[Stage]:
        amount: ProgressColumn = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(),
            amount,
            TextColumn(unit if unit != "bytes" else ""),
            TextColumn("{task.fields[told]}"),
        )
        with RichProgress(*columns, TimeRemainingColumn(), console=self._console) as bar:
            yield _RichStage(bar, bar.add_task(name, total=total, told=""))


def stderr_progress() -> Progress:
    """Bars when stderr is a terminal, silence otherwise."""
    return _RichBars(Console(stderr=True)) if sys.stderr.isatty() else SILENT


def print_json(document: Any) -> None:
    """One JSON object on stdout."""
    click.echo(json.dumps(document, indent=2, allow_nan=False))


def print_table(table: Table) -> None:
    """A table on stdout; when stdout is no terminal it is as wide as it needs to be, so that pipes see whole cells."""
    console = Console() if sys.stdout.isatty() else Console(width=WIDE, force_terminal=False)
    console.print(table)
