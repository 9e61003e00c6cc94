"""The plan of what goes to a GPU, on made-up models and devices: it needs neither."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgelm.errors import DoesNotFitError, UsageError
from targets.vram import (
    AUTO_LAYERS,
    NOTHING,
    RESERVE_BYTES,
    Device,
    LayeredModel,
    Room,
    choose_device,
    plan_offload,
    vram_parts,
    why_no_gpu,
)

MIB = 2**20
MODEL = LayeredModel(
    name="ten",
    layers=tuple((index + 11) * MIB for index in range(10)),
    head_bytes=50 * MIB,
    tied_bytes=40 * MIB,
    kv_elements=(256,) * 10,
    hidden=512,
    feed_forward=1536,
    vocabulary=32000,
    widest_bytes=MIB,
)
ROOM = Room(context=1000)
CPU = Device("CPU", "a processor", "CPU", "cpu", 10**10, 10**10)
CARD = Device("CUDA0", "a card", "CUDA", "gpu", 8 * 10**9, 8 * 10**9)
SHARED = Device("Vulkan0", "an integrated one", "Vulkan", "igpu", 16 * 10**9, 16 * 10**9)


def with_usable(usable_bytes: int) -> Device:
    return replace(CARD, free_bytes=usable_bytes + RESERVE_BYTES)


def test_the_head_comes_first_and_layers_follow_from_the_last() -> None:
    assert vram_parts(MODEL, ROOM, 0) == NOTHING
    head = vram_parts(MODEL, ROOM, 1)
    assert (head.weights_bytes, head.kv_bytes) == (50 * MIB, 0)
    three = vram_parts(MODEL, ROOM, 3)
    assert three.weights_bytes == (50 + 19 + 20) * MIB
    assert three.kv_bytes == 2 * 256 * 1024 * 2  # two layers, 1,000 tokens padded to 1,024, two bytes each
    assert vram_parts(MODEL, ROOM, 99) == vram_parts(MODEL, ROOM, 11)


def test_a_cache_grows_with_sequences_and_shrinks_with_its_type() -> None:
    usual = vram_parts(MODEL, ROOM, 11).kv_bytes
    assert vram_parts(MODEL, replace(ROOM, sequences=4), 11).kv_bytes == 4 * usual
    assert vram_parts(MODEL, replace(ROOM, kv_type="q8_0"), 11).kv_bytes == usual * 34 // 64


def test_all_of_a_model_that_fits() -> None:
    plan = plan_offload(MODEL, ROOM, CARD, AUTO_LAYERS, no_gpu="")
    assert (plan.gpu_layers, plan.most, plan.device) == (11, 11, CARD)
    assert plan.reason.startswith("all fit: ")
    assert plan.sentence().startswith("11 of 11 layers on CUDA0: all fit")
    assert plan.spared_bytes == plan.parts.weights_bytes + plan.parts.kv_bytes - MODEL.tied_bytes


@pytest.mark.parametrize("count", range(1, 11))
def test_as_many_as_fit_and_no_more(count: int) -> None:
    usable = vram_parts(MODEL, ROOM, count).total_bytes
    plan = plan_offload(MODEL, ROOM, with_usable(usable), AUTO_LAYERS, no_gpu="")
    assert plan.gpu_layers == count
    assert "one more would need" in plan.reason
    less = plan_offload(MODEL, ROOM, with_usable(usable - 1), AUTO_LAYERS, no_gpu="")
    assert less.gpu_layers == count - 1


def test_what_does_not_fit_at_all_stays_with_the_cpu() -> None:
    plan = plan_offload(MODEL, ROOM, with_usable(MIB), AUTO_LAYERS, no_gpu="")
    assert (plan.gpu_layers, plan.device, plan.spared_bytes) == (0, None, 0)
    assert "the head alone needs" in plan.reason


def test_more_than_fits_is_refused_with_what_would() -> None:
    device = with_usable(vram_parts(MODEL, ROOM, 4).total_bytes)
    with pytest.raises(DoesNotFitError, match=r"7 of 11 layers of ten need .* on CUDA0") as caught:
        plan_offload(MODEL, ROOM, device, 7, no_gpu="")
    assert caught.value.hint == "use --gpu-layers 4, or auto"
    assert caught.value.exit_code == 4
    with pytest.raises(DoesNotFitError) as caught:
        plan_offload(MODEL, ROOM, with_usable(0), 1, no_gpu="")
    assert "--gpu-layers 0" in str(caught.value.hint)
    assert plan_offload(MODEL, ROOM, device, 3, no_gpu="").reason.startswith("asked for: ")


def test_layers_without_a_gpu_are_an_error_and_auto_is_not() -> None:
    why = why_no_gpu([CPU], can_offload=False)
    with pytest.raises(UsageError, match=r"5 layers were to go to a GPU: this build of llama\.cpp is for CPUs only"):
        plan_offload(MODEL, ROOM, None, 5, no_gpu=why)
    plan = plan_offload(MODEL, ROOM, None, AUTO_LAYERS, no_gpu=why)
    assert plan.sentence() == "the CPU computes all layers: this build of llama.cpp is for CPUs only"
    assert plan_offload(MODEL, ROOM, CARD, 0, no_gpu="").device is None
    with pytest.raises(UsageError, match="gpu_layers"):
        plan_offload(MODEL, ROOM, CARD, -2, no_gpu="")
    assert why_no_gpu([CPU], can_offload=True).endswith("sees none")
    assert why_no_gpu([CPU, CARD], can_offload=True) == ""


def test_a_device_that_tells_no_sizes_gets_all() -> None:
    silent = replace(CARD, free_bytes=0, total_bytes=0)
    plan = plan_offload(MODEL, ROOM, silent, AUTO_LAYERS, no_gpu="")
    assert plan.gpu_layers == 11
    assert "no size told" in plan.reason
    assert silent.sentence() == "CUDA0 (a card): it tells no sizes"


def test_memory_that_is_shared_spares_none() -> None:
    assert plan_offload(MODEL, ROOM, SHARED, AUTO_LAYERS, no_gpu="").spared_bytes == 0


def test_the_gpu_with_the_most_free_memory_is_taken_or_the_one_named() -> None:
    fuller = replace(CARD, name="CUDA1", free_bytes=10**9)
    assert choose_device([CPU]) is None
    assert choose_device([CPU, SHARED]) == SHARED
    assert choose_device([CPU, SHARED, fuller, CARD]) == CARD
    assert choose_device([CPU, SHARED, fuller, CARD], "cuda1") == fuller
    with pytest.raises(UsageError, match="no GPU 'CUDA7'") as caught:
        choose_device([CPU, CARD], "CUDA7")
    assert caught.value.hint == "there are: CUDA0"
    with pytest.raises(UsageError) as caught:
        choose_device([CPU], "CUDA0")
    assert "docs/gpu.md" in str(caught.value.hint)
