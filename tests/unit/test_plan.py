"""Plans: which candidate is chosen and why, limits, contexts, overrides; the mixes' fallbacks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from edgelm.errors import DoesNotFitError, UsageError
from exporter import mixes
from exporter.checkpoint import Checkpoint, open_checkpoint, open_source
from exporter.options import ExportOptions, check_options, parse_type_override
from exporter.plan import candidates, choose, file_type, paced, resolve
from targets.predict import RunSettings, predict
from targets.profile import TargetProfile, load_profile
from targets.workload import workload_from_plan
from tests.tiny_models import make_tiny_llama


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("plan") / "m"
    return open_checkpoint(open_source(str(make_tiny_llama(directory, hidden=96, heads=3, kv_heads=1, ffn=256))))


@pytest.fixture(scope="module")
def profile() -> TargetProfile:
    return load_profile("raspberry-pi-5")


def test_sizes_add_up(checkpoint: Checkpoint, profile: TargetProfile) -> None:
    plan = resolve(ExportOptions("x", quant="Q4_K_M"), checkpoint, profile)
    stored = sum(item.size_bytes for item in plan.tensors)
    assert plan.bits_per_weight == pytest.approx(8 * stored / plan.parameters)
    assert plan.parameters == sum(header.elements for header in checkpoint.tensors.values())
    assert stored + checkpoint.vocabulary_bytes < plan.artifact_bytes < stored + checkpoint.vocabulary_bytes + 10_000
    assert file_type(plan) == 15
    assert plan.context.value == 1024


@pytest.mark.parametrize(
    ("format_", "quant"), [("gguf", "Q4_K_M"), ("onnx", "int4"), ("onnx", "fp16"), ("onnx", "int4-fp16")]
)
def test_a_plan_alone_predicts_what_was_predicted_for_it(
    checkpoint: Checkpoint, profile: TargetProfile, format_: Literal["gguf", "onnx"], quant: str
) -> None:
    plan = resolve(ExportOptions("x", format=format_, quant=quant), checkpoint, profile)
    workload = workload_from_plan(plan)
    assert workload is not None
    again = predict(workload, profile, RunSettings(context=int(plan.context.value)))
    assert again.ram_bytes == plan.predicted.ram_bytes
    assert again.decode_tps == pytest.approx(plan.predicted.decode_tps)
    assert again.prefill_tps == pytest.approx(plan.predicted.prefill_tps)


def test_rows_that_do_not_fit_say_so(checkpoint: Checkpoint, profile: TargetProfile) -> None:
    plan = resolve(ExportOptions("x", quant="Q4_K_M"), checkpoint, profile)
    by_name = {item.name: item for item in plan.tensors}
    assert by_name["blk.0.attn_q.weight"].type == "Q5_0"
    assert "rows of 96 are no multiple of the 256 that Q4_K needs" in by_name["blk.0.attn_q.weight"].reason
    assert by_name["blk.0.attn_norm.weight"].type == "F32"
    assert by_name["token_embd.weight"].type == "Q8_0"
    assert any("have rows that do not fit" in note for note in plan.notes)
    assert all(item.reason for item in plan.tensors)


def test_auto_takes_the_most_bits_that_keep_the_limits(checkpoint: Checkpoint, profile: TargetProfile) -> None:
    everything = candidates(ExportOptions("x"), checkpoint, profile)
    sizes = [item.plan.artifact_bytes for item in everything]
    assert sizes == sorted(sizes, reverse=True)
    free = resolve(ExportOptions("x"), checkpoint, profile)
    assert free.notes[-1].startswith(f"auto: {free.quant}")
    limit = everything[0].plan.artifact_bytes - 1
    tight = resolve(ExportOptions("x", max_artifact_bytes=limit), checkpoint, profile)
    assert tight.artifact_bytes <= limit
    assert tight.bits_per_weight < everything[0].plan.bits_per_weight
    with pytest.raises(DoesNotFitError, match="nothing fits") as caught:
        resolve(ExportOptions("x", max_artifact_bytes=10), checkpoint, profile)
    assert caught.value.exit_code == 4
    assert "the smallest is" in (caught.value.hint or "")


def test_speed_wins_between_mixes_of_nearly_equal_bits(checkpoint: Checkpoint, profile: TargetProfile) -> None:
    first, second = candidates(ExportOptions("x"), checkpoint, profile)[:2]

    def at(candidate: object, tps: float) -> object:
        plan = candidate.plan  # type: ignore[attr-defined]
        predicted = plan.predicted.model_copy(update={"decode_tps": tps})
        return replace(candidate, plan=plan.model_copy(update={"predicted": predicted}))  # type: ignore[type-var]

    assert second.plan.bits_per_weight > 0.9 * first.plan.bits_per_weight
    assert choose([at(first, 100), at(second, 110)], profile).plan.quant == first.plan.quant  # type: ignore[list-item]
    faster = choose([at(first, 100), at(second, 150)], profile)  # type: ignore[list-item]
    assert faster.plan.quant == second.plan.quant
    assert "1.50 times the speed" in faster.reason


def test_missed_limit_names_what_would_do(checkpoint: Checkpoint, profile: TargetProfile) -> None:
    small = resolve(ExportOptions("x", quant="Q4_0"), checkpoint, profile).artifact_bytes
    with pytest.raises(DoesNotFitError, match=r"F32 on Raspberry Pi 5: .* --max-bytes is") as caught:
        resolve(ExportOptions("x", quant="F32", max_artifact_bytes=small), checkpoint, profile)
    assert "these would do: " in (caught.value.hint or "")
    assert "Q4_0" in (caught.value.hint or "") or "IQ4_NL" in (caught.value.hint or "")


def test_model_larger_than_the_device_does_not_fit(checkpoint: Checkpoint, profile: TargetProfile) -> None:
    tiny = profile.with_ram(10**6)
    with pytest.raises(DoesNotFitError, match="does not fit"):
        resolve(ExportOptions("x", quant="Q8_0"), checkpoint, tiny)


def test_overrides_come_first_and_must_hit(checkpoint: Checkpoint, profile: TargetProfile) -> None:
    overrides = (parse_type_override("ffn_down=q6_K"), parse_type_override(r"blk\.\d\.ffn=F16"))
    plan = resolve(ExportOptions("x", quant="Q4_0", type_overrides=overrides), checkpoint, profile)
    types = {item.name: item.type for item in plan.tensors}
    assert types["blk.0.ffn_down.weight"] == "Q6_K"
    assert types["blk.1.ffn_up.weight"] == "F16"
    assert types["blk.1.ffn_norm.weight"] == "F32"
    with pytest.raises(UsageError, match="fits no tensor"):
        resolve(ExportOptions("x", type_overrides=(("_norm", "Q8_0"),)), checkpoint, profile)


@pytest.mark.parametrize("text", ["ffn_down", "=Q4_0", "ffn(=Q4_0", "ffn=Q99", "ffn=I8"])
def test_overrides_that_make_no_sense(text: str) -> None:
    with pytest.raises(UsageError):
        parse_type_override(text)


def test_copy_keeps_types_and_auto_prefers_it_for_quantised_sources(smollm2_gguf: Path, profile: TargetProfile) -> None:
    source = open_checkpoint(open_source(str(smollm2_gguf)))
    plan = resolve(ExportOptions("x"), source, profile)
    assert plan.quant == "COPY"
    assert {item.name: item.type for item in plan.tensors} == {name: item.type for name, item in source.tensors.items()}
    assert plan.artifact_bytes == pytest.approx(smollm2_gguf.stat().st_size, rel=0.01)
    assert file_type(plan) == 3
    others = candidates(ExportOptions("x"), source, profile)
    assert max(item.plan.bits_per_weight for item in others) == plan.bits_per_weight
    requantised = resolve(ExportOptions("x", quant="Q8_0"), source, profile)
    assert any("already" in note for note in requantised.notes)


def test_smollm2_q4_k_m_is_mostly_q5_0(smollm2_gguf: Path, profile: TargetProfile) -> None:
    """The published count for this model: 166 Q5_0, 16 Q4_K, 15 Q8_0, 14 Q6_K."""
    source = open_checkpoint(open_source(str(smollm2_gguf)))
    plan = resolve(ExportOptions("x", quant="Q4_K_M"), source, profile)
    assert plan.type_counts == {"Q5_0": 166, "F32": 61, "Q4_K": 16, "Q8_0": 15, "Q6_K": 14}


def test_names_of_mixes() -> None:
    assert mixes.mix_named("q4_k").name == "Q4_K_M"
    with pytest.raises(UsageError, match="'Q7' is no quantisation") as caught:
        mixes.mix_named("Q7")
    assert "Q4_K_M" in (caught.value.hint or "")
    assert mixes.in_quantizer_order(["blk.10.a", "output.weight", "blk.2.b", "blk.2.a"]) == [
        "output.weight",
        "blk.2.a",
        "blk.2.b",
        "blk.10.a",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_kl": 0.1, "verify": False}, "--max-kl needs the proof"),
        ({"evaluation": Path("x"), "verify": False}, "--eval has no use"),
        ({"evaluation": Path("/no/such/file")}, "is no file"),
        ({"max_kl": 0.0}, "above zero"),
        ({"min_decode_tps": float("nan")}, "above zero"),
        ({"context": 0}, "at least 1"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_options(replace(ExportOptions("x"), **changes))


def test_plans_become_a_page_with_a_picture(checkpoint: Checkpoint, profile: TargetProfile) -> None:
    pytest.importorskip("matplotlib")
    from targets.compare import compare_plans
    from targets.report.page import html_page

    found = candidates(ExportOptions("x"), checkpoint, profile)
    plain = compare_plans("tiny", [(item.plan, item.reason) for item in found], profile)
    assert [line.kl_mean for line in plain.lines] == [None] * len(found)
    assert plain.notes == ()
    measured = [
        (item.plan.model_copy(update={"predicted_kl": 0.01 * number}), item.reason)
        for number, item in enumerate(found, start=1)
    ]
    page = html_page(compare_plans("tiny", measured, profile))
    assert "<svg" in page
    assert "KL is expected, not measured" in page
    assert f"{found[0].plan.quant} {found[0].plan.bits_per_weight:.2f}" in page


def test_as_fast_as_a_mix_means_its_speed_on_the_target(checkpoint: Checkpoint, profile: TargetProfile) -> None:
    options = ExportOptions("x", quant="Q8_0", as_fast_as="Q8_0")
    reference = resolve(replace(options, as_fast_as=None), checkpoint, profile).predicted
    limited = paced(options, checkpoint, profile)
    assert (limited.min_decode_tps, limited.min_prefill_tps) == (reference.decode_tps, reference.prefill_tps)
    assert resolve(options, checkpoint, profile).quant == "Q8_0"
    faster = paced(replace(options, min_decode_tps=1e9), checkpoint, profile)
    assert faster.min_decode_tps == 1e9
    with pytest.raises(DoesNotFitError, match="as fast as Q4_0 is"):
        resolve(replace(options, as_fast_as="Q4_0"), checkpoint, profile)
    with pytest.raises(UsageError, match="no quantisation"):
        resolve(replace(options, as_fast_as="Q4"), checkpoint, profile)
    with pytest.raises(UsageError, match="mix of GGUF"):
        resolve(replace(options, format="onnx", quant="int8"), checkpoint, profile)
