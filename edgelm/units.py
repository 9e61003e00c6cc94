"""Sizes as people type and read them. Knows nothing of what is being measured."""

from __future__ import annotations

import re

from edgelm.errors import UsageError

_FACTORS = {
    "": 1,
    "b": 1,
    "k": 10**3,
    "kb": 10**3,
    "m": 10**6,
    "mb": 10**6,
    "g": 10**9,
    "gb": 10**9,
    "t": 10**12,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*")


def parse_size(text: str) -> int:
    """Bytes from ``2GB``, ``1.5GiB``, ``700M`` or a plain number of bytes.

    Raises ``UsageError`` for anything else, for sizes of zero and for negative ones.
    """
    match = _SIZE.fullmatch(text)
    factor = _FACTORS.get(match.group(2).lower()) if match else None
    if match is None or factor is None:
        raise UsageError(f"'{text}' is not a size", hint="write for example 2GB, 1.5GiB or 800000000")
    size_bytes = int(float(match.group(1)) * factor)
    if size_bytes <= 0:
        raise UsageError(f"'{text}' is not a size above zero", hint="write for example 2GB, 1.5GiB or 800000000")
    return size_bytes


def format_bytes(size_bytes: float) -> str:
    """``91.1 MB``, ``1.75 GB``: decimal units, three significant digits, as file sizes are advertised."""
    value = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
