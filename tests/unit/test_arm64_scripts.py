"""The parts of the ARM build that need no compiler: kernel sets, the repacked wheel, settings handed to a build."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib
import io
import re
import struct
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
VARIANTS = """\
            ggml_add_cpu_backend_variant(armv8.2_2    DOTPROD FP16_VECTOR_ARITHMETIC)
            ggml_add_cpu_backend_variant(armv8.6_1    DOTPROD FP16_VECTOR_ARITHMETIC SVE MATMUL_INT8)
            ggml_add_cpu_backend_variant(armv9.2_1    DOTPROD FP16_VECTOR_ARITHMETIC SVE MATMUL_INT8 SME)
            ggml_add_cpu_backend_variant(android_armv9.2_1    DOTPROD MATMUL_INT8 FP16_VECTOR_ARITHMETIC SVE SME)
"""


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.fixture
def wheel_script(scripts: None) -> ModuleType:
    return importlib.import_module("build_arm64_wheel")


@pytest.fixture
def image_script(scripts: None) -> ModuleType:
    return importlib.import_module("arm64_image")


def test_kernel_sets_follow_the_compiler(wheel_script: ModuleType) -> None:
    old = wheel_script.edit_variants(VARIANTS, sme=False).splitlines()
    assert [line.split("(")[1].split()[0] for line in old] == [
        "armv8.2_2",
        "armv8.6_0",
        "armv8.6_1",
        "android_armv9.2_1",
    ]
    assert "SVE" not in old[1]
    assert "MATMUL_INT8" in old[1]
    assert "(armv9.2_1 " in wheel_script.edit_variants(VARIANTS, sme=True)


def test_a_changed_list_of_kernel_sets_stops_the_build(wheel_script: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no longer lists the kernel sets"):
        wheel_script.edit_variants("ggml_add_cpu_backend_variant(other DOTPROD)\n", sme=False)


def test_the_wheel_holds_each_file_once_with_its_hash(wheel_script: ModuleType, tmp_path: Path) -> None:
    built = tmp_path / "llama_cpp_python-1.0-py3-none-linux_x86_64.whl"
    information = "llama_cpp_python-1.0.dist-info"
    with zipfile.ZipFile(built, "w") as archive:
        archive.writestr("llama_cpp/__init__.py", "")
        archive.writestr("llama_cpp/lib/libllama.so", b"library")
        archive.writestr("llama_cpp/lib/pkgconfig/llama.pc", "")
        archive.writestr("include/llama.h", "")
        archive.writestr("lib/libllama.so", b"library")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-linux_x86_64\n")
        archive.writestr(f"{information}/RECORD", "")
    openmp = tmp_path / "libgomp.so.1"
    openmp.write_bytes(b"threads")
    output = tmp_path / "out"
    output.mkdir()
    wheel = wheel_script.repack(built, openmp, output)
    assert wheel.name == "llama_cpp_python-1.0-py3-none-linux_aarch64.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        libraries = [name for name in names if ".so" in name]
        assert sorted(libraries) == ["llama_cpp/lib/libgomp.so.1", "llama_cpp/lib/libllama.so"]
        assert not [name for name in names if name.startswith(("include/", "lib/")) or "pkgconfig" in name]
        assert b"Tag: py3-none-linux_aarch64\n" in archive.read(f"{information}/WHEEL")
        record = {row[0]: row[1:] for row in csv.reader(io.StringIO(archive.read(f"{information}/RECORD").decode()))}
        assert set(record) == set(names)
        for name in set(names) - {f"{information}/RECORD"}:
            digest = base64.urlsafe_b64encode(hashlib.sha256(archive.read(name)).digest()).rstrip(b"=").decode()
            assert record[name] == [f"sha256={digest}", str(len(archive.read(name)))]


def test_a_build_gets_the_machines_index_and_certificates(
    image_script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificates = tmp_path / "ca.pem"
    certificates.write_text("CERTIFICATE")
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CERT", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    configuration = tmp_path / "pip.conf.in"
    configuration.write_text(
        "[global]\nindex-url = https://index.example/simple\nextra-index-url = file:///somewhere\n"
        f"cert = {certificates}\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(configuration))
    options = image_script.secrets(tmp_path)
    assert options[1] == f"id=ca_bundle,src={certificates}"
    assert options[3] == f"id=pip_conf,src={tmp_path}/pip.conf"
    assert (tmp_path / "pip.conf").read_text().splitlines() == [
        "[global]",
        "index-url = https://index.example/simple",
        "cert = /run/ca_bundle.pem",
    ]


def test_everything_that_is_missing_is_named_at_once(
    image_script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_script, "is_arm", lambda: False)
    monkeypatch.setattr(image_script, "BINFMT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="apt-get install podman runc debootstrap qemu-user-static"):
        image_script.check_tools()
    for program in ("podman", "debootstrap"):
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    with pytest.raises(SystemExit, match=r"missing: qemu-aarch64-static\n.*apt-get install qemu-user-static$"):
        image_script.check_tools()
    (tmp_path / "qemu-aarch64").write_text("enabled\n")
    image_script.check_tools()


@pytest.mark.parametrize("buildx", [True, False])
def test_docker_builds_the_same_file_where_its_engine_runs(
    image_script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buildx: bool
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    lines = ["#!/bin/sh", f'[ "$1" != buildx ] || {str(buildx).lower()} || exit 1']
    lines.append(f'echo "$DOCKER_BUILDKIT $*" >> {tmp_path}/said')
    (programs / "docker").write_text("\n".join([*lines, ""]))
    (programs / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setattr(image_script, "CACHE", tmp_path / "cache")
    image_script.build("exporter")
    image_script.build("wheel", output=tmp_path / "wheels")
    said = [line for line in (tmp_path / "said").read_text().splitlines() if "--platform" in line]
    start = "1 buildx build --load" if buildx else "1 build"
    common = "--platform linux/arm64 --file Dockerfile.arm64 --target"
    assert said[0].startswith(f"{start} {common} exporter --secret ")
    assert said[0].endswith(" --tag edgelm-exporter:arm64 .")
    assert said[1].startswith(f"{start.removesuffix(' --load')} {common} wheel --secret ")
    assert said[1].endswith(f" --output {tmp_path}/wheels .")


def test_containers_are_locked_down(image_script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_script, "engine", lambda: ["podman"])
    monkeypatch.setattr(image_script, "is_arm", lambda: False)
    words = " ".join(image_script.container_options(memory="1g", cpu="cortex-a72", mounts=["/a:/b:ro"]))
    for wanted in ("--read-only", "--cap-drop ALL", "--network none", "--memory-swap 1g", "QEMU_CPU=cortex-a72"):
        assert wanted in words


def test_every_imitated_processor_shows_its_own_cpuinfo(
    scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proof = importlib.import_module("arm64_proof")
    monkeypatch.setattr(proof, "CACHE", tmp_path)
    monkeypatch.setattr(proof, "is_arm", lambda: False)
    monkeypatch.setattr("arm64_image.engine", lambda: ["podman"])
    assert set(proof.CPUINFO) == set(proof.PROCESSORS)
    for processor, (kernels, _) in proof.PROCESSORS.items():
        text = proof.processor_file(processor).read_text()
        assert ("asimddp" in text) == (kernels != "armv8.0_1")
        assert ("i8mm" in text) == kernels.startswith("armv8.6")
        assert f"{proof.processor_file(processor)}:/proc/cpuinfo:ro" in proof.options_on(processor, "1g", [])


def test_the_proof_names_what_misses_its_limit(scripts: None) -> None:
    proof = importlib.import_module("arm64_proof")
    row = {"processor": "cortex-a76", "model": "tiny-gguf-f32", "kernels": "armv8.2_2", "kl_mean": 9e-5}
    onnx = {**row, "model": "tiny-onnx-int8", "kernels": None, "kl_mean": 9e-3}
    assert proof.failures({"logits": [row, onnx]}) == []
    missed = proof.failures({"logits": [{**row, "kl_mean": 2e-4}, {**onnx, "kl_mean": float("nan")}]})
    assert [sentence.split(":")[0] for sentence in missed] == [
        "tiny-gguf-f32 on cortex-a76",
        "tiny-onnx-int8 on cortex-a76",
    ]
    pages = {"files": 1, "segments": 4, "alignment_min_bytes": 4096, "tiny": {"page_bytes": 4096, "kl_mean": 0.0}}
    assert len(proof.failures({"large_pages": pages})) == 2
    warned = {"processor": "cortex-a72", "healthy": True, "broken": [], "features": {"status": "warning"}}
    assert len(proof.failures({"doctor": [warned]})) == 1


def test_a_proof_that_was_cut_off_goes_on_where_it_stopped(scripts: None, tmp_path: Path) -> None:
    kept = importlib.import_module("arm64_kept").Kept
    path = tmp_path / "rows.jsonl"
    kept(path).add({"kl_mean": 1e-5}, "logits", "image", "cortex-a53")
    with path.open("a") as stream:
        stream.write('{"key": "logits|image|cortex-a72", "row": {"kl_')
    again = kept(path)
    assert again.find("logits", "image", "cortex-a53") == {"kl_mean": 1e-5}
    assert again.find("logits", "image", "cortex-a72") is None
    assert again.find("logits", "another image", "cortex-a53") is None
    again.add({"kl_mean": 2e-5}, "logits", "image", "cortex-a72")
    assert kept(path).find("logits", "image", "cortex-a72") == {"kl_mean": 2e-5}
    again.forget()
    assert kept(path).find("logits", "image", "cortex-a53") is None


def test_what_misses_its_limit_is_computed_again(scripts: None, tmp_path: Path) -> None:
    proof = importlib.import_module("arm64_proof")
    work = proof.Proof(tmp_path, [], proof.Kept(tmp_path / "rows.jsonl"), "image", "exporter")
    row = {"processor": "cortex-a72", "healthy": False, "broken": ["engine: SIGILL"], "features": {"status": "ok"}}
    assert work.once("doctor", lambda: row, "image", "cortex-a72")["healthy"] is False
    assert work.once("doctor", lambda: {**row, "healthy": True}, "image", "cortex-a72")["healthy"] is True
    assert work.once("doctor", lambda: row, "image", "cortex-a72")["healthy"] is True


def test_segments_of_an_elf_file_are_read(scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS / "arm64"))
    segments = importlib.import_module("segments")
    header = b"\x7fELF\x02\x01".ljust(32, b"\0") + struct.pack("<QQIHHHHHH", 64, 0, 0, 64, 56, 3, 0, 0, 0)
    entries = [struct.pack("<II5QQ", kind, 0, 0, 0, 0, 0, 0, align) for kind, align in ((1, 65536), (6, 8), (1, 4096))]
    (tmp_path / "library.so").write_bytes(header + b"".join(entries))
    (tmp_path / "text").write_text("#!/bin/sh\n")
    assert segments.load_alignments(tmp_path / "library.so") == [65536, 4096]
    assert segments.load_alignments(tmp_path / "text") == []


def test_the_image_holds_what_edgelm_needs_at_run_time() -> None:
    """pip resolves nothing in the image, so a dependency that is added has to be named there as well."""
    root = SCRIPTS.parent
    needed = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    names = {re.split(r"[<>=;~ \[]", line)[0] for line in needed if "python_version" not in line}
    listed = (root / "docker/requirements-arm64.txt").read_text(encoding="ascii").splitlines()
    held = {line for line in listed if line and not line.startswith("#")}
    assert {plain(name) for name in names} <= {plain(name) for name in held}
    pinned = {
        plain(line.split("==")[0]) for line in (root / "constraints.txt").read_text().splitlines() if "==" in line
    }
    added = (root / "docker/requirements-exporter-arm64.txt").read_text(encoding="ascii").splitlines()
    wanted = held | {line for line in added if line and not line.startswith("#")}
    assert {plain(name) for name in wanted} <= pinned


def plain(name: str) -> str:
    return name.lower().replace("_", "-")
