"""The cache: whole entries only, bounded, and never in the way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from exporter import cache


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path / "cache"))


def _add(key: str, size_bytes: int, limit_bytes: int = cache.LIMIT_BYTES) -> None:
    with cache.new_entry(key, limit_bytes) as directory:
        assert directory is not None
        (directory / "data").write_bytes(b"x" * size_bytes)


def test_entry_is_found_with_its_content() -> None:
    key = cache.key_of("a", 1, ["b"])
    assert cache.find(key) is None
    _add(key, 5)
    found = cache.find(key)
    assert found is not None
    assert (found / "data").read_bytes() == b"xxxxx"
    cache.remove(key)
    assert cache.find(key) is None


def test_key_depends_on_every_part() -> None:
    keys = {cache.key_of("a", {"x": 1}), cache.key_of("a", {"x": 2}), cache.key_of("b", {"x": 1})}
    assert len(keys) == 3
    assert cache.key_of({"x": 1, "y": 2}) == cache.key_of({"y": 2, "x": 1})


def test_half_an_entry_never_exists() -> None:
    def fail() -> None:
        with cache.new_entry("k") as directory:
            assert directory is not None
            (directory / "data").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert cache.find("k") is None
    assert list(cache.cache_directory().iterdir()) == []


def test_least_recently_used_entries_go_first() -> None:
    for age, key in ((300, "old"), (200, "middle"), (100, "new")):
        _add(key, 40, limit_bytes=1000)
        path = cache.find(key)
        assert path is not None
        os.utime(path, (path.stat().st_atime - age, path.stat().st_mtime - age))
    assert cache.find("old") is not None  # used now, so the middle one is the oldest
    _add("latest", 40, limit_bytes=130)
    assert cache.find("middle") is None
    assert all(cache.find(key) is not None for key in ("old", "new", "latest"))


def test_unwritable_place_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    monkeypatch.setenv("EDGELM_CACHE", str(blocked / "cache"))
    with cache.new_entry("k") as directory:
        assert directory is None
    assert cache.find("k") is None
