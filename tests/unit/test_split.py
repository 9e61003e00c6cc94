"""Prediction for layers that are split between a GPU and its host."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest

from edgelm.cli.app import run_cli
from edgelm.errors import DoesNotFitError, UsageError
from targets.calibration import calibration
from targets.catalogue import workload_from_figures
from targets.predict import RunSettings, family_of, predict, predict_speed
from targets.profile import KernelCycles, load_profile
from targets.split import as_filed, layered, part_of, predict_split
from targets.vram import AUTO_LAYERS, Room, vram_parts
from targets.workload import TypedWeights, Workload

GPU, HOST = load_profile("rtx-4060-8gb"), load_profile("amd-ryzen-7950x-desktop")
SETTINGS = RunSettings(context=4096, depth=1024)


@pytest.fixture(scope="module")
def workload() -> Workload:
    """8.03 B parameters in Q4_K_M: a Llama 3.1 8B."""
    return workload_from_figures(parameters=8.03e9, file_bytes=4_920_000_000, quant="Q4_K_M", model=None)


@pytest.mark.parametrize("gpu", ["rtx-4060-8gb", "h200-sxm-141gb"])
def test_all_on_one_side_is_what_that_side_alone_reaches(workload: Workload, gpu: str) -> None:
    profile = load_profile(gpu)
    on_gpu = predict_split(workload, profile, HOST, SETTINGS, workload.layers + 1)
    assert on_gpu.decode_tps == pytest.approx(predict_speed(workload, profile, SETTINGS).decode_tps, rel=0.001)
    on_cpu = predict_split(workload, profile, HOST, SETTINGS, 0)
    assert on_cpu.decode_tps == pytest.approx(predict_speed(workload, HOST, SETTINGS).decode_tps, rel=0.01)
    assert on_cpu.ram_bytes == pytest.approx(predict(workload, HOST, SETTINGS).ram_bytes, rel=0.01)
    assert on_gpu.ram_bytes < on_cpu.ram_bytes / 4


def test_weights_rearranged_beside_a_gpu_are_faster_and_take_memory(workload: Workload) -> None:
    as_filed = predict_split(workload, GPU, HOST, SETTINGS, 10, host_repack=False)
    rearranged = predict_split(workload, GPU, HOST, SETTINGS, 10, host_repack=True)
    assert as_filed.decode_tps < rearranged.decode_tps < 1.25 * as_filed.decode_tps
    host_bytes = workload.streamed_bytes * (workload.layers - 9) / workload.layers
    assert host_bytes / 2 < rearranged.ram_bytes - as_filed.ram_bytes < host_bytes  # Q4_K of it, not Q6_K


def test_kernels_measured_as_filed_are_what_a_split_computes_with(workload: Workload) -> None:
    """Where a profile was measured before they were, a factor stands for them."""
    typical = KernelCycles(
        prefill={"Q4_K": 0.1}, decode={"Q4_K": 1.0}, layer_us=10.0, parallel_loss=0.05, source="measured: for this test"
    )
    told = typical.model_copy(update={"decode_as_filed": {"Q4_K": 4.0}})
    seconds = {}
    for name, cycles in (("old", typical), ("new", told)):
        host = HOST.model_copy(update={"kernel_cycles": cycles})
        for repacked in (False, True):
            found = predict_split(workload, GPU, host, SETTINGS, 10, host_repack=repacked)
            seconds[name, repacked] = 1 / found.decode_tps
    assert seconds["old", True] == seconds["new", True] < seconds["old", False] < seconds["new", False]
    family = family_of(host, calibration())
    filed, kernels = as_filed(host, family)
    assert kernels.decode_of("Q4_K") == 4.0
    assert kernels.decode_of("Q6_K") == family.decode_of("Q6_K")
    assert filed.kernel_cycles == told


def test_a_gpu_with_bandwidth_in_plenty_is_held_up_by_unpacking(workload: Workload) -> None:
    """An H200 reads 1.43 times as fast as an H100 of the same arithmetic."""
    fast, slow = load_profile("h200-sxm-141gb"), load_profile("h100-sxm-80gb")

    def gain(quant: str, file_bytes: int) -> float:
        model = workload_from_figures(parameters=8.03e9, file_bytes=file_bytes, quant=quant, model=None)
        with_own_rows = predict_speed(model, fast, SETTINGS).decode_tps
        return with_own_rows / predict_speed(model, slow, SETTINGS).decode_tps

    assert 0.9 < gain("Q4_K_M", 4_920_000_000) < gain("Q8_0", 8_540_000_000) < gain("F16", 16_070_000_000) < 1.5


def test_every_layer_on_the_gpu_makes_it_faster_and_the_host_lighter(workload: Workload) -> None:
    found = [predict_split(workload, GPU, HOST, SETTINGS, count) for count in range(workload.layers + 2)]
    speeds = [item.decode_tps for item in found]
    assert speeds[1:] == sorted(speeds[1:])  # the head alone is not worth the way there and back
    held = [item.ram_bytes for item in found[1:]]
    assert held == sorted(held, reverse=True)
    seconds = [1 / speed for speed in speeds[1:]]
    steps = [first - second for first, second in itertools.pairwise(seconds)]
    # Equal layers cost the same each; with the last one nobody waits for the host any more.
    assert max(steps[:-1]) == pytest.approx(min(steps[:-1]), rel=0.05)
    assert steps[-1] - steps[-2] == pytest.approx(50e-6, rel=0.2)


def test_as_many_as_fit_of_what_is_too_large_for_either(workload: Workload) -> None:
    large = workload_from_figures(parameters=14.8e9, file_bytes=9_000_000_000, quant="Q4_K_M", model=None)
    found = predict_split(large, GPU, HOST, SETTINGS, AUTO_LAYERS)
    assert 0 < found.plan.gpu_layers < found.plan.most
    assert predict(large, GPU, SETTINGS).fits == "no"
    alone = predict_speed(large, HOST, SETTINGS).decode_tps
    assert alone < found.decode_tps < predict_speed(large, GPU, SETTINGS).decode_tps
    with pytest.raises(DoesNotFitError, match="on rtx-4060-8gb"):
        predict_split(large, GPU, HOST, SETTINGS, found.plan.gpu_layers + 1)
    with pytest.raises(DoesNotFitError, match="stay with"):
        predict_split(large, GPU, HOST.with_ram(2 * 2**30), SETTINGS, AUTO_LAYERS)


def test_only_a_gpu_and_a_cpu_share_a_gguf(workload: Workload) -> None:
    for gpu, host in ((HOST, HOST), (GPU, GPU)):
        with pytest.raises(UsageError, match="between a GPU and a CPU"):
            predict_split(workload, gpu, host, SETTINGS, 1)
    with pytest.raises(UsageError, match="only GGUF"):
        predict_split(replace(workload, format="onnx"), GPU, HOST, SETTINGS, 1)


def test_parts_add_up_to_the_whole() -> None:
    weights = (TypedWeights("Q4_K", 4 * 10**6, 2_250_000), TypedWeights("Q6_K", 2 * 10**6, 1_640_000))
    whole = Workload("gguf", "llama", 6 * 10**6, 4 * 10**6, weights, None, 10, 512, 2000, 2560)
    first, second = part_of(whole, 4, with_head=True), part_of(whole, 6, with_head=False)
    assert first.streamed_bytes + second.streamed_bytes == pytest.approx(whole.streamed_bytes, abs=4)
    assert first.kv_elements_per_token + second.kv_elements_per_token == whole.kv_elements_per_token
    assert part_of(whole, 0, with_head=False).weights == ()
    model = layered(whole)
    assert sum(model.layers) + model.head_bytes == pytest.approx(whole.streamed_bytes, rel=0.001)
    assert model.tied_bytes == model.head_bytes
    assert vram_parts(model, Room(context=256), model.most).kv_bytes == 2560 * 256 * 2


def test_the_command_tells_the_split(capfd: pytest.CaptureFixture[str]) -> None:
    figures = ["--params-b", "14.8", "--file-mib", "8570", "--quant", "Q4_K_M"]
    split = ["--gpu-layers", "auto", "--host", "amd-ryzen-7950x-desktop"]
    assert run_cli(["targets", "predict", "rtx-4060-8gb", *figures, *split, "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert 0 < document["gpu_layers"] < document["layers"]
    assert document["decode_tps"] > 1
    assert document["prefill_tps"] is None
    assert document["vram"]["weights_bytes"] < 8 * 2**30
    assert run_cli(["targets", "predict", "rtx-4060-8gb", *figures, *split]) == 0
    assert "one more would need" in capfd.readouterr().out
    assert run_cli(["targets", "predict", "rtx-4060-8gb", *figures, *split, "--host-repack", "--json"]) == 0
    repacked = json.loads(capfd.readouterr().out)
    assert repacked["decode_tps"] > document["decode_tps"]
    assert repacked["ram_bytes"] > document["ram_bytes"]
    assert run_cli(["targets", "predict", "rtx-4060-8gb", *figures, "--host-repack"]) == 2
    assert "--host-repack is for --gpu-layers" in capfd.readouterr().err
    assert run_cli(["targets", "predict", "rtx-4060-8gb", *figures, *split[:1], "200", *split[2:]]) == 4
    assert run_cli(["targets", "predict", "rtx-4060-8gb", *figures, *split[2:]]) == 2
