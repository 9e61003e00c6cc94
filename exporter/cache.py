"""A bounded store of results that take minutes, addressed by what they were made from.

An entry is a directory of files under ``EDGELM_CACHE``, ``XDG_CACHE_HOME/edgelm`` or ``~/.cache/edgelm``, named by a
SHA-256 over everything that determines it. Entries appear complete or not at all; the least recently used ones go when
the store outgrows its bound. Whoever reads an entry treats a damaged one as absent. Knows no content.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LIMIT_BYTES = 4 * 2**30
_PREFIX = "entry-"


def cache_directory() -> Path:
    """Where entries live; it need not exist."""
    override = os.environ.get("EDGELM_CACHE")
    if override:
        return Path(override)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "edgelm"


def key_of(*parts: Any) -> str:
    """A key from JSON values, the same on every machine."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def find(key: str) -> Path | None:
    """The directory of an entry, marked as used now; None when there is none."""
    path = cache_directory() / f"{_PREFIX}{key}"
    try:
        os.utime(path)
    except OSError:
        return None
    return path


@contextmanager
def new_entry(key: str, limit_bytes: int = LIMIT_BYTES) -> Iterator[Path | None]:
    """A directory that becomes the entry when the block ends well; None when the cache cannot be written.

    An entry that exists is kept. Writing into the directory is the caller's: an ``OSError`` there, a full disk say,
    removes it and is swallowed, since a cache may always be left out.
    """
    try:
        root = cache_directory()
        root.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".new-", dir=root))
    except OSError:
        yield None
        return
    try:
        yield staging
        target = root / f"{_PREFIX}{key}"
        if not target.exists():
            staging.rename(target)
        _evict(root, limit_bytes, target)
    except OSError:
        pass
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def remove(key: str) -> None:
    """Forget an entry, damaged ones too."""
    shutil.rmtree(cache_directory() / f"{_PREFIX}{key}", ignore_errors=True)


def _evict(root: Path, limit_bytes: int, latest: Path) -> None:
    entries = [path for path in root.iterdir() if path.name.startswith(_PREFIX)]
    sizes = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in entries}
    used = sum(sizes.values())
    for path in sorted(entries, key=lambda path: path.stat().st_mtime):
        if used <= limit_bytes:
            return
        if path != latest or sizes[path] > limit_bytes:
            shutil.rmtree(path, ignore_errors=True)
            used -= sizes[path]
