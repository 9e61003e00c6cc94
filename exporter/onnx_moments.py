"""Second moments of what goes into each matrix, from the unquantised model reading calibration text.

Needs torch and transformers. The moments of one input serve every matrix that reads it: queries, keys and values share
theirs, so do gate and up. All are in memory at once: 4 bytes times the square of each input's width. Knows neither
types nor rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelm.progress import Progress
from exporter.checkpoint import Checkpoint
from exporter.reference import open_transformers
from exporter.texts import Text
from exporter.token_identity import open_tokenizer
from exporter.tokenizer import read_tokenizer

WINDOW = 512
WINDOWS = 24

# Matrix by its name in the artefact -> the module of the transformers model whose input it multiplies.
_MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.q_proj",
    "attn_v": "self_attn.q_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.gate_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, slots=True)
class Moments:
    """Second moments (columns, columns) of inputs by module, and which text they come from."""

    by_module: Mapping[str, npt.NDArray[np.float32]]
    text: str
    tokens: int


def module_of(name: str) -> str:
    """The module whose input a tensor of the artefact multiplies."""
    parts = name.split(".")
    if parts[0] == "blk" and parts[2] in _MODULES:
        return f"model.layers.{parts[1]}.{_MODULES[parts[2]]}"
    return "lm_head"


def collect_moments(checkpoint: Checkpoint, text: Text, progress: Progress) -> Moments:
    """Read windows spread over ``text``. Raises ``CheckpointError`` when transformers cannot compute the checkpoint."""
    encoded = open_tokenizer(read_tokenizer(checkpoint).tokenizer_json, "tokenizer.json")
    ids = encoded.encode(text.content, add_special_tokens=False).ids
    count = min(WINDOWS, max(1, len(ids) // WINDOW))
    step = (len(ids) - WINDOW) // max(count - 1, 1) if len(ids) > WINDOW else 0
    windows = [ids[index * step : index * step + WINDOW] for index in range(count)]
    sums: dict[str, Any] = {}
    with (
        open_transformers(checkpoint, progress) as model,
        progress.stage("calibrating", count, unit="windows") as stage,
    ):
        hooks = [module.register_forward_pre_hook(_adder(name, sums)) for name, module in _inputs(model)]
        try:
            import torch

            with torch.inference_mode():
                for window in windows:
                    model(torch.tensor([window]))
                    stage.advance()
        finally:
            for hook in hooks:
                hook.remove()
    tokens = sum(map(len, windows))
    return Moments({name: total.numpy() / tokens for name, total in sums.items()}, text.name, tokens)


def _inputs(model: Any) -> list[tuple[str, Any]]:
    wanted = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "lm_head")
    return [(name, module) for name, module in model.named_modules() if name.endswith(wanted)]


def _adder(name: str, sums: dict[str, Any]) -> Callable[[Any, Any], None]:
    def add(_module: Any, arguments: Any) -> None:
        rows = arguments[0].reshape(-1, arguments[0].shape[-1])
        product = rows.T @ rows
        if name in sums:
            sums[name] += product
        else:
            sums[name] = product

    return add
