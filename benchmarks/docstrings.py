"""English documentation as one text: docstrings of the standard library and of installed packages, and whole folders.

    python benchmarks/docstrings.py OUT.txt [--bytes 14000000] [--packages numpy torch ...] [--folders DIR ...]

It begins with the built-in calibration text, ``--repeat`` times, since that is nearest to what evaluates; then come
.rst, .md and .txt files of the folders, which are checkouts of projects with documentation, and at last docstrings, of
which there are at most ``--bytes``. A paragraph is taken once, and none that shares ten words in a row with the
evaluation text. What training on it gains is another question.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from exporter.texts import calibration_text, evaluation_text

LEFT_OUT = {"test", "tests", "idlelib", "pydoc_data", "lib2to3", "site-packages"}
LEAST_CHARACTERS = 250
NO_PROSE = re.compile(r"licen[cs]e|/tests?/|third_party|CMakeLists|requirements|/locale/", re.IGNORECASE)
SHARED_WORDS = 10
PARAGRAPH_CHARACTERS = 60
"""Shorter ones ("Examples", "Raises") come again and again and are kept."""


def docstrings(root: Path) -> Iterator[str]:
    """Docstrings of all modules, classes and functions below ``root``."""
    for path in sorted(root.rglob("*.py")):
        if LEFT_OUT & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield ast.get_docstring(node) or ""


def documents(folder: Path) -> Iterator[str]:
    """Texts of all files of documentation below ``folder``."""
    for path in sorted(item for item in folder.rglob("*") if item.suffix in (".rst", ".md", ".txt")):
        if path.is_file() and not NO_PROSE.search(f"/{path.relative_to(folder)}"):
            yield path.read_text(encoding="utf-8", errors="replace")


def runs_of_words(text: str) -> set[tuple[str, ...]]:
    """All ``SHARED_WORDS`` words in a row."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[at : at + SHARED_WORDS]) for at in range(len(words) - SHARED_WORDS + 1)}


class Collector:
    """Paragraphs that are new and not those of the evaluation text."""

    def __init__(self) -> None:
        self._evaluated = runs_of_words(evaluation_text().content)
        self._seen: set[str] = set()

    def fresh(self, text: str) -> str:
        """What is left of a text; empty when that is too little to learn from."""
        whole = "\n\n".join(part for part in text.split("\n\n") if self._is_fresh(part.strip()))
        return whole if len(whole) > LEAST_CHARACTERS else ""

    def _is_fresh(self, part: str) -> bool:
        if len(part) <= PARAGRAPH_CHARACTERS:
            return True
        if part in self._seen or self._evaluated & runs_of_words(part):
            return False
        self._seen.add(part)
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--bytes", type=int, default=14_000_000)
    packages = ["numpy", "torch", "scipy", "matplotlib", "pandas", "sympy", "transformers"]
    parser.add_argument("--packages", nargs="*", default=packages)
    parser.add_argument("--folders", nargs="*", type=Path, default=[])
    parser.add_argument("--repeat", type=int, default=12)
    arguments = parser.parse_args()
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    for name in arguments.packages:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:
            parser.error(f"package {name} is not installed")
        roots.append(Path(found.origin).parent)
    collector, parts, size = Collector(), [calibration_text().content] * arguments.repeat, 0
    parts += [collector.fresh(text) for folder in arguments.folders for text in documents(folder)]
    for text in (text for root in roots for text in docstrings(root)):
        if size > arguments.bytes:
            break
        parts.append(collector.fresh(text))
        size += len(parts[-1])
    arguments.output.write_text("\n\n".join(filter(None, parts)), encoding="utf-8")
    print(f"{arguments.output}: {arguments.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
