"""Build the llama-cpp-python wheel for the machine at hand, once, and print its path.

Standard library only: it runs before anything is installed. It decides the compiler flags, derives a cache key from
everything that changes the binary (package version, flags, compiler, CPU features), and asks pip for the wheel only
when the cache has none. It does not know who installs the wheel.

Flags, and why:

* ``LLAVA_BUILD=OFF`` and no tools, tests, server or examples: the Python package uses libllama and libggml only.
* ``LLAMA_BUILD_COMMON`` is forced on as a cache entry by the package; a normal variable set by an injected CMake file
  wins over it. That halves the build.
* ``GGML_NATIVE=ON``: the compiler's own view of this CPU (x86-64 and aarch64 alike) selects the kernels.
* gcc 12 drops the stores that feed AMX tile configuration, and the first matrix product dies with SIGSEGV. Disabling
  dead-store elimination keeps AMX and repairs it; ``EDGELM_AMX=off`` compiles AMX out instead, which saves
  the second copy of the weights that the AMX layout costs.
* ``--gpu`` adds a backend for GPUs beside the CPU's. Without it nothing for GPUs is compiled, looked for or installed.
  ``--cuda-architectures 89`` compiles CUDA's kernels for one kind of card (``native``: the one in this machine), which
  is a fraction of the time and size that all of them take.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

CMAKE_DEFINES = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "LLAVA_BUILD": "OFF",
    "LLAMA_BUILD_TOOLS": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
}
GPU_DEFINES = {
    "none": {},
    "cuda": {"GGML_CUDA": "ON"},
    "rocm": {"GGML_HIP": "ON"},
    "vulkan": {"GGML_VULKAN": "ON"},
}
# What a backend's build needs beside the compiler, and where it comes from.
GPU_TOOLS = {
    "cuda": ("nvcc", "NVIDIA's CUDA toolkit, with nvcc in PATH"),
    "rocm": ("hipconfig", "AMD's ROCm, with hipconfig in PATH"),
    "vulkan": ("glslc", "on Debian and Ubuntu: apt-get install glslc libvulkan-dev spirv-headers"),
}
LEAST_VULKAN = (1, 3, 272)  # VK_EXT_layer_settings, which ggml-vulkan.cpp names
PROJECT_INCLUDE = "set(LLAMA_BUILD_COMMON OFF)\n"
DEBIAN_PACKAGES = {"cc": "gcc", "c++": "g++", "make": "make"}


def cpu_features() -> frozenset[str]:
    """Feature flags of the first CPU as the kernel names them; empty where there is no /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def compiler(kind: str) -> str:
    """Command of the C or C++ compiler, from the environment or the usual name; exits with the package to install."""
    default = {"cc": "cc", "c++": "c++"}[kind]
    command = os.environ.get({"cc": "CC", "c++": "CXX"}[kind], default)
    if shutil.which(command.split()[0]) is None:
        package = DEBIAN_PACKAGES[kind]
        sys.exit(
            f"error: no {'C' if kind == 'cc' else 'C++'} compiler ({command}) to build llama-cpp-python with\n"
            f"hint: install it, on Debian and Ubuntu with: apt-get install {package} libc6-dev make"
        )
    return command


def compiler_version(command: str) -> str:
    result = subprocess.run([*command.split(), "--version"], capture_output=True, text=True, check=False)
    return result.stdout.splitlines()[0] if result.stdout else command


def compile_flags(features: frozenset[str], version: str) -> str:
    """Extra C and C++ flags for this CPU and compiler (see the module's text)."""
    if "amx_int8" not in features:
        return ""
    if os.environ.get("EDGELM_AMX", "on") == "off":
        return "-U__AMX_INT8__"
    return "" if "clang" in version else "-fno-tree-dse -fno-dse"


def pinned_requirement(constraints: Path) -> str:
    """``llama-cpp-python==X`` from a constraints file; exits when it is not pinned there."""
    for line in constraints.read_text(encoding="ascii").splitlines():
        if line.startswith("llama-cpp-python=="):
            return line.split(";")[0].strip()
    sys.exit(f"error: {constraints} does not pin llama-cpp-python")


def vulkan_headers() -> tuple[int, int, int] | None:
    """Version of the Vulkan headers that a build would take; None where they are not found."""
    sdk = os.environ.get("VULKAN_SDK")
    for folder in (*([Path(sdk) / "include"] if sdk else []), Path("/usr/local/include"), Path("/usr/include")):
        try:
            text = (folder / "vulkan/vulkan_core.h").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        patch = re.search(r"^#define VK_HEADER_VERSION (\d+)$", text, re.MULTILINE)
        whole = re.search(
            r"^#define VK_HEADER_VERSION_COMPLETE VK_MAKE_API_VERSION\(0, (\d+), (\d+),", text, re.MULTILINE
        )
        if patch is not None and whole is not None:
            return int(whole[1]), int(whole[2]), int(patch[1])
    return None


def defines_for(gpu: str, architectures: str | None) -> dict[str, str]:
    """CMake definitions of a build; exits with what to install when the backend's compiler is missing."""
    if gpu in GPU_TOOLS:
        tool, source = GPU_TOOLS[gpu]
        if shutil.which(tool) is None:
            sys.exit(f"error: a build for {gpu} needs {tool}\nhint: install it, {source}")
    headers = vulkan_headers() if gpu == "vulkan" else None
    if headers is not None and headers < LEAST_VULKAN:
        have, need = (".".join(map(str, version)) for version in (headers, LEAST_VULKAN))
        sys.exit(
            f"error: llama.cpp needs Vulkan headers {need} or newer, here are {have}\n"
            "hint: install LunarG's SDK and set VULKAN_SDK, or build on a newer distribution"
        )
    found = {**CMAKE_DEFINES, **GPU_DEFINES[gpu]}
    if architectures is not None:
        if gpu != "cuda":
            sys.exit(f"error: --cuda-architectures is for --gpu cuda, not for {gpu}")
        found["CMAKE_CUDA_ARCHITECTURES"] = architectures
    return found


def cache_key(
    requirement: str, cmake_defines: dict[str, str], flags: str, version: str, features: Iterable[str]
) -> str:
    """Names everything that changes the binary."""
    key_parts = [requirement, str(sorted(cmake_defines.items())), PROJECT_INCLUDE, flags, version, platform.machine()]
    key_parts += [f"{sys.version_info.major}.{sys.version_info.minor}", *sorted(features)]
    return hashlib.sha256("\n".join(key_parts).encode()).hexdigest()[:16]


def build(requirement: str, cache: Path, python: str, cmake_defines: dict[str, str]) -> Path:
    """The cached wheel for ``requirement`` on this machine, built when there is none yet."""
    cc, cxx = compiler("cc"), compiler("c++")
    version = compiler_version(cxx)
    features = cpu_features()
    flags = compile_flags(features, version)
    key = cache_key(requirement, cmake_defines, flags, version, features)
    wheels = cache / key
    found = sorted(wheels.glob("llama_cpp_python-*.whl"))
    if found:
        return found[-1]
    print(f"building {requirement} for this CPU, once (about 4 minutes on 2 cores)", file=sys.stderr)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="build-") as scratch:
        include = Path(scratch) / "without-common.cmake"
        include.write_text(PROJECT_INCLUDE, encoding="ascii")
        defines = [f"-D{name}={value}" for name, value in cmake_defines.items()]
        defines += [f"-DCMAKE_PROJECT_INCLUDE={include}"]
        environment = {**os.environ, "CMAKE_ARGS": " ".join(defines), "CC": cc, "CXX": cxx}
        for name in ("CFLAGS", "CXXFLAGS"):
            environment[name] = f"{environment.get(name, '')} {flags}".strip()
        output = Path(scratch) / "wheels"
        # --no-cache-dir: pip's own cache would return a wheel that was built with other flags. Only this package comes
        # from its source: with ":all:" pip compiles CMake, too, where the machine has none.
        command = [python, "-m", "pip", "wheel", "--no-deps", "--no-cache-dir", "--no-binary", "llama-cpp-python"]
        command += ["--quiet", "-w", str(output), requirement]
        log = cache / f"{key}.log"
        with log.open("wb") as sink:
            code = subprocess.run(
                command, env=environment, stdout=sink, stderr=subprocess.STDOUT, check=False
            ).returncode
        if code != 0:
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
            sys.exit("\n".join([*tail, f"error: building {requirement} failed (full log: {log})"]))
        log.unlink()
        output.rename(wheels)
    return max(wheels.glob("llama_cpp_python-*.whl"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--constraints", type=Path, required=True, help="file that pins llama-cpp-python")
    parser.add_argument("--cache", type=Path, required=True, help="directory that keeps built wheels")
    parser.add_argument("--gpu", choices=sorted(GPU_DEFINES), default="none", help="also build a backend for GPUs")
    parser.add_argument(
        "--cuda-architectures", metavar="LIST", help="compute capabilities, as '86' or '75;89', or 'native' [all]"
    )
    arguments = parser.parse_args()
    cmake_defines = defines_for(arguments.gpu, arguments.cuda_architectures)
    requirement = pinned_requirement(arguments.constraints)
    print(build(requirement, arguments.cache.resolve(), sys.executable, cmake_defines))


if __name__ == "__main__":
    main()
