"""Phi 1, 1.5 and 2: attention and feed-forward network side by side behind one norm; even logits have biases."""

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
    targets=(Target("phi2", square=True, head="required"),),
    tensors=(
        Rule("model.embed_tokens", MODEL_TENSOR.TOKEN_EMBD, ("vocabulary", "hidden")),
        Rule("model.final_layernorm", MODEL_TENSOR.OUTPUT_NORM, ("hidden",), bias="required"),
    ),
    layer_tensors=(
        Rule(LAYER + "input_layernorm", MODEL_TENSOR.ATTN_NORM, ("hidden",), bias="required"),
        *attention_tensors("required"),
        Rule(LAYER + "self_attn.dense", MODEL_TENSOR.ATTN_OUT, ("hidden", "query"), bias="required"),
        Rule(LAYER + "mlp.fc1", MODEL_TENSOR.FFN_UP, ("feed_forward", "hidden"), bias="required"),
        Rule(LAYER + "mlp.fc2", MODEL_TENSOR.FFN_DOWN, ("hidden", "feed_forward"), bias="required"),
    ),
    expected={"hidden_act": ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "qk_layernorm": (False,)},
    norm="layer",
    epsilon=("layer_norm_eps", 1e-5),
    activation="gelu_tanh",
    rope=RopeSettings(share=("partial_rotary_factor", 0.5)),
    parallel=True,
    head_bias=True,
)
