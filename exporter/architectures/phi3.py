"""Phi 3 and 4, the dense text models: queries, keys and values in one matrix, gate and up in another."""

from gguf.constants import MODEL_TENSOR

from exporter.architectures.shared.family import (
    LAYER,
    LLAMA_LIKE_GLOBALS,
    SILU,
    Family,
    Rule,
    Target,
    Windows,
)

FAMILY = Family(
    targets=(Target("phi3", square=True, factors=("longrope",)),),
    tensors=LLAMA_LIKE_GLOBALS,
    layer_tensors=(
        Rule(LAYER + "input_layernorm", MODEL_TENSOR.ATTN_NORM, ("hidden",)),
        Rule(LAYER + "self_attn.qkv_proj", MODEL_TENSOR.ATTN_QKV, ("qkv", "hidden")),
        Rule(LAYER + "self_attn.o_proj", MODEL_TENSOR.ATTN_OUT, ("hidden", "query")),
        Rule(LAYER + "post_attention_layernorm", MODEL_TENSOR.FFN_NORM, ("hidden",)),
        Rule(LAYER + "mlp.gate_up_proj", MODEL_TENSOR.FFN_UP, ("gate_up", "hidden")),
        Rule(LAYER + "mlp.down_proj", MODEL_TENSOR.FFN_DOWN, ("hidden", "feed_forward")),
    ),
    expected=SILU,
    epsilon=("rms_norm_eps", 1e-5),
    windows=Windows("all"),
)
