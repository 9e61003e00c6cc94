"""Granite 3, dense: a llama with factors on embedding, attention, residuals and logits."""

from gguf.constants import Keys

from exporter.architectures.shared.family import LLAMA_LIKE_GLOBALS, SILU, Family, Number, Target, llama_like_layers

FAMILY = Family(
    targets=(Target("granite", adjacent=True, factors=("llama3",)),),
    tensors=LLAMA_LIKE_GLOBALS,
    layer_tensors=llama_like_layers(),
    expected=SILU,
    numbers=(
        Number("attention_multiplier", Keys.Attention.SCALE, 1.0),
        Number("embedding_multiplier", Keys.LLM.EMBEDDING_SCALE, 1.0),
        Number("residual_multiplier", Keys.LLM.RESIDUAL_SCALE, 1.0),
        Number("logits_scaling", Keys.LLM.LOGIT_SCALE, 1.0),
    ),
)
