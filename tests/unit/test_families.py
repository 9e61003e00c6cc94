"""Families as data: what llama.cpp can hold is kept, what it cannot is refused by name, from headers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgelm.errors import CheckpointError
from exporter.architectures import available, describe, family, gguf_architectures
from exporter.architectures.base import LayerShape, ModelDescription, split_rows
from exporter.checkpoint import open_checkpoint, open_source

HIDDEN, HEAD, VOCABULARY = 32, 8, 40
EVEN = (LayerShape(4, 2, 48),) * 4
COMMON = {"num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 128, "n_layer": 4, "n_head": 4}
DECODERS = tuple(name for name in available() if not family(name).encoder)
# What has another meaning when it is left out than when it is there.
MADE_TO_FIT = {"granitemoehybrid": {"layer_types": ["attention"] * 4, "position_embedding_type": "rope"}}


def made(directory: Path, model_type: str, shapes: tuple[LayerShape, ...] = EVEN, **config: Any) -> ModelDescription:
    """Describe a checkpoint of zeros that has every tensor of the family, in layers of these shapes; those without
    heads of keys have a convolution."""
    kind, held = family(model_type), {}
    described = {"model_type": model_type, "tie_word_embeddings": True, "n_positions": 128, **COMMON, **config}
    for layer in (None, *range(len(shapes))):
        shape = shapes[layer or 0]
        query, key = shape.heads * HEAD, shape.kv_heads * HEAD
        widths = {
            "vocabulary": VOCABULARY,
            "hidden": HIDDEN,
            "positions": 128,
            "query": query,
            "key": key,
            "head": HEAD,
        }
        widths |= {"qkv": query + 2 * key, "feed_forward": shape.feed_forward, "gate_up": 2 * shape.feed_forward}
        widths |= {"mixed": 3 * HIDDEN, "taps": 3}
        absent = "convolution" if shape.kv_heads else "attention"
        for rule in kind.tensors if layer is None else kind.layer_tensors:
            if rule.only == absent:
                continue
            rows = [widths[name] for name in rule.widths]
            rows[0] *= 2 if rule.half else 1
            name = kind.prefixes[0] + rule.source.format(layer=layer)
            rows = [rows[0], 1, *rows[1:]] if rule.flat else rows
            held[f"{name}.weight"] = np.zeros(rows[::-1] if rule.transposed else rows, np.float32)
            if rule.bias == "required":
                held[f"{name}.bias"] = np.zeros(rows[0], np.float32)
    if kind.head_bias:
        held[f"{kind.head}.bias"] = np.zeros(VOCABULARY, np.float32)
    directory.mkdir(exist_ok=True)
    save_file(held, directory / "model.safetensors")
    described = {"head_dim": HEAD, **MADE_TO_FIT.get(model_type, {}), **described}
    if kind.text_config:
        described = {"model_type": model_type, kind.text_config: config.get(kind.text_config, described)}
    (directory / "config.json").write_text(json.dumps(described))
    return describe(open_checkpoint(open_source(str(directory))))


@pytest.mark.parametrize("model_type", DECODERS)
def test_every_name_is_one_that_the_architecture_has(model_type: str, tmp_path: Path) -> None:
    description = made(tmp_path / "m", model_type)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == description.architecture)
    known = {gguf.TENSOR_NAMES[kind].format(bid=layer) for kind in gguf.MODEL_TENSORS[number] for layer in range(4)}
    assert {item.name.rsplit(".", 1)[0] for item in description.tensors} <= known
    assert description.architecture in gguf_architectures()
    assert description.dimensions.heads == 4
    assert description.dimensions.feed_forward == 48
    assert description.structure is not None
    assert len(description.structure.windows) == 4
    assert all(key.startswith(("general.", f"{description.architecture}.")) for key in description.metadata)


def test_layers_of_their_own_widths_become_arrays(tmp_path: Path) -> None:
    shapes = (LayerShape(4, 2, 48), LayerShape(2, 1, 40), LayerShape(2, 2, 16), LayerShape(4, 1, 3))
    for model_type in ("llama", "mistral", "qwen2"):
        description = made(tmp_path / model_type, model_type, shapes)
        assert description.architecture == "deci"
        assert description.dimensions.uneven == shapes
        assert description.dimensions.kv_heads_total == 6
        assert description.metadata["deci.attention.head_count"] == [4, 2, 2, 4]
        assert description.metadata["deci.attention.head_count_kv"] == [2, 1, 2, 1]
        assert description.metadata["deci.feed_forward_length"] == [48, 40, 16, 3]
        assert any("deci" in note for note in description.notes)


@pytest.mark.parametrize("model_type", sorted(set(DECODERS) - {"llama", "mistral", "qwen2", "helium"}))
def test_layers_that_no_graph_can_hold_are_named(model_type: str, tmp_path: Path) -> None:
    shapes = (*EVEN[:2], LayerShape(4, 2, 40), LayerShape(4, 2, 44))
    with pytest.raises(CheckpointError, match="layer 2 has 40, layer 3 has 44, others 48 feed-forward rows") as caught:
        made(tmp_path / "m", model_type, shapes)
    assert "pad them with zeros" in (caught.value.hint or "")


def test_fewer_heads_than_a_graph_wants(tmp_path: Path) -> None:
    shapes = (LayerShape(2, 1, 48),) * 4
    assert made(tmp_path / "q", "qwen2", shapes).architecture == "llama"
    assert made(tmp_path / "g", "gemma2", shapes).architecture == "gemma2"
    with pytest.raises(CheckpointError, match=r"layer 0 has 16, llama.cpp's starcoder2 takes 32 rows of queries"):
        made(tmp_path / "s", "starcoder2", shapes)


def test_a_window_that_the_graph_lacks_ends_the_context(tmp_path: Path) -> None:
    for model_type, config in (
        ("mistral", {"sliding_window": 50}),
        ("phi3", {"sliding_window": 50}),
        ("starcoder2", {"sliding_window": 50}),
        ("qwen2", {"sliding_window": 50, "use_sliding_window": True, "max_window_layers": 2}),
    ):
        description = made(tmp_path / model_type, model_type, **config)
        assert description.dimensions.context_trained == 50
        assert description.metadata[f"{description.architecture}.context_length"] == 50
        assert any("ends at 50 tokens instead of 128" in note for note in description.notes)
    switched_off = made(tmp_path / "off", "qwen2", sliding_window=50, use_sliding_window=False)
    assert switched_off.dimensions.context_trained == 128
    assert not switched_off.notes


def test_windows_of_gemma_are_kept(tmp_path: Path) -> None:
    gemma2 = made(tmp_path / "a", "gemma2", sliding_window=50)
    assert gemma2.metadata["gemma2.attention.sliding_window"] == 50
    assert gemma2.metadata["gemma2.attention.sliding_window_pattern"] == [True, False, True, False]
    kinds = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    gemma3 = made(tmp_path / "b", "gemma3_text", sliding_window=50, layer_types=kinds)
    assert gemma3.structure is not None
    assert gemma3.structure.windows == (0, 0, 50, 0)
    assert gemma3.dimensions.context_trained == 128
    with pytest.raises(CheckpointError, match="layer_types is no list of 4"):
        made(tmp_path / "c", "gemma3_text", layer_types=kinds[:3])


def test_structure_says_what_a_graph_must_do(tmp_path: Path) -> None:
    gemma = made(tmp_path / "a", "gemma2", query_pre_attn_scalar=2 * HEAD, final_logit_softcapping=30.0)
    assert gemma.structure is not None
    assert gemma.structure.embedding_scale == pytest.approx(HIDDEN**0.5)
    assert gemma.structure.logit_softcap == 30.0
    queries = next(item for item in gemma.tensors if item.name == "blk.0.attn_q.weight")
    assert queries.scale * gemma.structure.attention_scale == pytest.approx((2 * HEAD) ** -0.5)
    norm = next(item for item in gemma.tensors if item.name == "blk.0.attn_norm.weight")
    assert (norm.scale, norm.offset) == (1.0, 1.0)
    neox = made(tmp_path / "b", "gpt_neox", rotary_pct=0.5, rotary_emb_base=5000).structure
    assert neox is not None
    assert neox.rotary is not None
    assert (neox.rotary.size, neox.rotary.theta, neox.rotary.adjacent) == (HEAD // 2, 5000.0, False)
    assert (neox.norm, neox.gated, neox.parallel_residual, neox.query_norm) == ("layer", False, True, "none")
    granite = made(tmp_path / "c", "granite", residual_multiplier=0.2, attention_multiplier=0.1).structure
    assert granite is not None
    assert (granite.residual_scale, granite.attention_scale, granite.gated) == (0.2, 0.1, True)
    assert made(tmp_path / "d", "gpt2").structure.rotary is None  # type: ignore[union-attr]
    assert made(tmp_path / "e", "olmo2").structure.query_norm == "all"  # type: ignore[union-attr]


def test_layers_that_are_no_attention_are_named(tmp_path: Path) -> None:
    kinds = ["attention", "mamba", "attention", "attention"]
    with pytest.raises(CheckpointError, match="it has layers of kind mamba"):
        made(tmp_path / "g", "granitemoehybrid", layer_types=kinds)
    with pytest.raises(CheckpointError, match="text_config is no table"):
        made(tmp_path / "s", "gemma3", text_config=[])
    with pytest.raises(CheckpointError, match="64 layers for one with attention windows"):
        made(tmp_path / "e", "exaone4", num_hidden_layers=64)


def test_layers_with_a_convolution_have_no_heads_of_keys(tmp_path: Path) -> None:
    kinds = ["conv", "full_attention", "conv", "full_attention"]
    shapes = tuple(LayerShape(4, 2 * (kind != "conv"), 48) for kind in kinds)
    for name, config in (("new", {"layer_types": kinds}), ("old", {"full_attn_idxs": [1, 3]})):
        description = made(tmp_path / name, "lfm2", shapes, **config)
        assert description.metadata["lfm2.attention.head_count_kv"] == [0, 2, 0, 2]
        assert description.metadata["lfm2.attention.head_count"] == 4
        assert description.metadata["lfm2.shortconv.l_cache"] == 3
        assert description.structure is not None
        assert description.structure.convolutions == (0, 2)
        assert (description.dimensions.kv_heads, description.dimensions.kv_heads_total) == (2, 4)
        assert description.dimensions.uneven == shapes
        assert not description.dimensions.differing
        taps = next(item for item in description.tensors if item.name == "blk.0.shortconv.conv.weight")
        assert taps.shape == (HIDDEN, 3)
    with pytest.raises(CheckpointError, match="layer_types is no list of 4"):
        made(tmp_path / "wrong", "lfm2", shapes, layer_types=[*kinds[:3], "mamba"])
    with pytest.raises(CheckpointError, match="conv_bias is True"):
        made(tmp_path / "biased", "lfm2", shapes, layer_types=kinds, conv_bias=True)


def test_a_head_that_is_there_although_the_embedding_is_it_is_told(tmp_path: Path) -> None:
    made(tmp_path / "m", "llama")
    held = load_file(tmp_path / "m" / "model.safetensors")
    save_file({**held, "lm_head.weight": held["model.embed_tokens.weight"]}, tmp_path / "m" / "model.safetensors")
    description = describe(open_checkpoint(open_source(str(tmp_path / "m"))))
    assert description.dimensions.tied
    assert description.notes == ("lm_head.weight is left out: by config.json the embedding is the output matrix too",)


def test_settings_that_published_configurations_leave_out(tmp_path: Path) -> None:
    settings = {"head_dim": HEAD, "num_hidden_layers": 4, "sliding_window": 16}
    dimensions = made(tmp_path / "g", "gemma3", text_config=settings).dimensions
    assert (dimensions.heads, dimensions.kv_heads, dimensions.context_trained) == (4, 2, 131072)


def test_pruned_smollm3_must_keep_its_rhythm(tmp_path: Path) -> None:
    assert made(tmp_path / "a", "smollm3", no_rope_layers=[1, 1, 1, 0]).structure is not None
    with pytest.raises(CheckpointError, match="remove layers in groups of four"):
        made(tmp_path / "b", "smollm3", no_rope_layers=[1, 1, 0, 1])


@pytest.mark.parametrize(
    ("model_type", "config", "message"),
    [
        ("cohere2", {"sliding_window": None}, "no layer has an attention window, llama.cpp's cohere2 needs one"),
        (
            "olmo3",
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 2e4}}},
            "rotate by two bases, llama.cpp's olmo2 has one",
        ),
        ("nemotron", {"hidden_act": "silu"}, "hidden_act is 'silu'"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm is True"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("olmo2", {"rope_scaling": {"rope_type": "llama3"}}, "'llama3' has no place in llama.cpp's olmo2"),
        ("phi3", {"rope_scaling": {"type": "longrope", "long_factor": [1]}}, "long_factor is no list of 4 numbers"),
        ("gpt_neox", {"rotary_pct": 3}, "24 of the 8 elements of a head rotate"),
        ("granite", {"logits_scaling": "16"}, "logits_scaling is '16', which is no positive number"),
        ("gemma2", {"tie_word_embeddings": False}, r"no tensor lm_head\.weight"),
    ],
)
def test_settings_that_have_no_place(model_type: str, config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        made(tmp_path / "m", model_type, **config)


def test_rows_head_by_head_become_queries_then_keys_then_values() -> None:
    rows = np.array([["q0"], ["q1"], ["k0"], ["k1"], ["v0"], ["v1"], ["Q0"], ["Q1"], ["K0"], ["K1"], ["V0"], ["V1"]])
    assert "".join(split_rows(rows, 2)[:, 0]) == "q0q1Q0Q1k0k1K0K1v0v1V0V1"
