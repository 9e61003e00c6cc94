"""Build one llama-cpp-python wheel for every 64-bit ARM board, there or on another machine, and print its path.

Standard library only. The wheel holds ggml's CPU kernels several times, compiled for different steps of the
architecture; the engine loads the best set that the processor at hand can run. So one wheel serves a Raspberry Pi 4
(plain armv8-a), a Raspberry Pi 5 or RK3588 (dot product, half floats), and newer cores (i8mm, SVE). It does not know
who installs the wheel; ``Dockerfile.arm64`` and docs/raspberry-pi.md are the callers.

What differs from ``build_llama_wheel.py``, and why:

* ``GGML_BACKEND_DL`` and ``GGML_CPU_ALL_VARIANTS`` make the kernel sets separate libraries, chosen when loaded.
* llama.cpp's list of sets asks for SME, which compilers before gcc 14 refuse: such sets are left out. It has no set for
  i8mm without SVE (Apple and Snapdragon processors under Linux): one is added.
* On another architecture Debian's cross compiler is used: emulated compiling takes an hour where this takes minutes.
* libgomp travels inside the wheel, and no library is there twice: nothing has to be installed beside it.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

from build_llama_wheel import CMAKE_DEFINES, compiler_version, pinned_requirement

CROSS_PREFIX = "aarch64-linux-gnu-"
LIBRARY_DIRECTORY = "llama_cpp/lib"
VARIANT_LIST = Path("vendor/llama.cpp/ggml/src/CMakeLists.txt")
I8MM_WITHOUT_SVE = "ggml_add_cpu_backend_variant(armv8.6_0    DOTPROD FP16_VECTOR_ARITHMETIC MATMUL_INT8)"
SME_FLAGS = "-march=armv9.2-a+dotprod+fp16+sve+i8mm+sme"
DEFINES = {
    **CMAKE_DEFINES,
    "GGML_NATIVE": "OFF",
    "GGML_BACKEND_DL": "ON",
    "GGML_CPU_ALL_VARIANTS": "ON",
    # llama-cpp-python installs the libraries that it knows by name; ggml installs the kernel sets, here beside them.
    "CMAKE_INSTALL_BINDIR": LIBRARY_DIRECTORY,
    "CMAKE_INSTALL_LIBDIR": LIBRARY_DIRECTORY,
    "CMAKE_INSTALL_RPATH": "$ORIGIN",
}
# Included by CMake after every project(): no common library (see build_llama_wheel.py), and one file per library, since
# a wheel cannot hold the links libX.so -> libX.so.0 -> libX.so.0.1 and would carry each library three times.
PROJECT_INCLUDE = "set(LLAMA_BUILD_COMMON OFF)\nset(CMAKE_PLATFORM_NO_VERSIONED_SONAME ON)\n"
TOOLCHAIN = """set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER {prefix}gcc)
set(CMAKE_CXX_COMPILER {prefix}g++)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
"""


def cross_prefix() -> str:
    """Prefix of the tools that make aarch64 programs: empty on an ARM machine; exits when they are missing."""
    prefix = "" if platform.machine() in ("aarch64", "arm64") else CROSS_PREFIX
    if shutil.which(f"{prefix}g++") is None:
        package = "g++ make" if not prefix else "gcc-aarch64-linux-gnu g++-aarch64-linux-gnu"
        sys.exit(
            f"error: no compiler {prefix}g++ to build llama-cpp-python for aarch64 with\n"
            f"hint: install it, on Debian and Ubuntu with: apt-get install {package}"
        )
    if prefix and shutil.which("cmake") is None:  # pip would fetch the one for aarch64, which does not run here
        sys.exit("error: no CMake to build llama-cpp-python with\nhint: apt-get install cmake ninja-build")
    return prefix


def knows_sme(prefix: str) -> bool:
    """Whether the compiler accepts the flags of llama.cpp's kernel sets for SME."""
    command = [f"{prefix}gcc", SME_FLAGS, "-E", "-x", "c", os.devnull, "-o", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def edit_variants(text: str, *, sme: bool) -> str:
    """llama.cpp's CMake list of kernel sets, with the i8mm set added and those for SME dropped unless ``sme``."""
    anchor = re.compile(r"^( *)ggml_add_cpu_backend_variant\(armv8\.6_1 .*\n", re.MULTILINE)
    found = anchor.search(text)
    unwanted = re.compile(r"^ *ggml_add_cpu_backend_variant\(armv9\.2_\d .*\n", re.MULTILINE)
    if found is None or not unwanted.search(text):
        sys.exit(f"error: {VARIANT_LIST} no longer lists the kernel sets as expected; adapt {Path(__file__).name}")
    text = text[: found.start()] + f"{found[1]}{I8MM_WITHOUT_SVE}\n" + text[found.start() :]
    return text if sme else unwanted.sub("", text)


def run_logged(command: list[str], log: Path, environment: dict[str, str]) -> None:
    """Run a command with its output in ``log``; exits with the log's end when it fails."""
    with log.open("ab") as sink:
        code = subprocess.run(command, env=environment, stdout=sink, stderr=subprocess.STDOUT, check=False).returncode
    if code != 0:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
        sys.exit("\n".join([*tail, f"error: {' '.join(command[:5])} ... failed (full log: {log})"]))


def fetch_source(requirement: str, scratch: Path, log: Path) -> Path:
    """Directory of the unpacked source distribution."""
    # Named, not ":all:": that would compile CMake as well, for half an hour, where the machine has none.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
    run_logged([*command, "-d", str(scratch), requirement], log, dict(os.environ))
    archive = next(scratch.glob("llama_cpp_python-*.tar.gz"))
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):
            tar.extractall(scratch, filter="data")
        else:  # Python 3.10 and 3.11 before their security updates
            tar.extractall(scratch)  # noqa: S202 (the archive was checked by pip)
    return scratch / archive.name.removesuffix(".tar.gz")


def configure(scratch: Path, prefix: str) -> dict[str, str]:
    """Environment of the build: CMake's settings, and the platform that the wheel's name shall carry."""
    include = scratch / "project.cmake"
    include.write_text(PROJECT_INCLUDE, encoding="ascii")
    defines = [f"-D{name}={value}" for name, value in DEFINES.items()]
    defines.append(f"-DCMAKE_PROJECT_INCLUDE={include}")
    if prefix:
        toolchain = scratch / "toolchain.cmake"
        toolchain.write_text(TOOLCHAIN.format(prefix=prefix), encoding="ascii")
        defines.append(f"-DCMAKE_TOOLCHAIN_FILE={toolchain}")
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "CFLAGS", "CXXFLAGS")}
    return {**environment, "CMAKE_ARGS": " ".join(defines), "_PYTHON_HOST_PLATFORM": "linux-aarch64"}


def repack(built: Path, openmp: Path, output: Path) -> Path:
    """Write ``built`` anew into ``output``: package and metadata only, no headers and CMake files, libgomp added."""
    name = re.sub(r"-[^-]+\.whl$", "-linux_aarch64.whl", built.name)
    target = output / name
    records: list[str] = []
    with zipfile.ZipFile(built) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as sink:
        record_name = next(entry for entry in source.namelist() if entry.endswith(".dist-info/RECORD"))
        information = record_name.split("/")[0]

        def add(entry: str, data: bytes) -> None:
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            records.append(f"{entry},sha256={digest},{len(data)}")
            info = zipfile.ZipInfo(entry)  # a fixed date: the same input gives the same bytes
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = (0o755 if entry.endswith(".so") else 0o644) << 16
            sink.writestr(info, data)

        for entry in sorted(source.namelist()):
            if entry == record_name or entry.endswith("/"):
                continue
            kept = entry.startswith((f"{information}/", "llama_cpp/"))
            if not kept or entry.startswith((f"{LIBRARY_DIRECTORY}/cmake/", f"{LIBRARY_DIRECTORY}/pkgconfig/")):
                continue
            data = source.read(entry)
            if entry == f"{information}/WHEEL":
                data = re.sub(rb"(?m)^Tag: .*$", b"Tag: py3-none-linux_aarch64", data)
            add(entry, data)
        add(f"{LIBRARY_DIRECTORY}/{openmp.name}", openmp.read_bytes())
        sink.writestr(zipfile.ZipInfo(record_name), "\n".join([*records, f"{record_name},,", ""]))
    return target


def children_cpu_s() -> float:
    """Processor seconds of every program that ended below this one."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def build(requirement: str, cache: Path) -> Path:
    """The cached wheel for ``requirement``, built when there is none yet."""
    prefix = cross_prefix()
    version = compiler_version(f"{prefix}g++")
    key_parts = [requirement, version, str(sorted(DEFINES.items())), PROJECT_INCLUDE, TOOLCHAIN, I8MM_WITHOUT_SVE]
    key = hashlib.sha256("\n".join(key_parts).encode()).hexdigest()[:16]
    wheels = cache / f"arm64-{key}"
    found = sorted(wheels.glob("llama_cpp_python-*.whl"))
    if found:
        return found[-1]
    print(f"building {requirement} for 64-bit ARM with {version}, once", file=sys.stderr)
    cache.mkdir(parents=True, exist_ok=True)
    log = cache / f"arm64-{key}.log"
    log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="build-") as name:
        scratch = Path(name)
        source = fetch_source(requirement, scratch, log)
        variants = source / VARIANT_LIST
        variants.write_text(
            edit_variants(variants.read_text(encoding="utf-8"), sme=knows_sme(prefix)), encoding="utf-8"
        )
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-cache-dir", "-w", str(scratch / "built")]
        started, used_s = time.perf_counter(), children_cpu_s()
        run_logged([*command, str(source)], log, configure(scratch, prefix))
        # Processor time as well: it tells the cost where other work shares the machine.
        elapsed_s, used_s = time.perf_counter() - started, children_cpu_s() - used_s
        print(f"compiled in {elapsed_s:.0f} s, {used_s:.0f} s of processor time", file=sys.stderr)
        asked = [f"{prefix}gcc", "-print-file-name=libgomp.so.1"]
        openmp = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
        output = scratch / "wheels"
        output.mkdir()
        repack(next((scratch / "built").glob("*.whl")), openmp, output)
        output.rename(wheels)
    log.unlink()
    return max(wheels.glob("llama_cpp_python-*.whl"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--constraints", type=Path, required=True, help="file that pins llama-cpp-python")
    parser.add_argument("--cache", type=Path, required=True, help="directory that keeps built wheels")
    arguments = parser.parse_args()
    print(build(pinned_requirement(arguments.constraints), arguments.cache.resolve()))


if __name__ == "__main__":
    main()
