"""Tiny random BERT checkpoints in the layout of sentence-transformers, made without torch.

The tokenizer is a WordPiece trained on the spot. Weights spread enough for the vectors of different texts to differ.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.tiny_models import write_safetensors

WORDPIECE_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = 600
TEXTS = (
    "A cat sat on the mat.",
    "The statement returns a value",
    "one",
    "numbers, strings and tuples: what is the type?",
)


@lru_cache
def wordpiece(vocabulary: int = VOCABULARY, *, lowercase: bool = True) -> str:
    """``tokenizer.json`` of a WordPiece as BERT has it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary, special_tokens=list(WORDPIECE_SPECIAL), show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(topics.values())[:120_000]], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    document: str = tokenizer.to_str()
    return document


def write_wordpiece(directory: Path, vocabulary: int = VOCABULARY, *, lowercase: bool = True) -> None:
    """Write the tokenizer files of a checkpoint."""
    (directory / "tokenizer.json").write_text(wordpiece(vocabulary, lowercase=lowercase), encoding="utf-8")
    names = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
    config = {"tokenizer_class": "BertTokenizer", **{f"{name}_token": token for name, token in names.items()}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_modules(directory: Path, pooling: str = "mean_tokens", *, normalize: bool = True, longest: int = 64) -> None:
    """Write what sentence-transformers keeps beside a model."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": index, "name": str(index), "path": paths[index], "type": f"sentence_transformers.models.{kind}"}
        for index, kind in enumerate(kinds)
    ]
    (directory / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (directory / "1_Pooling").mkdir(exist_ok=True)
    names = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken")
    modes: dict[str, Any] = {f"pooling_mode_{name}": name == pooling for name in names}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(modes), encoding="utf-8")
    (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": longest}), encoding="utf-8")


def bert_weights(config: dict[str, Any], seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    """Tensors of a BERT of this configuration under their Hugging Face names."""
    generator = np.random.default_rng(seed)
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    tensors: dict[str, npt.NDArray[np.float32]] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        weight = generator.standard_normal((rows, columns), dtype=np.float32) / np.float32(np.sqrt(columns))
        tensors[f"{name}.weight"] = weight
        tensors[f"{name}.bias"] = np.float32(0.1) * generator.standard_normal(rows, dtype=np.float32)

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = 1 + np.float32(0.1) * generator.standard_normal(hidden, dtype=np.float32)
        tensors[f"{name}.bias"] = np.float32(0.1) * generator.standard_normal(hidden, dtype=np.float32)

    for name, rows in (("word", config["vocab_size"]), ("position", config["max_position_embeddings"])):
        tensors[f"embeddings.{name}_embeddings.weight"] = generator.standard_normal((rows, hidden), dtype=np.float32)
    types = generator.standard_normal((config["type_vocab_size"], hidden), dtype=np.float32)
    tensors["embeddings.token_type_embeddings.weight"] = types
    norm("embeddings.LayerNorm")
    for layer in range(config["num_hidden_layers"]):
        prefix = f"encoder.layer.{layer}."
        for part in ("query", "key", "value"):
            linear(f"{prefix}attention.self.{part}", hidden, hidden)
        linear(f"{prefix}attention.output.dense", hidden, hidden)
        norm(f"{prefix}attention.output.LayerNorm")
        linear(f"{prefix}intermediate.dense", wide, hidden)
        linear(f"{prefix}output.dense", hidden, wide)
        norm(f"{prefix}output.LayerNorm")
    linear("pooler.dense", hidden, hidden)
    return tensors


def make_tiny_bert(
    directory: Path, *, hidden: int = 64, layers: int = 2, pooling: str = "mean_tokens", seed: int = 0
) -> Path:
    """Write a random sentence model that transformers and the exporter read."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
        "max_position_embeddings": 96,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_safetensors(directory / "model.safetensors", bert_weights(config, seed), "float32")
    write_wordpiece(directory)
    write_modules(directory, pooling)
    return directory
