"""Sizes as people type them."""

from __future__ import annotations

import pytest

from edgelm.errors import UsageError
from edgelm.units import format_bytes, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("2GB", 2 * 10**9), ("1.5GiB", 1610612736), ("800", 800), (" 700 m ", 700 * 10**6), ("64kib", 65536), ("3B", 3)],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1XB", "1e9", "0", "0.1b", "nan", "1 2GB", "٣GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size_bytes", "text"), [(0, "0 B"), (999, "999 B"), (91_100_000, "91.1 MB"), (1_750_000_000, "1.75 GB")]
)
def test_formatted(size_bytes: int, text: str) -> None:
    assert format_bytes(size_bytes) == text
