"""libggml through ctypes, against the gguf package's own implementation in numpy."""

from __future__ import annotations

import ctypes

import gguf
import numpy as np
import pytest

from edgelm.errors import MissingDependencyError, UsageError
from exporter import ggml

ROWS = np.random.default_rng(7).standard_normal((6, 768), dtype=np.float32)
# numpy twins of the quantiser exist for these, bit for bit
TWINS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"]


@pytest.mark.parametrize("name", TWINS)
def test_same_bytes_as_the_gguf_package(name: str) -> None:
    wanted = gguf.quants.quantize(ROWS, gguf.GGMLQuantizationType[name])
    assert ggml.quantize(ROWS, name).tobytes() == np.ascontiguousarray(wanted).tobytes()


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "IQ4_NL", "IQ4_XS", "Q3_K", "Q2_K", "Q5_K", "IQ3_S"])
def test_same_numbers_back_as_the_gguf_package(name: str) -> None:
    data = ggml.quantize(ROWS, name)
    wanted = gguf.quants.dequantize(data.reshape(6, -1), gguf.GGMLQuantizationType[name])
    np.testing.assert_allclose(ggml.dequantize(data, name, ROWS.size).reshape(ROWS.shape), wanted, rtol=1e-6, atol=1e-7)


def test_table_of_types_is_the_librarys() -> None:
    library = ggml._library()
    assert isinstance(library, ctypes.CDLL)
    told = {kind.name: bool(library.ggml_quantize_requires_imatrix(kind.id)) for kind in ggml.TYPES.values()}
    assert told == {kind.name: kind.requires_importance for kind in ggml.TYPES.values()}


def test_importance_changes_the_rounding() -> None:
    importance = np.geomspace(1, 1000, 768, dtype=np.float32)
    plain, weighted = ggml.quantize(ROWS, "Q4_K"), ggml.quantize(ROWS, "Q4_K", importance=importance)

    def error(data: ggml.Bytes) -> float:
        back = ggml.dequantize(data, "Q4_K", ROWS.size).reshape(ROWS.shape)
        return float(np.sum(importance * (back - ROWS) ** 2))

    assert error(weighted) < error(plain)


def test_refusals() -> None:
    with pytest.raises(UsageError, match="IQ2_XXS needs an importance matrix"):
        ggml.quantize(ROWS, "IQ2_XXS")
    with pytest.raises(UsageError, match="nothing can be quantised to I8"):
        ggml.quantize(ROWS, "I8")
    with pytest.raises(UsageError, match="'Q9' is no ggml type") as caught:
        ggml.quantize(ROWS, "Q9")
    assert "Q4_K" in (caught.value.hint or "")
    with pytest.raises(ValueError, match="multiple of 256"):
        ggml.quantize(np.ascontiguousarray(ROWS[:, :96]), "Q4_K")


def test_damaged_scales_are_found(capfd: pytest.CaptureFixture[str]) -> None:
    data = ggml.quantize(ROWS, "Q8_0")
    data[0:2] = np.frombuffer(np.float16("nan").tobytes(), dtype=np.uint8)
    assert not ggml.is_valid(data, "Q8_0")
    assert "nan" in capfd.readouterr().err


def test_missing_library_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match="no libggml in"):
        ggml._find_library()
