"""The llama family's description: names against the gguf package's own map, settings, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from edgelm.errors import CheckpointError
from exporter.architectures import available, describe
from exporter.architectures.base import COMPUTED, ModelDescription
from exporter.checkpoint import Checkpoint, open_checkpoint, open_source
from tests.tiny_models import make_tiny_llama, write_safetensors


def opened(directory: Path, **config: Any) -> Checkpoint:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return open_checkpoint(open_source(str(directory)))


def described(directory: Path, **config: Any) -> ModelDescription:
    return describe(opened(directory, **config))


def with_tensors(directory: Path, changes: dict[str, np.ndarray[Any, Any] | None]) -> Path:
    checkpoint = open_checkpoint(open_source(str(directory)))
    tensors = {name: checkpoint.load(name) for name in checkpoint.tensors}
    kept = {name: value for name, value in {**tensors, **changes}.items() if value is not None}
    write_safetensors(directory / "model.safetensors", kept, "float32")
    return directory


def test_names_are_the_gguf_packages(tmp_path: Path) -> None:
    description = described(make_tiny_llama(tmp_path / "m", tied=False))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for item in description.tensors:
        assert names.get_name(item.source_name, try_suffixes=(".weight", ".bias")) == item.name
    rotary = {item.name for item in description.tensors if item.interleave}
    assert rotary == {f"blk.{layer}.attn_{letter}.weight" for layer in (0, 1) for letter in "qk"}


def test_counts_and_settings(tmp_path: Path) -> None:
    description = described(make_tiny_llama(tmp_path / "m"), rope_theta=5e5)
    metadata = description.metadata
    assert metadata["llama.attention.head_count"] == 4
    assert metadata["llama.attention.head_count_kv"] == 2
    assert metadata["llama.rope.dimension_count"] == 16
    assert metadata["llama.rope.freq_base"] == 5e5
    assert metadata["llama.feed_forward_length"] == 128
    assert metadata["llama.context_length"] == 1024
    assert description.dimensions.tied


def test_transformers_5_writes_rope_settings_elsewhere(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 7e4}
    metadata = described(make_tiny_llama(tmp_path / "m"), rope_parameters=rope, rope_theta=None).metadata
    assert metadata["llama.rope.freq_base"] == 7e4
    assert metadata["llama.rope.scaling.type"] == "linear"
    assert metadata["llama.rope.scaling.factor"] == 4.0


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


@pytest.mark.reference
def test_llama3_rope_factors_are_transformers_own(tmp_path: Path) -> None:
    description = described(make_tiny_llama(tmp_path / "m", hidden=256, heads=4), rope_scaling=LLAMA3)
    factors = next(item for item in description.tensors if item.name == "rope_freqs.weight")
    assert factors.source_name == COMPUTED
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64, "rope_scaling": LLAMA3}
    config = LlamaConfig(**settings, max_position_embeddings=1024)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 10000.0 ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(plain / factors.values, frequencies.numpy(), rtol=1e-5)
    assert len(set(factors.values)) > 3  # all three regimes are there


def test_biases_are_taken_along(tmp_path: Path) -> None:
    directory = make_tiny_llama(tmp_path / "m", layers=1)
    bias = {"model.layers.0.self_attn.k_proj.bias": np.arange(32, dtype=np.float32)}
    by_name = {item.name: item for item in described(with_tensors(directory, bias)).tensors}
    assert by_name["blk.0.attn_k.bias"].interleave == 16
    assert by_name["blk.0.attn_k.bias"].shape == (32,)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mamba3"}, "architecture 'mamba3', which is not supported"),
        ({"num_hidden_layers": 3}, r"no tensor model\.layers\.2\.input_layernorm\.weight"),
        ({"num_hidden_layers": 1}, "9 tensors that a llama model has no place for"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2', which is no count"),
        ({"num_hidden_layers": 10**6}, "1000000 layers"),
        ({"head_dim": 24}, "do not divide into heads of 24"),
        ({"tie_word_embeddings": False}, r"no tensor lm_head\.weight"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "rotary scaling of type 'spiral'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope' has no place in llama.cpp's llama"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor is missing"),
        ({"rope_theta": -1}, "rope_theta is -1"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is gptq"),
    ],
)
def test_refusals_name_the_setting(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        described(make_tiny_llama(tmp_path / "m"), **config)


def test_layers_of_other_widths_are_named(tmp_path: Path) -> None:
    directory = make_tiny_llama(tmp_path / "m")
    with_tensors(directory, {"model.layers.1.mlp.up_proj.weight": np.zeros((96, 64), np.float32)})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has the shape \(96, 64\)"):
        described(directory)


def test_copy_of_a_tied_head_is_left_out(tmp_path: Path) -> None:
    directory = make_tiny_llama(tmp_path / "m")
    with_tensors(directory, {"lm_head.weight": np.zeros((512, 64), np.float32)})
    assert "output.weight" not in {item.name for item in described(directory).tensors}


def test_what_exists_is_listed(tmp_path: Path) -> None:
    assert "llama" in available()
    with pytest.raises(CheckpointError) as caught:
        described(make_tiny_llama(tmp_path / "m"), model_type="base")
    assert "llama" in (caught.value.hint or "")


def test_gguf_is_described_as_it_stands(smollm2_gguf: Path) -> None:
    description = describe(open_checkpoint(open_source(str(smollm2_gguf))))
    assert description.parameters == 134_515_008
    assert description.dimensions.layers == 30
    assert not any(item.interleave for item in description.tensors)
    assert not any(key.startswith("tokenizer.") for key in description.metadata)
