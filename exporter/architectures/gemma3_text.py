"""Gemma 3, text only: as Gemma 2 with normalised queries and keys, longer runs of windows, two rotation bases."""

from dataclasses import replace

from gguf.constants import MODEL_TENSOR, Keys

from exporter.architectures.gemma2 import GEMMA_GLOBALS, gemma_layers
from exporter.architectures.shared.family import (
    LAYER,
    Family,
    Number,
    RopeSettings,
    Rule,
    Target,
    Windows,
    attention_tensors,
)

FAMILY = Family(
    targets=(Target("gemma3", windows=True),),
    tensors=GEMMA_GLOBALS,
    layer_tensors=gemma_layers(
        (
            *(replace(rule, is_query=False) for rule in attention_tensors("none")),
            Rule(LAYER + "self_attn.q_norm", MODEL_TENSOR.ATTN_Q_NORM, ("head",), offset=1.0, is_query=True),
            Rule(LAYER + "self_attn.k_norm", MODEL_TENSOR.ATTN_K_NORM, ("head",), offset=1.0),
        )
    ),
    expected={
        "hidden_activation": ("gelu_pytorch_tanh", None),
        "attention_bias": (False,),
        "attn_logit_softcapping": (None,),
        "use_bidirectional_attention": (False, None),
    },
    numbers=(Number("final_logit_softcapping", Keys.LLM.FINAL_LOGIT_SOFTCAPPING),),
    activation="gelu_tanh",
    norm_place="both",
    tied=True,
    scaled_embedding=True,
    head_size=256,
    rope=RopeSettings(theta=("rope_theta", 1e6), local_theta=("rope_local_base_freq", 10000.0)),
    windows=Windows("periodic", period=6, default=4096),
    query_scalar=("query_pre_attn_scalar", 256.0),
)
