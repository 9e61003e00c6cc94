"""Where torch computes: the GPU when there is one, with the reason, and what that changes.

Figures that are compared are computed in plain float32 on either device (``exact_float32``), training and sampling in
bfloat16 products on a GPU (``computing_in_bfloat16``), training on a CPU that has units for it too
(``rounded_products``). torch is imported when something is asked of it, never before.
Does not know models.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from edgelm.bundle import Choice
from edgelm.errors import DoesNotFitError, MissingDependencyError
from edgelm.units import format_bytes
from targets.host import instruction_set

DeviceChoice = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the two models of a proof compute: torch's ``device`` for the reference, ``gpu_layers`` of the artefact on
    llama.cpp's ``gpu`` as in ``EngineOptions``."""

    device: DeviceChoice = "auto"
    gpu_layers: int = 0
    gpu: str = ""


ON_CPU = Placement()
"""The artefact's place unless another is asked for: its figures do not depend on the machine that made them."""

_MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory")


def resolve_device(choice: DeviceChoice, needed_bytes: float = 0) -> Choice:
    """``cpu`` or ``cuda``, and why; ``auto`` takes a GPU that torch sees and that has ``needed_bytes`` free.

    Raises ``MissingDependencyError`` when ``cuda`` was asked for and torch cannot use one here, ``DoesNotFitError``
    when it has less memory than is needed.
    """
    if choice == "cpu":
        return Choice(value="cpu", reason="asked for")
    obstacle = _obstacle()
    if obstacle is None:
        import torch

        name, free_bytes = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0]
        if needed_bytes <= free_bytes:
            return Choice(value="cuda", reason=f"asked for: {name}" if choice == "cuda" else f"torch sees {name}")
        lacking = f"{format_bytes(needed_bytes)} are needed on {name}, {format_bytes(free_bytes)} are free there"
        if choice == "cuda":
            raise DoesNotFitError(f"--device cuda: {lacking}", hint="use --device cpu, or end what else uses the GPU")
        return Choice(value="cpu", reason=lacking)
    if choice == "cuda":
        raise MissingDependencyError(f"--device cuda: {obstacle[0]}", hint=obstacle[1])
    return Choice(value="cpu", reason=obstacle[0])


def _obstacle() -> tuple[str, str] | None:
    """Why torch can use no GPU here and what to do about it, None when it can."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed", 'pip install "edgelm[export]"'
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a driver that is too old for this torch, among others
        import torch

        if torch.cuda.is_available():
            return None
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"the installed torch {torch.__version__} is a CPU build",
            "install a CUDA build from PyTorch's own index (pytorch.org tells which), or use --device cpu",
        )
    return (
        f"torch {torch.__version__} sees no GPU here",
        "look whether nvidia-smi lists one and whether its driver is new enough for this torch, or use --device cpu",
    )


@contextmanager
def exact_float32() -> Iterator[None]:
    """Inside, products of float32 on a GPU are not rounded to TF32, whatever the process or its environment says."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def rounded_products(device: Any) -> Iterator[None]:
    """On a CPU with AMX: factors of products are rounded to bfloat16, sums and all else stay in float32.

    For a training step, backward pass included: 2.7 times as fast there, its gradient 0.7 % off (docs/LOG.md). A GPU
    and other CPUs compute as before: without such units the rounding costs time.
    """
    if device.type != "cpu" or "amx_int8" not in instruction_set():
        yield
        return
    import torch

    products = torch.backends.mkldnn.matmul
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before


@contextmanager
def computing_in_bfloat16(device: Any) -> Iterator[None]:
    """On a GPU: products in bfloat16, all else in float32. On a CPU nothing changes.

    Attention is computed by the kernels that take any length: cuDNN's makes a plan for each, and a sequence that is
    written token by token has hundreds.
    """
    if device.type != "cuda":
        yield
        return
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with torch.autocast("cuda", dtype=torch.bfloat16), sdpa_kernel(kernels):
        yield


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that memory is too small, on either device."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _MEMORY_WORDS)


@contextmanager
def memory_errors(what: str, hint: str) -> Iterator[None]:
    """Raise ``DoesNotFitError`` naming ``what`` when torch runs out of memory inside."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise DoesNotFitError(f"memory is too small for {what}", hint=hint) from error
