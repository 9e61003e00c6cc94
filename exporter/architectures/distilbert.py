"""DistilBERT: BERT under other names and without types of tokens."""

from gguf.constants import MODEL_TENSOR

from exporter.architectures.shared.family import Family, Rule, Target

_LAYER = "transformer.layer.{layer}."

FAMILY = Family(
    targets=(Target("bert", square=True),),
    tensors=(
        Rule("embeddings.word_embeddings", MODEL_TENSOR.TOKEN_EMBD, ("vocabulary", "hidden")),
        Rule("embeddings.position_embeddings", MODEL_TENSOR.POS_EMBD, ("positions", "hidden")),
        Rule("embeddings.LayerNorm", MODEL_TENSOR.TOKEN_EMBD_NORM, ("hidden",), bias="required"),
    ),
    layer_tensors=(
        Rule(_LAYER + "attention.q_lin", MODEL_TENSOR.ATTN_Q, ("query", "hidden"), bias="required"),
        Rule(_LAYER + "attention.k_lin", MODEL_TENSOR.ATTN_K, ("key", "hidden"), bias="required"),
        Rule(_LAYER + "attention.v_lin", MODEL_TENSOR.ATTN_V, ("key", "hidden"), bias="required"),
        Rule(_LAYER + "attention.out_lin", MODEL_TENSOR.ATTN_OUT, ("hidden", "query"), bias="required"),
        Rule(_LAYER + "sa_layer_norm", MODEL_TENSOR.ATTN_OUT_NORM, ("hidden",), bias="required"),
        Rule(_LAYER + "ffn.lin1", MODEL_TENSOR.FFN_UP, ("feed_forward", "hidden"), bias="required"),
        Rule(_LAYER + "ffn.lin2", MODEL_TENSOR.FFN_DOWN, ("hidden", "feed_forward"), bias="required"),
        Rule(_LAYER + "output_layer_norm", MODEL_TENSOR.LAYER_OUT_NORM, ("hidden",), bias="required"),
    ),
    prefixes=("distilbert.", ""),
    # The head of the pre-training task.
    ignored=tuple(
        f"vocab_{name}.{kind}" for name in ("transform", "layer_norm", "projector") for kind in ("weight", "bias")
    ),
    settings={"num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"},
    expected={"activation": ("gelu",)},
    norm="layer",
    epsilon=("layer_norm_eps", 1e-12),  # of the class; configurations do not have it
    activation="gelu",
    norm_place="after",
    tied=True,
    rope=None,
    encoder=True,
)
