"""A checkpoint as transformers has it: classes, names of modules, and llamas that come as GGUF.

No code from a checkpoint is ever run, and nothing is downloaded. torch and transformers are imported when something is
asked, never before. Knows neither how much memory there is nor what a model is computed for.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edgelm.errors import CheckpointError
from exporter.architectures.base import ModelDescription, TensorDescription
from exporter.checkpoint import Checkpoint
from exporter.ggml import Floats
from targets.host import default_threads


def loading_obstacle(checkpoint: Checkpoint, description: ModelDescription) -> str | None:
    """Why transformers cannot load a checkpoint, however much memory there is; None when it can.

    ``description`` is that for ONNX: what the model is, not what llama.cpp can hold.
    """
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    if description.dimensions.differing:
        return "its layers differ in width, which transformers cannot load"
    if checkpoint.source.kind == "huggingface":
        part = checkpoint.config.get("text_config")
        for kind in (checkpoint.architecture, part.get("model_type") if isinstance(part, Mapping) else None):
            if isinstance(kind, str) and not _knows(kind):
                return f"the installed version does not know models of type '{kind}'"
    if checkpoint.source.kind == "gguf":
        unknown = [item.name for item in description.tensors if transformers_name(item.name) is None]
        if description.architecture != "llama" or unknown:
            return f"a GGUF file with {unknown[0] if unknown else description.architecture} is not translated for it"
    return None


def _knows(model_type: str) -> bool:
    with quiet_transformers():
        from transformers import CONFIG_MAPPING

        return model_type in CONFIG_MAPPING


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """As many threads as the host allows, no progress bars and no notes on stderr; all as before afterwards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both warn about their own imports; none of it is the user's
        import torch
        import transformers
    logging = transformers.utils.logging
    threads, verbosity, bars = torch.get_num_threads(), logging.get_verbosity(), logging.is_progress_bar_enabled()
    torch.set_num_threads(int(default_threads()[1].value))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def decoder_class(model_type: str) -> Any:
    """The class of transformers that loads decoders of a type, some of which also see."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return AutoModelForCausalLM if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModelForImageTextToText


def load_directory(directory: Path, kind: Any) -> Any:
    """A model in float32 by a class of transformers: no code of the checkpoint, no pickles, no network.

    Raises ``CheckpointError`` when transformers cannot load it.
    """
    import torch

    try:
        return kind.from_pretrained(
            directory,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation="eager",
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise CheckpointError(f"transformers cannot load {directory}: {str(error).splitlines()[0]}") from error


def module_of(model: Any, checkpoint: Checkpoint, tensor: TensorDescription) -> Any:
    """The module of a transformers model that multiplies by a tensor of the artefact.

    It is called as in the checkpoint, perhaps below another prefix: beside its embedding, so that what a model sees
    with is not taken for what it speaks with. Raises ``CheckpointError``.
    """
    name = tensor.source_name
    if checkpoint.source.kind == "gguf":
        name = transformers_name(tensor.name) or name
    modules, beside = dict(model.named_modules()), text_prefix(model)
    parts = name.removesuffix(".weight").split(".")
    for start in range(len(parts)):
        path = ".".join(parts[start:])
        for candidate in (path, f"{beside}.{path}"):
            if candidate in modules:
                return modules[candidate]
    raise CheckpointError(f"transformers has no module {'.'.join(parts)}: what {tensor.name} reads cannot be measured")


def text_prefix(model: Any) -> str:
    """Where in a transformers model the part that speaks is: the path of what holds its embedding."""
    table = model.get_input_embeddings()
    return next((path for path, module in model.named_modules() if module is table), "").rpartition(".")[0]


def decoder_layers(model: Any) -> Any:
    """The list of decoder layers. Raises ``CheckpointError`` for a model without one."""
    import torch

    count, prefix = model.config.get_text_config().num_hidden_layers, text_prefix(model)
    for path, module in model.named_modules():
        if path.startswith(prefix) and isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise CheckpointError(f"{type(model).__name__} has no list of {count} layers")


# Names in a GGUF of the llama family -> names in transformers, without layer and suffix.
_GLOBAL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_NAME = re.compile(r"(?:blk\.(\d+)\.)?([a-z_]+)\.weight")


def transformers_name(name: str) -> str | None:
    """The name in transformers of a tensor of a llama GGUF, None when it has none there."""
    match = _GGUF_NAME.fullmatch(name)
    if match is None:
        return None
    layer, role = match.groups()
    if layer is None:
        return f"{_GLOBAL_NAMES[role]}.weight" if role in _GLOBAL_NAMES else None
    return f"model.layers.{layer}.{_LAYER_NAMES[role]}.weight" if role in _LAYER_NAMES else None


def llama_from_gguf(checkpoint: Checkpoint, description: ModelDescription) -> Any:
    """The weights of a llama GGUF, dequantised one by one into transformers' own Llama."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(description))
    dimensions = description.dimensions
    names = {name: transformers_name(name) for name in checkpoint.tensors}
    state = {}
    for name, target in names.items():
        state[target] = torch.from_numpy(load_weight(checkpoint, name, dimensions.head_size))
    if dimensions.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()  # assigned one by one, a tied table would be two parameters, and twice in a GPU's memory
    # Not part of the weights, so still without values: the frequencies, which follow from the configuration.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model


def llama_config(description: ModelDescription) -> Any:
    """The configuration of transformers for a llama that comes as GGUF."""
    from transformers import LlamaConfig

    dimensions, metadata = description.dimensions, description.metadata
    return LlamaConfig(
        vocab_size=dimensions.vocabulary,
        hidden_size=dimensions.hidden,
        intermediate_size=dimensions.feed_forward,
        num_hidden_layers=dimensions.layers,
        num_attention_heads=dimensions.heads,
        num_key_value_heads=dimensions.kv_heads,
        head_dim=dimensions.head_size,
        max_position_embeddings=dimensions.context_trained,
        rms_norm_eps=metadata["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=metadata.get("llama.rope.freq_base", 10000.0),
        tie_word_embeddings=dimensions.tied,
        attn_implementation="eager",
    )


def load_weight(checkpoint: Checkpoint, name: str, head_size: int) -> Floats:
    """A tensor of a checkpoint as transformers has it, float32: rows of a llama GGUF are in its own order again."""
    values = checkpoint.load(name)
    if checkpoint.source.kind == "gguf" and (".attn_q." in name or ".attn_k." in name):
        return _halves(values, head_size)
    return values


def _halves(rows: Floats, head_size: int) -> Floats:
    """Undo the order of rows in a llama GGUF, where rotation partners are neighbours: two halves per head instead."""
    pairs = rows.reshape(-1, head_size // 2, 2, rows.shape[-1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
