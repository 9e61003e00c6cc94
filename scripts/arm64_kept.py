"""Rows of the ARM proof that were computed before, so that a run that was cut off goes on where it stopped.

A row is found again by everything that it was computed from: the image's id, the processor, the bundle, the scripts in
the container. It does not know what a row means. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def fingerprint(paths: Iterable[Path]) -> str:
    """Hash of the contents of files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


class Kept:
    """A file of rows, one JSON object a line. A line that was cut off in the middle counts as not written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[str, dict[str, Any]] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            self._rows[entry["key"]] = entry["row"]

    def find(self, *origins: str) -> dict[str, Any] | None:
        """The row that was computed from exactly these, if there is one."""
        return self._rows.get("|".join(origins))

    def add(self, row: dict[str, Any], *origins: str) -> None:
        """Keep a row; it is on disk when this returns."""
        key = "|".join(origins)
        self._rows[key] = row
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as sink:
            # A line of its own even after one that was cut off.
            sink.write("\n" + json.dumps({"key": key, "row": row}) + "\n")

    def forget(self) -> None:
        """Start anew."""
        self._rows.clear()
        self._path.unlink(missing_ok=True)
