"""Encoders without an engine: what the files beside the weights say, GGUF keys, steps, figures of the proof."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_encoders import VOCABULARY, make_tiny_bert, write_modules

from edgelm.bundle import TokenIdentity
from edgelm.errors import CheckpointError, DoesNotFitError, ProofError, UsageError
from exporter.architectures import available, describe, family
from exporter.architectures.base import ModelDescription
from exporter.checkpoint import open_checkpoint, open_source
from exporter.embedding_quality import PASSAGES, compare, cut_passages, pool
from exporter.mixes import WeightShape, is_quantizable
from exporter.options import ExportOptions
from exporter.plan import resolve
from exporter.texts import Text, evaluation_text
from runtime.encoder import steps
from targets.profile import load_profile

ENCODERS = ("bert", "camembert", "distilbert", "roberta", "xlm_roberta")
IDENTITY = TokenIdentity(identical=True, texts=1, tokens=1)


def described(directory: Path) -> ModelDescription:
    return describe(open_checkpoint(open_source(str(directory))))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bert(tmp_path_factory.mktemp("bert") / "model", hidden=32, layers=1)


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(original, tmp_path / "model"))


def test_which_families_are_encoders() -> None:
    assert tuple(name for name in available() if family(name).encoder) == ENCODERS


def test_description(model: Path) -> None:
    found = described(model)
    assert found.architecture == "bert"
    assert found.encoder is not None
    assert found.encoder.record.model_dump() == {"pooling": "mean", "normalized": True, "dimensions": 32}
    assert found.encoder.context == 64
    assert found.structure is not None
    assert not found.structure.causal
    keys = {
        "bert.attention.causal": False,
        "bert.pooling_type": 1,
        "tokenizer.ggml.token_type_count": 2,
        "bert.context_length": 96,
        "bert.attention.layer_norm_epsilon": 1e-12,
    }
    assert {name: found.metadata[name] for name in keys} == keys
    names = {item.name for item in found.tensors}
    assert {"token_embd_norm.bias", "token_types.weight", "blk.0.layer_output_norm.weight"} <= names
    assert not any("pooler" in item.source_name for item in found.tensors)
    assert not found.dimensions.tied


@pytest.mark.parametrize(
    ("mode", "normalize", "expected"),
    [
        ("cls_token", True, ("cls", True)),
        ("lasttoken", False, ("last", False)),
        ("mean_tokens", False, ("mean", False)),
        ("mean_sqrt_len_tokens", True, ("mean", True)),  # a factor, which normalisation removes
    ],
)
def test_pooling(model: Path, mode: str, normalize: bool, expected: tuple[str, bool]) -> None:
    write_modules(model, mode, normalize=normalize)
    encoder = described(model).encoder
    assert encoder is not None
    assert (encoder.record.pooling, encoder.record.normalized) == expected


@pytest.mark.parametrize(("mode", "normalize"), [("max_tokens", True), ("mean_sqrt_len_tokens", False), ("none", True)])
def test_pooling_that_no_engine_does(model: Path, mode: str, normalize: bool) -> None:
    write_modules(model, mode, normalize=normalize)
    with pytest.raises(CheckpointError, match="which is not supported"):
        described(model)


def test_several_kinds_of_pooling_at_once(model: Path) -> None:
    edit(model / "1_Pooling" / "config.json", pooling_mode_cls_token=True)
    with pytest.raises(CheckpointError, match="pooling_mode_cls_token and pooling_mode_mean_tokens"):
        described(model)


@pytest.mark.parametrize(
    ("document", "match"),
    [
        ('{"a": 1}', "no list of steps"),
        ("[", "no valid JSON"),
        ('[{"type": "x.Transformer"}, {"type": "x.Pooling", "path": "../../etc"}]', "no plain name"),
        ('[{"type": "x.Transformer"}, {"type": "x.Pooling", "path": "2_Pooling"}]', "missing"),
        ('[{"type": "x.Transformer"}, {"type": "x.Pooling", "path": "1_Pooling"}, {"type": "x.Dense"}]', "Dense; only"),
        ("[]", "only Transformer, Pooling and Normalize"),
    ],
)
def test_steps_that_make_no_sense(model: Path, document: str, match: str) -> None:
    (model / "modules.json").write_text(document)
    with pytest.raises(CheckpointError, match=match):
        described(model)


def test_without_modules_it_says_what_it_assumes(model: Path) -> None:
    (model / "modules.json").unlink()
    (model / "sentence_bert_config.json").unlink()
    found = described(model)
    assert found.encoder is not None
    assert found.encoder.context == 96
    assert "mean of all tokens" in " ".join(found.notes)


def test_prompts_are_told(model: Path) -> None:
    prompts = {"query": "query: ", "document": ""}
    (model / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    assert "query: 'query: '" in " ".join(described(model).notes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"num_attention_heads": 3}, "do not divide into heads"),
        ({"max_position_embeddings": 128}, "has the shape"),
        ({"num_hidden_layers": 2}, "it has no tensor encoder.layer.1"),
    ],
)
def test_checkpoints_that_do_not_fit(model: Path, changes: dict[str, Any], match: str) -> None:
    edit(model / "config.json", **changes)
    with pytest.raises(CheckpointError, match=match):
        described(model)


def test_roberta_s_positions_begin_behind_the_padding_s_number(model: Path) -> None:
    edit(model / "config.json", model_type="roberta", pad_token_id=5)
    found = described(model)
    positions = next(item for item in found.tensors if item.name == "position_embd.weight")
    assert (positions.shape, positions.skipped) == ((90, 32), 6)
    assert found.metadata["bert.context_length"] == 90
    edit(model / "config.json", pad_token_id="x")
    with pytest.raises(CheckpointError, match="pad_token_id is 'x'"):
        described(model)


def test_a_plan_has_no_cache_and_no_decode(model: Path) -> None:
    profile = load_profile("raspberry-pi-5")
    checkpoint = open_checkpoint(open_source(str(model)))
    plan = resolve(ExportOptions(str(model), quant="Q8_0"), checkpoint, profile)
    assert plan.predicted.ram_parts.kv_bytes == 0
    assert plan.predicted.decode_tps is None
    assert plan.predicted.prefill_tps is not None
    assert plan.context.value == 64
    assert plan.shape is not None
    assert plan.shape.lookup_tensor == "token_embd.weight"
    types = {item.name: item.type for item in plan.tensors}
    assert types["position_embd.weight"] == types["token_types.weight"] == "F32"
    assert types["blk.0.attn_q.weight"] == "Q8_0"
    with pytest.raises(UsageError, match="--max-kl has no meaning"):
        resolve(ExportOptions(str(model), quant="Q8_0", max_kl=0.1), checkpoint, profile)
    with pytest.raises(UsageError, match="--min-decode-tps has no meaning"):
        resolve(ExportOptions(str(model), quant="auto", min_decode_tps=3), checkpoint, profile)
    onnx = resolve(ExportOptions(str(model), format="onnx", quant="int8"), checkpoint, profile)
    assert (onnx.format, onnx.quant, onnx.predicted.decode_tps) == ("onnx", "int8", None)
    with pytest.raises(UsageError, match="more than the 96 tokens"):
        resolve(ExportOptions(str(model), quant="Q8_0", context=97), checkpoint, profile)
    with pytest.raises(DoesNotFitError):
        resolve(ExportOptions(str(model), quant="Q8_0", max_artifact_bytes=10), checkpoint, profile)


def test_what_is_added_to_embeddings_is_never_quantised() -> None:
    for name in ("position_embd.weight", "token_types.weight"):
        assert not is_quantizable(WeightShape(name, (512, 384)))
    assert is_quantizable(WeightShape("token_embd.weight", (512, 384)))


def test_steps_are_full_and_in_order() -> None:
    sequences = [[0] * length for length in (3, 3, 3, 8, 1, 1, 1, 1, 1)]
    assert steps(sequences, batch=8, most=4) == [range(2), range(2, 3), range(3, 4), range(4, 8), range(8, 9)]
    assert steps([], batch=8, most=4) == []


def test_passages_have_many_lengths_and_their_frame(model: Path) -> None:
    checkpoint = open_checkpoint(open_source(str(model)))
    passages = cut_passages(evaluation_text(), checkpoint, 64)
    assert len(passages) == PASSAGES
    assert {(ids[0], ids[-1]) for ids in passages} == {(2, 3)}
    lengths = {len(ids) for ids in passages}
    assert max(lengths) == 64
    assert min(lengths) == 6
    assert len(lengths) > 5
    assert max(max(ids) for ids in passages) < VOCABULARY
    with pytest.raises(UsageError, match="are needed for"):
        cut_passages(Text("short", "a few words"), checkpoint, 64)


def test_figures_of_vectors() -> None:
    expected = np.array([[1, 0], [0, 2], [1, 1]], np.float32)
    same = compare(expected, 3 * expected, "r", Text("t", "x"), 9, IDENTITY)
    assert same.cosine_min == pytest.approx(1)
    assert same.error_max == pytest.approx(0, abs=1e-7)
    assert same.nearest_agreement == 1
    turned = compare(expected, np.array([[1, 0], [2, 0], [1, 1]], np.float32), "r", Text("t", "x"), 9, IDENTITY)
    assert turned.cosine_min == pytest.approx(0)
    assert turned.cosine_mean == pytest.approx(2 / 3)
    assert turned.error_max == pytest.approx(1)
    with pytest.raises(ProofError, match="no finite numbers"):
        compare(expected, np.full((3, 2), np.nan, np.float32), "r", Text("t", "x"), 9, IDENTITY)


def test_pooling_of_states() -> None:
    states = np.array([[1, 2], [3, 4], [5, 9]], np.float32)
    assert pool(states, "mean").tolist() == [3, 5]
    assert pool(states, "cls").tolist() == [1, 2]
    assert pool(states, "last").tolist() == [5, 9]
