"""Profiles: what comes along is complete, what users write is checked, nothing crashes the reader."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm.errors import ProfileError
from targets.calibration import calibration
from targets.profile import (
    GIB,
    PROFILES,
    board_profile,
    list_profiles,
    load_profile,
    parse_profile,
    profile_for_device,
    profile_toml,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PI = (PROFILES / "raspberry-pi-5.toml").read_text(encoding="utf-8")


def test_every_builtin_profile_is_complete_and_sourced() -> None:
    families = calibration().families
    profiles = list_profiles()
    assert len(profiles) > 100
    names = [name for profile in profiles for name in (profile.id, *profile.aliases)]
    assert len(names) == len(set(names)), "an id or alias stands for two profiles"
    for profile in profiles:
        assert profile.kernels in families, profile.id
        assert families[profile.kernels].gpu == (profile.kind == "gpu"), profile.id
        assert 0 < profile.usable_ram_bytes < profile.ram_bytes, profile.id
        assert profile.ram_bytes in profile.memory.variants_bytes, profile.id
        assert profile.threads_decode.reason, profile.id
        assert profile.threads_prefill.reason, profile.id


def test_every_figure_has_a_source_that_is_an_address_or_says_what_it_is() -> None:
    for path in PROFILES.glob("*.toml"):
        sources = tomllib.loads(path.read_text(encoding="utf-8"))["sources"]
        for key, source in sources.items():
            assert source.startswith(("https://", "estimate: ", "arithmetic")), f"{path.name}: {key}"


@pytest.mark.parametrize(
    ("text", "target", "ram_gib"),
    [
        ("raspberry-pi-5", "raspberry-pi-5", 8),
        ("raspberry-pi-5-4gb", "raspberry-pi-5", 4),
        ("pi4-1gb", "raspberry-pi-4", 1),
        ("laptop", "laptop-x86-avx2", 16),
        ("rtx-4090-24gb", "rtx-4090-24gb", 24),
    ],
)
def test_a_target_is_found_by_id_size_and_alias(text: str, target: str, ram_gib: int) -> None:
    profile = load_profile(text)
    assert (profile.id, profile.ram_bytes) == (target, ram_gib * GIB)
    assert load_profile(profile.label) == profile


def test_a_miss_names_what_is_near_and_a_wrong_size_what_exists() -> None:
    with pytest.raises(ProfileError, match="no target 'raspbery-pi-5'") as near:
        load_profile("raspbery-pi-5")
    assert "raspberry-pi-5" in str(near.value.hint)
    with pytest.raises(ProfileError, match="does not come with 64 GB") as size:
        load_profile("raspberry-pi-5-64gb")
    assert "raspberry-pi-5-16gb" in str(size.value.hint)
    with pytest.raises(ProfileError, match="cannot read profile"):
        load_profile("no/such/file.toml")


def test_a_file_of_the_users_own_is_a_target(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(PI.replace("raspberry-pi-5", "mine"), encoding="utf-8")
    assert load_profile(str(path)).id == "mine"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"memory.theoretical_gbs" = ', '"memory.other" = ', "memory.theoretical_gbs has no source"),
        ("theoretical_gbs = 17.07", 'theoretical_gbs = "fast"', "a number is needed"),
        ("theoretical_gbs = 17.07", "theoretical_gbs = nan", "finite"),
        ("theoretical_gbs = 17.07", "theoretical_gbs = -1.0", "greater than or equal to 0"),
        ('kernels = "arm-dotprod"', "", "kernels: Field required"),
        ('kind = "cpu"', 'kind = "gpu"', "does not go with backend"),
        ("sizes_gib = [1, 2, 4, 8, 16]", "sizes_gib = []", "variants_bytes"),
        ('cpu = "', 'colour = "red"\ncpu = "', "colour: Extra inputs"),
        ("[cores]", "[cores", "is not TOML"),
    ],
)
def test_a_wrong_profile_is_refused_with_the_key(old: str, new: str, said: str) -> None:
    assert old in PI
    with pytest.raises(ProfileError, match=r"my\.toml") as error:
        parse_profile(PI.replace(old, new).encode(), "my.toml")
    assert said in str(error.value)


def test_what_is_written_reads_back_the_same() -> None:
    for profile in list_profiles():
        again = parse_profile(profile_toml(profile).encode(), profile.id)
        assert again.model_dump(exclude={"memory"}) == profile.model_dump(exclude={"memory"})
        assert again.usable_ram_bytes == pytest.approx(profile.usable_ram_bytes, rel=1e-9)
        if profile.memory.theoretical is not None:
            assert again.memory.theoretical is not None
            assert again.memory.theoretical.value == pytest.approx(profile.memory.theoretical.value)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_crash_the_reader(content: bytes) -> None:
    with pytest.raises(ProfileError):
        parse_profile(content, "fuzz")


@settings(max_examples=80, deadline=None)
@given(
    key=st.sampled_from(
        ["id", "kind", "cpu", "isa", "power_w", "threads_decode", "cores", "memory", "sources", "ram_bytes"]
    ),
    value=st.sampled_from(
        ["1", "-1", "1e400", "true", '""', '"x"', "[]", "[[1]]", "{}", "{ fast = 0 }", "{ a = [1] }"]
    ),
)
def test_no_value_of_another_kind_crashes_the_reader(key: str, value: str) -> None:
    document = tomllib.loads(PI)
    document.pop(key, None)
    lines = [f"{key} = {value}", *(line for line in PI.splitlines() if not line.startswith(f"{key} = "))]
    skipped = False
    kept = []
    for line in lines:
        if line.startswith("["):
            skipped = line == f"[{key}]"
        if not skipped:
            kept.append(line)
    with contextlib.suppress(ProfileError):
        parse_profile("\n".join(kept).encode(), "fuzz")


def test_boards_are_recognised_by_their_own_name() -> None:
    found = board_profile("Raspberry Pi 5 Model B Rev 1.0")
    assert found is not None
    assert found.id == "raspberry-pi-5"
    assert board_profile("Raspberry Pi 500+ Rev 1.0") == load_profile("raspberry-pi-500-plus")
    assert board_profile("ThinkPad X1") is None


def test_a_device_has_a_profile_for_its_cpu_and_for_its_gpu() -> None:
    cpu, gpu = (profile_for_device("intel-ultra7-258v-laptop", gpu=gpu) for gpu in (False, True))
    assert cpu is not None
    assert gpu is not None
    assert (cpu.backend, gpu.backend) == ("cpu", "vulkan")
