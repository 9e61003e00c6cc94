"""Gemma 1: a llama with a scaled embedding and a GELU gate; norms are stored less one."""

from gguf.constants import MODEL_TENSOR

from exporter.architectures.gemma2 import GEMMA_GLOBALS
from exporter.architectures.shared.family import LAYER, Family, Rule, Target, attention_tensors

FAMILY = Family(
    targets=(Target("gemma", head="tied"),),
    tensors=GEMMA_GLOBALS,
    layer_tensors=(
        Rule(LAYER + "input_layernorm", MODEL_TENSOR.ATTN_NORM, ("hidden",), offset=1.0),
        *attention_tensors("none"),
        Rule(LAYER + "self_attn.o_proj", MODEL_TENSOR.ATTN_OUT, ("hidden", "query")),
        Rule(LAYER + "post_attention_layernorm", MODEL_TENSOR.FFN_NORM, ("hidden",), offset=1.0),
        Rule(LAYER + "mlp.gate_proj", MODEL_TENSOR.FFN_GATE, ("feed_forward", "hidden")),
        Rule(LAYER + "mlp.up_proj", MODEL_TENSOR.FFN_UP, ("feed_forward", "hidden")),
        Rule(LAYER + "mlp.down_proj", MODEL_TENSOR.FFN_DOWN, ("hidden", "feed_forward")),
    ),
    expected={"hidden_activation": (None, "gelu_pytorch_tanh"), "attention_bias": (False,)},
    activation="gelu_tanh",
    tied=True,
    scaled_embedding=True,
    head_size=256,
)
