"""Tokenizers over ``tokenizer.json`` and the incremental decoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.errors import BundleError, UsageError
from runtime.tokenizer import JsonTokenizer, TextDecoder, byte_of_character
from tests.tiny_models import trained_tokenizer

TEXTS = ["", "Hello 12345", "größe 🎉 中文", "a\r\n  b\t", "<|im_start|>user\nhi<|im_end|>", "\x00\x7f\ufeff"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> JsonTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(trained_tokenizer(400), encoding="utf-8")
    return JsonTokenizer(path)


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_join_to_the_text(tokenizer: JsonTokenizer, text: str) -> None:
    ids = tokenizer.encode(text, special=False)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.decode(ids) == text


def test_special_tokens_are_recognised_only_when_asked(tokenizer: JsonTokenizer) -> None:
    text = "<|im_start|>a<|im_end|>"
    ids = tokenizer.encode(text)
    assert (ids[0], ids[-1], len(ids)) == (1, 2, 3)
    assert tokenizer.token_bytes(1) == b""
    assert tokenizer.decode(ids) == "a"
    assert tokenizer.decode(ids, special=True) == text
    plain = tokenizer.encode(text, special=False)
    assert 1 not in plain
    assert tokenizer.decode(plain) == text
    assert tokenizer.encode(text) == ids  # the switch does not stick


def test_an_id_without_text_has_no_bytes(tokenizer: JsonTokenizer) -> None:
    assert tokenizer.token_bytes(399_999) == b""


def test_half_a_surrogate_pair_is_a_usage_error(tokenizer: JsonTokenizer) -> None:
    with pytest.raises(UsageError, match="surrogate pair at character 2"):
        tokenizer.encode("ab\ud83d")


def test_sentencepiece_pieces_become_bytes(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models

    vocab = {"<unk>": 0, "<0x0A>": 1, "\u2581hi": 2, "<0xE2>": 3}
    built = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    built.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    built.save(str(tmp_path / "tokenizer.json"))
    tokenizer = JsonTokenizer(tmp_path / "tokenizer.json")
    assert [tokenizer.token_bytes(token) for token in (1, 2, 3)] == [b"\n", b" hi", b"\xe2"]


@pytest.mark.parametrize("content", ["", "{}", "[1, 2]", "not json", '{"model": {"type": "Nothing"}}'])
def test_files_that_are_no_tokenizers(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        JsonTokenizer(path)


def test_missing_file_and_unknown_decoder(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot read"):
        JsonTokenizer(tmp_path / "none.json")
    document = json.loads(trained_tokenizer(400))
    document["decoder"] = {"type": "CTC", "pad_token": "_", "word_delimiter_token": "|", "cleanup": True}
    path = tmp_path / "ctc.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(BundleError, match="CTC"):
        JsonTokenizer(path)


def test_the_byte_alphabet_is_the_library_s() -> None:
    from tokenizers import pre_tokenizers

    assert set(byte_of_character()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_of_character().values()) == list(range(256))
    assert byte_of_character()["Ġ"] == ord(" ")


@given(st.binary(max_size=40), st.integers(1, 5))
def test_text_in_pieces_is_the_text_at_once(data: bytes, step: int) -> None:
    decoder = TextDecoder()
    pieces = [decoder.push(data[start : start + step]) for start in range(0, len(data), step)]
    assert "".join(pieces) + decoder.finish() == data.decode("utf-8", "replace")


def test_no_half_character_is_ever_given_out() -> None:
    decoder = TextDecoder()
    assert [decoder.push(bytes([byte])) for byte in "é🎉".encode()] == ["", "é", "", "", "", "🎉"]
