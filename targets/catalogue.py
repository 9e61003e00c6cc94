"""Workloads of published models from the few figures that people publish: size in parameters, file size, quantisation.

Knows the shapes of common open models (``models.toml``) and the type mixes of llama.cpp's presets, and guesses the
rest from the size. Exact workloads come from export plans and file headers instead.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import Field

from edgelm.bundle import Record
from edgelm.errors import UsageError
from targets.workload import TypedWeights, Workload, own_kv_type

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MODELS = Path(__file__).parent / "models.toml"
K_ROW = 256

# Bits per weight of ggml block types: bytes of a block over its weights (ggml-common.h of llama.cpp).
BITS = {
    "F32": 32.0,
    "F16": 16.0,
    "BF16": 16.0,
    "Q8_0": 8.5,
    "Q6_K": 6.5625,
    "Q5_0": 5.5,
    "Q5_1": 6.0,
    "Q5_K": 5.5,
    "Q4_0": 4.5,
    "Q4_1": 5.0,
    "Q4_K": 4.5,
    "MXFP4": 4.25,
    "IQ4_NL": 4.5,
    "IQ4_XS": 4.25,
    "Q3_K": 3.4375,
    "IQ3_S": 3.4375,
    "IQ3_XXS": 3.0625,
    "Q2_K": 2.625,
    "IQ2_S": 2.5,
    "IQ2_XS": 2.3125,
    "IQ2_XXS": 2.0625,
    "Q2_0": 2.125,
    "TQ2_0": 2.0625,
    "TQ1_0": 1.6875,
    "IQ1_M": 1.75,
    "IQ1_S": 1.5625,
    "Q1_0": 1.125,
}
# Bits per weight of ONNX types in the block sizes that recipes take, scales and zero points included: of graphs that
# compute with float32, and with float16.
_FULL_BITS = {"int4-32-asym": 5.125, "int8-32": 9.0, "fp32": 32.0}
_HALF_BITS = {"int4-32-asym-fp16": 4.625, "int8-32-fp16": 8.5, "fp16": 16.0}
ONNX_BITS = _FULL_BITS | _HALF_BITS
ONNX_NAMES = (
    "fp32, int8, int4, int4-mixed, int4-gptq, int4-mixed-gptq, or a type as int4-64-asym; fp16, or one with -fp16"
)
_ONNX_NAME = re.compile(r"fp32|fp16|(int4(-mixed)?(-gptq)?|int[48](-(16|32|64|128))?(-asym)?)(-fp16)?")
# Names that say nothing of types: a file taken as it was, and types that were chosen for every tensor.
_BY_SIZE = ("COPY", "MIXED")
# Shares of the weights between embedding and head, by preset; a mix of one type is that type.
MIXES = {
    "Q4_K_M": {"Q4_K": 0.86, "Q6_K": 0.14},
    "Q4_K_S": {"Q4_K": 0.96, "Q5_K": 0.04},
    "UD-Q4_K_XL": {"Q4_K": 0.75, "Q5_K": 0.1, "Q6_K": 0.15},
    "Q5_K_M": {"Q5_K": 0.86, "Q6_K": 0.14},
    "Q5_K_S": {"Q5_K": 1.0},
    "Q3_K_S": {"Q3_K": 1.0},
    "Q3_K_M": {"Q3_K": 0.7, "Q4_K": 0.27, "Q5_K": 0.03},
    "Q3_K_L": {"Q3_K": 0.66, "Q5_K": 0.34},
    "Q2_K": {"Q2_K": 0.68, "Q3_K": 0.32},
    "Q2_K_S": {"Q2_K": 0.95, "Q4_K": 0.05},
    "IQ4_XS": {"IQ4_XS": 0.97, "Q5_K": 0.03},
    "IQ3_M": {"IQ3_S": 0.86, "Q4_K": 0.14},
    "IQ3_S": {"IQ3_S": 1.0},
    "IQ3_XS": {"IQ3_XXS": 0.5, "IQ3_S": 0.5},
    "IQ3_XXS": {"IQ3_XXS": 0.9, "IQ3_S": 0.1},
    "IQ2_M": {"IQ2_S": 0.9, "IQ3_S": 0.1},
    "F16/BF16": {"F16": 1.0},
}
# What llama.cpp stores where a row is no multiple of 256.
FALLBACK = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
    "IQ3_S": "IQ4_NL",
    "IQ3_XXS": "IQ4_NL",
    "IQ2_S": "IQ4_NL",
    "IQ2_XS": "IQ4_NL",
    "IQ2_XXS": "IQ4_NL",
    "IQ1_S": "IQ4_NL",
    "IQ1_M": "IQ4_NL",
}
# Share of the weights whose rows have the length of the hidden size; the others (ffn_down) nearly always fit.
HIDDEN_ROWS = 0.72


class KnownModel(Record):
    """The shape of one published model. ``names`` are lower-case beginnings of the names it goes by."""

    names: tuple[str, ...]
    layers: int = Field(gt=0)
    hidden: int = Field(gt=0)
    vocabulary: int = Field(gt=0)
    kv: int = Field(ge=0)
    tied: bool
    parameters: int = Field(gt=0)
    source: str = Field(min_length=8)


@dataclass(frozen=True, slots=True)
class _Shape:
    body: int
    layers: int
    hidden: int
    vocabulary: int
    kv_elements: int
    tied: bool | None


def workload_from_figures(
    *,
    parameters: float | None,
    file_bytes: int,
    quant: str,
    model: str | None = None,
    format_name: Literal["gguf", "onnx"] | None = None,
) -> Workload:
    """A workload from published figures. ``parameters`` counts weights, ``quant`` is a preset or a type.

    A known ``model`` name gives the exact shape, otherwise the usual shape of that size is assumed. Whether the head
    is stored beside the embedding is decided by which of the two explains ``file_bytes`` better. ``format_name`` of
    None is told by ``quant``. Types of GGUF files without a preset (``COPY``, ``MIXED``) and of ONNX files, whatever
    their recipe is called, are read off the size. Raises ``UsageError`` for an unknown quantisation or figures that
    cannot be.
    """
    if file_bytes <= 0 or (parameters is not None and parameters <= 0):
        raise UsageError("parameters and file size have to be above zero")
    if format_name is None:
        format_name = "onnx" if _ONNX_NAME.fullmatch(quant.lower()) else "gguf"
    if parameters is not None and format_name == "onnx":
        mix = _onnx_mix_of_size(file_bytes / parameters, _HALF_BITS if quant.lower().endswith("fp16") else _FULL_BITS)
    elif parameters is not None and quant.upper() in _BY_SIZE:
        mix = _mix_of_size(file_bytes / parameters)
    else:
        mix = mix_of(quant)
    known = known_model(model) if model else None
    if parameters is None:
        bits = sum(share * BITS[kind] for kind, share in mix.items())
        parameters = known.parameters if known else file_bytes * 8 / (bits * 1.05)
    shape = _known_shape(known) if known else _usual_shape(parameters)
    table = shape.vocabulary * shape.hidden
    base, head = _head_types(mix, shape.hidden)
    body = _resolved(mix, shape.hidden)
    body_bytes = sum(shape.body * share * _bits(kind) / 8 for kind, share in body.items())
    tied_bytes = body_bytes + table * _bits(head) / 8
    untied_bytes = tied_bytes + table * _bits(base) / 8
    tied = shape.tied is not False and abs(tied_bytes - file_bytes) <= abs(untied_bytes - file_bytes)
    factor = file_bytes / (tied_bytes if tied else untied_bytes)
    weights = [
        TypedWeights(kind, round(shape.body * share), _scaled(shape.body * share, kind, factor))
        for kind, share in body.items()
    ]
    weights.append(TypedWeights(head, table, _scaled(table, head, factor)))
    return Workload(
        format=format_name,
        architecture=model or "unknown",
        parameters=shape.body + table * (1 if tied else 2),
        file_bytes=file_bytes,
        weights=tuple(weights),
        lookup=None if tied else TypedWeights(base, table, _scaled(table, base, factor)),
        layers=shape.layers,
        hidden=shape.hidden,
        vocabulary=shape.vocabulary,
        kv_elements_per_token=shape.kv_elements,
        own_kv_type=own_kv_type(format_name, (item.type for item in weights)),
    )


def mix_of(quant: str) -> dict[str, float]:
    """Shares of the types that a preset uses. Raises ``UsageError`` listing what is known."""
    if quant in MIXES:
        return MIXES[quant]
    if quant in BITS:
        return {quant: 1.0}
    upper = quant.upper()
    if upper != quant:
        return mix_of(upper)
    raise UsageError(
        f"unknown quantisation '{quant}'",
        hint=f"known are: {', '.join([*MIXES, *(k for k in BITS if k not in MIXES)])}; of ONNX: {ONNX_NAMES}",
    )


def _mix_of_size(bytes_per_weight: float) -> dict[str, float]:
    """The type whose size is nearest, for a file that was taken as it was and whose types nobody stated."""
    return {min(BITS, key=lambda kind: abs(BITS[kind] / 8 - bytes_per_weight)): 1.0}


def _onnx_mix_of_size(bytes_per_weight: float, types: dict[str, float]) -> dict[str, float]:
    """The two neighbours among ONNX types that give a file of this size together: recipes mix them tensor by tensor."""
    names, sizes = list(types), list(types.values())
    bits = min(max(8 * bytes_per_weight, sizes[0]), sizes[-1])
    upper = next(index for index in range(1, len(sizes)) if bits <= sizes[index])
    share = (bits - sizes[upper - 1]) / (sizes[upper] - sizes[upper - 1])
    mix = {names[upper - 1]: 1 - share, names[upper]: share}
    return {kind: part for kind, part in mix.items() if part > 0}


def _bits(kind: str) -> float:
    """Bits per weight of a type of either format."""
    return BITS[kind] if kind in BITS else ONNX_BITS[kind]


def known_model(name: str) -> KnownModel | None:
    """The model that ``name`` begins with, the longest beginning winning; None when it is not known."""
    text = re.sub(r"[\s_]+", "-", name.strip().lower())
    found = [(len(start), model) for model in _models() for start in model.names if text.startswith(start)]
    return max(found, key=lambda item: item[0])[1] if found else None


@lru_cache(maxsize=1)
def _models() -> tuple[KnownModel, ...]:
    document = tomllib.loads(MODELS.read_text(encoding="utf-8"))
    return tuple(KnownModel.model_validate(entry) for entry in document["model"])


def _known_shape(known: KnownModel) -> _Shape:
    tables = known.vocabulary * known.hidden * (1 if known.tied else 2)
    # Some publishers store the head of a tied model twice; one without tying is never stored once.
    tied = None if known.tied else False
    kv_elements = 2 * known.layers * known.kv
    return _Shape(known.parameters - tables, known.layers, known.hidden, known.vocabulary, kv_elements, tied)


def _usual_shape(parameters: float) -> _Shape:
    """The shape that open models of this size usually have: fitted by eye through Llama 3, Qwen 2.5 and SmolLM2."""
    billions = parameters / 1e9
    hidden = max(round(1900 * billions**0.37 / 64) * 64, 64)
    layers = max(round(22 * billions**0.2), 1)
    vocabulary = 49152 if billions < 0.4 else 128256
    tables = vocabulary * hidden * (1 if billions < 4 else 2)
    body = max(parameters - tables, 0.3 * parameters)
    return _Shape(
        round(body), layers, hidden, vocabulary, 2 * layers * max(hidden // 4, 128), None if billions < 4 else False
    )


def _resolved(mix: dict[str, float], hidden: int) -> dict[str, float]:
    if hidden % K_ROW == 0:
        return mix
    shares: dict[str, float] = {}
    for kind, share in mix.items():
        other = FALLBACK.get(kind, kind)
        shares[other] = shares.get(other, 0) + share * HIDDEN_ROWS
        shares[kind] = shares.get(kind, 0) + share * (1 - HIDDEN_ROWS)
    return shares


def _head_types(mix: dict[str, float], hidden: int) -> tuple[str, str]:
    """Type of the looked-up table and of the head: the preset's main type, and in GGUF at least Q6_K for the head."""
    main = max(mix, key=lambda kind: mix[kind])
    if main in ONNX_BITS:
        return main, main
    head = main if BITS[main] >= BITS["Q8_0"] or main in ("Q1_0", "Q2_0") else "Q6_K"
    if hidden % K_ROW:
        main, head = FALLBACK.get(main, main), FALLBACK.get(head, head)
    return main, head


def _scaled(weights: float, kind: str, factor: float) -> int:
    return round(weights * _bits(kind) / 8 * factor)
