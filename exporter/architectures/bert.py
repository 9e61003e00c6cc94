"""BERT and the sentence models made of it (MiniLM, BGE, E5): norms behind every part, learned positions."""

from gguf.constants import MODEL_TENSOR

from exporter.architectures.shared.family import Family, Rule, Target

_LAYER = "encoder.layer.{layer}."

TENSORS = (
    Rule("embeddings.word_embeddings", MODEL_TENSOR.TOKEN_EMBD, ("vocabulary", "hidden")),
    Rule("embeddings.position_embeddings", MODEL_TENSOR.POS_EMBD, ("positions", "hidden")),
    Rule("embeddings.token_type_embeddings", MODEL_TENSOR.TOKEN_TYPES, ("types", "hidden"), optional=True),
    Rule("embeddings.LayerNorm", MODEL_TENSOR.TOKEN_EMBD_NORM, ("hidden",), bias="required"),
)
LAYER_TENSORS = (
    Rule(_LAYER + "attention.self.query", MODEL_TENSOR.ATTN_Q, ("query", "hidden"), bias="required"),
    Rule(_LAYER + "attention.self.key", MODEL_TENSOR.ATTN_K, ("key", "hidden"), bias="required"),
    Rule(_LAYER + "attention.self.value", MODEL_TENSOR.ATTN_V, ("key", "hidden"), bias="required"),
    Rule(_LAYER + "attention.output.dense", MODEL_TENSOR.ATTN_OUT, ("hidden", "query"), bias="required"),
    Rule(_LAYER + "attention.output.LayerNorm", MODEL_TENSOR.ATTN_OUT_NORM, ("hidden",), bias="required"),
    Rule(_LAYER + "intermediate.dense", MODEL_TENSOR.FFN_UP, ("feed_forward", "hidden"), bias="required"),
    Rule(_LAYER + "output.dense", MODEL_TENSOR.FFN_DOWN, ("hidden", "feed_forward"), bias="required"),
    Rule(_LAYER + "output.LayerNorm", MODEL_TENSOR.LAYER_OUT_NORM, ("hidden",), bias="required"),
)
# The head of the pre-training task and the layer behind [CLS] that goes with it: no part of a text's vector.
HEADS = (
    "position_ids",
    *(f"pooler.dense.{kind}" for kind in ("weight", "bias")),
    *(f"predictions.{name}" for name in ("bias", "decoder.weight", "decoder.bias")),
    *(f"transform.{part}" for part in ("dense.weight", "dense.bias", "LayerNorm.weight", "LayerNorm.bias")),
    *(f"transform.LayerNorm.{kind}" for kind in ("gamma", "beta")),
    *(f"seq_relationship.{kind}" for kind in ("weight", "bias")),
)
SETTINGS = {
    # llama.cpp computes all of them by the tanh formula, from a table of 16-bit values.
    "hidden_act": ("gelu", "gelu_new", "gelu_python", "gelu_pytorch_tanh"),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
}

FAMILY = Family(
    targets=(Target("bert", square=True),),
    tensors=TENSORS,
    layer_tensors=LAYER_TENSORS,
    prefixes=("bert.", ""),
    ignored=HEADS,
    expected=SETTINGS,
    norm="layer",
    epsilon=("layer_norm_eps", 1e-12),
    activation="gelu",
    norm_place="after",
    tied=True,
    rope=None,
    encoder=True,
)
