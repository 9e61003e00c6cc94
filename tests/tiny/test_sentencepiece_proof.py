"""Tokenizers as SentencePiece writes them: their ids are those of llama.cpp, in every form, there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sentencepiece_tokenizer import VOCABULARY, Style, document, write_sentencepiece
from tiny_models import make_tiny_llama
from tokenizers import Tokenizer

from edgelm.errors import CheckpointError, ProofError
from edgelm.progress import SILENT
from exporter.checkpoint import Checkpoint, open_checkpoint, open_source
from exporter.gguf_header import encode_header
from exporter.options import ExportOptions
from exporter.pipeline import export
from exporter.texts import hard_corpus
from exporter.tokenizer import load_tokenizer, prove_identity, read_tokenizer
from exporter.vocabulary import tokenize_with_llama
from runtime.engine import EngineOptions
from runtime.model import open_model

pytestmark = pytest.mark.tiny
STYLES: tuple[Style, ...] = ("llama", "gemma")
EVERY: tuple[Style, ...] = (*STYLES, "metaspace", "mistral")


def checkpoint_with(directory: Path, style: Style, **changes: Any) -> Checkpoint:
    make_tiny_llama(directory, layers=1, hidden=32, heads=2, kv_heads=1, ffn=32, vocab=VOCABULARY)
    write_sentencepiece(directory, style)
    path = directory / "tokenizer.json"
    held = json.loads(path.read_text(encoding="utf-8"))
    held["model"].update(changes)
    path.write_text(json.dumps(held), encoding="utf-8")
    return open_checkpoint(open_source(str(directory)))


@pytest.mark.parametrize("style", STYLES)
def test_ids_are_proven_and_survive_the_way_back(tmp_path: Path, style: Style) -> None:
    source = load_tokenizer(checkpoint_with(tmp_path / "m", style), SILENT)
    assert source.gguf_metadata["tokenizer.ggml.model"] == "llama"
    assert source.gguf_metadata["tokenizer.ggml.add_space_prefix"] is (style != "gemma")
    assert source.gguf_metadata["tokenizer.ggml.add_bos_token"] is True
    assert source.gguf_metadata["tokenizer.ggml.token_type"][:5] == [2, 3, 3, 6, 6]
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(encode_header("llama", source.gguf_metadata, ()))
    identity = prove_identity(source, path)
    assert identity.identical, identity.first_difference
    assert identity.tokens > 5000
    rebuilt = load_tokenizer(open_checkpoint(open_source(str(path))), SILENT)
    ours, theirs = (Tokenizer.from_str(item.tokenizer_json) for item in (rebuilt, source))
    for text in hard_corpus(["<s>", "</s>"]):
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False).ids == ids
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("style", ["metaspace", "mistral"])
def test_space_that_depends_on_the_text_is_the_caller_s(tmp_path: Path, style: Style) -> None:
    """Metaspace puts no space before a text that starts with one, llama.cpp always or never does."""
    source = load_tokenizer(checkpoint_with(tmp_path / "m", style), SILENT)
    assert source.gguf_metadata["tokenizer.ggml.add_space_prefix"] is False
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(encode_header("llama", source.gguf_metadata, ()))
    identity = prove_identity(source, path)
    assert identity.identical, identity.first_difference
    tokenizer = Tokenizer.from_str(source.tokenizer_json)

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    # As whoever runs the bare file has to write it: the library's own ids, asked with and without the space.
    asked = [" a list", " a list", "<s>a list", "<s> a list"]
    found = [list(item) for item in tokenize_with_llama(path, asked).ids]
    assert found[:2] == [ids("a list"), ids(" a list")]
    assert found[2 if style == "mistral" else 3] == ids("<s>a list")
    rebuilt = load_tokenizer(open_checkpoint(open_source(str(path))), SILENT)  # raises when it is not proven
    assert "Prepend" not in rebuilt.tokenizer_json


def test_merges_that_llama_cpp_would_not_make_fail_the_proof(tmp_path: Path) -> None:
    merges = document("llama")["model"]["merges"]
    one_each = list({left + right: [left, right] for left, right in reversed(merges)}.values())[::-1]
    checkpoint = checkpoint_with(tmp_path / "m", "llama", merges=one_each)
    with pytest.raises(ProofError, match="fails on text"):
        load_tokenizer(checkpoint, SILENT)


def test_missing_bytes_are_named(tmp_path: Path) -> None:
    vocabulary = document("llama")["model"]["vocab"]
    renamed = {("zzz" if token == "<0x41>" else token): index for token, index in vocabulary.items()}
    with pytest.raises(CheckpointError, match="has no token for the byte <0x41>"):
        read_tokenizer(checkpoint_with(tmp_path / "m", "llama", vocab=renamed))


@pytest.mark.parametrize("style", EVERY)
def test_whole_export(tmp_path: Path, style: Style) -> None:
    checkpoint_with(tmp_path / "m", style)
    options = ExportOptions(str(tmp_path / "m"), target="raspberry-pi-5", quant="Q8_0", verify=False)
    bundle = export(options, tmp_path / "bundle")
    model = open_model(bundle.path, EngineOptions(context=256))
    try:
        ids = model.tokenizer.encode("a list of integers, 17 €")
        assert model.tokenizer.decode(ids) == "a list of integers, 17 €"
    finally:
        model.close()
