"""The Pareto picture of a comparison: KL against decode speed, point size for RAM, a colour and a shape per target.

Drawn by matplotlib as SVG that is put into a page: colours are the page's CSS variables (``--ink``, ``--grid``,
``--series-0`` ...), so that one picture serves light and dark, and text stays text. matplotlib is imported when a
picture is drawn. Knows points, not pages.
"""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelm.errors import MissingDependencyError
from edgelm.units import format_bytes
from targets.compare import Comparison, Line, pareto
from targets.report.table import three_digits

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SERIES_COLOURS = 8
_SHAPES = "osD^vPX*"
# Colours that nothing else draws with: each is replaced by the CSS variable of its name.
_INK, _GRID, _PAPER = "#010203", "#010204", "#010205"
_LARGEST_POINT = 260.0
_SMALLEST_POINT = 16.0
_WIDE_RANGE = 5.0  # from this ratio on an axis is logarithmic


@dataclass(frozen=True, slots=True)
class Picture:
    """Inline SVG without prologue, and what it shows in words."""

    svg: str
    text: str


@dataclass(frozen=True, slots=True)
class _Series:
    """The lines of one target that can be drawn, and those on its front from the smallest KL on."""

    target: str
    lines: tuple[Line, ...]
    front: tuple[Line, ...]


def pareto_picture(comparison: Comparison, *, width_in: float, height_in: float, name: str) -> Picture | None:
    """The picture in inches of 72 points, None when no line has both KL and a decode speed.

    ``name`` keeps the ids of several pictures on one page apart. Raises ``MissingDependencyError`` without matplotlib.
    """
    series = _series(comparison)
    if not series:
        return None
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "the HTML report draws with matplotlib, which is not installed", hint="pip install 'edgelm[report]'"
        ) from error
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}):
        figure = Figure(figsize=(width_in, height_in), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        _draw(axes, series)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = _in_words(series)
    return Picture(_inline(stream.getvalue(), name, text), text)


def _series(comparison: Comparison) -> list[_Series]:
    found = []
    for target in dict.fromkeys(line.target for line in comparison.lines):
        lines = tuple(line for line in comparison.lines if line.target == target and _point(line) is not None)
        if lines:
            found.append(_Series(target, lines, tuple(lines[index] for index in pareto(lines))))
    return found


def _point(line: Line) -> tuple[float, float] | None:
    """(decode tokens/s, KL) of a line that can be drawn: spoilt runs cannot."""
    speed = line.decode_tps.value
    if line.kl_mean is None or not speed or line.spoilt is not None:
        return None
    return speed, line.kl_mean


def _draw(axes: Axes, series: list[_Series]) -> None:
    points = [point for item in series for line in item.lines if (point := _point(line)) is not None]
    _scale(axes, "x", [point[0] for point in points])
    _scale(axes, "y", [point[1] for point in points])
    axes.set_xlabel("decode, tokens/s  (faster →)", color=_INK)
    axes.set_ylabel("mean KL, nats/token  (better ↓)", color=_INK)
    axes.patch.set_alpha(0)
    axes.grid(color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_color(_GRID)
    axes.tick_params(which="both", colors=_INK, length=0)
    largest = max((line.ram_bytes.value or 0) for item in series for line in item.lines) or 1
    for index, item in enumerate(series):
        colour, shape = f"#0f00{index % SERIES_COLOURS:02x}", _SHAPES[index % len(_SHAPES)]
        front = [point for line in item.front if (point := _point(line)) is not None]
        axes.plot(*zip(*front, strict=True), color=colour, linewidth=1.2, alpha=0.7, zorder=2)
        for line in item.lines:
            speed, kl = _point(line) or (0.0, 0.0)
            size = _area(line, largest)
            face = colour if line.decode_tps.measured is not None else _PAPER
            axes.scatter([speed], [kl], s=size, marker=shape, facecolor=face, edgecolor=colour, linewidth=1.6, zorder=3)
        axes.scatter([], [], s=45, marker=shape, facecolor=_PAPER, edgecolor=colour, linewidth=1.6, label=item.target)
    _label(axes, series, largest)
    columns = 2 if len(series) > 1 else 1
    above = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2}
    axes.legend(ncols=columns, frameon=False, labelcolor=_INK, handletextpad=0.4, columnspacing=1.2, **above)


def _scale(axes: Axes, which: str, values: list[float]) -> None:
    """Linear, or logarithmic with ticks at 1, 2 and 5 where the values span a wide range."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    if min(values) > 0 and max(values) / min(values) >= _WIDE_RANGE:
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_minor_formatter(NullFormatter())
        limits = min(values) / 1.6, max(values) * 1.6
    else:
        pad = 0.18 * (max(values) - min(values)) or 0.3 * max(values) or 1.0
        limits = min(values) - pad, max(values) + pad
    (axes.set_xlim if which == "x" else axes.set_ylim)(*limits)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))


def _label(axes: Axes, series: list[_Series], largest: float) -> None:
    """Names beside the points of the fronts, where they cover neither points nor names; all others are in the table."""
    axes.figure.canvas.draw()
    lines = [line for item in series for line in item.lines]
    several = len({(line.target, line.quant) for line in lines}) < len(lines)
    taken = [_square(axes, line, largest) for line in lines]
    for line in (line for item in series for line in item.front):
        point = _point(line)
        assert point is not None
        name = f"{line.model} {line.quant}" if several and line.quant not in line.model else line.quant
        away = math.sqrt(_area(line, largest)) / 2 + 3
        for dx, dy, side in ((away, -3, "left"), (-away, -3, "right"), (0, away, "center"), (0, -away - 6, "center")):
            text = axes.annotate(
                name, point, (dx, dy), textcoords="offset points", ha=side, color=_INK, fontsize=8, zorder=4
            )
            box = text.get_window_extent()
            corners = (box.x0, box.y0, box.x1, box.y1)
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            if inside and not any(_overlap(corners, other) for other in taken):
                taken.append(corners)
                break
            text.remove()


def _area(line: Line, largest: float) -> float:
    """Area of a point in square points of print."""
    return max(_LARGEST_POINT * (line.ram_bytes.value or 0) / largest, _SMALLEST_POINT)


def _square(axes: Axes, line: Line, largest: float) -> tuple[float, float, float, float]:
    """Where a point is drawn, in pixels."""
    x, y = axes.transData.transform(_point(line) or (0.0, 0.0))
    half = math.sqrt(_area(line, largest)) / 2 * axes.figure.dpi / 72
    return x - half, y - half, x + half, y + half


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _in_words(series: list[_Series]) -> str:
    """The text alternative: every front, point by point."""
    sentences = ["Mean KL divergence against decode speed, the area of a point is the RAM."]
    for item in series:
        points = []
        for line in item.front:
            speed, kl = _point(line) or (0.0, 0.0)
            ram = f", {format_bytes(line.ram_bytes.value)}" if line.ram_bytes.value else ""
            points.append(f"{line.model} {line.quant} at KL {kl:.4g} with {three_digits(speed)} tokens/s{ram}")
        rest = len(item.lines) - len(item.front)
        beaten = f"; {rest} more {'is' if rest == 1 else 'are'} beaten in both" if rest else ""
        sentences.append(f"On {item.target} nothing beats {'; '.join(points)}{beaten}.")
    return " ".join(sentences)


def _inline(svg: str, name: str, text: str) -> str:
    """The SVG element alone, with its text alternative, and with CSS variables for colours."""
    from html import escape

    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    for colour, variable in ((_INK, "--ink"), (_GRID, "--grid"), (_PAPER, "--paper")):
        body = body.replace(colour, f"var({variable})")
    body = re.sub(r"#0f00(\d\d)", lambda match: f"var(--series-{int(match.group(1))})", body)
    head, _, rest = body.partition(">")
    head = re.sub(r' (?:width|height)="[^"]*"', "", head)
    labels = f'<title id="{name}-title">Pareto picture</title><desc id="{name}-desc">{escape(text)}</desc>'
    return f'{head} role="img" aria-labelledby="{name}-title {name}-desc">{labels}{rest}'
