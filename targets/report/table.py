"""The cells of a comparison as text, the same in the terminal, in Markdown and in HTML. Knows no markup."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgelm.units import format_bytes
from targets.compare import Comparison, Line, Pair


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell: its text without the mark, and whether it is the best of its column."""

    text: str
    best: bool = False

    @property
    def marked(self) -> str:
        """The text with ``*`` behind it when it is the best."""
        return f"{self.text} *" if self.best else self.text


# Heading (TTFT gets the prompt length added), the column of ``Comparison.best`` or "", the text of a line.
_COLUMNS: tuple[tuple[str, str, Callable[[Line], str]], ...] = (
    ("model", "", lambda line: line.model),
    ("target", "", lambda line: line.target + (" (spoilt)" if line.spoilt else "")),
    ("format", "", lambda line: line.format),
    ("quant", "", lambda line: line.quant),
    ("size", "artifact_bytes", lambda line: format_bytes(line.artifact_bytes)),
    ("KL", "kl_mean", lambda line: "-" if line.kl_mean is None else f"{line.kl_mean:.4f}"),
    ("RAM", "ram_bytes", lambda line: pair_text(line.ram_bytes, format_bytes)),
    ("prefill t/s", "prefill_tps", lambda line: pair_text(line.prefill_tps, three_digits)),
    ("decode t/s", "decode_tps", lambda line: pair_text(line.decode_tps, three_digits)),
    ("TTFT", "ttft_s", lambda line: pair_text(line.ttft_s, lambda value: f"{three_digits(value)} s")),
    ("load", "load_s", lambda line: pair_text(line.load_s, lambda value: f"{three_digits(value)} s")),
    (
        "J/token",
        "joule_per_token",
        lambda line: "-" if line.joule_per_token is None else _joules(line, line.joule_per_token),
    ),
    ("fits", "", lambda line: line.fits or "-"),
)


def _joules(line: Line, value: float) -> str:
    """Of a run with a power sensor, or a rated power over a predicted speed."""
    return f"{'~' if line.decode_tps.measured is None else ''}{three_digits(value)}"


def headings(comparison: Comparison) -> list[str]:
    """The headings; the one of the time to first token names the length of the prompt that it is for."""
    return [f"{name} {comparison.prompt_tokens}" if name == "TTFT" else name for name, _, _ in _COLUMNS]


def cells(comparison: Comparison, index: int) -> list[Cell]:
    """The row of one line, in the order of ``headings``."""
    line = comparison.lines[index]
    return [Cell(text(line), bool(column) and comparison.best.get(column) == index) for _, column, text in _COLUMNS]


def title(comparison: Comparison) -> str:
    """What all rows have in common, and how to read them."""
    depth = f", depth {comparison.depth}" if comparison.depth else ""
    return f"prompt of {comparison.prompt_tokens} tokens{depth}; ~ predicted, * best of the column"


def remarks(comparison: Comparison) -> list[str]:
    """Sentences below the table: what does not fit, what was spoilt, what was left out and why."""
    found = [
        f"{line.model} on {line.target}: {line.fit_reason}" for line in comparison.lines if line.fits in ("no", "pages")
    ]
    found += [f"spoilt: {line.model} on {line.target}: {line.spoilt}" for line in comparison.lines if line.spoilt]
    return [*found, *comparison.notes]


def markdown(comparison: Comparison) -> str:
    """The table in Markdown."""
    head = headings(comparison)
    rows = [[cell.marked for cell in cells(comparison, index)] for index in range(len(comparison.lines))]
    return "\n".join([_row(head), _row(["---"] * len(head)), *(_row(row) for row in rows)]) + "\n"


def _row(texts: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("\\", "\\\\").replace("|", "\\|") for text in texts) + " |"


def pair_text(pair: Pair, shown: Callable[[float], str]) -> str:
    """``measured (~predicted, error)``, ``~predicted``, or a dash."""
    if pair.measured is None:
        return "-" if pair.predicted is None else f"~{shown(pair.predicted)}"
    if pair.predicted is None or pair.error_pct is None:
        return shown(pair.measured)
    return f"{shown(pair.measured)} (~{shown(pair.predicted)}, {pair.error_pct:+.0f} %)"


def three_digits(value: float) -> str:
    """A number as people compare numbers: three significant digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def changes_lines(comparison: Comparison, *, as_markdown: bool) -> list[str]:
    """The second of two reports against the first, a line per figure; nothing for other comparisons."""
    lines = []
    for item in comparison.changes:
        interval = "" if item.interval is None else f" ({item.interval[0]:+.1%} to {item.interval[1]:+.1%})"
        before, after = (
            format_bytes(value) if item.figure.endswith("(bytes)") else three_digits(value)
            for value in (item.before, item.after)
        )
        figure = item.figure.partition(" (")[0]
        lines.append(f"{figure}: {before} -> {after}, {item.change:+.1%}{interval}: {item.verdict} ({item.reason})")
    lines += [f"differs besides: {text}" for text in comparison.unlike]
    return ["", *(f"- {line}" for line in lines)] if as_markdown and lines else lines
