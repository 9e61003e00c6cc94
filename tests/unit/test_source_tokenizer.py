"""Reading the tokenizer of a checkpoint: what is taken over, what is filled in, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import CHAT_TEMPLATE, make_tiny_llama
from tokenizers import Tokenizer

from edgelm.errors import CheckpointError
from exporter.checkpoint import open_checkpoint, open_source
from exporter.pretokenizers import likely_candidates, rebuild_tokenizer_json
from exporter.tokenizer import SourceTokenizer, read_tokenizer


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "model", layers=1, vocab=400)


def read(directory: Path) -> SourceTokenizer:
    return read_tokenizer(open_checkpoint(open_source(str(directory))))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def test_takes_over_vocabulary_template_and_special_tokens(checkpoint: Path) -> None:
    source = read(checkpoint)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    assert source.vocabulary == 400
    assert source.gguf_metadata["tokenizer.ggml.tokens"] == [tokenizer.id_to_token(index) for index in range(400)]
    assert source.gguf_metadata["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    ids = {key.split(".")[-1]: value for key, value in source.gguf_metadata.items() if key.endswith("_token_id")}
    assert ids == {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "padding_token_id": 2}
    assert source.gguf_metadata["tokenizer.ggml.add_bos_token"] is False
    assert source.chat_template == source.gguf_metadata["tokenizer.chat_template"] == CHAT_TEMPLATE
    assert source.generation_config == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def test_template_file_wins_over_the_configuration(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}\n", encoding="utf-8")
    assert read(checkpoint).chat_template == "{{ messages }}\n"


def test_list_of_templates_gives_the_default_one(checkpoint: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    edit(checkpoint / "tokenizer_config.json", lambda document: document.update(chat_template=named))
    assert read(checkpoint).chat_template == "D"


def test_further_end_token_ends_a_turn(checkpoint: Path) -> None:
    edit(checkpoint / "generation_config.json", lambda document: document.update(eos_token_id=[2, 0]))
    metadata = read(checkpoint).gguf_metadata
    assert (metadata["tokenizer.ggml.eos_token_id"], metadata["tokenizer.ggml.eot_token_id"]) == (2, 0)


def test_missing_ids_come_from_the_model_configuration(checkpoint: Path) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        (checkpoint / name).unlink()
    source = read(checkpoint)
    assert source.gguf_metadata["tokenizer.ggml.eos_token_id"] == 2
    assert source.generation_config["eos_token_id"] == 2
    assert source.chat_template is None
    assert "tokenizer.chat_template" not in source.gguf_metadata


def test_truncation_of_training_does_not_cut_prompts(checkpoint: Path) -> None:
    limit = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    edit(checkpoint / "tokenizer.json", lambda document: document.update(truncation=limit))
    tokenizer = Tokenizer.from_str(read(checkpoint).tokenizer_json)
    assert len(tokenizer.encode("one two three four five six seven").ids) > 6


def test_added_bos_is_found_by_behaviour(checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    metadata = read(checkpoint).gguf_metadata
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_eos_token"] is False
    rebuilt = Tokenizer.from_str(rebuild_tokenizer_json({**metadata, "tokenizer.ggml.pre": "smollm"}, "it"))
    assert rebuilt.encode("Hi 42").ids == tokenizer.encode("Hi 42").ids


def test_rows_without_a_token_are_filled(tmp_path: Path) -> None:
    larger = make_tiny_llama(tmp_path / "larger", layers=1, vocab=420)
    smaller = make_tiny_llama(tmp_path / "smaller", layers=1, vocab=400)
    (larger / "tokenizer.json").write_bytes((smaller / "tokenizer.json").read_bytes())
    source = read(larger)
    assert source.vocabulary == 420
    assert source.gguf_metadata["tokenizer.ggml.tokens"][400:402] == ["[PAD400]", "[PAD401]"]
    assert source.gguf_metadata["tokenizer.ggml.token_type"][399:401] == [1, 5]
    (smaller / "tokenizer.json").write_bytes(
        (make_tiny_llama(tmp_path / "third", layers=1, vocab=420) / "tokenizer.json").read_bytes()
    )
    with pytest.raises(CheckpointError, match="has 420 tokens, the model's embedding 400 rows"):
        read(smaller)


WRONG: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda document: document["model"].update(type="WordLevel"), "of type WordLevel"),
    (
        lambda document: document.update(pre_tokenizer={"type": "Whitespace"}),
        "neither a BPE of bytes nor one that falls back to them",
    ),
    (lambda document: document.update(normalizer={"type": "Lowercase"}), "in a way that llama.cpp cannot"),
    (lambda document: document["model"].update(dropout=0.1), "drops merges at random"),
    (lambda document: document["model"].update(merges=[]), "has no merges"),
    (lambda document: document.update(added_tokens=[{"id": "x"}]), "holds no valid tokenizer"),
    (lambda document: document.pop("model"), "only BPE, WordPiece and Unigram are supported"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_refuses_what_cannot_be_translated(
    checkpoint: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(checkpoint / "tokenizer.json", change)
    with pytest.raises(CheckpointError, match=message):
        read(checkpoint)


def test_refuses_missing_and_malformed_files(checkpoint: Path) -> None:
    (checkpoint / "tokenizer_config.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(CheckpointError, match="is no table of settings"):
        read(checkpoint)
    (checkpoint / "tokenizer.json").write_bytes(b'{"model": ')
    with pytest.raises(CheckpointError, match="is no valid JSON"):
        read(checkpoint)
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "tokenizer.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json, only tokenizer\.model"):
        read(checkpoint)


def test_likely_candidates_put_the_family_first_and_forget_none() -> None:
    digits = {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, {"type": "ByteLevel"}]}
    assert likely_candidates(digits)[0] == "smollm"
    assert likely_candidates({"type": "ByteLevel"})[0] == "gpt-2"
    assert likely_candidates({"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}"}})[0] == "llama-bpe"
    assert len({frozenset(likely_candidates(rules)) for rules in (digits, None)}) == 1


def test_unknown_pre_tokenizer_of_a_gguf_is_named(checkpoint: Path) -> None:
    metadata = {**read(checkpoint).gguf_metadata, "tokenizer.ggml.pre": "tomorrow"}
    with pytest.raises(CheckpointError, match=r"pre-tokenizer 'tomorrow'.*smollm"):
        rebuild_tokenizer_json(metadata, "model.gguf")
