"""StableLM 3B and StableLM 2: layer norms with biases, a quarter of each head rotates."""

from gguf.constants import MODEL_TENSOR

from exporter.architectures.shared.family import (
    LAYER,
    SILU,
    Family,
    RopeSettings,
    Rule,
    Target,
    attention_tensors,
)

FAMILY = Family(
    targets=(Target("stablelm", square=True, head="required"),),
    tensors=(
        Rule("model.embed_tokens", MODEL_TENSOR.TOKEN_EMBD, ("vocabulary", "hidden")),
        Rule("model.norm", MODEL_TENSOR.OUTPUT_NORM, ("hidden",), bias="required"),
    ),
    layer_tensors=(
        Rule(LAYER + "input_layernorm", MODEL_TENSOR.ATTN_NORM, ("hidden",), bias="required"),
        *attention_tensors("optional"),
        Rule(LAYER + "self_attn.o_proj", MODEL_TENSOR.ATTN_OUT, ("hidden", "query")),
        # Absent where attention and feed-forward network stand side by side.
        Rule(LAYER + "post_attention_layernorm", MODEL_TENSOR.FFN_NORM, ("hidden",), bias="optional", optional=True),
        Rule(LAYER + "mlp.gate_proj", MODEL_TENSOR.FFN_GATE, ("feed_forward", "hidden")),
        Rule(LAYER + "mlp.up_proj", MODEL_TENSOR.FFN_UP, ("feed_forward", "hidden")),
        Rule(LAYER + "mlp.down_proj", MODEL_TENSOR.FFN_DOWN, ("hidden", "feed_forward")),
    ),
    expected={**SILU, "qk_layernorm": (False,)},
    norm="layer",
    epsilon=("layer_norm_eps", 1e-5),
    rope=RopeSettings(share=("partial_rotary_factor", 0.25)),
    parallel_residual=("use_parallel_residual", False),
)
