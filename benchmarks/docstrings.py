"""English documentation without a network: docstrings of the standard library and of installed packages, as one text.

    python benchmarks/docstrings.py OUT.txt [--bytes 14000000] [--packages numpy torch ...] [--repeat 12]

It begins with the built-in calibration text, ``--repeat`` times, since that is nearest to what evaluates; nothing of
the evaluation text is in it, and a paragraph is taken once. What training on it gains is another question.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from exporter.texts import calibration_text, evaluation_text

LEFT_OUT = {"test", "tests", "idlelib", "pydoc_data", "lib2to3", "site-packages"}
LEAST_CHARACTERS = 250
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--bytes", type=int, default=14_000_000)
    packages = ["numpy", "torch", "scipy", "matplotlib", "pandas", "sympy", "transformers"]
    parser.add_argument("--packages", nargs="*", default=packages)
    parser.add_argument("--repeat", type=int, default=12)
    arguments = parser.parse_args()
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    for name in arguments.packages:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:
            parser.error(f"package {name} is not installed")
        roots.append(Path(found.origin).parent)
    seen = {part.strip() for part in evaluation_text().content.split("\n\n")}
    parts, size = [calibration_text().content] * arguments.repeat, 0
    for text in (text for root in roots for text in docstrings(root)):
        if size > arguments.bytes:
            break
        fresh = [part for part in text.split("\n\n") if len(part) <= PARAGRAPH_CHARACTERS or part.strip() not in seen]
        seen.update(part.strip() for part in fresh)
        whole = "\n\n".join(fresh)
        if len(whole) > LEAST_CHARACTERS:
            parts.append(whole)
            size += len(whole)
    arguments.output.write_text("\n\n".join(parts), encoding="utf-8")
    print(f"{arguments.output}: {arguments.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
