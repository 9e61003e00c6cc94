"""How many layers of a model the memory of a GPU holds, and what they take there by purpose: a plan with its reason.

Counts as llama.cpp does: one is the head (the output matrix with its norm), every further one a layer from the last to
the first, so that a model of 30 layers has 31. A layer takes its keys and values along; the table of the tokens stays
with the CPU, and a tied one goes to the GPU a second time as the head. Pure functions of sizes: loads no library, looks
at no machine, opens no file. What drivers take beyond what llama.cpp announces is an estimate (``RESERVE_BYTES``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edgelm.errors import DoesNotFitError, UsageError
from edgelm.units import format_bytes

DeviceKind = Literal["cpu", "gpu", "igpu", "accel"]
AUTO_LAYERS = -1
"""As many layers as fit on the GPU; none where there is no GPU."""
RESERVE_BYTES = 300 * 2**20
"""Left free: the driver's context and the scratch memory of kernels (unpacked weights, staging), which nobody
announces. An estimate; llama.cpp's own ``--fit`` leaves 1 GiB."""
# Beside a GPU llama.cpp leaves the CPU's weights as the file has them, to copy them to the GPU for every batch of a
# long prompt and multiply there. Rearranged for the CPU's kernels they cannot be copied, and prompts are its work, too:
# docs/gpu.md has what that gains and costs.
HOST_REPACK = False
KV_BYTES = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
# Floats alive at once for each position, from the sizes that llama.cpp 0.3.36 announces for shapes of llama with hidden
# sizes of 256 to 4096, contexts of 512 to 8192, batches of 32 to 512: 0.1 % off when all layers are there.
_HIDDEN_ALIVE, _INNER_ALIVE, _INPUTS_ALIVE = 2, 3, 5
_ENCODER_ATTENTION_ALIVE, _ENCODER_HIDDEN_ALIVE = 6, 3
_MASK_BYTES = 2  # the attention mask, for each position and cell
_CELLS = 256  # a sequence's share of the cache is a multiple of this
RECIPE = "docs/gpu.md has the builds of llama-cpp-python for CUDA, Vulkan, ROCm and Metal"


@dataclass(frozen=True, slots=True)
class Device:
    """A device that a build of llama.cpp can compute on. ``igpu`` shares the machine's memory.

    ``free_bytes`` and ``total_bytes`` are what its backend tells; some tell 0 for both.
    """

    name: str
    description: str
    backend: str
    kind: DeviceKind
    free_bytes: int
    total_bytes: int

    @property
    def is_gpu(self) -> bool:
        """Whether layers can be put there."""
        return self.kind in ("gpu", "igpu")

    def sentence(self) -> str:
        """For people: ``CUDA0 (GeForce RTX 4060): 7.2 GB of 8.2 GB free``."""
        free = f"{format_bytes(self.free_bytes)} of {format_bytes(self.total_bytes)} free"
        return f"{self.name} ({self.description}): {free if self.total_bytes else 'it tells no sizes'}"


@dataclass(frozen=True, slots=True)
class LayeredModel:
    """A model as a GPU takes it.

    ``layers`` are the bytes of each layer's weights, first to last, ``kv_elements`` the keys and values that one token
    leaves in each; ``feed_forward`` is the widest inner size of a layer, ``widest_bytes`` the size of the largest
    matrix in one. ``tied_bytes`` of the head are a copy of the table of tokens, 0 where the head is its own matrix.
    ``encoder_heads`` are an encoder's heads, which looks at a whole batch at once and has neither cache nor logits; 0
    for a model that generates.
    """

    name: str
    layers: tuple[int, ...]
    head_bytes: int
    tied_bytes: int
    kv_elements: tuple[int, ...]
    hidden: int
    feed_forward: int
    vocabulary: int
    widest_bytes: int
    encoder_heads: int = 0

    @property
    def most(self) -> int:
        """What ``gpu_layers`` is when all is on the GPU: the layers and the head."""
        return len(self.layers) + 1


@dataclass(frozen=True, slots=True)
class Room:
    """What is kept while a model runs: ``context`` tokens for each of ``sequences``, ``batch`` tokens computed in one
    step, of which ``outputs`` have logits."""

    context: int
    sequences: int = 1
    kv_type: str = "f16"
    batch: int = 512
    outputs: int = 16


@dataclass(frozen=True, slots=True)
class VramParts:
    """Bytes in a device's memory by purpose."""

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int

    @property
    def total_bytes(self) -> int:
        """Their sum."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes


NOTHING = VramParts(0, 0, 0)


@dataclass(frozen=True, slots=True)
class OffloadPlan:
    """How many layers go to ``device`` (None: all stays with the CPU), of how many, why, and what they take there.

    ``spared_bytes`` are those of weights and cache that the machine's own memory need not hold: none where the GPU
    shares it. ``host_repack`` tells whether weights that stay with the CPU are rearranged for its kernels.
    """

    gpu_layers: int
    most: int
    device: Device | None
    parts: VramParts
    reason: str
    spared_bytes: int = 0
    host_repack: bool = False

    def sentence(self) -> str:
        """For people: ``31 of 31 layers on CUDA0: all fit``."""
        where = "the CPU computes all layers" if self.device is None else self._share(self.device.name)
        return f"{where}: {self.reason}"

    def _share(self, name: str) -> str:
        return f"{self.gpu_layers} of {self.most} layers on {name}"


def vram_parts(model: LayeredModel, room: Room, gpu_layers: int) -> VramParts:
    """What ``gpu_layers`` of a model (more than it has mean all) take in a device's memory."""
    count = min(gpu_layers, model.most)
    if count <= 0:
        return NOTHING
    first = len(model.layers) - (count - 1)
    cells = -(-room.context // _CELLS) * _CELLS * room.sequences
    per_token = sum(model.kv_elements[first:]) * KV_BYTES[room.kv_type]
    return VramParts(
        weights_bytes=model.head_bytes + sum(model.layers[first:]),
        kv_bytes=round(per_token * cells),
        compute_bytes=compute_bytes(model, room, count),
    )


def compute_bytes(model: LayeredModel, room: Room, gpu_layers: int) -> int:
    """What llama.cpp reserves on a device for intermediate results when ``gpu_layers`` (1 or more) are there.

    Long prompts are multiplied on the GPU in layers of the CPU, too: their matrices and caches pass through, one at a
    time. Then it is coarse: 29 % too little for a tiny model (3 MB) to 40 % too much for a wide one (36 MB).
    """
    batch = min(room.batch, room.context)
    if model.encoder_heads:
        passing = model.widest_bytes if gpu_layers < model.most else 0
        return passing + _encoder_bytes(model, batch)
    cells = -(-room.context // _CELLS) * _CELLS
    states = 4 * batch * _HIDDEN_ALIVE * model.hidden
    logits = 4 * min(room.outputs, batch) * (model.vocabulary + _HIDDEN_ALIVE * model.hidden)
    mask = _MASK_BYTES * batch * cells
    layer = states + 4 * batch * (_INNER_ALIVE * model.feed_forward + _INPUTS_ALIVE)
    if gpu_layers >= model.most:
        return max(mask + layer, logits)
    cache = round(max(model.kv_elements, default=0) * KV_BYTES[room.kv_type] * cells * room.sequences)
    return max(mask + model.widest_bytes + states + max(layer, cache), logits)


def _encoder_bytes(model: LayeredModel, batch: int) -> int:
    """Intermediate results of an encoder without flash attention, which some GPUs lack for small heads.

    From what llama.cpp 0.3.36 announces for BERTs of hidden sizes of 64 to 1024 and batches of 128 to 2048: at most 5 %
    off beyond hidden sizes of 64. With flash attention it is less.
    """
    square = 4 * batch * batch
    scores = model.encoder_heads * square + 4 * batch * _ENCODER_ATTENTION_ALIVE * model.hidden
    network = 4 * batch * (_ENCODER_HIDDEN_ALIVE * model.hidden + model.feed_forward)
    return square + max(scores, network)


def choose_device(devices: Sequence[Device], wanted: str = "") -> Device | None:
    """The GPU to use: the one named, else the one with the most free memory, one of its own before one that shares
    the machine's; None where there is none. Raises ``UsageError`` for a name that none has."""
    gpus = [device for device in devices if device.is_gpu]
    if wanted:
        named = next((device for device in gpus if device.name.lower() == wanted.lower()), None)
        if named is None:
            there = ", ".join(device.name for device in gpus)
            hint = f"there are: {there}" if there else f"it sees no GPU; {RECIPE}"
            raise UsageError(f"llama.cpp sees no GPU '{wanted}'", hint=hint)
        return named
    return max(gpus, key=lambda device: (device.kind == "gpu", device.free_bytes), default=None)


def why_no_gpu(devices: Sequence[Device], *, can_offload: bool) -> str:
    """Why nothing can be put on a GPU; empty where it can."""
    if any(device.is_gpu for device in devices):
        return ""
    if can_offload:
        return "this build of llama.cpp can use GPUs and sees none"
    return "this build of llama.cpp is for CPUs only"


def plan_offload(model: LayeredModel, room: Room, device: Device | None, asked: int, *, no_gpu: str) -> OffloadPlan:
    """How many layers go to ``device``: ``asked``, or as many as fit for ``AUTO_LAYERS``.

    ``no_gpu`` is the reason where ``device`` is None. Raises ``UsageError`` when layers are asked for and there is no
    GPU, ``DoesNotFitError`` when more are asked for than its free memory holds.
    """
    if asked < AUTO_LAYERS:
        raise UsageError(f"gpu_layers has to be {AUTO_LAYERS} (as many as fit) or more, not {asked}")
    if asked == 0:
        return _on_cpu(model, "asked for")
    if device is None:
        if asked > 0:
            raise UsageError(f"{asked} layers were to go to a GPU: {no_gpu}", hint=f"use --gpu-layers auto; {RECIPE}")
        return _on_cpu(model, no_gpu)
    usable = max(device.free_bytes - RESERVE_BYTES, 0)
    known = device.total_bytes > 0
    fitting = _most_that_fit(model, room, usable) if known else model.most
    free = f"{format_bytes(usable)} of {format_bytes(device.free_bytes)} free can be used" if known else "no size told"
    count = fitting if asked == AUTO_LAYERS else min(asked, model.most)
    parts = vram_parts(model, room, count)
    if count > fitting:
        raise DoesNotFitError(
            f"{count} of {model.most} layers of {model.name} need {by_purpose(parts)} on {device.name}, {free}",
            hint=f"use --gpu-layers {fitting}, or auto" if fitting else "use --gpu-layers 0, or a shorter --context",
        )
    if not count:
        least = vram_parts(model, room, 1)
        return _on_cpu(model, f"the head alone needs {by_purpose(least)} on {device.name}, {free}")
    needed = f"{by_purpose(parts)}, {free}"
    if asked != AUTO_LAYERS:
        reason = f"asked for: {needed}"
    elif count == model.most:
        reason = f"all fit: {needed}"
    else:
        more = vram_parts(model, room, count + 1).total_bytes
        reason = f"{needed}; one more would need {format_bytes(more)}"
    spared = 0 if device.kind == "igpu" else parts.weights_bytes + parts.kv_bytes - model.tied_bytes
    return OffloadPlan(count, model.most, device, parts, reason, spared)


def _on_cpu(model: LayeredModel, reason: str) -> OffloadPlan:
    return OffloadPlan(0, model.most, None, NOTHING, reason)


def _most_that_fit(model: LayeredModel, room: Room, usable_bytes: int) -> int:
    counts = range(model.most, 0, -1)
    return next((count for count in counts if vram_parts(model, room, count).total_bytes <= usable_bytes), 0)


def by_purpose(parts: VramParts) -> str:
    """For people: ``145 MB (weights 120 MB, cache 20 MB, compute 5 MB)``."""
    split = (
        f"weights {format_bytes(parts.weights_bytes)}, cache {format_bytes(parts.kv_bytes)}, "
        f"compute {format_bytes(parts.compute_bytes)}"
    )
    return f"{format_bytes(parts.total_bytes)} ({split})"
