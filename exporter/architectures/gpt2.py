"""GPT-2 and DistilGPT-2: learned positions, matrices stored transposed, queries, keys and values in one."""

from gguf.constants import MODEL_TENSOR

from exporter.architectures.shared.family import Family, Rule, Target

_LAYER = "h.{layer}."

FAMILY = Family(
    targets=(Target("gpt2", square=True),),
    tensors=(
        Rule("wte", MODEL_TENSOR.TOKEN_EMBD, ("vocabulary", "hidden")),
        Rule("wpe", MODEL_TENSOR.POS_EMBD, ("positions", "hidden")),
        Rule("ln_f", MODEL_TENSOR.OUTPUT_NORM, ("hidden",), bias="required"),
    ),
    layer_tensors=(
        Rule(_LAYER + "ln_1", MODEL_TENSOR.ATTN_NORM, ("hidden",), bias="required"),
        Rule(_LAYER + "attn.c_attn", MODEL_TENSOR.ATTN_QKV, ("qkv", "hidden"), bias="required", transposed=True),
        Rule(_LAYER + "attn.c_proj", MODEL_TENSOR.ATTN_OUT, ("hidden", "query"), bias="required", transposed=True),
        Rule(_LAYER + "ln_2", MODEL_TENSOR.FFN_NORM, ("hidden",), bias="required"),
        Rule(_LAYER + "mlp.c_fc", MODEL_TENSOR.FFN_UP, ("feed_forward", "hidden"), bias="required", transposed=True),
        Rule(
            _LAYER + "mlp.c_proj", MODEL_TENSOR.FFN_DOWN, ("hidden", "feed_forward"), bias="required", transposed=True
        ),
    ),
    prefixes=("transformer.", ""),
    ignored=(".attn.bias", ".attn.masked_bias"),
    settings={
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
    expected={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    norm="layer",
    epsilon=("layer_norm_epsilon", 1e-5),
    activation="gelu_tanh",
    tied=True,
    rope=None,
)
