"""One HTML page of a comparison: self-contained, without scripts, light and dark, readable on a phone and on paper.

The page asks for nothing from anywhere, and its content security policy forbids it to. Texts from bundles and reports
are escaped. Knows the template ``page.html`` and the picture; decides nothing.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, StrictUndefined

from edgelm.units import format_bytes
from targets.compare import Comparison
from targets.report.picture import pareto_picture
from targets.report.table import cells, headings, remarks

TEMPLATE = Path(__file__).parent / "page.html"


def html_page(comparison: Comparison) -> str:
    """The page as text. Raises ``MissingDependencyError`` without matplotlib."""
    wide = pareto_picture(comparison, width_in=9.0, height_in=5.2, name="wide")
    narrow = pareto_picture(comparison, width_in=4.4, height_in=5.0, name="narrow")
    lines = comparison.lines
    models = list(dict.fromkeys(line.model for line in lines))
    targets = list(dict.fromkeys(line.target for line in lines))
    depth = f", behind {comparison.depth} tokens" if comparison.depth else ""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        heading=f"{_listed(models, 'models')} on {_listed(targets, 'targets')}",
        shared=f"Prompt of {comparison.prompt_tokens} tokens{depth}. {len(lines)} rows.",
        wide=wide,
        narrow=narrow,
        largest_ram=format_bytes(max((line.ram_bytes.value or 0 for line in lines), default=0)),
        headings=headings(comparison),
        rows=[cells(comparison, index) for index in range(len(lines))],
        remarks=remarks(comparison),
        devices=sorted(
            {f"{line.target}: {line.device}" for line in lines if line.decode_tps.measured or line.prefill_tps.measured}
        ),
    )


def _listed(names: list[str], several: str) -> str:
    return " and ".join(names) if len(names) <= 2 else f"{len(names)} {several}"
