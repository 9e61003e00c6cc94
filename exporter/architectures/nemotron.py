"""Nemotron and Minitron, dense: layer norms that add to one, squared ReLU without a gate, half of a head rotates."""

from gguf.constants import MODEL_TENSOR

from exporter.architectures.shared.family import (
    LAYER,
    Family,
    RopeSettings,
    Rule,
    Target,
    attention_tensors,
)

FAMILY = Family(
    targets=(Target("nemotron", square=True, head="required"),),
    tensors=(
        Rule("model.embed_tokens", MODEL_TENSOR.TOKEN_EMBD, ("vocabulary", "hidden")),
        Rule("model.norm", MODEL_TENSOR.OUTPUT_NORM, ("hidden",), bias="required", offset=1.0),
    ),
    layer_tensors=(
        Rule(LAYER + "input_layernorm", MODEL_TENSOR.ATTN_NORM, ("hidden",), bias="required", offset=1.0),
        *attention_tensors("optional"),
        Rule(LAYER + "self_attn.o_proj", MODEL_TENSOR.ATTN_OUT, ("hidden", "query"), bias="optional"),
        Rule(LAYER + "post_attention_layernorm", MODEL_TENSOR.FFN_NORM, ("hidden",), bias="required", offset=1.0),
        Rule(LAYER + "mlp.up_proj", MODEL_TENSOR.FFN_UP, ("feed_forward", "hidden"), bias="optional"),
        Rule(LAYER + "mlp.down_proj", MODEL_TENSOR.FFN_DOWN, ("hidden", "feed_forward"), bias="optional"),
    ),
    expected={"hidden_act": ("relu2",)},
    norm="layer",
    epsilon=("norm_eps", 1e-5),
    activation="relu2",
    rope=RopeSettings(share=("partial_rotary_factor", 0.5)),
)
