"""Checkpoints that are wrong or odd, one row each: the one error that names it, or the result that is right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgelm.errors import CheckpointError
from exporter.architectures import describe
from exporter.architectures.base import ModelDescription
from exporter.checkpoint import open_checkpoint, open_source
from exporter.preflight import check_checkpoint
from exporter.tokenizer import read_tokenizer
from tests.tiny_models import make_tiny_llama

Change = Callable[[Path], object]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "m", vocab=320, hidden=32, ffn=48, layers=3)


def checked(directory: Path) -> ModelDescription:
    checkpoint = open_checkpoint(open_source(str(directory)))
    check_checkpoint(checkpoint)
    return describe(checkpoint)


def config(**changes: Any) -> Change:
    """Settings changed; None removes one."""

    def change(directory: Path) -> None:
        path = directory / "config.json"
        document = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))

    return change


def tensors(edit: Callable[[dict[str, Any]], object]) -> Change:
    def change(directory: Path) -> None:
        held = load_file(directory / "model.safetensors")
        edit(held)
        save_file(held, directory / "model.safetensors")

    return change


def text(name: str, content: str) -> Change:
    return lambda directory: (directory / name).write_text(content)


def document(name: str, edit: Callable[[dict[str, Any]], object]) -> Change:
    def change(directory: Path) -> None:
        held = json.loads((directory / name).read_text())
        edit(held)
        (directory / name).write_text(json.dumps(held))

    return change


def sharded(weight_map: Callable[[dict[str, str]], object], *, write: bool = True) -> Change:
    """Two shards and an index whose map is edited."""

    def change(directory: Path) -> None:
        held = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        names = sorted(held)
        places = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(names)}
        for shard in sorted(set(places.values())) if write else ():
            save_file({name: held[name] for name in names if places[name] == shard}, directory / shard)
        weight_map(places)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    return change


LAYER = "model.layers.1."
GATE, NORM = LAYER + "mlp.gate_proj.weight", LAYER + "input_layernorm.weight"
QUERY, EMBEDDING = LAYER + "self_attn.q_proj.weight", "model.embed_tokens.weight"
zeros = np.zeros

WRONG: dict[str, tuple[Change, str]] = {
    "config is no JSON": (text("config.json", "{'a': 1"), "no valid JSON"),
    "config is a list": (text("config.json", "[]"), "no table of settings"),
    "config nested too deep": (text("config.json", "[" * 100_000), "no valid JSON"),
    "adapter": (
        lambda directory: (
            (directory / "config.json").unlink(),
            text("adapter_config.json", '{"peft_type": "LORA"}')(directory),
        ),
        "is an adapter, which changes another model",
    ),
    "tied as text": (config(tie_word_embeddings="false"), "tie_word_embeddings is 'false', which is neither"),
    "weights of 64 bits": (
        tensors(lambda held: held.update({GATE: zeros((48, 32), np.float64)})),
        r"gate_proj\.weight is stored as F64",
    ),
    "no model_type": (config(model_type=None), "has no model_type"),
    "unknown model_type": (config(model_type="mamba3"), "architecture 'mamba3', which is not supported"),
    "module path as model_type": (config(model_type="shared.family"), "which is not supported"),
    "mixture of experts": (config(num_local_experts=8), "num_local_experts is 8"),
    "quantised by another tool": (config(quantization_config={"quant_method": "awq"}), "quantization_config is awq"),
    "other activation": (config(hidden_act="relu"), "hidden_act is 'relu'"),
    "layers as text": (config(num_hidden_layers="3"), "num_hidden_layers is '3', which is no count"),
    "layers beyond number": (config(num_hidden_layers=10**9), "1000000000 layers; the engine takes 512"),
    "negative layers": (config(num_hidden_layers=-1), "num_hidden_layers is -1"),
    "true as a count": (config(num_attention_heads=True), "num_attention_heads is True"),
    "no heads": (config(num_attention_heads=None), "num_attention_heads is missing"),
    "too many layers told": (config(num_hidden_layers=4), r"no tensor model\.layers\.3\..* and 8 more"),
    "too few layers told": (config(num_hidden_layers=2), "9 tensors that a llama model has no place for"),
    "heads that do not divide": (config(head_dim=12), "32 query and 16 key rows do not divide into heads of 12"),
    "odd head size": (config(head_dim=1), "do not divide into heads of 1"),
    "infinite epsilon": (config(rms_norm_eps=float("inf")), "rms_norm_eps is inf, which is no positive number"),
    "context of zero": (config(max_position_embeddings=0), "max_position_embeddings is 0"),
    "rope settings as text": (config(rope_scaling="linear"), "the rope settings are no table"),
    "rope type as a list": (config(rope_scaling={"rope_type": [1]}), r"rotary scaling of type '\[1\]'"),
    "llama3 rope of equal borders": (
        config(
            rope_scaling={"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}
            | {"original_max_position_embeddings": 64}
        ),
        "low_freq_factor and high_freq_factor are equal",
    ),
    "yarn of another kind": (
        config(rope_scaling={"rope_type": "yarn", "factor": 4, "truncate": False}),
        "yarn's truncate is not supported",
    ),
    "yarn with scales that are none": (
        config(rope_scaling={"rope_type": "yarn", "factor": 4, "mscale": "a", "mscale_all_dim": 1}),
        "mscale is 'a', which is no positive number",
    ),
    "no embedding": (tensors(lambda held: held.pop(EMBEDDING)), r"no tensor model\.embed_tokens\.weight"),
    "embedding of one dimension": (
        tensors(lambda held: held.update({EMBEDDING: zeros(320, np.float32)})),
        r"model\.embed_tokens\.weight has the shape \(320,\)",
    ),
    "missing norm": (tensors(lambda held: held.pop(NORM)), r"no tensor model\.layers\.1\.input_layernorm\.weight"),
    "norm of another width": (
        tensors(lambda held: held.update({NORM: zeros(31, np.float32)})),
        r"input_layernorm\.weight has the shape \(31,\), the others imply \(32,\)",
    ),
    "matrix of three dimensions": (
        tensors(lambda held: held.update({GATE: zeros((48, 32, 1), np.float32)})),
        r"gate_proj\.weight has the shape \(48, 32, 1\)",
    ),
    "empty tensor": (
        tensors(lambda held: held.update({QUERY: zeros((0, 32), np.float32)})),
        r"q_proj\.weight has the shape \(0, 32\)",
    ),
    "gate wider than up": (
        tensors(lambda held: held.update({GATE: zeros((64, 32), np.float32)})),
        r"gate_proj\.weight has the shape \(64, 32\), the others imply \(48, 32\)",
    ),
    "untied without a head": (config(tie_word_embeddings=False), r"no tensor lm_head\.weight"),
    "weights as bytes": (
        tensors(lambda held: held.update({GATE: zeros((48, 32), np.uint8)})),
        r"gate_proj\.weight is stored as U8",
    ),
    "a tensor of another model": (
        tensors(lambda held: held.update({"vision.weight": zeros(2, np.float32)})),
        r"1 tensors that a llama model has no place for, as vision\.weight",
    ),
    "weights cut off": (
        lambda directory: (directory / "model.safetensors").write_bytes(
            (directory / "model.safetensors").read_bytes()[:-8]
        ),
        "is truncated",
    ),
    "no weights": (lambda directory: (directory / "model.safetensors").unlink(), r"it has no model\.safetensors"),
    "weights are a link to nothing": (
        lambda directory: (
            (directory / "model.safetensors").unlink(),
            (directory / "model.safetensors").symlink_to("gone"),
        ),
        r"it has no model\.safetensors",
    ),
    "two shards missing": (
        sharded(lambda places: None, write=False),
        r"model-0\.safetensors is missing and 1 more: model-1\.safetensors",
    ),
    "shard outside of the directory": (
        sharded(lambda places: places.update({NORM: "../other.safetensors"})),
        r"'\.\./other\.safetensors', which is no plain safetensors file name",
    ),
    "shard and index disagree": (
        sharded(lambda places: places.update({NORM: "model-0.safetensors", QUERY: "model-0.safetensors"})),
        "disagree on tensor",
    ),
    "tensor in no shard": (
        sharded(lambda places: places.update({"model.ghost": "model-0.safetensors"})),
        r"disagree on tensor model\.ghost",
    ),
    "no tokenizer": (lambda directory: (directory / "tokenizer.json").unlink(), r"has no tokenizer\.json"),
    "tokenizer of another model": (
        document("tokenizer.json", lambda held: held["model"]["vocab"].update({"zz": 320})),
        r"has 321 tokens, the model's embedding 320 rows",
    ),
    "tokenizer is no JSON": (text("tokenizer.json", "\x00"), r"tokenizer\.json is no valid JSON"),
    "token ids beyond number": (
        document("tokenizer.json", lambda held: held["model"]["vocab"].update({"zz": 2**40})),
        r"tokenizer",
    ),
    "end of text outside of the vocabulary": (
        lambda directory: (
            text("tokenizer_config.json", "{}")(directory),
            text("special_tokens_map.json", "{}")(directory),
            text("generation_config.json", '{"eos_token_id": [320, 9999]}')(directory),
        ),
        "eos_token_id is 320, outside of the vocabulary of 320 tokens",
    ),
    "text changed before tokenizing": (
        document(
            "tokenizer.json",
            lambda held: held.update(normalizer={"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}),
        ),
        "changes text before tokenizing",
    ),
    "random merges": (document("tokenizer.json", lambda held: held["model"].update(dropout=0.5)), "drops merges"),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_clear_error(model: Path, name: str) -> None:
    change, message = WRONG[name]
    change(model)
    with pytest.raises(CheckpointError, match=message) as caught:
        checked(model)
    assert caught.value.message.startswith((str(model), "m: ", "m is ", "m has "))


def test_all_problems_are_told_at_once(model: Path) -> None:
    config(hidden_act="relu", rope_scaling={"rope_type": "spiral"}, rms_norm_eps=-1)(model)
    tensors(lambda held: (held.pop(NORM), held.update({GATE: zeros((64, 32), np.uint8)})))(model)
    (model / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="has 7 problems") as caught:
        checked(model)
    for told in (
        "hidden_act is 'relu'",
        "'spiral'",
        "rms_norm_eps is -1",
        "input_layernorm.weight",
        "is stored as U8",
        "has the shape (64, 32)",
        "has no tokenizer.json",
    ):
        assert told in caught.value.message
    assert caught.value.hint


def untied_twin(held: dict[str, Any]) -> None:
    held["lm_head.weight"] = held[EMBEDDING]


def bfloat_buffers(held: dict[str, Any]) -> None:
    held[LAYER + "self_attn.rotary_emb.inv_freq"] = zeros(4, np.float64)


ODD: dict[str, Change] = {
    "copy of a tied head": tensors(untied_twin),
    "buffers that old savers wrote": tensors(bfloat_buffers),
    "rope settings of transformers 5": config(
        rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}
    ),
    "no rope settings": config(rope_scaling={}),
    "a sequence of no normalizers": document(
        "tokenizer.json", lambda held: held.update(normalizer={"type": "Sequence", "normalizers": []})
    ),
    "an empty template": text("chat_template.jinja", ""),
    "settings of training": config(attention_dropout=0.1, use_cache=False, pretraining_tp=1),
    "vocab_size that is not the embedding's": config(vocab_size=7),
    "shards": sharded(lambda places: None),
    "null for a default": config(head_dim=None, num_local_experts=0),
    "dynamic rotation, the same within the context": config(rope_scaling={"rope_type": "dynamic", "factor": 4.0}),
    "added token without a row": document(
        "tokenizer.json",
        lambda held: held["added_tokens"].append({**held["added_tokens"][0], "id": 320, "content": "<picture>"}),
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_checkpoints_are_what_they_would_be_without(model: Path, name: str) -> None:
    plain = checked(model)
    ODD[name](model)
    odd = checked(model)
    assert odd.metadata == plain.metadata
    assert odd.dimensions == plain.dimensions
    assert [item.name for item in odd.tensors] == [item.name for item in plain.tensors]
    words = read_tokenizer(open_checkpoint(open_source(str(model))))
    assert words.vocabulary == 320
    assert "<picture>" not in words.tokenizer_json


def test_table_is_as_large_as_promised() -> None:
    assert len(WRONG) >= 25
