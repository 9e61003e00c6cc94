"""GLM 4 and GLM Edge: gate and up in one matrix, half of a head rotates, partners side by side."""

from gguf.constants import MODEL_TENSOR

from exporter.architectures.shared.family import (
    LAYER,
    LLAMA_LIKE_GLOBALS,
    SILU,
    Family,
    RopeSettings,
    Rule,
    Target,
    attention_tensors,
)

FAMILY = Family(
    targets=(Target("chatglm", adjacent=True, square=True),),
    tensors=LLAMA_LIKE_GLOBALS,
    layer_tensors=(
        Rule(LAYER + "input_layernorm", MODEL_TENSOR.ATTN_NORM, ("hidden",)),
        *attention_tensors("optional"),
        Rule(LAYER + "self_attn.o_proj", MODEL_TENSOR.ATTN_OUT, ("hidden", "query")),
        Rule(LAYER + "post_attention_layernorm", MODEL_TENSOR.FFN_NORM, ("hidden",)),
        Rule(LAYER + "mlp.gate_up_proj", MODEL_TENSOR.FFN_UP, ("gate_up", "hidden")),
        Rule(LAYER + "mlp.down_proj", MODEL_TENSOR.FFN_DOWN, ("hidden", "feed_forward")),
    ),
    expected=SILU,
    epsilon=("rms_norm_eps", 1.5625e-7),
    head_size=128,
    rope=RopeSettings(share=("partial_rotary_factor", 0.5)),
    adjacent=True,
)
