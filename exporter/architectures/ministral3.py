"""Ministral 3: a llama with yarn whose attention sharpens as texts grow beyond the original context."""

from exporter.architectures.shared.family import (
    LLAMA_LIKE_GLOBALS,
    SILU,
    Family,
    RopeSettings,
    Target,
    llama_like_layers,
)

FAMILY = Family(
    targets=(Target("mistral3", adjacent=True),),
    tensors=LLAMA_LIKE_GLOBALS,
    layer_tensors=llama_like_layers(qkv="none", others="none"),
    expected={**SILU, "sliding_window": (None,)},
    epsilon=("rms_norm_eps", 1e-5),
    head_size=128,
    rope=RopeSettings(theta=("rope_theta", 1e6), temperature="llama_4_scaling_beta"),
)
