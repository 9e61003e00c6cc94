"""The constants that turn a profile's figures into speeds: fitted, not written by hand.

``calibration.toml`` is made by ``benchmarks/fit_profiles.py`` from published measurements; this module reads it. A
kernel family is what llama.cpp's kernels for one instruction set (or one GPU interface) reach: cycles of one core per
weight for CPUs, shares of the rated bandwidth and arithmetic for GPUs. Knows neither profiles nor models.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path

from pydantic import Field, ValidationError

from edgelm.bundle import Record
from edgelm.errors import ProfileError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PATH = Path(__file__).parent / "calibration.toml"


class Family(Record):
    """One kernel family.

    CPU: ``prefill`` and ``decode`` are core cycles per weight and token, by type; ``per_core_gbs`` what one core draws;
    ``parallel_loss`` a in n / (1 + a (n - 1)), the speed-up of n threads in prefill. GPU: ``prefill`` is the share of
    the rated f16 arithmetic, ``decode`` the share of the rated bandwidth; ``layer_us`` the fixed cost of a layer per
    token, ``token_us`` that of the token itself, ``weight_flops`` what a quantised weight costs at least, in operations
    of the rated f16 arithmetic (0: bandwidth alone decides). ``bandwidth_share`` is sustained over theoretical
    bandwidth. The ``old_*`` values hold for llama.cpp builds before 2025. ``repacked`` lists the types of which
    llama.cpp makes a second, rearranged copy, ``repacked_growth`` how much larger that is than the original, where it
    is. ``default`` in the maps stands for types that nobody measured.
    """

    gpu: bool = False
    bandwidth_share: float = Field(gt=0, le=1.5)
    per_core_gbs: float = Field(default=0, ge=0)
    parallel_loss: float = Field(default=0, ge=0, lt=1)
    layer_us: float = Field(default=0, ge=0)
    old_layer_us: float = Field(default=0, ge=0)
    token_us: float = Field(default=0, ge=0)
    weight_flops: float = Field(default=0, ge=0)
    old_prefill: float = Field(default=1, gt=0)
    hidden_half: float = Field(default=0, ge=0)
    repacked: tuple[str, ...] = ()
    repacked_growth: dict[str, float] = Field(default_factory=dict)
    prefill: dict[str, float]
    decode: dict[str, float]

    def prefill_of(self, kind: str) -> float:
        """Entry of ``prefill`` for a type."""
        return _entry(self.prefill, kind)

    def decode_of(self, kind: str) -> float:
        """Entry of ``decode`` for a type."""
        return _entry(self.decode, kind)


class DeviceScale(Record):
    """How one device differs from its family: factors on bandwidth and arithmetic, and the rows that told so."""

    bandwidth: float = Field(default=1, gt=0)
    compute: float = Field(default=1, gt=0)
    decode_rows: int = 0
    prefill_rows: int = 0


class Spread(Record):
    """Half width of the 80 % band as a factor: prediction / factor ... prediction x factor."""

    decode_known: float = Field(gt=1)
    decode_unknown: float = Field(gt=1)
    prefill_known: float = Field(gt=1)
    prefill_unknown: float = Field(gt=1)


class Unseen(Record):
    """Errors of the fit for devices of which it saw no row (leave one device out), in percent.

    ``inside_band_pct`` is the share inside the 80 % band of devices without rows, ``rows_inside_band_pct`` that of left
    out rows inside the band of devices with rows; each band was taken from other devices than those it is judged on.
    """

    median_abs_pct_error: float = Field(ge=0)
    within_25_pct: float = Field(ge=0, le=100)
    within_30_pct: float = Field(ge=0, le=100)
    inside_band_pct: float = Field(ge=0, le=100)
    rows_inside_band_pct: float = Field(ge=0, le=100)


class Holdout(Record):
    """``Unseen`` for both figures."""

    decode: Unseen
    prefill: Unseen


class Calibration(Record):
    """All of ``calibration.toml``."""

    norm: float = Field(gt=1)
    spread: Spread
    holdout: Holdout
    families: dict[str, Family]
    devices: dict[str, DeviceScale]

    def family(self, name: str) -> Family:
        """The family of that name. Raises ``ProfileError`` listing what exists."""
        found = self.families.get(name)
        if found is None:
            raise ProfileError(
                f"there is no kernel family '{name}'", hint=f"kernels is one of: {', '.join(sorted(self.families))}"
            )
        return found


# Types whose inner loops are alike where nobody measured one of them: a miss is answered by the next of the chain.
_ALIKE = {
    "BF16": "F16",
    "fp16": "F16",
    "fp32": "F32",
    "int8": "Q8_0",
    "int4": "Q4_1",
    "F32": "F16",
    "MXFP4": "IQ4_NL",
    "IQ3_XXS": "IQ3_S",
    "IQ2_S": "IQ2_XXS",
    "IQ2_XS": "IQ2_XXS",
    "IQ1_S": "IQ2_XXS",
    "IQ1_M": "IQ2_XXS",
    "TQ1_0": "Q2_K",
    "TQ2_0": "Q2_K",
    "Q2_0": "Q2_K",
    "Q1_0": "Q2_K",
}


def _entry(table: dict[str, float], kind: str) -> float:
    seen: str | None = kind
    while seen is not None:
        if seen in table:
            return table[seen]
        # ONNX types name their block as well (int4-32-asym): the kernels' speed is that of int4.
        seen = _ALIKE.get(seen) or (seen.partition("-")[0] if "-" in seen else None)
    return table["default"]


def parse_calibration(text: str) -> Calibration:
    """The constants in TOML text. Raises ``ProfileError``."""
    try:
        return Calibration.model_validate(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise ProfileError(f"{PATH.name} is damaged: {error}", hint="install EdgeLM again") from error


@lru_cache(maxsize=1)
def calibration() -> Calibration:
    """The constants that come with EdgeLM. Raises ``ProfileError`` when the file is missing or damaged."""
    try:
        return parse_calibration(PATH.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(f"cannot read {PATH.name}: {error.strerror}", hint="install EdgeLM again") from error
