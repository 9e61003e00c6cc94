"""The ONNX side of the export pipeline: writes the artefact with what a runtime needs to know of tokens.

An ONNX file has no vocabulary: the bundle's ``tokenizer.json`` is the artefact's tokenizer, the rest stands in the
model's metadata. Knows nothing of types, plans and graphs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgelm.bundle import ExportPlan, FileRecord
from edgelm.progress import Progress
from exporter import onnx_observed
from exporter.architectures.base import ModelDescription
from exporter.calibration import calibration_ids
from exporter.checkpoint import Checkpoint
from exporter.device import DeviceChoice
from exporter.onnx_moments import WINDOW, WINDOWS, MomentSource, spread_windows
from exporter.onnx_plan import recipe_named
from exporter.onnx_writer import WeightSource, write_onnx
from exporter.optimum_bundle import write_encoder
from exporter.tokenizer import SourceTokenizer
from runtime.model import special_token_texts

# Control tokens that end an answer in the chat formats of published models, whatever the configuration says of them.
_ENDS = frozenset(
    {
        "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>",
        "<|end_of_turn|>", "</s>", "<|return|>", "<|call|>", "<EOT>", "_<EOT>",
    }
)  # fmt: skip


def write_artifact(
    staging: Path,
    checkpoint: Checkpoint,
    description: ModelDescription,
    plan: ExportPlan,
    words: SourceTokenizer,
    calibration: tuple[Path | None, DeviceChoice],
    progress: Progress,
) -> tuple[Path, tuple[FileRecord, ...]]:
    """Write ``model.onnx`` and its data file; returns the former, and records of files that were hashed on the way.

    ``calibration`` is what a calibrated recipe reads, as in ``open_calibration``, and where.

    Raises ``CheckpointError``, ``BundleError`` and, for calibrated recipes, ``MissingDependencyError``.
    """
    context = int(plan.context.value)
    if description.encoder is not None:
        return write_encoder(staging, checkpoint, description, plan, progress), ()
    notes = _token_notes(words.gguf_metadata)
    source, recipe = WeightSource(checkpoint), recipe_named(plan.quant)
    if recipe.reads_text:
        window, windows = (WINDOW, WINDOWS) if recipe.calibrated else (onnx_observed.WINDOW, onnx_observed.WINDOWS)
        length = min(window, description.dimensions.context_trained)
        chosen, device = calibration
        ids, name, _ = calibration_ids(checkpoint, words, chosen, length, progress, device=device)
        text = spread_windows(ids, name, length, windows)
        moments = MomentSource(checkpoint, text, progress, device) if recipe.calibrated else None
        source = WeightSource(checkpoint, moments, text if recipe.balanced else None)
        notes["edgelm.calibration"] = f"{text.text}, {text.tokens} tokens"
    path, data = write_onnx(
        staging,
        source,
        description,
        plan.tensors,
        context=context,
        notes=notes,
        progress=progress,
    )
    return path, (data,)


def _token_notes(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens' texts for templates, ids that end an answer, and the id that plain text has to start with."""
    tokens = metadata["tokenizer.ggml.tokens"]
    ends = {index for index, token in enumerate(tokens) if token in _ENDS}
    ends |= {metadata[key] for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id") if key in metadata}
    bos = metadata.get("tokenizer.ggml.bos_token_id") if metadata.get("tokenizer.ggml.add_bos_token") else None
    return {
        "edgelm.special_tokens": json.dumps(special_token_texts(metadata)),
        "edgelm.stop_tokens": json.dumps(sorted(ends)),
        "edgelm.bos": json.dumps(bos),
    }
