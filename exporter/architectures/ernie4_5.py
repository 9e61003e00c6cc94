"""ERNIE 4.5, dense: a llama whose checkpoints have the partners of a rotation side by side already."""

from exporter.architectures.shared.family import (
    LLAMA_LIKE_GLOBALS,
    SILU,
    Family,
    RopeSettings,
    Target,
    llama_like_layers,
)

FAMILY = Family(
    targets=(Target("ernie4_5", adjacent=True),),
    tensors=LLAMA_LIKE_GLOBALS,
    layer_tensors=llama_like_layers(qkv="none", others="none"),
    expected={**SILU, "use_bias": (False,)},
    epsilon=("rms_norm_eps", 1e-5),
    tied=True,
    rope=RopeSettings(theta=("rope_theta", 500000.0)),
    adjacent=True,
)
