"""Moments collected layer by layer are those that hooks see in a whole forward pass, in families of every build."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgelm.errors import UsageError
from edgelm.progress import SILENT
from exporter.architectures import describe
from exporter.checkpoint import open_checkpoint, open_source
from exporter.onnx_moments import TABLES, WINDOWS, MomentSource, spread_windows
from exporter.options import ExportOptions, check_options
from exporter.pipeline import export
from runtime.onnx_header import read_onnx_model
from tests.parity import ROWS, make_checkpoint
from tests.tiny_models import make_tiny_llama

pytestmark = [pytest.mark.tiny, pytest.mark.reference]

# A tensor of the artefact and the module of transformers' model that multiplies by it.
MODULES = {
    "gemma2": {"blk.1.attn_v": "model.layers.1.self_attn.v_proj", "blk.3.ffn_down": "model.layers.3.mlp.down_proj"},
    "gpt2": {"blk.0.attn_qkv": "transformer.h.0.attn.c_attn", "blk.2.ffn_up": "transformer.h.2.mlp.c_fc"},
    "gpt_neox": {"blk.3.attn_output": "gpt_neox.layers.3.attention.dense", "output": "embed_out"},
}


@pytest.mark.parametrize("name", list(MODULES))
@pytest.mark.filterwarnings("ignore")
def test_moments_are_those_of_a_whole_pass(name: str, tmp_path: Path) -> None:
    import torch

    model = make_checkpoint(next(row for row in ROWS if row.name == name), tmp_path / "model")
    checkpoint = open_checkpoint(open_source(str(tmp_path / "model")))
    text = spread_windows([int(token) for token in np.random.default_rng(0).integers(3, 320, 200)], "text", 64)
    tensors = {item.name.removesuffix(".weight"): item for item in describe(checkpoint, "onnx").tensors}
    wanted = [tensors[tensor] for tensor in MODULES[name]]
    seen: dict[str, np.ndarray] = {}

    def add(tensor: str) -> object:
        def hook(_module: object, arguments: tuple[torch.Tensor, ...]) -> None:
            rows = arguments[0].reshape(-1, arguments[0].shape[-1]).numpy()
            seen[tensor] = seen.get(tensor, 0) + rows.T @ rows / text.tokens

        return hook

    for tensor, module in MODULES[name].items():
        model.get_submodule(module).register_forward_pre_hook(add(tensor))
    with torch.no_grad():
        for window in text.windows:
            model(torch.tensor([window]))
    found, groups = {}, []
    for group, moments in MomentSource(checkpoint, text, SILENT).by_group(wanted):
        groups.append(group)
        found |= moments
    assert groups == sorted(groups, key=lambda group: (group == TABLES, group))
    for tensor in MODULES[name]:
        np.testing.assert_allclose(found[f"{tensor}.weight"], seen[tensor], rtol=1e-4, atol=1e-5)


def test_windows_are_spread_and_of_one_length() -> None:
    text = spread_windows(list(range(100_000)), "text", 512)
    assert len(text.windows) == WINDOWS
    assert text.windows[0][0] == 0
    assert text.windows[-1][-1] > 99_000
    assert spread_windows([1, 2, 3], "text", 512).windows == ((1, 2, 3),)


@pytest.mark.parametrize("quant", ["int4-gptq", "int8"])
def test_calibration_text_is_read_where_a_recipe_measures(quant: str, tmp_path: Path) -> None:
    source = make_tiny_llama(tmp_path / "source")
    text = tmp_path / "own.txt"
    text.write_text("a word and another one, again and again. " * 300)
    options = ExportOptions(str(source), format="onnx", quant=quant, calibration=text, verify=False)
    export(options, tmp_path / "out")
    assert read_onnx_model(tmp_path / "out" / "model.onnx").metadata["edgelm.calibration"].startswith("own.txt, ")


@pytest.mark.parametrize("quant", ["int4", "auto"])
def test_calibration_of_what_measures_nothing_is_refused(quant: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("words")
    with pytest.raises(UsageError, match="others read no text"):
        check_options(ExportOptions("x", format="onnx", quant=quant, calibration=tmp_path / "text"))
