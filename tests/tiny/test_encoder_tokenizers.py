"""WordPiece and unigram: their ids are those of llama.cpp, there and back, and of the libraries that trained them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_encoders import VOCABULARY, make_tiny_bert, write_wordpiece
from tokenizers import Tokenizer
from unigram_tokenizer import MASK, ROWS, SPECIAL, Style, document, trained, write_unigram

from edgelm.errors import CheckpointError, ProofError
from edgelm.progress import SILENT
from exporter.checkpoint import Checkpoint, open_checkpoint, open_source
from exporter.gguf_header import encode_header
from exporter.texts import hard_corpus
from exporter.tokenizer import SourceTokenizer, load_tokenizer, prove_identity, read_tokenizer
from exporter.vocabulary import tokenize_with_llama
from runtime.engines.llamacpp import load_vocabulary
from runtime.tokenizer import JsonTokenizer

pytestmark = pytest.mark.tiny
STYLES: tuple[Style, ...] = ("xlm-roberta", "t5")
SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "Größe, naïveté and café: ﬁne print",
    "a  b\tc\nd",
    "x = [i**2 for i in range(10)]",
    "我想在苹果工作 ＡＢＣ",
)


def opened(directory: Path) -> Checkpoint:
    return open_checkpoint(open_source(str(directory)))


def bert(directory: Path, **changes: Any) -> Checkpoint:
    make_tiny_bert(directory, hidden=32, layers=1)
    path = directory / "tokenizer.json"
    held = json.loads(path.read_text(encoding="utf-8"))
    held.update(changes)
    path.write_text(json.dumps(held), encoding="utf-8")
    return opened(directory)


def unigram(directory: Path, style: Style, **changes: Any) -> Checkpoint:
    """With more rows than tokens, as published embeddings often are."""
    make_tiny_bert(directory, hidden=32, layers=1)
    assert ROWS < VOCABULARY
    write_unigram(directory, style)
    path = directory / "tokenizer.json"
    held = json.loads(path.read_text(encoding="utf-8"))
    held["model"].update(changes)
    path.write_text(json.dumps(held), encoding="utf-8")
    return opened(directory)


def file_of(source: SourceTokenizer, path: Path) -> Path:
    path.write_bytes(encode_header("llama", source.gguf_metadata, ()))
    return path


@pytest.mark.parametrize("lowercase", [True, False])
def test_wordpiece_is_proven_and_survives_the_way_back(tmp_path: Path, lowercase: bool) -> None:
    bert(tmp_path / "m")
    write_wordpiece(tmp_path / "m", lowercase=lowercase)
    source = load_tokenizer(opened(tmp_path / "m"), SILENT)
    metadata = source.gguf_metadata
    assert metadata["tokenizer.ggml.model"] == "bert"
    assert metadata["tokenizer.ggml.normalizer.lowercase"] is lowercase
    assert metadata["tokenizer.ggml.tokens"][:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    ids = {"bos": 2, "cls": 2, "seperator": 3, "unknown": 1, "padding": 0, "mask": 4}
    assert {name: metadata[f"tokenizer.ggml.{name}_token_id"] for name in ids} == ids
    path = file_of(source, tmp_path / "vocabulary.gguf")
    identity = prove_identity(source, path)
    assert identity.identical, identity.first_difference
    assert identity.tokens > 5000
    rebuilt = load_tokenizer(opened(path), SILENT)
    ours, theirs = (Tokenizer.from_str(item.tokenizer_json) for item in (rebuilt, source))
    for text in hard_corpus(["[CLS]", "[SEP]"]):
        assert ours.encode(text).ids == theirs.encode(text).ids  # special tokens at the ends included
        assert ours.decode(theirs.encode(text).ids) == theirs.decode(theirs.encode(text).ids)


def test_what_wordpiece_texts_are_compared_without(tmp_path: Path) -> None:
    """Where llama.cpp and Hugging Face differ, which is why those texts are changed before the comparison."""
    source = load_tokenizer(bert(tmp_path / "m"), SILENT)
    path = file_of(source, tmp_path / "vocabulary.gguf")
    tokenizer = Tokenizer.from_str(source.tokenizer_json)
    for text in ("a" * 101, "a\u0903b"):  # a word that is too long; a sign with a width of its own
        assert list(tokenize_with_llama(path, [text]).ids[0]) != tokenizer.encode(text, add_special_tokens=False).ids
    text = "a" * 100
    assert list(tokenize_with_llama(path, [text]).ids[0]) == tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "cut text into words as BERT does"),
        ({"normalizer": {"type": "Lowercase"}}, "clean text as BERT does"),
        (
            {"normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": False}
             | {"strip_accents": None, "lowercase": True}},
            "handle_chinese_chars switched off",
        ),
    ],
)  # fmt: skip
def test_wordpiece_that_llama_cpp_cannot_do(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        read_tokenizer(bert(tmp_path / "m", **changes))


@pytest.mark.parametrize("style", STYLES)
def test_unigram_is_proven_and_survives_the_way_back(tmp_path: Path, style: Style) -> None:
    source = load_tokenizer(unigram(tmp_path / "m", style), SILENT)
    metadata = source.gguf_metadata
    assert metadata["tokenizer.ggml.model"] == "t5"
    assert metadata["tokenizer.ggml.remove_extra_whitespaces"] is True
    assert metadata["tokenizer.ggml.add_bos_token"] is (style == "xlm-roberta")
    assert metadata["tokenizer.ggml.add_eos_token"] is True
    assert len(metadata["tokenizer.ggml.tokens"]) == VOCABULARY
    assert metadata["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 2]
    path = file_of(source, tmp_path / "vocabulary.gguf")
    identity = prove_identity(source, path)
    assert identity.identical, identity.first_difference
    assert identity.tokens > 5000
    rebuilt = load_tokenizer(opened(path), SILENT)
    assert rebuilt.gguf_metadata == source.gguf_metadata
    ours, theirs = (Tokenizer.from_str(item.tokenizer_json) for item in (rebuilt, source))
    for text in SENTENCES:
        assert ours.encode(text).ids == theirs.encode(text).ids


def test_unigram_ids_are_sentencepiece_s_own(tmp_path: Path) -> None:
    import sentencepiece

    source = load_tokenizer(unigram(tmp_path / "m", "t5"), SILENT)
    path = file_of(source, tmp_path / "vocabulary.gguf")
    judge = sentencepiece.SentencePieceProcessor(model_proto=trained()[0])
    for text, ids in zip(SENTENCES, tokenize_with_llama(path, SENTENCES).ids, strict=True):
        expected = [3 if index == judge.unk_id() else index + 1 for index in judge.encode(text)]
        assert list(ids) == expected


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"byte_fallback": True}, "falls back to bytes"),
        ({"unk_id": None}, "unknown token None"),
        ({"vocab": [["a"]]}, "no list of tokens and scores"),
        ({"vocab": [[token, 0.0] for token in (*SPECIAL, "a", "a")]}, "occurs twice"),
    ],
)
def test_unigram_that_llama_cpp_cannot_do(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        read_tokenizer(unigram(tmp_path / "m", "t5", **changes))


def test_unigram_that_keeps_spaces_fails_the_proof(tmp_path: Path) -> None:
    unigram(tmp_path / "m", "t5")
    path = tmp_path / "m" / "tokenizer.json"
    held = document("t5")
    held["normalizer"] = held["normalizer"]["normalizers"][0]
    path.write_text(json.dumps(held))
    with pytest.raises(ProofError, match="fails on text"):
        load_tokenizer(opened(tmp_path / "m"), SILENT)


def test_more_tokens_than_rows_are_refused_unless_they_are_added_ones(tmp_path: Path) -> None:
    """A mask that has no row is dropped: it cannot be computed. A piece without a row is no small thing."""
    unigram(tmp_path / "m", "xlm-roberta")
    held = document("xlm-roberta")
    held["model"]["vocab"] += [[f"filler{index}", -20.0] for index in range(VOCABULARY - ROWS)]
    held["added_tokens"].append({**held["added_tokens"][-1], "id": VOCABULARY, "content": "<extra>"})
    held["model"]["vocab"].append(["<extra>", 0.0])
    (tmp_path / "m" / "tokenizer.json").write_text(json.dumps(held))
    source = read_tokenizer(opened(tmp_path / "m"))
    assert source.vocabulary == VOCABULARY
    assert "<extra>" not in source.tokenizer_json
    assert MASK in source.tokenizer_json


@pytest.mark.parametrize("kind", ["wordpiece", "xlm-roberta"])
def test_special_tokens_at_the_ends_are_the_same_in_both_forms(tmp_path: Path, kind: str) -> None:
    checkpoint = bert(tmp_path / "m") if kind == "wordpiece" else unigram(tmp_path / "m", "xlm-roberta")
    source = load_tokenizer(checkpoint, SILENT)
    (tmp_path / "tokenizer.json").write_text(source.tokenizer_json, encoding="utf-8")
    vocabulary = load_vocabulary(file_of(source, tmp_path / "vocabulary.gguf"))
    try:
        assert vocabulary.frame() == JsonTokenizer(tmp_path / "tokenizer.json").frame()
        assert vocabulary.frame() == (((2,), (3,)) if kind == "wordpiece" else ((0,), (2,)))
    finally:
        vocabulary.close()


def test_tokens_of_a_wordpiece_are_bytes_of_text(tmp_path: Path) -> None:
    source = read_tokenizer(bert(tmp_path / "m"))
    path = tmp_path / "tokenizer.json"
    path.write_text(source.tokenizer_json, encoding="utf-8")
    tokenizer = JsonTokenizer(path)
    ids = tokenizer.encode("the returned values")
    assert b"".join(map(tokenizer.token_bytes, ids)) == b" the returned values"
    assert tokenizer.token_bytes(2) == b""
