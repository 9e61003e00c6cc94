"""Tiny random Llama checkpoints in Hugging Face layout, made without torch, for the tests of every room.

The weights are random but not flat: logits spread over several nats, so that a proof has something to lose. The
tokenizer is a byte-level BPE trained on the spot, digits split one by one, with a ChatML template.
"""

from __future__ import annotations

import json
import struct
from functools import lru_cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

Dtype = Literal["float32", "float16", "bfloat16"]

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@lru_cache
def trained_tokenizer(vocab: int) -> str:
    """``tokenizer.json`` of a byte-level BPE with exactly ``vocab`` tokens (300 or more)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(topics.values())[:200_000]], trainer)
    if tokenizer.get_vocab_size() != vocab:
        raise ValueError(f"a tokenizer of {vocab} tokens cannot be trained, only {tokenizer.get_vocab_size()}")
    document: str = tokenizer.to_str()
    return document


def write_tokenizer(directory: Path, vocab: int) -> None:
    """Write the tokenizer files of a checkpoint."""
    (directory / "tokenizer.json").write_text(trained_tokenizer(vocab), encoding="utf-8")
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    names["unk_token"] = "<|endoftext|>"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE, **names}
    _write_json(directory / "tokenizer_config.json", config)
    _write_json(directory / "special_tokens_map.json", names)
    _write_json(directory / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})


def write_safetensors(path: Path, tensors: dict[str, npt.NDArray[np.float32]], dtype: Dtype) -> None:
    """Write float32 arrays in the given type (bfloat16 rounds to nearest even)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs, offset = [], 0
    for name, values in tensors.items():
        blob = _encode(values, dtype)
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[dtype],
            "shape": list(values.shape),
            "data_offsets": [offset, offset + len(blob)],
        }
        blobs.append(blob)
        offset += len(blob)
    document = json.dumps(header).encode()
    document += b" " * (-len(document) % 8)
    path.write_bytes(struct.pack("<Q", len(document)) + document + b"".join(blobs))


def _encode(values: npt.NDArray[np.float32], dtype: Dtype) -> bytes:
    if dtype != "bfloat16":
        return values.astype(dtype).tobytes()
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    """Tensors of a Llama of this configuration under their Hugging Face names."""
    generator = np.random.default_rng(seed)
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]

    def linear(rows: int, row_length: int) -> npt.NDArray[np.float32]:
        return generator.standard_normal((rows, row_length), dtype=np.float32) / np.float32(np.sqrt(row_length))

    def norm() -> npt.NDArray[np.float32]:
        return 1 + np.float32(0.1) * generator.standard_normal(hidden, dtype=np.float32)

    tensors = {"model.embed_tokens.weight": np.float32(2) * linear(config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        tensors[prefix + "input_layernorm.weight"] = norm()
        tensors[prefix + "self_attn.q_proj.weight"] = linear(queries, hidden)
        tensors[prefix + "self_attn.k_proj.weight"] = linear(keys, hidden)
        tensors[prefix + "self_attn.v_proj.weight"] = linear(keys, hidden)
        tensors[prefix + "self_attn.o_proj.weight"] = linear(hidden, queries)
        tensors[prefix + "post_attention_layernorm.weight"] = norm()
        tensors[prefix + "mlp.gate_proj.weight"] = linear(ffn, hidden)
        tensors[prefix + "mlp.up_proj.weight"] = linear(ffn, hidden)
        tensors[prefix + "mlp.down_proj.weight"] = linear(hidden, ffn)
    tensors["model.norm.weight"] = norm()
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = np.float32(2) * linear(config["vocab_size"], hidden)
    return tensors


def make_tiny_llama(
    directory: Path,
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int = 128,
    vocab: int = 512,
    tied: bool = True,
    dtype: Dtype = "float32",
) -> Path:
    """Write a random Llama checkpoint that transformers, the exporter and llama.cpp's converter all read."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "torch_dtype": dtype,
    }
    _write_json(directory / "config.json", config)
    write_safetensors(directory / "model.safetensors", random_weights(config), dtype)
    write_tokenizer(directory, vocab)
    return directory


def _write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=1), encoding="utf-8")
