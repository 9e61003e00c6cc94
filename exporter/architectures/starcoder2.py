"""StarCoder 2: layer norms, biases everywhere, a feed-forward network without a gate."""

from gguf.constants import MODEL_TENSOR

from exporter.architectures.shared.family import LAYER, Family, Rule, Target, Windows, attention_tensors

FAMILY = Family(
    targets=(Target("starcoder2", square=True),),
    tensors=(
        Rule("model.embed_tokens", MODEL_TENSOR.TOKEN_EMBD, ("vocabulary", "hidden")),
        Rule("model.norm", MODEL_TENSOR.OUTPUT_NORM, ("hidden",), bias="required"),
    ),
    layer_tensors=(
        Rule(LAYER + "input_layernorm", MODEL_TENSOR.ATTN_NORM, ("hidden",), bias="required"),
        *attention_tensors("required"),
        Rule(LAYER + "self_attn.o_proj", MODEL_TENSOR.ATTN_OUT, ("hidden", "query"), bias="required"),
        Rule(LAYER + "post_attention_layernorm", MODEL_TENSOR.FFN_NORM, ("hidden",), bias="required"),
        Rule(LAYER + "mlp.c_fc", MODEL_TENSOR.FFN_UP, ("feed_forward", "hidden"), bias="required"),
        Rule(LAYER + "mlp.c_proj", MODEL_TENSOR.FFN_DOWN, ("hidden", "feed_forward"), bias="required"),
    ),
    expected={"hidden_act": ("gelu_pytorch_tanh", "gelu_new"), "use_bias": (True,)},
    norm="layer",
    epsilon=("norm_epsilon", 1e-5),
    activation="gelu_tanh",
    tied=True,
    windows=Windows("all"),
)
