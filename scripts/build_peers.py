"""Build llama.cpp's own tools from the sources that llama-cpp-python ships, for benchmarks and cross-checks.

Same sources, same compiler flags as the engine in the virtual environment (``build_llama_wheel.py`` decides them), so
that a difference between the two is a difference of ours. Not needed to use or to test EdgeLM. Standard library only.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from build_llama_wheel import compile_flags, compiler, compiler_version, cpu_features, pinned_requirement

TOOLS = ("llama-quantize", "llama-bench", "llama-completion", "llama-perplexity", "llama-imatrix", "llama-tokenize")
TOOLS += ("llama-server", "llama-cli")
OFF = ("LLAMA_CURL", "LLAMA_OPENSSL", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_UI")
OFF += ("LLAMA_USE_PREBUILT_UI",)


def fetch_sources(requirement: str, directory: Path) -> Path:
    """Download and unpack the source distribution; returns its llama.cpp directory."""
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
        subprocess.run([*command, "-d", scratch, requirement], check=True)
        archive = next(Path(scratch).glob("*.tar.gz"))
        with tarfile.open(archive) as source:
            source.extractall(directory, filter="data")
        return directory / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--constraints", type=Path, required=True, help="file that pins llama-cpp-python")
    parser.add_argument("--output", type=Path, required=True, help="directory for sources and binaries")
    arguments = parser.parse_args()
    if shutil.which("cmake") is None:
        sys.exit("error: cmake was not found\nhint: on Debian and Ubuntu: apt-get install cmake")
    cxx = compiler("c++")
    flags = compile_flags(cpu_features(), compiler_version(cxx))
    output: Path = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    sources = next(output.glob("llama_cpp_python-*/vendor/llama.cpp"), None)
    sources = sources or fetch_sources(pinned_requirement(arguments.constraints), output)
    defines = ["-DCMAKE_BUILD_TYPE=Release", *(f"-D{name}=OFF" for name in OFF)]
    defines += [f"-DCMAKE_C_FLAGS={flags}", f"-DCMAKE_CXX_FLAGS={flags}"]
    build = output / "build"
    subprocess.run(["cmake", "-S", str(sources), "-B", str(build), *defines], check=True)
    # A bare --parallel starts every compiler at once, some gigabytes of them.
    jobs = ["--parallel", str(os.cpu_count() or 1)]
    subprocess.run(["cmake", "--build", str(build), *jobs, "--target", *TOOLS], check=True)
    print(build / "bin")


if __name__ == "__main__":
    main()
