"""Settings chosen for a machine: what gives way when memory is short, in which order, and when a model is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

import runtime.settings
from edgelm.bundle import Choice
from edgelm.cli import run, serve
from edgelm.errors import DoesNotFitError, UsageError
from edgelm.units import parse_size
from runtime.engine import EngineOptions
from runtime.gguf_header import read_gguf_header
from runtime.offload import layered_model
from runtime.probe import write_tiny_gguf
from runtime.settings import LEAST_CONTEXT, SPARE_SHARE, Asked, choose_settings
from targets.predict import RunSettings, ram_parts
from targets.profile import load_profile

MIB = 2**20
SEQUENCES = 64  # a cache of 256 MiB at 4096 tokens: 2 layers x 2 heads x 64 numbers x keys and values x 2 bytes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("settings") / "model.gguf"
    write_tiny_gguf(path, context=8192)
    return path


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    return Memory(monkeypatch)


class Memory:
    """Sets what the machine says is free. What the test process itself holds does not count."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def is_free(self, free_bytes: int) -> None:
        told = Choice(value=free_bytes, reason="a test says so")
        self._monkeypatch.setattr("runtime.settings.memory_for_model", lambda: told)


def test_with_room_nothing_is_given_up(model: Path, memory: Memory) -> None:
    memory.is_free(4096 * MIB)
    settings = choose_settings(model, "auto", Asked(sequences=SEQUENCES))
    options = settings.options
    assert (options.context, options.kv_type, options.batch, options.mmap) == (4096, "f16", 512, True)
    assert options.sequences == SEQUENCES
    assert settings.lines()["context"] == "4096: the usual context of a bare file"
    assert "a test says so" in settings.lines()["memory"]
    assert list(settings.reasons)[:2] == ["memory", "context"]


def test_scores_take_memory_without_flash_attention(model: Path, memory: Memory) -> None:
    memory.is_free(4096 * MIB)
    kinds = [choose_settings(model, "auto", Asked(context=8192, flash_attention=kind)) for kind in ("on", "off")]
    needs = [parse_size(str(found.reasons["memory"].value).replace(" ", "")) for found in kinds]
    # 6 bytes for each of 4 heads and a mask, 512 tokens, 8,192 cells; 14 of 20 activations are not alive beside them
    assert needs[1] - needs[0] == pytest.approx(512 * (28 * 8192 - 4 * 14 * 256), rel=0.02)
    assert [found.options.flash_attention for found in kinds] == ["on", "off"]
    assert kinds[1].lines()["flash_attention"] == "off: asked for"
    with pytest.raises(UsageError, match="needs flash attention"):
        choose_settings(model, "auto", Asked(kv_type="q8_0", flash_attention="off"))


def test_what_is_faster_gives_way_when_memory_is_short(
    model: Path, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.attention.has_tiles", lambda: True)
    memory.is_free(4096 * MIB)
    settings = choose_settings(model, "auto", Asked(context=8192))
    assert settings.lines()["flash_attention"].startswith("off: with AMX")
    assert settings.options.flash_attention == "auto", "an engine with layers on a GPU decides otherwise"
    needed = parse_size(str(settings.reasons["memory"].value).replace(" ", ""))
    # With a batch of 128 a quarter of 120 MB is left: a bit too much here.
    memory.is_free(round((needed - 0.75 * 120e6 - 6e6) / (1 - SPARE_SHARE)))
    short = choose_settings(model, "auto", Asked(context=8192))
    assert (short.options.flash_attention, short.options.batch, short.options.context) == ("on", 128, 8192)
    assert short.lines()["flash_attention"].startswith("on: memory is short")


def test_an_onnx_model_is_never_given_an_option_of_gguf(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.attention.has_tiles", lambda: True)
    gguf = runtime.settings._open(model, load_profile("host"), Asked(context=8192))
    onnx = replace(gguf, workload=replace(gguf.workload, format="onnx"), q8_cache=False)
    first = runtime.settings._Way(EngineOptions(context=8192), in_process=False)
    assert {way.options.flash_attention for way in runtime.settings._ways(gguf, first)} == {"auto", "on"}
    assert {way.options.flash_attention for way in runtime.settings._ways(onnx, first)} == {"auto"}


def test_a_drafting_model_takes_memory_too(model: Path, memory: Memory) -> None:
    memory.is_free(4096 * MIB)
    alone = choose_settings(model, "auto", Asked(sequences=SEQUENCES, lookup=True))
    both = choose_settings(model, "auto", Asked(sequences=SEQUENCES, draft=str(model)))
    assert (alone.options.lookup, alone.options.draft) == (True, "")
    assert (both.options.lookup, both.options.draft) == (False, str(model))
    needs = [parse_size(str(found.reasons["memory"].value).replace(" ", "")) for found in (alone, both)]
    # The draft keeps two sequences of 4 MiB each, its weights and a process's own.
    assert needs[0] + 8 * MIB < needs[1] < needs[0] + 200 * MIB


def test_rearranging_beside_a_gpu_counts_as_opening_counts_it(model: Path, memory: Memory) -> None:
    """Every layer's weights once more at most, but not where they are read in place of being mapped."""
    memory.is_free(4096 * MIB)
    header = read_gguf_header(model)
    layers = sum(layered_model(header, "").layers)
    plain, asked, refused = (
        runtime.settings.predicted_bytes(model, EngineOptions(context=1024, host_repack=wanted), in_process=True)
        for wanted in (None, True, False)
    )
    assert plain == refused
    rearranged = runtime.settings._open(model, load_profile("host"), Asked(1024))
    way = runtime.settings._Way(EngineOptions(context=1024, host_repack=True, mmap=False), in_process=True)
    read = replace(way, options=replace(way.options, host_repack=None))
    assert rearranged.needs(way) == rearranged.needs(read)
    without = plain - predict_repacked(rearranged, EngineOptions(context=1024))
    assert asked == max(plain, without + layers)
    assert asked > plain
    chosen = choose_settings(model, "auto", Asked(context=1024, host_repack=True))
    assert chosen.options.host_repack
    assert parse_size(str(chosen.reasons["memory"].value).replace(" ", "")) == pytest.approx(asked, rel=0.01)


@pytest.mark.parametrize("wanted", [None, True, False])
def test_commands_keep_where_weights_beside_a_gpu_lie(model: Path, memory: Memory, wanted: bool | None) -> None:
    memory.is_free(4096 * MIB)
    options = EngineOptions(context=1024, gpu_layers=1, gpu="CUDA0", host_repack=wanted)
    by_run = run._settled(model, "auto", options, fixed_type=False)
    by_serve, _ = serve._settled(model, "auto", options, True, fixed_type=False)
    for found in (by_run, by_serve):
        assert (found.gpu_layers, found.gpu, found.host_repack) == (1, "CUDA0", wanted)


def predict_repacked(model: runtime.settings._Model, options: EngineOptions) -> int:
    """Bytes of rearranged copies that are predicted where nobody asks."""
    settings = RunSettings(context=options.context)
    return ram_parts(model.workload, model.profile, settings, model.family).repack_bytes


def test_what_gives_way_costs_least_first(model: Path, memory: Memory) -> None:
    seen = []
    for free_mib in range(500, 60, -4):
        memory.is_free(free_mib * MIB)
        try:
            settings = choose_settings(model, "auto", Asked(sequences=SEQUENCES))
        except DoesNotFitError:
            break
        options = settings.options
        assert parse_size(str(settings.reasons["memory"].value).replace(" ", "")) <= free_mib * MIB
        assert options.context >= LEAST_CONTEXT
        seen.append((-options.context, options.kv_type == "q8_0", options.batch == 128))
    assert seen == sorted(seen)  # nothing comes back as memory shrinks
    assert (-4096, False, True) in seen
    assert (-4096, True, True) in seen
    assert seen[-1][0] > -1024
    assert all(quantised and small for context, quantised, small in seen if context != -4096)


def test_the_engine_moves_into_the_server_before_anything_that_shows(model: Path, memory: Memory) -> None:
    seen = []
    for free_mib in range(560, 300, -4):
        memory.is_free(free_mib * MIB)
        settings = choose_settings(model, "auto", Asked(sequences=SEQUENCES, process="any"))
        assert settings.lines()["engine"].startswith("in the server's process: memory is short") == settings.in_process
        seen.append((settings.in_process, settings.options.kv_type == "q8_0"))
    assert seen == sorted(seen)
    assert {(False, False), (True, False), (True, True)} == set(seen)
    assert choose_settings(model, "auto", Asked()).in_process


def test_a_shortened_context_says_why(model: Path, memory: Memory) -> None:
    memory.is_free(150 * MIB)
    settings = choose_settings(model, "auto", Asked(sequences=SEQUENCES))
    assert LEAST_CONTEXT <= settings.options.context < 4096
    assert re.search(r"4096 would need .* and memory is short \(a test says so\)", settings.lines()["context"])


def test_what_was_asked_for_is_kept_or_refused(model: Path, memory: Memory) -> None:
    memory.is_free(150 * MIB)
    with pytest.raises(DoesNotFitError, match=r"needs .* for a context of 4096 tokens x 64.*a test says so") as caught:
        choose_settings(model, "auto", Asked(context=4096, sequences=SEQUENCES))
    offered = re.fullmatch(r"use --context (\d+)", caught.value.hint or "")
    assert offered
    settings = choose_settings(model, "auto", Asked(context=int(offered[1]), sequences=SEQUENCES))
    assert settings.lines()["context"].endswith("asked for")


def test_too_little_for_the_model_is_refused(model: Path, memory: Memory) -> None:
    memory.is_free(40 * MIB)
    with pytest.raises(DoesNotFitError, match=r"model.gguf needs .* for a context of 512 tokens, ") as caught:
        choose_settings(model, "auto", Asked())
    assert caught.value.exit_code == 4
    assert caught.value.hint == "use a smaller model or quantisation, or free memory"


def test_a_profile_counts_where_it_is_tighter(model: Path, memory: Memory) -> None:
    memory.is_free(64 * 1024 * MIB)
    settings = choose_settings(model, "raspberry-pi-5-1gb", Asked())
    assert settings.options.threads_decode <= 2
    assert "1 GiB less" in settings.lines()["memory"]
    asked = choose_settings(model, "raspberry-pi-5-1gb", Asked(threads_decode=3, threads_prefill=7))
    assert (asked.options.threads_decode, asked.options.threads_prefill) == (3, 7)
    assert asked.lines()["threads_decode"] == "3: asked for"
    with pytest.raises(UsageError, match="is a GPU"):
        choose_settings(model, "rtx-3060-12gb", Asked())
