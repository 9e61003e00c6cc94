"""``edgelm doctor``: what this machine can do, what the engine uses of it, and what is wrong."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgelm.cli.console import print_json, print_table

if TYPE_CHECKING:
    from runtime.doctor import Diagnosis

_STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "broken": "bold red"}


@click.command(short_help="Tell what this machine can do and what is wrong.")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--profile", metavar="ID|FILE", help="Expect the speed of this profile [default: as detected].")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(bundle: Path | None, profile: str | None, as_json: bool) -> int:
    """Check this machine and its engine, and BUNDLE (a bundle or a .gguf file) when one is given.

    The engine runs in a child process, so a crash is reported and not suffered. Exit 1 when something is broken. With a
    BUNDLE its speed is set against the profile's, and causes of a shortfall that can be seen are named.

    \b
    Example:
      edgelm doctor
      edgelm doctor bundle --profile raspberry-pi-5 --json
    """
    from runtime.doctor import diagnose
    from targets.profile import load_profile

    diagnosis = diagnose(bundle, load_profile(profile) if profile else None)
    if as_json:
        findings = [asdict(finding) for finding in diagnosis.findings]
        engine = asdict(diagnosis.engine) if diagnosis.engine else None
        print_json({"healthy": diagnosis.healthy, "findings": findings, "engine": engine})
    else:
        _print(diagnosis)
    return 0 if diagnosis.healthy else 1


def _print(diagnosis: Diagnosis) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column("looked at")
    table.add_column("status")
    table.add_column("found", overflow="fold")
    for finding in diagnosis.findings:
        detail = finding.detail if finding.hint is None else f"{finding.detail}\nhint: {finding.hint}"
        table.add_row(finding.name, Text(finding.status, style=_STYLES[finding.status]), Text(detail))
    print_table(table)
