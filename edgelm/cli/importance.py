"""``edgelm importance``: measure an importance matrix with the engine and write it for llama.cpp's tools and ours."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Measure an importance matrix and write it as llama.cpp does.")
@click.argument("source")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The file to write."
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="FILE|self",
    help="Text, or JSON lines with text or messages, instead of the built-in one; self: the model's own words.",
)
@click.option("--legacy", is_flag=True, help="Write the older format (.dat) instead of GGUF.")
@click.option("--force", is_flag=True, help="Replace a file that exists.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(source: str, output: Path, calibration: Path | None, legacy: bool, force: bool, as_json: bool) -> None:
    """Measure how large the inputs of every matrix of SOURCE are, and write the sums as an importance matrix.

    The unquantised model reads the calibration text in llama.cpp; torch is not needed. The file is what llama-imatrix
    writes: for llama-quantize --imatrix, and for edgelm export --imatrix.

    \b
    Example:
      edgelm importance ./my-model -o imatrix.gguf
      edgelm export ./my-model -o bundle --quant Q4_K_M --imatrix imatrix.gguf
    """
    from edgelm.cli.console import print_json, stderr_progress
    from edgelm.errors import UsageError
    from exporter.importance import write_measured

    if output.exists() and not force:
        raise UsageError(f"{output} exists", hint="choose another name, or replace it with --force")
    if calibration is not None and str(calibration) != "self" and not calibration.is_file():
        raise UsageError(f"--calibration: {calibration} is no file", hint="name a text or JSONL file, or: self")
    found = write_measured(source, output, calibration, stderr_progress(), legacy=legacy)
    told = {
        "file": str(output),
        "matrices": len(found.entries),
        "tokens": found.chunk_count * found.chunk_size,
        "text": found.datasets[0],
    }
    if as_json:
        print_json(told)
    else:
        click.echo(f"{output}: {told['matrices']} matrices over {told['tokens']} tokens of {told['text']}")
