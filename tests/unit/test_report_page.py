"""The HTML page of a comparison: self-contained, escaped, with a text alternative; and matplotlib missing."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_compare import bundle, report

from edgelm.bundle import file_record
from edgelm.cli.app import run_cli
from edgelm.errors import MissingDependencyError
from targets.compare import Comparison, compare
from targets.report.page import html_page
from targets.report.picture import pareto_picture
from targets.report.table import cells, headings

VOID = {"meta", "br", "img", "hr", "link"}


class Page(HTMLParser):
    """Collects what a browser would fetch, and checks that elements nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    kls = (("a", 0.004, "Q8_0"), ("b", 0.05, "Q4_K"), ("c", 0.3, "Q4_0"))
    paths = [bundle(tmp_path, name, kl=kl, quant=quant) for name, kl, quant in kls]
    sha256 = file_record(paths[0] / "model.gguf").sha256
    measured = report(tmp_path / "r.json", name="a", sha256=sha256)
    return compare([*paths, measured], ["raspberry-pi-5", "pi4"])


def test_the_page_asks_for_nothing_from_anywhere(comparison: Comparison) -> None:
    page = html_page(comparison)
    parsed = Page(page)
    assert all(address.startswith("#") for address in parsed.addresses)
    assert {"script", "link", "img", "iframe", "object"} & set(parsed.tags) == set()
    assert not re.search(r"@import|url\((?!#)", page)
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_every_figure_of_the_table_is_on_the_page(comparison: Comparison) -> None:
    page = html_page(comparison)
    for index in range(len(comparison.lines)):
        for cell in cells(comparison, index):
            assert f">{cell.marked}<" in page
    assert all(f">{heading}<" in page for heading in headings(comparison))
    assert "TTFT 512" in headings(comparison)


def test_the_picture_is_svg_with_a_text_alternative(comparison: Comparison) -> None:
    picture = pareto_picture(comparison, width_in=6, height_in=4, name="test")
    assert picture is not None
    root = ElementTree.fromstring(picture.svg)  # noqa: S314 - our own text
    assert root.get("role") == "img"
    described = [root.find(f".//*[@id='{name}']") for name in root.attrib["aria-labelledby"].split()]
    assert all(element is not None for element in described)
    assert described[1] is not None
    assert described[1].text == picture.text
    for words in ("raspberry-pi-5", "raspberry-pi-4", "host", "KL 0.004"):
        assert words in picture.text
    # Colours are the page's variables, so that both themes are readable.
    assert "var(--series-0)" in picture.svg
    assert "var(--series-2)" in picture.svg
    assert "#0f00" not in picture.svg
    assert "#0102" not in picture.svg


def test_a_measured_point_is_filled_and_a_predicted_one_hollow(comparison: Comparison) -> None:
    picture = pareto_picture(comparison, width_in=6, height_in=4, name="test")
    assert picture is not None
    assert "fill: var(--series-0)" in picture.svg
    assert "fill: var(--series-1)" not in picture.svg
    assert "fill: var(--paper); stroke: var(--series-1)" in picture.svg


def test_the_same_comparison_gives_the_same_page(comparison: Comparison) -> None:
    assert html_page(comparison) == html_page(comparison)


def test_names_from_files_are_escaped(comparison: Comparison) -> None:
    lines = tuple(line.model_copy(update={"model": "<b>&\"'"}) for line in comparison.lines)
    page = html_page(comparison.model_copy(update={"lines": lines, "notes": ("<script>alert(1)</script>",)}))
    Page(page)
    assert "<b>" not in page
    assert "<script>" not in page


def test_without_quality_the_page_says_why_there_is_no_picture(tmp_path: Path) -> None:
    page = html_page(compare([report(tmp_path / "r.json")], []))
    assert "<svg" not in page
    assert "no picture" in page


def test_equal_points_and_one_point_can_be_drawn(comparison: Comparison) -> None:
    one = comparison.model_copy(update={"lines": comparison.lines[:1]})
    twice = comparison.model_copy(update={"lines": (comparison.lines[0], comparison.lines[0])})
    lossless = comparison.model_copy(update={"lines": (comparison.lines[0].model_copy(update={"kl_mean": 0.0}),)})
    for case in (one, twice, lossless):
        assert pareto_picture(case, width_in=3, height_in=3, name="t") is not None


def test_without_matplotlib_the_way_out_is_named(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match="matplotlib") as error:
        html_page(comparison)
    assert "edgelm[report]" in (error.value.hint or "")


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(bundle(tmp_path, "a"))
    page = tmp_path / "page.html"
    assert run_cli(["compare", source, "--target", "pi5", "--html", str(page), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("{")
    assert "page.html" in captured.err
    Page(page.read_text(encoding="utf-8"))
    assert run_cli(["compare", source, "--target", "pi5", "--html", str(tmp_path / "no" / "page.html")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_comparing_without_a_page_loads_no_matplotlib() -> None:
    code = "import sys, edgelm.cli.compare, targets.report.table; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
