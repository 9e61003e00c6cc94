"""A vocabulary cut for a text: it is still cut as before, any text can still be written, and an export proves both."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from edgelm.cli.app import run_cli
from edgelm.errors import CheckpointError, UsageError
from exporter.checkpoint import open_checkpoint, open_source
from exporter.compress import decoders as decoders_module
from exporter.compress.pipeline import compress, proposal
from exporter.compress.run import CompressOptions
from exporter.compress.vocabulary import check_vocabulary, choose_tokens, pairs_of
from exporter.options import ExportOptions
from exporter.pipeline import export
from exporter.texts import calibration_text, hard_corpus
from exporter.tokenizer import SourceTokenizer, read_tokenizer
from tests import sentencepiece_tokenizer, unigram_tokenizer
from tests.tiny_encoders import make_tiny_bert
from tests.tiny_models import make_tiny_llama

pytestmark = [pytest.mark.tiny, pytest.mark.reference]
DOMAIN = "\n\n".join(calibration_text().content[:20_000].split("\n\n")[:40])


@pytest.fixture(scope="module")
def teacher_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("teacher"), layers=3, vocab=1500)


@pytest.fixture(scope="module")
def words(teacher_directory: Path) -> SourceTokenizer:
    return read_tokenizer(open_checkpoint(open_source(str(teacher_directory))))


def spoken(tokenizer_json: str, text: str) -> list[str]:
    """The tokens of a text as they are written."""
    tokens: list[str] = Tokenizer.from_str(tokenizer_json).encode(text, add_special_tokens=False).tokens
    return tokens


def sentencepiece_words(tmp_path: Path, style: Any) -> SourceTokenizer:
    directory = make_tiny_llama(tmp_path / style, vocab=sentencepiece_tokenizer.VOCABULARY)
    sentencepiece_tokenizer.write_sentencepiece(directory, style)
    return read_tokenizer(open_checkpoint(open_source(str(directory))))


@pytest.mark.parametrize("style", ["bytes", "llama", "metaspace"])
def test_a_text_whose_tokens_stay_is_cut_as_before(words: SourceTokenizer, tmp_path: Path, style: str) -> None:
    source = words if style == "bytes" else sentencepiece_words(tmp_path, style)
    text = DOMAIN if style == "bytes" else DOMAIN[:1500]
    count = source.vocabulary - 100
    cut = choose_tokens(source, [text], count)
    assert len(cut.kept) == count
    assert cut.before == cut.after
    assert spoken(cut.tokenizer_json, text) == spoken(source.tokenizer_json, text)
    old = Tokenizer.from_str(source.tokenizer_json).encode(text, add_special_tokens=False).ids
    new = Tokenizer.from_str(cut.tokenizer_json).encode(text, add_special_tokens=False).ids
    assert [cut.kept[index] for index in new] == old


@pytest.mark.parametrize("style", ["bytes", "llama", "metaspace"])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_any_text_can_still_be_written(words: SourceTokenizer, tmp_path: Path, style: str, share: float) -> None:
    """Even with nothing left that is not needed: texts come back as the whole tokenizer gives them back."""
    source = words if style == "bytes" else sentencepiece_words(tmp_path, style)
    with pytest.raises(UsageError) as raised:
        check_vocabulary(source, 1)
    least = int((raised.value.hint or "").split()[4])
    count = least + int(share * (source.vocabulary - least))
    cut = choose_tokens(source, ["of the"], count)
    assert len(cut.kept) == count
    whole, smaller = (Tokenizer.from_str(item) for item in (source.tokenizer_json, cut.tokenizer_json))
    special = [item.content for item in whole.get_added_tokens_decoder().values()]
    for text in hard_corpus(special):
        back = [
            tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
            for tokenizer in (whole, smaller)
        ]
        assert back[0] == back[1]


def test_every_token_that_stays_can_be_merged_and_no_merge_leads_nowhere(words: SourceTokenizer) -> None:
    cut = choose_tokens(words, [DOMAIN[:3000]], 700)
    document = json.loads(cut.tokenizer_json)
    vocabulary, special = document["model"]["vocab"], {item["content"] for item in document["added_tokens"]}
    assert sorted(vocabulary.values()) == list(range(700))
    made = {first + second for first, second in pairs_of(document["model"])}
    for token in vocabulary:
        assert token in made or len(token) == 1 or token in special
    for first, second in pairs_of(document["model"]):
        assert {first, second, first + second} <= vocabulary.keys()


def test_what_a_text_uses_most_stays_and_fewer_tokens_make_it_longer(words: SourceTokenizer) -> None:
    lengths = [choose_tokens(words, [DOMAIN], count).after for count in (400, 700, 1000, 1500)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]
    first, second = "import module import module " * 50, "the value of the value of " * 50
    for text, other in ((first, second), (second, first)):
        cut = choose_tokens(words, [text], 300)
        assert cut.before == cut.after
        smaller = Tokenizer.from_str(cut.tokenizer_json)
        assert len(smaller.encode(other).ids) > len(Tokenizer.from_str(words.tokenizer_json).encode(other).ids)


def test_models_that_take_whole_words_without_merging(words: SourceTokenizer) -> None:
    document = json.loads(words.tokenizer_json)
    document["model"]["ignore_merges"] = True
    source = SourceTokenizer(words.gguf_metadata, json.dumps(document), None, words.generation_config, words.vocabulary)
    cut = choose_tokens(source, [DOMAIN[:3000]], 900)
    assert spoken(cut.tokenizer_json, DOMAIN[:3000]) == spoken(source.tokenizer_json, DOMAIN[:3000])


def test_from_a_teacher_to_a_bundle_that_speaks_fewer_tokens(
    teacher_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decoders_module, "EVALUATION_TOKENS", 600)
    text = tmp_path / "domain.txt"
    text.write_text(DOMAIN)
    output = tmp_path / "student"
    typed = ["compress", str(teacher_directory), "--layers", "2", "--vocabulary", "1024", "--text", str(text)]
    typed += ["--tokens", "512", "--length", "64", "--batch", "4", "-o", str(output), "--json"]
    assert run_cli(typed) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["vocabulary"] == 1024
    assert any("1024 tokens stayed" in item for item in document["remarks"])
    before, after = document["comparisons"][-2:]
    assert (before["stage"], after["stage"]) == ("distilled", "1024 tokens")
    assert after["tokens"] >= before["tokens"]
    assert after["bits_per_byte_teacher"] == before["bits_per_byte_teacher"]
    assert 0 < after["kl_mean"] < 2 * before["kl_mean"]
    assert after["bits_per_byte"] == pytest.approx(before["bits_per_byte"], rel=0.5)
    bundle = export(ExportOptions(source=str(output), quant="Q8_0"), tmp_path / "bundle")
    quality = bundle.manifest.quality
    assert quality is not None
    assert quality.token_identity.identical
    assert quality.chat is not None
    assert bundle.manifest.plan.shape is not None
    assert bundle.manifest.plan.shape.vocabulary == 1024
    assert run_cli(["run", str(bundle.path), "Hello", "--max-tokens", "4"]) == 0


def test_rows_and_numbers_are_those_of_the_tokens_that_stayed(teacher_directory: Path, tmp_path: Path) -> None:
    """Ids of ends and of special tokens in every file name the same tokens as before."""
    text = tmp_path / "domain.txt"
    text.write_text(DOMAIN)
    document = json.loads((teacher_directory / "tokenizer.json").read_text())
    moved = make_tiny_llama(tmp_path / "teacher", layers=1, vocab=1500, tied=False)
    # As of models whose special tokens come last: their numbers have to change.
    shifted = {token: (index - 3) % 1500 for token, index in document["model"]["vocab"].items()}
    document["model"]["vocab"] = shifted
    for item in document["added_tokens"]:
        item["id"] = shifted[item["content"]]
    (moved / "tokenizer.json").write_text(json.dumps(document))
    ends = {"bos_token_id": shifted["<|im_start|>"], "eos_token_id": [shifted["<|im_end|>"], shifted["<|endoftext|>"]]}
    (moved / "generation_config.json").write_text(json.dumps(ends))
    config = json.loads((moved / "config.json").read_text())
    changed = {"bos_token_id": shifted["<|im_start|>"], "eos_token_id": shifted["<|im_end|>"], "pad_token_id": 1498}
    (moved / "config.json").write_text(json.dumps({**config, **changed}))
    settings = json.loads((moved / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {
        str(item["id"]): {"content": item["content"]} for item in document["added_tokens"]
    }
    (moved / "tokenizer_config.json").write_text(json.dumps(settings))
    options = CompressOptions(str(moved), vocabulary=900, texts=(text,), tokens=0, length=64)
    student = compress(options, tmp_path / "student").path
    vocabulary = json.loads((student / "tokenizer.json").read_text())["model"]["vocab"]
    written = {name: json.loads((student / name).read_text()) for name in ("config.json", "generation_config.json")}
    assert written["config.json"]["vocab_size"] == 900
    for document in written.values():
        assert document["bos_token_id"] == vocabulary["<|im_start|>"]
    assert written["config.json"]["eos_token_id"] == vocabulary["<|im_end|>"]
    assert written["config.json"]["pad_token_id"] == vocabulary[next(t for t, i in shifted.items() if i == 1498)]
    assert written["generation_config.json"]["eos_token_id"] == [vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"]]
    decoder = json.loads((student / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {entry["content"]: int(index) for index, entry in decoder.items()} == {
        name: vocabulary[name] for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    }
    teacher, cut = (open_checkpoint(open_source(str(item))) for item in (moved, student))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        ours, theirs = cut.load(name), teacher.load(name)
        for token in ("<|im_end|>", "e", "\u0120the"):
            assert np.abs(ours[vocabulary[token]] - theirs[shifted[token]]).max() < 0.02  # bfloat16
    bundle = export(ExportOptions(source=str(student), quant="Q8_0"), tmp_path / "bundle")
    assert bundle.manifest.quality is not None
    assert bundle.manifest.quality.token_identity.identical


@pytest.mark.parametrize("style", ["llama", "mistral"])
def test_sentencepiece_vocabularies_are_proven_too(tmp_path: Path, style: Any) -> None:
    teacher = make_tiny_llama(tmp_path / "teacher", layers=1, vocab=sentencepiece_tokenizer.VOCABULARY)
    sentencepiece_tokenizer.write_sentencepiece(teacher, style)
    options = CompressOptions(str(teacher), vocabulary=500, tokens=0, length=64)
    student = compress(options, tmp_path / "student")
    assert student.record.vocabulary == 500
    bundle = export(ExportOptions(source=str(student.path), quant="Q8_0"), tmp_path / "bundle")
    assert bundle.manifest.quality is not None
    assert bundle.manifest.quality.token_identity.identical


def test_an_encoder_speaks_fewer_pieces(tmp_path: Path) -> None:
    teacher = make_tiny_bert(tmp_path / "teacher", layers=2)
    text = tmp_path / "domain.txt"
    text.write_text(DOMAIN)
    options = CompressOptions(str(teacher), vocabulary=400, texts=(text,), tokens=0, length=64)
    student = compress(options, tmp_path / "student")
    whole, cut = student.record.comparisons
    assert (whole.stage, cut.stage) == ("pruned", "400 tokens")
    assert whole.cosine_mean == pytest.approx(1)  # nothing else was asked for
    assert 0.5 < cut.cosine_mean < 1
    bundle = export(ExportOptions(source=str(student.path), quant="F16"), tmp_path / "bundle")
    assert bundle.manifest.embedding_quality is not None
    assert bundle.manifest.embedding_quality.token_identity.identical


def test_a_shape_for_a_device_counts_the_tokens_that_stay(teacher_directory: Path) -> None:
    free = CompressOptions(str(teacher_directory), target="raspberry-pi-4-2gb", quant="Q8_0")
    sizes = []
    for count in (None, 500):
        found = proposal(replace(free, vocabulary=count))[2]
        assert found is not None
        sizes.append(found.plan.artifact_bytes)
    assert sizes[0] - sizes[1] == 1000 * 64 * 34 // 32  # rows of 64 numbers in blocks of 32 that take 34 bytes


def test_what_cannot_be_cut_is_refused(words: SourceTokenizer, teacher_directory: Path, tmp_path: Path) -> None:
    for count, message in ((2000, "the teacher has 1500 tokens"), (200, "special tokens and those that any text")):
        with pytest.raises(UsageError, match=message):
            compress(CompressOptions(str(teacher_directory), vocabulary=count), tmp_path / "student")
    document = unigram_tokenizer.document("t5")
    source = SourceTokenizer(words.gguf_metadata, json.dumps(document), None, {}, words.vocabulary)
    with pytest.raises(CheckpointError, match="compete by score"):
        check_vocabulary(source, 400)
