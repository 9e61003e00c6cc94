"""Types, rounding and plans of ONNX artefacts, without any engine."""

from __future__ import annotations

import numpy as np
import pytest

from edgelm.errors import UsageError
from exporter.architectures.base import Dimensions, ModelDescription, TensorDescription
from exporter.onnx_gptq import compensated_rows, inverse_factor
from exporter.onnx_plan import RECIPES, recipe_named, tensor_plans
from exporter.onnx_quantize import PackedRows, dequantize_rows, quantize_rows
from exporter.onnx_types import parse_type

GENERATOR = np.random.default_rng(0)
ROWS = GENERATOR.standard_normal((48, 200), dtype=np.float32) * GENERATOR.gamma(2, size=(48, 1)).astype(np.float32)
ALL = [f"int{bits}-{block}{asym}" for bits in (4, 8) for block in (16, 32, 64, 128) for asym in ("", "-asym")]


def error(name: str, rows: np.ndarray = ROWS, importance: np.ndarray | None = None) -> float:
    kind = parse_type(name)
    back = dequantize_rows(quantize_rows(rows, kind, importance), kind, rows.shape[1])
    squares = (back - rows) ** 2
    return float((squares if importance is None else squares * importance).mean())


def plain_error(bits: int, block: int, rows: np.ndarray = ROWS) -> float:
    """Symmetric rounding by the largest magnitude, without any search."""
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % block))).reshape(len(rows), -1, block)
    scales = np.abs(padded).max(axis=2, keepdims=True) / (2 ** (bits - 1) - 1)
    back = (np.rint(padded / scales) * scales).reshape(len(rows), -1)[:, : rows.shape[1]]
    return float(((back - rows) ** 2).mean())


@pytest.mark.parametrize("name", ALL)
def test_searched_grids_beat_plain_rounding(name: str) -> None:
    kind = parse_type(name)
    assert error(name) < plain_error(kind.bits, kind.block)


@pytest.mark.parametrize("name", ALL)
def test_stored_sizes_are_what_the_type_says(name: str) -> None:
    kind = parse_type(name)
    packed = quantize_rows(ROWS, kind)
    stored = packed.data.nbytes + packed.scales.nbytes + (packed.zeros.nbytes if packed.zeros is not None else 0)
    assert stored == kind.size_bytes(ROWS.shape)
    assert packed.data.shape == kind.data_shape(*ROWS.shape)
    assert kind.name == name


def test_smaller_blocks_and_zero_points_lose_less() -> None:
    shifted = ROWS + np.float32(0.5)
    for asym in ("", "-asym"):
        errors = [error(f"int4-{block}{asym}", shifted) for block in (16, 32, 64, 128)]
        assert errors == sorted(errors)
    assert error("int4-32-asym", shifted) < error("int4-32", shifted)


@pytest.mark.parametrize("name", ["int4-32", "int4-32-asym"])
def test_importance_moves_error_away_from_what_matters(name: str) -> None:
    importance = np.where(np.arange(200) % 8 == 0, 100, 1).astype(np.float32)
    kind = parse_type(name)
    weighted = dequantize_rows(quantize_rows(ROWS, kind, importance), kind, 200)
    plain = dequantize_rows(quantize_rows(ROWS, kind), kind, 200)
    assert (((weighted - ROWS) ** 2) * importance).sum() < (((plain - ROWS) ** 2) * importance).sum()


@pytest.mark.parametrize("name", ALL)
def test_constant_and_zero_rows_survive(name: str) -> None:
    rows = np.zeros((3, 64), np.float32)
    rows[1] = 3.25
    rows[2] = -1e-20
    kind = parse_type(name)
    back = dequantize_rows(quantize_rows(rows, kind), kind, 64)
    assert np.isfinite(back).all()
    np.testing.assert_allclose(back[:2], rows[:2], rtol=1e-6)


@pytest.mark.parametrize("name", [*ALL, "fp32"])
def test_float16_halves_scales_and_plain_floats_and_nothing_else(name: str) -> None:
    kind = parse_type(name)
    half = parse_type(f"{name}-fp16") if kind.is_quantized else parse_type("fp16")
    assert half == kind.halved
    assert half.halved == half
    floats = ROWS.shape[0] * (kind.blocks(ROWS.shape[1]) if kind.is_quantized else ROWS.shape[1])
    assert half.size_bytes(ROWS.shape) == kind.size_bytes(ROWS.shape) - 2 * floats


@pytest.mark.parametrize("name", ["int3", "int4-48", "q4_0", "int8-asym-32", "", "int4-32-sym"])
def test_unknown_types_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="is no ONNX weight type"):
        parse_type(name)


def description(layers: int = 8) -> ModelDescription:
    names = ("attn_q", "attn_v", "ffn_down")
    matrices = [f"blk.{layer}.{name}.weight" for layer in range(layers) for name in names]
    tensors = [
        TensorDescription("token_embd.weight", "e", (100, 64)),
        TensorDescription("output_norm.weight", "n", (64,)),
    ]
    tensors += [TensorDescription(name, name, (64, 64)) for name in matrices]
    metadata = {"llama.attention.layer_norm_rms_epsilon": 1e-5}
    return ModelDescription("llama", Dimensions(layers, 64, 4, 4, 16, 64, 100, 128, True), metadata, tuple(tensors))


def test_recipes_spend_bits_where_they_say() -> None:
    types = {item.name: item.type for item in tensor_plans(description(), RECIPES["int4-mixed"])}
    assert types["token_embd.weight"] == "int8-32"
    assert types["output_norm.weight"] == "fp32"
    assert types["blk.0.ffn_down.weight"] == types["blk.7.attn_v.weight"] == "int8-32"
    assert types["blk.0.attn_q.weight"] == types["blk.1.attn_v.weight"] == "int4-32-asym"


def test_calibrated_recipes_keep_attention_and_down_better() -> None:
    types = {item.name: item.type for item in tensor_plans(description(), RECIPES["int4-mixed-gptq"])}
    assert types["token_embd.weight"] == "int4-32-asym"
    assert types["blk.3.ffn_down.weight"] == types["blk.3.attn_q.weight"] == "int8-64"


@pytest.mark.parametrize("name", ["int4-32", "int4-64-asym", "int4-128-asym"])
def test_compensation_spares_what_the_inputs_see(name: str) -> None:
    """The error of the output, not of the weights, is what rounding with compensation makes small."""
    inputs = GENERATOR.standard_normal((2000, 200), dtype=np.float32) @ GENERATOR.standard_normal((200, 200)).astype(
        "f4"
    )
    moments, kind = inputs.T @ inputs / np.float32(len(inputs)), parse_type(name)

    def output_error(packed: PackedRows) -> float:
        difference = dequantize_rows(packed, kind, 200) - ROWS
        return float(np.einsum("ni,ij,nj->", difference, moments, difference, optimize=True))

    compensated = output_error(compensated_rows(ROWS, kind, inverse_factor(moments)))
    assert compensated < 0.7 * output_error(quantize_rows(ROWS, kind))


def test_inputs_that_are_always_zero_do_not_stop_it() -> None:
    moments = np.zeros((200, 200), np.float32)
    moments[:5, :5] = np.eye(5)
    kind = parse_type("int4-32-asym")
    back = dequantize_rows(compensated_rows(ROWS, kind, inverse_factor(moments)), kind, 200)
    assert np.isfinite(back).all()


def test_overrides_decide_and_say_so() -> None:
    plans = tensor_plans(description(), recipe_named("int4-64"), (("attn_v", "int8-16"), ("blk.0", "fp32")))
    by_name = {item.name: item for item in plans}
    assert by_name["blk.0.attn_v.weight"].type == "int8-16"
    assert "--type 'attn_v=int8-16'" in by_name["blk.0.attn_v.weight"].reason
    assert by_name["blk.0.attn_q.weight"].type == "fp32"
    assert by_name["token_embd.weight"].type == "int4-64"


def test_overrides_that_match_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="fits no matrix"):
        tensor_plans(description(), RECIPES["int8"], (("output_norm", "int8-32"),))


def test_unknown_recipes_are_refused_with_what_exists() -> None:
    with pytest.raises(UsageError) as caught:
        recipe_named("Q4_K_M")
    assert "int4-mixed" in str(caught.value.hint)
