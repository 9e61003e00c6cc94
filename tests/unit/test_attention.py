"""Which kind of attention is chosen: as asked, by what it needs, by what was measured, by the processor."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgelm.bundle import Choice
from edgelm.cli.app import run_cli
from edgelm.errors import UsageError
from runtime import attention
from runtime.attention import choose_attention, measured_attention, planned_attention
from runtime.engine import EngineOptions
from targets.predict import RunSettings, predict, score_bytes
from targets.profile import KernelCycles, TargetProfile, load_profile, profile_toml
from targets.workload import TypedWeights, Workload

Processor = Callable[[bool], None]


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Processor:
    """Sets whether the processor has AMX, on a machine with a GiB of free memory."""
    free = Choice(value=2**30, reason="a test says so")
    monkeypatch.setattr(attention, "available_memory", lambda: free)
    return lambda amx: monkeypatch.setattr(attention, "has_tiles", lambda: amx)


def chosen(*, on_gpu: bool = False, scores_bytes: int = 0, **options: Any) -> str:
    return str(choose_attention(EngineOptions(**options), on_gpu=on_gpu, scores_bytes=scores_bytes).value)


@pytest.mark.parametrize("amx", [True, False])
def test_what_is_asked_for_is_taken(processor: Processor, amx: bool) -> None:
    processor(amx)
    assert (chosen(flash_attention="on"), chosen(flash_attention="off")) == ("on", "off")
    assert chosen(flash_attention="off", on_gpu=True, scores_bytes=2**40) == "off"


def test_only_processors_with_amx_do_without(processor: Processor) -> None:
    processor(False)
    assert chosen() == "on"
    processor(True)
    assert chosen() == "off"
    assert "AMX" in choose_attention(EngineOptions(), on_gpu=False).reason


def test_what_was_measured_counts_more_than_the_processor(processor: Processor) -> None:
    processor(True)
    assert chosen(faster_attention="on") == "on"
    processor(False)
    assert chosen(faster_attention="off") == "off"


@pytest.mark.parametrize("needs", [{"kv_type": "q8_0"}, {"on_gpu": True}, {"scores_bytes": 2**27}])
def test_it_stays_where_it_is_needed(processor: Processor, needs: dict[str, Any]) -> None:
    processor(True)
    assert chosen(**needs) == "on"
    assert chosen(**needs, faster_attention="off") == "on"


def test_a_cache_of_8_bits_cannot_be_had_without() -> None:
    with pytest.raises(UsageError, match="q8_0 needs flash attention"):
        chosen(kv_type="q8_0", flash_attention="off")


def profile_with(**cycles: float) -> TargetProfile:
    known = KernelCycles(
        prefill={"Q8_0": 0.1},
        decode={"Q8_0": 0.2},
        layer_us=5,
        parallel_loss=0.1,
        source="measured: by a test",
        **cycles,
    )
    return load_profile("generic-x86-64").model_copy(update={"kernel_cycles": known})


def test_a_profile_tells_what_is_faster() -> None:
    flash = {"attention_prefill": 0.2, "attention_decode": 2.0}
    assert measured_attention(load_profile("generic-x86-64")) is None
    assert measured_attention(profile_with(**flash)) is None
    # 0.2 x 131,072 + 2.0 x 73,728 cycles against 0.4 x 131,072 + 0.5 x 73,728.
    assert measured_attention(profile_with(**flash, plain_prefill=0.4, plain_decode=0.5)) == "off"
    assert measured_attention(profile_with(**flash, plain_prefill=0.4, plain_decode=1.7)) == "on"
    # What is as good as equal changes nothing.
    assert measured_attention(profile_with(**flash, plain_prefill=0.2, plain_decode=1.95)) == "on"


def test_targets_predict_has_the_kind_of_attention_that_a_run_will(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without flash attention scores take memory: only on the machine with AMX."""
    plain = load_profile("intel-i7-8700-desktop")
    needed = []
    for isa in (plain.isa, (*plain.isa, "amx_int8")):
        path = tmp_path / "me.toml"
        path.write_text(profile_toml(plain.model_copy(update={"isa": isa})), encoding="utf-8")
        figures = ["--params-b", "0.135", "--file-mib", "88", "--quant", "Q4_0", "--model", "SmolLM2-135M"]
        assert run_cli(["targets", "predict", str(path), *figures, "--json"]) == 0
        needed.append(json.loads(capfd.readouterr().out)["ram_parts"]["compute_bytes"])
    assert needed[1] - needed[0] > 0.7 * score_bytes(SMALL, 4096, 512)


# SmolLM2-135M at 4 bits.
SMALL = Workload(
    "gguf", "llama", 134_515_008, 92_000_000, (TypedWeights("Q4_0", 134_515_008, 76_000_000),), None, 30, 576, 49_152,
    11_520, heads=9,
)  # fmt: skip


def test_a_plan_knows_what_a_machine_with_amx_will_compute() -> None:
    plain = load_profile("intel-i7-8700-desktop")
    tiles = plain.model_copy(update={"isa": ("avx2", "amx_int8")})
    settings = RunSettings(context=4096)
    assert planned_attention(plain, SMALL, settings)
    assert not planned_attention(tiles, SMALL, settings)
    needed = [
        predict(SMALL, tiles, replace(settings, flash_attention=flash)).ram_parts.compute_bytes
        for flash in (True, False)
    ]
    scores = score_bytes(SMALL, 4096, 512)
    assert 0.7 * scores < needed[1] - needed[0] < scores
    assert planned_attention(tiles.with_ram(2**31), SMALL, RunSettings(context=8192))  # a tenth of memory at most
    assert planned_attention(tiles, SMALL, replace(settings, kv_type="q8_0"))
    assert planned_attention(tiles, replace(SMALL, format="onnx"), settings)
    assert planned_attention(load_profile("h200-sxm-141gb"), SMALL, settings)
