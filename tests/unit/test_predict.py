"""Predictions: the directions that physics gives, memory by its parts, verdicts with numbers, published rows."""

from __future__ import annotations

import contextlib
import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm.errors import ProfileError, UsageError
from targets.catalogue import BITS, known_model, mix_of, workload_from_figures
from targets.predict import RunSettings, load_text, predict
from targets.profile import GIB, list_profiles, load_profile
from targets.validate import COLUMNS, parse_rows, validate
from targets.workload import TypedWeights, Workload

TABLE = 49152 * 576
BODY = 106_204_032
Q4 = Workload(
    format="gguf",
    architecture="llama",
    parameters=TABLE + BODY,
    file_bytes=91_000_000,
    weights=(TypedWeights("Q4_0", BODY, BODY * 9 // 16), TypedWeights("Q8_0", TABLE, TABLE * 17 // 16)),
    lookup=None,
    layers=30,
    hidden=576,
    vocabulary=49152,
    kv_elements_per_token=2 * 30 * 192,
)
RUN = RunSettings(context=2048)
PI5 = load_profile("raspberry-pi-5")

# Public llama-bench figures, with the page that states them.
PUBLISHED = """device_id,backend,threads,model,params_b,quant,file_mib,n_prompt,pp_tps,n_gen,tg_tps,source_url
raspberry-pi-5,cpu,2,Qwen2.5-1.5B-Instruct,1.5,Q4_K_M,940.37,512,31.44,128,12.20,https://github.com/manunicholasjacob/edge-llm-memory-wall/blob/HEAD/results/L1_roofline.json
raspberry-pi-5,cpu,4,Llama-3.2-1B-Instruct,1.24,Q4_K_M,770.28,512,61.69,128,11.40,https://github.com/manunicholasjacob/edge-llm-memory-wall/blob/HEAD/results/L1_roofline.json
rtx-3090-24gb,cuda,,Mistral-7B-Instruct-v0.3,7.25,Q4_K_M,4167.68,512,5408,128,150.65,https://github.com/lhl/intel-inference/blob/HEAD/reference/reddit-localllama-llamacpp-compute-memory-bandwidth-efficiency.md
apple-m2-ultra-76gpu,metal,,Meta-Llama-3-8B,8.03,Q4_K_M,4689.92,512,994,1024,76.28,https://github.com/XiongjieDai/GPU-Benchmarks-on-LLM-Inference/blob/main/LLaMA%203/Mac/M2ultra_192GB.ipynb
unheard-of-board,cpu,4,TinyLlama,1.1,Q4_0,607,512,10,128,5,https://example.org/
"""


def test_published_figures_are_predicted(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(PUBLISHED, encoding="utf-8")
    outcome = validate(path)
    assert (outcome.rows, outcome.predicted_rows) == (5, 4)
    assert outcome.without_profile == {"unheard-of-board (cpu)": 1}
    assert outcome.decode.rows == 4
    assert outcome.decode.median_abs_pct_error is not None
    assert outcome.decode.median_abs_pct_error <= 15
    assert outcome.prefill.median_abs_pct_error is not None
    assert outcome.prefill.median_abs_pct_error <= 25
    assert abs(outcome.decode.worst[0].error_pct) >= abs(outcome.decode.worst[-1].error_pct)


def test_every_profile_gives_a_positive_speed_and_a_band_around_it() -> None:
    for profile in list_profiles():
        prediction = predict(Q4, profile, RUN)
        assert prediction.fits == "fits", profile.id
        for rate, band in (
            (prediction.decode_tps, prediction.decode_tps_band),
            (prediction.prefill_tps, prediction.prefill_tps_band),
        ):
            assert rate is not None
            assert band is not None
            assert 0 < band[0] < rate < band[1]
        assert prediction.prefill_tps > prediction.decode_tps, profile.id  # type: ignore[operator]


def test_four_threads_on_a_pi_5_decode_slower_and_prefill_faster_than_two() -> None:
    big = replace(
        Q4, weights=tuple(replace(w, parameters=w.parameters * 8, size_bytes=w.size_bytes * 8) for w in Q4.weights)
    )
    two, four = (predict(big, PI5, replace(RUN, threads_decode=n, threads_prefill=n)) for n in (2, 4))
    assert four.decode_tps is not None
    assert two.decode_tps is not None
    assert 0.7 < four.decode_tps / two.decode_tps < 0.95
    assert four.prefill_tps is not None
    assert two.prefill_tps is not None
    assert 1.7 < four.prefill_tps / two.prefill_tps < 2.05


def test_a_deep_cache_slows_decode_and_a_smaller_cache_type_less() -> None:
    shallow, deep, small = (
        predict(Q4, PI5, replace(RUN, context=8192, depth=depth, kv_type=kind)).decode_tps
        for depth, kind in ((0, "f16"), (8000, "f16"), (8000, "q8_0"))
    )
    assert shallow is not None
    assert deep is not None
    assert small is not None
    assert deep < small < shallow


def test_a_table_that_is_looked_up_and_multiplied_is_held_twice() -> None:
    """As llama.cpp does: a tied table of a type with repacked kernels is loaded once for each purpose."""
    unmapped = replace(RUN, mmap=False)
    tied = predict(Q4, PI5, unmapped).ram_parts
    assert tied.repack_bytes == TABLE * 17 // 16
    untied = replace(Q4, lookup=TypedWeights("Q8_0", TABLE, TABLE * 17 // 16), file_bytes=123_000_000)
    assert predict(untied, PI5, unmapped).ram_parts.repack_bytes == 0
    # Q8_0 has no repacked kernel on x86 with AVX-512
    avx512 = load_profile("laptop-x86-avx512")
    assert predict(Q4, avx512, unmapped).ram_parts.repack_bytes == 0
    assert predict(Q4, avx512, RUN).ram_parts.repack_bytes == BODY * 9 // 16


def test_tiles_of_amx_carry_sums() -> None:
    """SmolLM2-135M as Q4_0: llama.cpp announces 56.95 MiB of AMX buffer for the layers and 32.06 MiB for the head."""
    amx = load_profile("laptop-x86-avx512").model_copy(update={"kernels": "x86-amx"})
    parts = predict(Q4, amx, RUN).ram_parts
    assert parts.repack_bytes == pytest.approx((56.95 + 32.06) * 2**20, rel=1e-3)
    # Without a map only the head's second copy and the sums are more than the file.
    unmapped = predict(Q4, amx, replace(RUN, mmap=False)).ram_parts.repack_bytes
    assert unmapped == pytest.approx(TABLE * (34 + 4) / 32, rel=1e-3)


def test_memory_is_the_sum_of_parts_that_follow_their_causes() -> None:
    base = predict(Q4, PI5, RUN)
    parts = base.ram_parts
    assert base.ram_bytes == sum(parts.model_dump().values())
    assert parts.weights_bytes == Q4.file_bytes
    assert parts.kv_bytes == 2048 * 2 * 30 * 192 * 2
    # Q4_0 and Q8_0 have repacked kernels on the Pi 5; as the head, the tied table is multiplied, too
    assert parts.repack_bytes == BODY * 9 // 16 + TABLE * 17 // 16
    assert predict(Q4, load_profile("pi4"), RUN).ram_parts.repack_bytes == 0
    half = predict(Q4, PI5, replace(RUN, kv_type="q8_0")).ram_parts.kv_bytes
    assert half == round(parts.kv_bytes * 34 / 64)
    # llama.cpp rounds the cache up to multiples of 256
    assert predict(Q4, PI5, replace(RUN, context=1793)).ram_parts.kv_bytes == parts.kv_bytes


def test_verdicts_state_the_numbers() -> None:
    small = PI5.with_ram(600 * 2**20)
    no_mmap = predict(Q4, small, replace(RUN, context=8192, mmap=False))
    assert no_mmap.fits == "no"
    assert no_mmap.decode_tps is None
    assert "usable are" in no_mmap.fit_reason
    heavy = replace(Q4, file_bytes=3 * GIB)
    pages = predict(heavy, load_profile("raspberry-pi-5-2gb"), RUN)
    assert pages.fits == "pages"
    assert "storage" in pages.fit_reason
    fast = predict(heavy, load_profile("raspberry-pi-5-8gb"), RUN)
    assert fast.fits == "fits"
    assert pages.decode_tps is not None
    assert fast.decode_tps is not None
    assert pages.decode_tps < fast.decode_tps / 2
    assert predict(heavy, load_profile("raspberry-pi-5-2gb"), replace(RUN, mmap=False)).fits == "no"


@pytest.mark.parametrize(
    "wrong", [{"context": 0}, {"depth": -1}, {"threads_decode": 0}, {"prompt_tokens": 0}, {"batch": 0}]
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="has to be at least"):
        predict(Q4, PI5, RunSettings(**{"context": 2048, **wrong}))  # type: ignore[arg-type]


def test_an_unknown_kernel_family_is_named() -> None:
    with pytest.raises(ProfileError, match="no kernel family 'z80'"):
        predict(Q4, PI5.model_copy(update={"kernels": "z80"}), RUN)


@pytest.mark.parametrize(
    ("model", "billions", "quant", "file_mib", "tied"),
    [
        ("Llama-3.2-1B", 1.236, "Q4_K_M", 762.81, True),
        ("Qwen2.5-0.5B-Instruct", 0.63, "Q8_0", 638.74, False),
        ("Qwen2.5-0.5B-Instruct", 0.5, "Q4_K_M", 379.38, True),
        ("Gemma-3-270M-it", 0.268, "Q6_K", 263.64, True),
        ("Meta-Llama-3-8B", 8.03, "Q4_K_M", 4689.92, False),
    ],
)
def test_published_files_are_explained_by_shape_and_mix(
    model: str, billions: float, quant: str, file_mib: float, tied: bool
) -> None:
    workload = workload_from_figures(
        parameters=billions * 1e9, file_bytes=round(file_mib * 2**20), quant=quant, model=model
    )
    stored = [*workload.weights, *([workload.lookup] if workload.lookup else [])]
    assert (workload.lookup is None) == tied
    assert sum(item.size_bytes for item in stored) == pytest.approx(workload.file_bytes, rel=1e-6)
    unscaled = sum(item.parameters * BITS[item.type] / 8 for item in stored)
    assert unscaled == pytest.approx(workload.file_bytes, rel=0.03)


def test_rows_that_do_not_fit_a_k_quant_become_what_llama_cpp_makes_of_them() -> None:
    workload = workload_from_figures(parameters=0.5e9, file_bytes=398_000_000, quant="Q4_K_M", model="Qwen2.5-0.5B")
    sizes = {item.type: item.parameters for item in workload.weights}
    assert max(sizes, key=lambda kind: sizes[kind]) == "Q5_0"


def test_names_and_presets() -> None:
    found = known_model("Llama 3.2 1B Instruct")
    assert found is not None
    assert (found.layers, found.hidden) == (16, 2048)
    assert known_model("something else") is None
    assert mix_of("q4_k_m") == mix_of("Q4_K_M")
    with pytest.raises(UsageError, match="unknown quantisation 'Q9'"):
        mix_of("Q9")


@pytest.mark.parametrize(
    ("bits", "types"),
    [
        (33.0, {"fp32"}),
        (9.0, {"int8-32"}),
        (6.2, {"int4-32-asym", "int8-32"}),
        (4.6, {"int4-32-asym"}),
        (16.2, {"fp16"}),
        (8.5, {"int8-32-fp16"}),
        (5.0, {"int4-32-asym-fp16", "int8-32-fp16"}),
    ],
)
def test_types_of_onnx_files_are_read_off_their_size(bits: float, types: set[str]) -> None:
    size = round(135e6 * bits / 8)
    quant = "int4-fp16" if any(kind.endswith("fp16") for kind in types) else "int4"
    workload = workload_from_figures(parameters=135e6, file_bytes=size, quant=quant)
    assert workload.own_kv_type == ("f16" if quant == "int4-fp16" else "f32")
    assert workload.format == "onnx"
    assert {item.type for item in workload.weights} == types
    stored = [*workload.weights, *([workload.lookup] if workload.lookup else [])]
    assert sum(item.size_bytes for item in stored) == pytest.approx(size, rel=1e-6)


def test_a_cpu_multiplies_float16_as_float32() -> None:
    """ONNX Runtime has no such products there: it keeps copies, and reads those for every token."""
    board, size = load_profile("raspberry-pi-5-4gb"), RunSettings(context=512, depth=128)
    half = workload_from_figures(parameters=135e6, file_bytes=270_000_000, quant="fp16", model="SmolLM2-135M")
    full = workload_from_figures(parameters=135e6, file_bytes=540_000_000, quant="fp32", model="SmolLM2-135M")
    first, second = predict(half, board, size), predict(full, board, size)
    assert first.ram_parts is not None
    assert second.ram_parts is not None
    assert first.ram_parts.kv_bytes == second.ram_parts.kv_bytes / 2
    # Copies of all, and the tied table once more to look up.
    table = 2 * half.vocabulary * half.hidden
    assert first.ram_parts.repack_bytes == pytest.approx(270_000_000 + table, rel=0.01)
    assert second.ram_parts.repack_bytes == 0
    assert first.decode_tps == pytest.approx(second.decode_tps, rel=0.02)


@settings(max_examples=80, deadline=None)
@given(
    billions=st.floats(min_value=1e-3, max_value=500),
    bits=st.floats(min_value=1.2, max_value=20),
    quant=st.sampled_from(
        ["Q4_K_M", "Q8_0", "F16", "Q2_K", "IQ4_NL", "COPY", "MIXED", "int8", "int4-mixed", "fp32", "fp16"]
    ),
)
def test_any_size_gives_a_workload_that_can_be_predicted(billions: float, bits: float, quant: str) -> None:
    workload = workload_from_figures(
        parameters=billions * 1e9, file_bytes=round(billions * 1e9 * bits / 8), quant=quant
    )
    assert all(item.parameters >= 0 and item.size_bytes >= 0 for item in workload.weights)
    prediction = predict(workload, load_profile("a100-pcie-80gb"), RUN)
    assert prediction.ram_bytes > 0


def test_lines_that_cannot_be_understood_are_named_not_dropped() -> None:
    lines = ("device_id,quant,file_mib,tg_tps", "pi,Q4_0,x,5", "pi,Q77,100,5", "pi,Q4_0,400,9")
    text = "\n".join(lines)
    rows, unreadable = parse_rows(text, "t")
    assert [row.line for row in rows] == [4]
    assert [sentence.split(":")[0] for sentence in unreadable] == ["line 2", "line 3"]
    with pytest.raises(ProfileError, match="no column quant"):
        parse_rows("device_id,file_mib,tg_tps\n", "t")


def test_threads_of_prefill_and_the_age_of_a_build_are_read() -> None:
    header = [*COLUMNS, "threads", "notes", "llama_cpp_build_or_date"]
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(header)
    writer.writerow(["x", "Q4_0", "400", "5", "2", "pp at 16 threads, tg at 2", "b2836 (8c570c94)"])
    writer.writerow(["x", "Q4_0", "400", "5", "", "", "2026-03-08"])
    (old, new), _ = parse_rows(stream.getvalue(), "t")
    assert (old.settings.threads_decode, old.settings.threads_prefill, old.settings.old_engine) == (2, 16, True)
    assert (new.settings.threads_decode, new.settings.old_engine) == (None, False)


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=60), st.text(alphabet='0123456789.,-"\n eEnaifQ_K\x00', max_size=60))
def test_no_text_crashes_the_table_reader(junk: str, cells: str) -> None:
    for text in (junk, f"device_id,quant,file_mib,tg_tps\n{cells}"):
        with contextlib.suppress(ProfileError):
            parse_rows(text, "fuzz")


def test_loading_takes_reading_from_storage_and_filling_memory() -> None:
    workload = workload_from_figures(parameters=1.24e9, file_bytes=770 * 2**20, quant="Q4_K_M")
    board = load_profile("raspberry-pi-5")
    assert board.storage_read is not None
    mapped = predict(workload, board, RunSettings(context=512))
    copied = predict(workload, board, RunSettings(context=512, mmap=False))
    longer = predict(workload, board, RunSettings(context=8192))
    assert mapped.load_warm_s is not None
    assert mapped.load_cold_s is not None
    assert mapped.load_cold_s - mapped.load_warm_s == pytest.approx(workload.file_bytes / board.storage_read.value)
    assert 0.1 < mapped.load_warm_s < min(copied.load_warm_s or 0, longer.load_warm_s or 0) < 10
    assert load_text(mapped) == f"{mapped.load_warm_s:.2g} s from cache, {mapped.load_cold_s:.2g} s from storage"
    unknown = board.model_copy(update={"storage_read": None})
    assert predict(workload, unknown, RunSettings(context=512)).load_cold_s is None
    onnx = predict(replace(workload, format="onnx"), board, RunSettings(context=512))
    assert (onnx.load_warm_s, load_text(onnx)) == (None, "-")
