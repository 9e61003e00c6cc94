"""CPU extensions: what the processor has against what the engine's build uses. Knows llama.cpp's names for them."""

from __future__ import annotations

# What the CPU calls a feature (targets.host) and what llama.cpp's build calls it.
BUILD_NAMES = {
    "avx": "AVX",
    "avx2": "AVX2",
    "fma": "FMA",
    "f16c": "F16C",
    "avx_vnni": "AVX_VNNI",
    "avx512f": "AVX512",
    "avx512_vnni": "AVX512_VNNI",
    "avx512_bf16": "AVX512_BF16",
    "amx_int8": "AMX_INT8",
    "neon": "NEON",
    "dotprod": "DOTPROD",
    "i8mm": "MATMUL_INT8",
    "sve": "SVE",
    "sme": "SME",
}
_BLAS = {"BLAS", "OPENBLAS", "ACCELERATE", "MKL"}


def build_flags(system: str) -> frozenset[str]:
    """What is switched on in llama.cpp's system information: ``CPU : AVX2 = 1 | BLAS = 0 | ...``."""
    used = {name for part in system.split("|") for name, _, on in [part.partition("=")] if on.strip() == "1"}
    return frozenset(name.split(":")[-1].strip() for name in used)


def used_and_idle(isa: tuple[str, ...], system: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The CPU's extensions that a build of llama.cpp uses, and those that it leaves idle."""
    flags = build_flags(system)
    known = [feature for feature in isa if feature in BUILD_NAMES]
    used = tuple(feature for feature in known if BUILD_NAMES[feature] in flags)
    return used, tuple(feature for feature in known if feature not in used)


def has_blas(system: str) -> bool:
    """Whether the build multiplies large matrices through a BLAS library."""
    return bool(_BLAS & build_flags(system))
