"""Write the parts of docs/ that are generated: command reference, schema of reports, architectures.

``--parity`` and ``--onnx-parity`` measure every architecture anew, as GGUF and as ONNX, which needs torch and
transformers. Tests compare the files with what
this prints, so that they cannot drift.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["COLUMNS"] = "100"  # click wraps help to the terminal's width; the document has one

from click.testing import CliRunner

from edgelm.cli.app import COMMANDS, cli
from edgelm.report import report_schema

ROOT = Path(__file__).resolve().parents[1]
HEADER = """# The command line

Written by `make docs` from `--help`; do not edit.
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 proof failed, 4 does not fit.
"""


def help_text(arguments: list[str]) -> str:
    return CliRunner().invoke(cli, [*arguments, "--help"], prog_name="edgelm", terminal_width=100).output.rstrip()


def subcommands(name: str) -> list[str]:
    command = cli.get_command(None, name)  # type: ignore[arg-type]
    return sorted(getattr(command, "commands", {}))


def cli_reference() -> str:
    """The whole of docs/cli.md."""
    pages = [[], *([name] for name in COMMANDS)]
    pages += [[name, sub] for name in COMMANDS for sub in subcommands(name)]
    sections = (f"\n## {' '.join(['edgelm', *page])}\n\n```text\n{help_text(page)}\n```\n" for page in pages)
    return HEADER + "".join(sections)


def architectures() -> str:
    """The whole of docs/architectures.md, measured now."""
    sys.path.insert(0, str(ROOT))  # the models are those of the tests
    from tests.parity import ROWS, document, measure

    with tempfile.TemporaryDirectory() as directory:
        return document({row.name: measure(row, Path(directory) / str(index)) for index, row in enumerate(ROWS)})


def onnx_architectures() -> str:
    """The whole of docs/onnx-architectures.md, measured now."""
    sys.path.insert(0, str(ROOT))
    from tests.onnx_parity import ONNX_ROWS, document, measure

    with tempfile.TemporaryDirectory() as directory:
        return document({row.name: measure(row, Path(directory) / str(index)) for index, row in enumerate(ONNX_ROWS)})


def encoders() -> str:
    """The whole of docs/encoders.md, measured now."""
    sys.path.insert(0, str(ROOT))
    from tests.encoder_parity import ENCODER_ROWS, encoder_document, measure_encoder

    with tempfile.TemporaryDirectory() as directory:
        places = [(row, Path(directory) / str(index)) for index, row in enumerate(ENCODER_ROWS)]
        return encoder_document({row.name: measure_encoder(row, place) for row, place in places})


def main() -> None:
    if "--parity" in sys.argv[1:]:
        (ROOT / "docs" / "architectures.md").write_text(architectures(), encoding="utf-8")
        (ROOT / "docs" / "encoders.md").write_text(encoders(), encoding="utf-8")
    if "--onnx-parity" in sys.argv[1:]:
        (ROOT / "docs" / "onnx-architectures.md").write_text(onnx_architectures(), encoding="utf-8")
    (ROOT / "docs" / "cli.md").write_text(cli_reference(), encoding="utf-8")
    schema = json.dumps(report_schema(), indent=2)
    (ROOT / "docs" / "report.schema.json").write_text(schema + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
