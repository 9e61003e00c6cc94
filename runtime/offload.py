"""Which part of a GGUF model goes to a GPU: the model's header against the devices that llama.cpp sees.

Reads names and sizes of tensors; the arithmetic is ``targets.vram``'s. Loads llama.cpp's library, no model.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from runtime.engine import EngineOptions
from runtime.engines.llamacpp_devices import can_offload, find_devices
from runtime.gguf_header import GGUFHeader, count_per_layer, kv_elements_per_layer
from targets.vram import HOST_REPACK, LayeredModel, OffloadPlan, Room, choose_device, plan_offload, why_no_gpu

_LAYER = re.compile(r"blk\.(\d{1,5})\.")
# Of the tensors outside of layers those that are computed with after the last one; the others begin a model.
_HEAD = ("output", "cls")
_LOOKUP = "token_embd.weight"
# With room for 4 rows of logits or fewer, prompts took 9 to 18 % more CPU time on AMX than with 16 or more (SmolLM2 and
# a distilled one, Q4_0, Q6_K, Q8_0; none more at Q4_K_M). Why, was not found. What is not used costs no memory.
_LEAST_OUTPUTS = 16


def layered_model(header: GGUFHeader, name: str) -> LayeredModel:
    """The model in a GGUF file as a GPU takes it. Raises ``BundleError`` when the header's counts are absurd."""
    per_layer = kv_elements_per_layer(header)
    weights = [0] * len(per_layer)
    head = lookup = widest = largest = vocabulary = hidden = 0
    for tensor in header.tensors:
        match = _LAYER.match(tensor.name)
        if match is not None and int(match[1]) < len(weights):
            weights[int(match[1])] += tensor.size_bytes
            if len(tensor.shape) > 1:
                largest = max(largest, tensor.size_bytes)
            if len(tensor.shape) > 1 and "ffn" in tensor.name:
                widest = max(widest, *tensor.shape[-2:])
        elif tensor.name.startswith(_HEAD):
            head += tensor.size_bytes
        elif tensor.name == _LOOKUP:
            lookup, vocabulary, hidden = tensor.size_bytes, tensor.shape[0], tensor.shape[-1]
    heads = _encoder_heads(header)
    tied = 0 if heads or any(tensor.name == "output.weight" for tensor in header.tensors) else lookup
    return LayeredModel(
        name=name,
        layers=tuple(weights),
        head_bytes=head + tied,
        tied_bytes=tied,
        kv_elements=(0,) * len(per_layer) if heads else tuple(per_layer),
        hidden=hidden,
        feed_forward=widest,
        vocabulary=vocabulary,
        widest_bytes=largest,
        encoder_heads=heads,
    )


def _encoder_heads(header: GGUFHeader) -> int:
    """Heads of a model whose attention looks both ways, 0 for any other."""
    architecture = header.metadata.get("general.architecture")
    if header.metadata.get(f"{architecture}.attention.causal") is not False:
        return 0
    layers = len(kv_elements_per_layer(header))
    return max(count_per_layer(header, f"{architecture}.attention.head_count", layers))


def room_of(options: EngineOptions) -> Room:
    """What an engine keeps with these options."""
    rows = options.batch if options.all_logits else min(options.logits_rows * options.sequences, options.batch)
    outputs = max(rows, options.sequences, min(_LEAST_OUTPUTS, options.batch))
    return Room(options.context, options.sequences, options.kv_type, options.batch, outputs)


def repacks_host(options: EngineOptions, offload: OffloadPlan | None) -> bool:
    """Whether weights that stay with the CPU beside a GPU are rearranged for its kernels. Without a GPU they are
    anyway, which nobody has to ask for."""
    if offload is None or offload.device is None:
        return False
    return HOST_REPACK if options.host_repack is None else options.host_repack


def repacked_bytes(header: GGUFHeader, options: EngineOptions, offload: OffloadPlan) -> int:
    """What rearranged weights of the CPU beside a GPU take besides the mapped file, at most: not every type is. Without
    a map they stand in place of the file's."""
    if not options.mmap or not repacks_host(options, offload):
        return 0
    layers = layered_model(header, "").layers
    return sum(layers[: len(layers) - max(offload.gpu_layers - 1, 0)])


def _told(plan: OffloadPlan, options: EngineOptions) -> OffloadPlan:
    """The plan with what becomes of the weights that stay, and why, where that was asked for."""
    plan = replace(plan, host_repack=plan.gpu_layers < plan.most and repacks_host(options, plan))
    if options.host_repack is None or plan.device is None:
        return plan
    if plan.gpu_layers == plan.most:
        why = "no layer stays with the CPU to be rearranged"
    elif plan.host_repack:
        why = "the others are rearranged for the CPU, which computes their part of prompts, too: asked for"
    else:
        why = "the others stay as the file has them, and the GPU helps with their part of prompts: asked for"
    return replace(plan, reason=f"{plan.reason}; {why}")


def offload_of(library: Any, header: GGUFHeader, options: EngineOptions, name: str) -> OffloadPlan:
    """How many layers go to which GPU for these options, with the memory that is free there now.

    Raises ``UsageError`` when a GPU is asked for that is not there, ``DoesNotFitError`` when more is asked for than its
    memory holds.
    """
    model = layered_model(header, name)
    if options.gpu_layers == 0:
        return plan_offload(model, room_of(options), None, 0, no_gpu="")
    devices = find_devices(library)
    reason = why_no_gpu(devices, can_offload=can_offload(library))
    device = choose_device(devices, options.gpu)
    return _told(plan_offload(model, room_of(options), device, options.gpu_layers, no_gpu=reason), options)
