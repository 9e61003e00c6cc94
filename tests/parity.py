"""Tiny random models of every family, and how far an export's logits are from transformers' own.

One row per shape: a configuration with the head layout of the real models, exported unquantised, run in llama.cpp and
in transformers over the same random tokens, at a short length and at one beyond windows and scaling borders. Measured
twice: as the engine runs, and with plain instead of flash attention. The latter shows whether the export is exact,
the former what llama.cpp's flash attention adds, which rounds to 16 bits on the way. Used by the tests and by the
script that writes docs/architectures.md.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelm.bundle import TensorPlan
from exporter import ggml
from exporter.architectures import describe
from exporter.architectures.base import ModelDescription
from exporter.checkpoint import Checkpoint, open_checkpoint, open_source
from exporter.gguf import write_gguf
from exporter.tokenizer import read_tokenizer
from exporter.transformers_model import decoder_class
from runtime.engine import Chunk, EngineOptions, FlashAttention
from runtime.engines.llamacpp import load_engine
from tests.tiny_models import write_tokenizer

VOCABULARY = 320
SHORT, LONG = 24, 200
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Row:
    """One model. ``config`` are arguments of transformers' configuration class, ``change`` prunes the made model.

    ``contexts`` are those that the engine is opened with at short and at long length, ``lengths`` the tokens. What
    norms multiply by is around 1 in trained models: ``norm_offset`` is added where transformers starts elsewhere.
    """

    name: str
    model_type: str
    config: Mapping[str, Any]
    change: Callable[[Any], None] | None = None
    after: Mapping[str, Any] = field(default_factory=dict)
    lengths: tuple[int, int] = (SHORT, LONG)
    contexts: tuple[int, int] = (256, 256)
    norm_offset: float = 0.0


@dataclass(frozen=True)
class Distance:
    """KL divergence in nats per token, and the largest difference of any logit."""

    kl_mean: float
    logit_error_max: float


@dataclass(frozen=True)
class Parity:
    """Distance of an export from transformers, the worst of both lengths. ``spread`` is the logits' own deviation."""

    architecture: str
    engine: Distance
    plain: Distance
    spread: float


HEADER = f"""# Architectures

Written by `.venv-transformers5/bin/python scripts/write_docs.py --parity`: only transformers 5 knows some families
(`make test-transformers5` makes that environment; `make test` measures the others with 4.57); do not edit.

Each row is a tiny random model made by transformers, exported as F32 and run in llama.cpp over the same {SHORT} and
{LONG} random tokens (beyond windows and the borders of rotation scalings) as in transformers, float32, eager
attention. The numbers are the larger of both lengths: mean KL divergence in nats per token and the largest difference
of any logit, as the engine runs and with plain instead of flash attention, which rounds to 16 bits inside llama.cpp.
Logits spread as the last column says. Networks with GELU go through a table of 16-bit values in llama.cpp.

Side by side with `convert_hf_to_gguf.py` of the llama.cpp in llama-cpp-python 0.3.36, on the same models: the same
tensors with the same bytes and the same values for every key that both write, and 14 families answer with the same
greedy tokens in `llama-server` (`tests/tiny/test_peer_tools.py`, after `make peers`). What differs is on purpose: query
scales of Gemma 2 and 3 that are not the head size are kept (folded into the queries or their norm), windows are
written layer by layer so that pruned layers keep theirs, rotation bases are always written (the script leaves those of
StableLM, Pythia and Gemma 2 to a default of 10000), a tied OLMo 2 gets the output matrix that its graph needs, counts
of Phi and epsilon and context of GLM are those of config.json instead of the published ones, GPT-2 configurations
without `n_ctx` and those of Command R7B without `rotary_pct` work, and Helium, which the script does not have, is a
llama. Layers of different widths, and heads that do not add up to the hidden size, have no counterpart there. The
converter writes a window for every Phi 3, also where it is as long as the context, and leaves vocabulary size, head
sizes, yarn's betas and rules for BOS and EOS to llama.cpp's defaults.

A model whose attention has windows that the GGUF architecture lacks (Mistral 7B v0.1, Phi 3 mini 4k, StarCoder 2, Qwen
with `use_sliding_window`) gets a context that ends where the window begins, with a note in the plan. LFM2's short
convolutions keep a state that forgets nothing: a chat goes on from it, but another beginning is computed anew, and
nothing is guessed ahead.

Not here: mixtures of experts, Mamba and delta-net layers (Qwen 3.5, Granite 4 H, Falcon H1), Gemma 3n and 4, weights
of 8 bits (Ministral 3 has them beside those of 16), the text in models that see apart from Gemma 3 and Ministral 3,
and families that transformers knows only by code of the checkpoint (EXAONE 3, InternLM, MiniCPM).

| model | model_type | GGUF | KL | logits | KL, plain | logits, plain | spread |
|---|---|---|---|---|---|---|---|
"""


def _linear(layer: Any, name: str, rows: int | None = None, columns: int | None = None) -> None:
    """Keep the first rows and columns of a matrix of a transformers layer."""
    import torch

    linear = layer.get_submodule(name)
    linear.weight = torch.nn.Parameter(linear.weight[:rows, :columns].clone())
    if linear.bias is not None:
        linear.bias = torch.nn.Parameter(linear.bias[:rows].clone())
    linear.out_features, linear.in_features = linear.weight.shape


def narrow(layer: Any, heads: int, kv_heads: int, feed_forward: int) -> None:
    """Prune one layer of a llama-like transformers model."""
    size = layer.self_attn.head_dim
    layer.self_attn.num_key_value_groups = heads // kv_heads
    for name, count in (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads)):
        _linear(layer, f"self_attn.{name}", rows=count * size)
    _linear(layer, "self_attn.o_proj", columns=heads * size)
    for name in ("gate_proj", "up_proj"):
        _linear(layer, f"mlp.{name}", rows=feed_forward)
    _linear(layer, "mlp.down_proj", columns=feed_forward)


def narrow_unevenly(model: Any) -> None:
    """Every layer other than its neighbours: feed-forward width, query heads, key heads, ratio of both."""
    for layer, shape in zip(model.model.layers, ((4, 2, 96), (2, 1, 72), (2, 2, 50), (4, 1, 33)), strict=True):
        narrow(layer, *shape)


def narrow_evenly(model: Any) -> None:
    """Half the heads in every layer: heads times head size is not the hidden size any more."""
    for layer in model.model.layers:
        narrow(layer, 2, 1, 80)


COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}
GPT2_IDS = {"bos_token_id": 1, "eos_token_id": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0 + 0.02 * step for step in range(6)],
    "long_factor": [1.5 + 0.9 * step for step in range(6)],
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
MSCALES = {**YARN, "mscale": 1.3, "mscale_all_dim": 0.8}
MINISTRAL = {**YARN, "rope_theta": 1e6, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3}
GEMMA = {**COMMON, "head_dim": 32, "sliding_window": 48, "num_hidden_layers": 6}
FULL = ["full_attention"] * 4
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2} | {
    "image_size": 28,
    "patch_size": 14,
}

ROWS = (
    Row("llama", "llama", {**COMMON, "head_dim": 24}),
    Row(
        "llama, tied, biases",
        "llama",
        {**COMMON, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    Row("llama 3.1 rotation", "llama", {**COMMON, "rope_scaling": LLAMA3}),
    Row("llama, linear rotation", "llama", {**COMMON, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    Row("llama, yarn rotation", "llama", {**COMMON, "rope_scaling": YARN}),
    Row("llama, yarn rotation with scales", "llama", {**COMMON, "rope_scaling": MSCALES}),
    Row("llama, odd widths", "llama", {**COMMON, "hidden_size": 60, "head_dim": 20, "intermediate_size": 90}),
    Row("llama, padded embedding", "llama", {**COMMON, "vocab_size": 384, "tie_word_embeddings": True}),
    Row("llama, layers of different widths", "llama", COMMON, narrow_unevenly),
    Row("mistral", "mistral", {**COMMON, "head_dim": 32, "sliding_window": None}),
    Row("qwen2", "qwen2", COMMON),
    Row("qwen2, yarn rotation, tied", "qwen2", {**COMMON, "rope_scaling": YARN, "tie_word_embeddings": True}),
    Row("qwen2, half the heads", "qwen2", COMMON, narrow_evenly),
    Row("qwen2, layers of different widths", "qwen2", COMMON, narrow_unevenly),
    Row("qwen3, half the heads", "qwen3", {**COMMON, "head_dim": 16}, narrow_evenly),
    Row("qwen3", "qwen3", {**COMMON, "head_dim": 32, "tie_word_embeddings": True}),
    Row("gemma", "gemma", {**COMMON, "head_dim": 32, "hidden_act": "gelu_pytorch_tanh"}),
    Row("gemma2", "gemma2", {**GEMMA, "query_pre_attn_scalar": 32}),
    Row("gemma2, other query scale", "gemma2", {**GEMMA, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 3.0}),
    Row("gemma3_text", "gemma3_text", {**GEMMA, "query_pre_attn_scalar": 24}),
    Row(
        "gemma3_text, linear rotation, other windows",
        "gemma3_text",
        {**GEMMA, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "query_pre_attn_scalar": 32}
        | {"layer_types": ["full_attention", *["sliding_attention"] * 4, "full_attention"]},
    ),
    Row("phi3", "phi3", {**COMMON, "sliding_window": None}),
    Row(
        "phi3, long rotation, part of a head",
        "phi3",
        {**COMMON, "rope_scaling": LONGROPE, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 256}
        | {"max_position_embeddings": 1024},
        lengths=(SHORT, 400),
        contexts=(256, 1024),
    ),
    Row("gpt2", "gpt2", {**GPT2, **GPT2_IDS}),
    Row(
        "gemma3, text of a model that sees",
        "gemma3",
        {"text_config": {**GEMMA, "query_pre_attn_scalar": 24, "model_type": "gemma3_text"}, "vision_config": VISION}
        | {"mm_tokens_per_image": 4, "eos_token_id": [2, 0], "bos_token_id": 1},
    ),
    Row("exaone4", "exaone4", {**COMMON, "sliding_window": None, "rope_scaling": LLAMA3, "layer_types": FULL}),
    Row("ernie4_5", "ernie4_5", {**COMMON, "head_dim": 24}),
    Row("hunyuan_v1_dense", "hunyuan_v1_dense", {**COMMON, "head_dim": 24, "tie_word_embeddings": True}),
    Row(
        "hunyuan_v1_dense, long base",
        "hunyuan_v1_dense",
        {**COMMON, "head_dim": 16, "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}},
    ),
    Row("smollm3", "smollm3", {**COMMON, "num_hidden_layers": 8}),
    Row("olmo3, yarn rotation", "olmo3", {**COMMON, "sliding_window": 48, "rope_scaling": YARN}),
    Row("phi", "phi", {**COMMON, "partial_rotary_factor": 0.5}),
    Row(
        "mistral3, text of a model that sees",
        "mistral3",
        {"text_config": {**COMMON, "head_dim": 24, "model_type": "mistral", "sliding_window": None}}
        | {"vision_config": {**VISION, "model_type": "pixtral"}, "bos_token_id": 1, "eos_token_id": 2},
    ),
    Row("ministral3", "ministral3", {**COMMON, "head_dim": 24, "rope_parameters": MINISTRAL}),
    Row("nemotron", "nemotron", {**COMMON, "partial_rotary_factor": 0.5}, norm_offset=-1.0),
    Row("nemotron, biases", "nemotron", {**COMMON, "attention_bias": True, "mlp_bias": True}, norm_offset=-1.0),
    Row("arcee", "arcee", {**COMMON, "rope_scaling": LLAMA3}),
    Row("helium", "helium", {**COMMON, "head_dim": 16}),
    Row(
        "lfm2",
        "lfm2",
        {**COMMON, "layer_types": ["conv", "conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    ),
    Row("cohere", "cohere", {**COMMON, "logit_scale": 0.5}),
    Row("cohere2", "cohere2", {**COMMON, "logit_scale": 0.5, "sliding_window": 48}),
    Row("glm", "glm", {**COMMON, "head_dim": 16}),
    Row("glm4", "glm4", {**COMMON, "head_dim": 24, "attention_bias": False}),
    Row("olmo2", "olmo2", COMMON),
    Row("olmo2, tied", "olmo2", {**COMMON, "tie_word_embeddings": True}),
    Row(
        "granite",
        "granite",
        {**COMMON, "attention_multiplier": 0.2, "embedding_multiplier": 6.0, "residual_multiplier": 0.4}
        | {"logits_scaling": 3.0, "tie_word_embeddings": True},
    ),
    Row(
        "granitemoehybrid, dense",
        "granitemoehybrid",
        {**COMMON, "layer_types": ["attention"] * 4, "shared_intermediate_size": 96, "num_local_experts": 0}
        | {"num_experts_per_tok": 0}
        | {"position_embedding_type": "rope", "attention_multiplier": 0.2, "embedding_multiplier": 6.0}
        | {"residual_multiplier": 0.4, "logits_scaling": 3.0, "tie_word_embeddings": True}
        | {"mamba_n_heads": 4, "mamba_d_head": 32},
    ),
    Row("stablelm", "stablelm", {**COMMON, "partial_rotary_factor": 0.25, "use_qkv_bias": True}),
    Row("stablelm, parallel", "stablelm", {**COMMON, "partial_rotary_factor": 0.5, "use_parallel_residual": True}),
    Row("starcoder2", "starcoder2", {**COMMON, "sliding_window": None}),
    Row("gpt_neox", "gpt_neox", {**COMMON, "rotary_pct": 0.25}),
    Row("gpt_neox, one after the other", "gpt_neox", {**COMMON, "rotary_pct": 0.5, "use_parallel_residual": False}),
)


def known_to_transformers(row: Row) -> bool:
    """Whether the installed version has the row's family."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import CONFIG_MAPPING

        return row.model_type in CONFIG_MAPPING


def make_checkpoint(row: Row, directory: Path, seed: int = 0, gain: float | None = 1.3) -> Any:
    """Write the row's checkpoint; the transformers model in float32, ready to run.

    Matrices deviate by ``gain`` over the root of their width: above 1, layers enlarge whatever goes wrong before them.
    None: everything stays as transformers initialises it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from transformers import AutoConfig

        config = AutoConfig.for_model(
            row.model_type, **copy.deepcopy(dict(row.config))
        )  # which changes what it is given
        torch.manual_seed(seed)
        model = decoder_class(row.model_type).from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, values in model.named_parameters() if gain is not None else ():
            noise = torch.randn(values.shape, generator=generator)
            if values.ndim < 2:
                values.add_(0.15 * noise + (row.norm_offset if name.endswith("norm.weight") else 0.0))
            else:
                wide = "embed" in name or "wte" in name or "lm_head" in name
                values.copy_(noise * (2.5 if wide else gain) / values.shape[-1] ** 0.5)
        if row.change is not None:
            row.change(model)
    model.save_pretrained(directory)
    write_tokenizer(directory, VOCABULARY)
    if row.after:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **row.after}))
    return model


def write_f32(checkpoint: Checkpoint, path: Path) -> ModelDescription:
    """Export every tensor as F32."""
    description = describe(checkpoint)
    plans = [
        TensorPlan(
            name=item.name,
            source_name=item.source_name,
            shape=item.shape,
            type="F32",
            size_bytes=4 * int(np.prod(item.shape)),
            reason="parity",
        )
        for item in description.tensors
    ]
    words = read_tokenizer(checkpoint).gguf_metadata
    metadata = {**description.metadata, **words, "tokenizer.ggml.pre": "smollm"}
    write_gguf(path, checkpoint, description.tensors, plans, metadata, threads=2)
    assert {plan.type for plan in plans} <= set(ggml.TYPES)
    return description


def engine_logits(path: Path, tokens: list[int], context: int, kind: FlashAttention = "on") -> Floats:
    """Logits (tokens, vocabulary) after each token, with flash attention or without."""
    options = EngineOptions(
        context=context, batch=512, kv_type="f32", all_logits=True, threads_decode=2, threads_prefill=2
    )
    options = replace(options, flash_attention=kind)
    engine = load_engine(path, options)
    try:
        return engine.forward([Chunk(0, tokens, "all")]).copy()
    finally:
        engine.close()


def transformers_logits(model: Any, tokens: list[int]) -> Floats:
    """Logits of one whole forward pass."""
    import torch

    with torch.inference_mode():
        logits: Floats = model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()
    return logits


def distance(ours: Floats, theirs: Floats) -> Distance:
    """Mean KL(theirs || ours) over positions."""
    wanted = theirs - np.logaddexp.reduce(theirs.astype(np.float64), axis=-1, keepdims=True)
    found = ours - np.logaddexp.reduce(ours.astype(np.float64), axis=-1, keepdims=True)
    kl = np.sum(np.exp(wanted) * (wanted - found), axis=-1)
    return Distance(float(max(kl.mean(), 0.0)), float(np.abs(ours - theirs).max()))


def worst(distances: list[Distance]) -> Distance:
    """The larger of each number."""
    return Distance(max(item.kl_mean for item in distances), max(item.logit_error_max for item in distances))


def measure(row: Row, directory: Path) -> Parity:
    """Parity of a row over its short and its long length."""
    model = make_checkpoint(row, directory / "model")
    path = directory / "model.gguf"
    description = write_f32(open_checkpoint(open_source(str(directory / "model"))), path)
    generator = np.random.default_rng(1)
    engine, plain, spread = [], [], 0.0
    for length, context in zip(row.lengths, row.contexts, strict=True):
        tokens = generator.integers(3, VOCABULARY, length).tolist()
        theirs = transformers_logits(model, tokens)
        spread = float(theirs.std())
        engine.append(distance(engine_logits(path, tokens, context), theirs))
        plain.append(distance(engine_logits(path, tokens, context, "off"), theirs))
    return Parity(description.architecture, worst(engine), worst(plain), spread)


def document(measured: Mapping[str, Parity]) -> str:
    """docs/architectures.md for parities by row name."""
    lines = []
    for row in ROWS:
        found = measured[row.name]
        numbers = (found.engine.kl_mean, found.engine.logit_error_max, found.plain.kl_mean, found.plain.logit_error_max)
        shown = " | ".join(f"{number:.0e}" for number in numbers)
        lines.append(f"| {row.name} | {row.model_type} | {found.architecture} | {shown} | {found.spread:.1f} |")
    return HEADER + "\n".join(lines) + "\n"
