"""GLM 4 of 2025 (0414): GLM with norms behind attention and feed-forward network as well."""

from dataclasses import replace

from gguf.constants import MODEL_TENSOR

from exporter.architectures import glm
from exporter.architectures.shared.family import LAYER, Rule, Target

FAMILY = replace(
    glm.FAMILY,
    targets=(Target("glm4", adjacent=True),),
    layer_tensors=(
        *glm.FAMILY.layer_tensors,
        Rule(LAYER + "post_self_attn_layernorm", MODEL_TENSOR.ATTN_POST_NORM, ("hidden",)),
        Rule(LAYER + "post_mlp_layernorm", MODEL_TENSOR.FFN_POST_NORM, ("hidden",)),
    ),
    norm_place="both",
)
