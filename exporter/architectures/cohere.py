"""Command R and Aya: attention and feed-forward network side by side behind one norm, logits multiplied."""

from gguf.constants import MODEL_TENSOR, Keys

from exporter.architectures.shared.family import (
    LLAMA_LIKE_GLOBALS,
    SILU,
    Family,
    Number,
    Target,
    llama_like_layers,
)

FAMILY = Family(
    targets=(Target("command-r", adjacent=True, square=True, head="tied"),),
    tensors=LLAMA_LIKE_GLOBALS,
    layer_tensors=tuple(
        rule for rule in llama_like_layers(qkv="none", others="none") if rule.target != MODEL_TENSOR.FFN_NORM
    ),
    expected={**SILU, "attention_bias": (False,), "use_qk_norm": (False,)},
    numbers=(Number("logit_scale", Keys.LLM.LOGIT_SCALE, 0.0625),),
    norm="layer",
    epsilon=("layer_norm_eps", 1e-5),
    tied=True,
    adjacent=True,
    parallel=True,
    multiplies_logits=True,
)
