"""Graphs of encoders and encoder-decoders, drawn by optimum from a transformers model.

The model is loaded without code of the checkpoint and without the network, traced, and handed on as onnx models in
memory. Knows no plans, no rounding and no files of a bundle.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from edgelm.errors import CheckpointError, MissingDependencyError
from edgelm.progress import Progress
from exporter.checkpoint import Checkpoint
from exporter.transformers_model import load_directory, quiet_transformers

Task = Literal["feature-extraction", "fill-mask", "text-classification", "text2text-generation-with-past"]
_CLASSES: dict[Task, str] = {
    "feature-extraction": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "text2text-generation-with-past": "AutoModelForSeq2SeqLM",
}
_PACKAGES = ("torch", "transformers", "onnx", "optimum", "optimum.onnxruntime")


def require_optimum() -> None:
    """Raises ``MissingDependencyError`` when the packages that draw these graphs are not installed."""
    for package in _PACKAGES:
        found = importlib.util.find_spec(package.split(".")[0]) and importlib.util.find_spec(package)
        if found is None:
            raise MissingDependencyError(
                f"{package} is not installed, which encoders and encoder-decoders need to become ONNX",
                hint='pip install "edgelm[optimum]"',
            )


@contextmanager
def open_task_model(checkpoint: Checkpoint, task: Task, progress: Progress) -> Iterator[Any]:
    """The checkpoint as a transformers model in float32 with the head of ``task``.

    Raises ``MissingDependencyError``, and ``CheckpointError`` when transformers cannot load it.
    """
    require_optimum()
    with quiet_transformers(), progress.stage("loading the model", 1) as stage:
        import transformers

        model = load_directory(checkpoint.source.path, getattr(transformers, _CLASSES[task])).eval()
        stage.advance()
        yield model


def draw_graphs(model: Any, task: Task, checkpoint: Checkpoint, progress: Progress) -> dict[str, Any]:
    """The onnx models of a task, by the stems of the files that optimum writes: ``model``, or ``encoder_model``,
    ``decoder_model`` and ``decoder_with_past_model``. Raises ``CheckpointError`` when it cannot be traced."""
    import onnx

    with (
        tempfile.TemporaryDirectory(prefix="edgelm-optimum-") as directory,
        progress.stage("drawing the graph", 1) as stage,
    ):
        try:
            with silent():
                from optimum.exporters.onnx import onnx_export_from_model

                onnx_export_from_model(model, directory, task=task, do_validation=False, no_post_process=True)
        except (
            ValueError,
            RuntimeError,
            KeyError,
            TypeError,
            NotImplementedError,
            ImportError,
            AttributeError,
        ) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(
                f"optimum cannot export {checkpoint.source.location} for {task}: {first[:300]}"
            ) from error
        stage.advance()
        return {path.stem: onnx.load(str(path)) for path in sorted(Path(directory).glob("*.onnx"))}


@contextmanager
def silent() -> Iterator[None]:
    """Nothing on stdout and stderr. Tracing warns of everything it assumes, and optimum tells of its steps; none of
    it is the user's."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
