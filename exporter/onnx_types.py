"""The weight types of an ONNX artefact: names, sizes and the places of their parts. Knows no values and no graphs.

A matrix is stored as ``com.microsoft.MatMulNBits`` wants it: rows (output features) by blocks of ``block`` weights
along the input features, packed low bits first, one float scale per block, and with ``asym`` one zero point per
block in the weights' own width. A weight is ``(q - zero_point) * scale``; without zero points they are 2^(bits-1).
Scales, vectors, activations and the cache are float32, or float16 in a graph of types that end in ``fp16``.
Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import prod

from edgelm.errors import UsageError

BLOCKS = (16, 32, 64, 128)
DEFAULT_BLOCK = 32
HALF = "-fp16"
_NAME = re.compile(r"int(?P<bits>4|8)(?:-(?P<block>16|32|64|128))?(?P<asym>-asym)?(?P<half>-fp16)?")


@dataclass(frozen=True, slots=True)
class WeightType:
    """How one matrix is stored. ``bits`` 32 and 16 are plain floats, without blocks.

    ``floats`` are the bits of scales, and of all that the matrix is computed with.
    """

    bits: int
    block: int = 0
    asymmetric: bool = False
    floats: int = 32

    @property
    def name(self) -> str:
        """``fp32``, ``int8-32``, ``int4-32-asym``, ``int4-32-fp16``: what a plan and ``--type`` call it."""
        if not self.is_quantized:
            return f"fp{self.bits}"
        return f"int{self.bits}-{self.block}{'-asym' if self.asymmetric else ''}{HALF if self.floats == 16 else ''}"

    @property
    def is_quantized(self) -> bool:
        return self.bits < 16

    @property
    def halved(self) -> WeightType:
        """The same with float16 in place of float32."""
        return replace(self, bits=min(self.bits, 16), floats=16)

    def blocks(self, columns: int) -> int:
        """Blocks of one row; the last one may be padded."""
        return -(-columns // self.block)

    def data_shape(self, rows: int, columns: int) -> tuple[int, int, int]:
        """Shape of the packed bytes: (rows, blocks, bytes of a block)."""
        return rows, self.blocks(columns), self.block * self.bits // 8

    def zeros_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the packed zero points; an odd number of 4-bit ones is padded to a whole byte per row."""
        return rows, -(-self.blocks(columns) * self.bits // 8)

    def size_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of this type: weights, scales and zero points, alignment between them apart."""
        if not self.is_quantized:
            return self.bits // 8 * prod(shape)
        rows, columns = shape
        size_bytes = prod(self.data_shape(rows, columns)) + self.floats // 8 * rows * self.blocks(columns)
        return size_bytes + (prod(self.zeros_shape(rows, columns)) if self.asymmetric else 0)


FP32 = WeightType(32)
FP16 = FP32.halved


def parse_type(text: str) -> WeightType:
    """The type that ``fp32``, ``fp16``, ``int8``, ``int4-64`` or ``int4-32-asym-fp16`` names; without a block size it
    is 32.

    Raises ``UsageError`` for anything else.
    """
    plain = {kind.name: kind for kind in (FP32, FP16)}.get(text.lower())
    if plain is not None:
        return plain
    match = _NAME.fullmatch(text.lower())
    if match is None:
        raise UsageError(
            f"'{text}' is no ONNX weight type",
            hint=f"there are fp32, fp16, int8-B and int4-B with B one of {', '.join(map(str, BLOCKS))}, each also with "
            "-asym, and behind that with -fp16",
        )
    kind = WeightType(int(match["bits"]), int(match["block"] or DEFAULT_BLOCK), match["asym"] is not None)
    return kind.halved if match["half"] else kind
