"""What a 64-bit ARM processor can do, as the kernel tells every process when it starts it.

The auxiliary vector names the extensions that this process may use. ``/proc/cpuinfo`` names them too, but under
emulation and in some containers it is the file of another machine. Knows numbers and names; nothing of kernels' speed.
"""

from __future__ import annotations

import struct
from pathlib import Path

ARM_MACHINES = frozenset({"aarch64", "arm64"})
# Types of entries in the auxiliary vector (Linux, include/uapi/linux/auxvec.h).
_AT_HWCAP, _AT_HWCAP2 = 16, 26
_ENTRY = struct.Struct("<QQ")
_LIMIT_BYTES = 2**16
# Bits of both words (Linux, arch/arm64/include/uapi/asm/hwcap.h), by the names that profiles use.
_HWCAP = {"neon": 1 << 1, "dotprod": 1 << 20, "fp16": 1 << 10}
_HWCAP2 = {"i8mm": 1 << 13, "bf16": 1 << 14}
_HWCAP_SVE, _HWCAP2_SVE2, _HWCAP2_SME = 1 << 22, 1 << 1, 1 << 23


def arm_features(root: Path) -> tuple[str, ...]:
    """Extensions that this process may use, from ``/proc/self/auxv`` below ``root``; empty where there is none.

    Only meaningful on a 64-bit ARM machine: the same entries mean other things elsewhere.
    """
    entries = _auxiliary_vector(root / "proc/self/auxv")
    first, second = entries.get(_AT_HWCAP, 0), entries.get(_AT_HWCAP2, 0)
    found = [name for name, bit in _HWCAP.items() if first & bit]
    found += [name for name, bit in _HWCAP2.items() if second & bit]
    found += ["sve"] if first & _HWCAP_SVE else []
    found += ["sve2"] if second & _HWCAP2_SVE2 else []
    found += ["sme"] if second & _HWCAP2_SME else []
    return tuple(found)


def _auxiliary_vector(path: Path) -> dict[int, int]:
    try:
        with path.open("rb") as stream:
            content = stream.read(_LIMIT_BYTES)
    except OSError:
        return {}
    whole = content[: len(content) // _ENTRY.size * _ENTRY.size]
    return dict(_ENTRY.iter_unpack(whole))
