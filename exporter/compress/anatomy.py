"""Where the parts of a layer are, family by family, and what runs along each axis of their weights.

A cut of the width, the neurons or the heads is the same index along every axis that has them. Data only: no tensors,
no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

Axes = Mapping[str, tuple[str | None, ...]]
"""By module, what runs along each axis of its weight; a bias has the first one."""


@dataclass(frozen=True)
class Anatomy:
    """One kind of model. ``layers`` is the path of the list of layers, the paths after it are within a layer.

    ``down`` reads what the neurons put out, ``output`` what the heads put out, ``stream`` the channels of the width.
    ``neurons`` is the name of their count in the configuration. ``encoder``: makes vectors of texts.
    """

    layers: str
    down: str
    output: str
    stream: str
    axes: Axes
    outer: Axes
    neurons: str = "intermediate_size"
    encoder: bool = False

    def layers_of(self, model: Any) -> Any:
        """The list of layers of a model."""
        return attrgetter(self.layers)(model)

    def place(self, name: str) -> tuple[int, str, str] | None:
        """Layer, module and kind (weight or bias) of a tensor; None for those outside of layers."""
        match = re.fullmatch(re.escape(self.layers) + r"\.(\d+)\.(.+)\.(weight|bias)", name)
        return (int(match.group(1)), match.group(2), match.group(3)) if match else None


_LLAMA = Anatomy(
    layers="model.layers",
    down="mlp.down_proj",
    output="self_attn.o_proj",
    stream="mlp.gate_proj",
    axes={
        "self_attn.q_proj": ("query", "hidden"),
        "self_attn.k_proj": ("key", "hidden"),
        "self_attn.v_proj": ("key", "hidden"),
        "self_attn.o_proj": ("hidden", "query"),
        "self_attn.q_norm": (None,),
        "self_attn.k_norm": (None,),
        "mlp.gate_proj": ("neurons", "hidden"),
        "mlp.up_proj": ("neurons", "hidden"),
        "mlp.down_proj": ("hidden", "neurons"),
        "input_layernorm": ("hidden",),
        "post_attention_layernorm": ("hidden",),
    },
    outer={
        "model.embed_tokens": (None, "hidden"),
        "model.norm": ("hidden",),
        "lm_head": (None, "hidden"),
    },
)
_TABLES: Axes = {
    "embeddings.word_embeddings": (None, "hidden"),
    "embeddings.position_embeddings": (None, "hidden"),
    "embeddings.token_type_embeddings": (None, "hidden"),
    "embeddings.LayerNorm": ("hidden",),
}
_BERT = Anatomy(
    layers="encoder.layer",
    down="output.dense",
    output="attention.output.dense",
    stream="intermediate.dense",
    axes={
        "attention.self.query": ("query", "hidden"),
        "attention.self.key": ("key", "hidden"),
        "attention.self.value": ("key", "hidden"),
        "attention.output.dense": ("hidden", "query"),
        "attention.output.LayerNorm": ("hidden",),
        "intermediate.dense": ("neurons", "hidden"),
        "output.dense": ("hidden", "neurons"),
        "output.LayerNorm": ("hidden",),
    },
    outer=_TABLES,
    encoder=True,
)
_DISTILBERT = Anatomy(
    layers="transformer.layer",
    down="ffn.lin2",
    output="attention.out_lin",
    stream="ffn.lin1",
    axes={
        "attention.q_lin": ("query", "hidden"),
        "attention.k_lin": ("key", "hidden"),
        "attention.v_lin": ("key", "hidden"),
        "attention.out_lin": ("hidden", "query"),
        "sa_layer_norm": ("hidden",),
        "ffn.lin1": ("neurons", "hidden"),
        "ffn.lin2": ("hidden", "neurons"),
        "output_layer_norm": ("hidden",),
    },
    outer=_TABLES,
    neurons="hidden_dim",
    encoder=True,
)

ANATOMIES: Mapping[str, Anatomy] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert"), _BERT),
    "distilbert": _DISTILBERT,
}
"""By ``model_type``: every family that can be pruned."""
POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "camembert")
"""Families whose first position is the row behind the padding token's number."""
