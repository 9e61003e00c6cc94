"""Texts of the proofs: stable, disjoint, and hard where tokenizers differ."""

from __future__ import annotations

import hashlib
import unicodedata
from pathlib import Path

import pytest

from edgelm.errors import UsageError
from exporter.texts import calibration_text, evaluation_text, hard_corpus, read_text


def test_halves_are_large_disjoint_and_repeatable() -> None:
    first, second = calibration_text(), evaluation_text()
    assert min(len(first.content), len(second.content)) > 120_000
    paragraphs = {part for part in first.content.split("\n\n") if len(part) > 200}
    assert not any(paragraph in second.content for paragraph in paragraphs)
    assert second.sha256 == evaluation_text().sha256 == hashlib.sha256(second.content.encode()).hexdigest()


def test_users_file_replaces_the_default(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("Grüße\r\n", encoding="utf-8", newline="")
    assert evaluation_text(path).name == "mine.txt"
    assert evaluation_text(path).content == calibration_text(path).content == "Grüße\r\n"


@pytest.mark.parametrize(
    ("content", "message"), [(None, "does not exist"), (b" \n", "is empty"), (b"ok \xff", r"is not UTF-8 \(byte 3\)")]
)
def test_unusable_files_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_text(path)


def test_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a file"):
        read_text(tmp_path)


def test_corpus_holds_every_kind_of_difficulty() -> None:
    texts = hard_corpus(["<|end|>"])
    joined = "\0".join(texts)
    scripts = {unicodedata.name(character, "").split(" ")[0] for character in joined}
    assert scripts >= {"CJK", "ARABIC", "HEBREW", "DEVANAGARI", "CYRILLIC", "GREEK", "HANGUL", "THAI", "COMBINING"}
    for needle in ("\r\n", "\t", "\u200d", "\u200b", "'ll", "def f(", "tight<|end|>tight", "  leading", "\ufeff"):
        assert needle in joined
    assert "" in texts
    assert any(len(text) >= 700 and " " not in text for text in texts)
    assert len(set(texts)) == len(texts)
