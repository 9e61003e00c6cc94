"""Token identity, proven by llama.cpp's own tokenizer in a child process; and what happens when it fails."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_tiny_llama
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

import exporter.pretokenizers
import exporter.tokenizer
from edgelm.errors import BundleError, EngineError, ProofError
from edgelm.progress import SILENT
from exporter.checkpoint import Checkpoint, open_checkpoint, open_source
from exporter.gguf_header import encode_header
from exporter.texts import hard_corpus
from exporter.tokenizer import load_tokenizer, prove_identity, read_tokenizer
from exporter.vocabulary import tokenize_with_llama

pytestmark = pytest.mark.tiny

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(regex: str | None = None) -> Any:
    if regex is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    parts = [
        pre_tokenizers.Split(Regex(regex), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(parts)


PRE_TOKENIZERS: dict[str, Any] = {
    "smollm": None,  # as the tiny model has it
    "gpt-2": byte_level(),
    "llama-bpe": byte_level(LLAMA3),
    "qwen2": byte_level(LLAMA3.replace("{1,3}", "")),
}


def checkpoint_with(directory: Path, pre_tokenizer: Any = None, *, nfc: bool = False) -> Checkpoint:
    make_tiny_llama(directory, layers=1, hidden=32, heads=2, kv_heads=1, ffn=32, vocab=500)
    if pre_tokenizer is not None:
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        tokenizer.pre_tokenizer = pre_tokenizer
        if nfc:
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.save(str(directory / "tokenizer.json"))
    return open_checkpoint(open_source(str(directory)))


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_pre_tokenizer_is_found_and_survives_the_way_back(tmp_path: Path, name: str) -> None:
    checkpoint = checkpoint_with(tmp_path / "model", PRE_TOKENIZERS[name], nfc=name == "qwen2")
    source = load_tokenizer(checkpoint, SILENT)
    found = source.gguf_metadata["tokenizer.ggml.pre"]
    # Where no token spans what two families cut differently, either is right: what counts is that the ids are.
    assert found == name or name == "llama-bpe"
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(encode_header("llama", {**source.gguf_metadata, "tokenizer.ggml.pre": name}, ()))
    identity = prove_identity(source, path)
    assert identity.identical, identity.first_difference
    assert identity.texts > 150
    assert identity.tokens > 5000

    rebuilt = load_tokenizer(open_checkpoint(open_source(str(path))), SILENT)
    assert rebuilt.gguf_metadata == {**source.gguf_metadata, "tokenizer.ggml.pre": name}
    ours, theirs = (Tokenizer.from_str(item.tokenizer_json) for item in (rebuilt, source))
    for text in hard_corpus(["<|im_start|>", "<|im_end|>"]):
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False).ids == ids
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, skip_special_tokens=False)


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A checkpoint whose merges were learned across all borders of words: any other way to cut gives other tokens."""
    checkpoint = checkpoint_with(tmp_path_factory.mktemp("uncut") / "model")
    path = checkpoint.source.path / "tokenizer.json"
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=497, initial_alphabet=alphabet, show_progress=False)
    learned.train_from_iterator([text for text in hard_corpus([]) for _ in range(2)], trainer)
    document, found = json.loads(path.read_text()), json.loads(learned.to_str())
    document["model"]["vocab"] = {token: index + 3 for token, index in found["model"]["vocab"].items()}
    document["model"]["merges"] = found["model"]["merges"]
    path.write_text(json.dumps(document))
    return open_checkpoint(checkpoint.source)


@pytest.mark.parametrize("name", [family.names[0] for family in exporter.pretokenizers._FAMILIES])
def test_vocabularies_of_gguf_files_are_rebuilt_for_every_way_to_cut(
    uncut: Checkpoint, tmp_path: Path, name: str
) -> None:
    words = read_tokenizer(uncut).gguf_metadata
    path, other = tmp_path / "vocabulary.gguf", tmp_path / "other.gguf"
    path.write_bytes(encode_header("llama", {**words, "tokenizer.ggml.pre": name}, ()))
    source = load_tokenizer(open_checkpoint(open_source(str(path))), SILENT)  # proves it
    assert source.gguf_metadata["tokenizer.ggml.pre"] == name
    other_name = "llama-bpe" if name == "gpt-2" else "gpt-2"
    other.write_bytes(encode_header("llama", {**words, "tokenizer.ggml.pre": other_name}, ()))
    assert not prove_identity(source, other).identical  # so the corpus tells ways to cut apart


def test_wrong_pre_tokenizer_is_noticed(tmp_path: Path) -> None:
    source = read_tokenizer(checkpoint_with(tmp_path / "model", byte_level()))
    path = tmp_path / "wrong.gguf"
    path.write_bytes(encode_header("llama", {**source.gguf_metadata, "tokenizer.ggml.pre": "llama-bpe"}, ()))
    identity = prove_identity(source, path)
    assert not identity.identical
    assert identity.first_difference is not None
    assert "the source gives" in identity.first_difference


def test_wrong_number_of_tokens_is_noticed(tmp_path: Path) -> None:
    source = load_tokenizer(checkpoint_with(tmp_path / "model"), SILENT)
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(encode_header("llama", source.gguf_metadata, ()))
    identity = prove_identity(replace(source, vocabulary=501), path)
    assert identity.first_difference == "the source has 501 tokens, the artefact 500"


def test_tokenizer_that_llama_cpp_cannot_imitate_fails_the_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = checkpoint_with(tmp_path / "model", pre_tokenizers.ByteLevel(add_prefix_space=True))
    monkeypatch.setattr(exporter.tokenizer, "likely_candidates", lambda rules: ("gpt-2", "no-such-name"))
    with pytest.raises(ProofError, match="the closest, 'gpt-2', fails on text '0'") as caught:
        load_tokenizer(checkpoint, SILENT)
    assert caught.value.exit_code == 3


def test_vocabulary_that_kills_llama_cpp_is_a_sentence(tmp_path: Path) -> None:
    source = load_tokenizer(checkpoint_with(tmp_path / "model"), SILENT)
    tokens = list(source.gguf_metadata["tokenizer.ggml.tokens"])
    tokens[300] = tokens[301]  # llama.cpp asserts that tokens are unique, and aborts
    path = tmp_path / "deadly.gguf"
    path.write_bytes(encode_header("llama", {**source.gguf_metadata, "tokenizer.ggml.tokens": tokens}, ()))
    with pytest.raises(EngineError, match=r"deadly\.gguf: it died of SIGABRT"):
        tokenize_with_llama(path, ["a"])


def test_invalid_header_never_reaches_llama_cpp(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 64)
    with pytest.raises(BundleError, match="announces"):
        tokenize_with_llama(path, ["a"])
