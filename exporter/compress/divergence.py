"""KL divergence of two models' logits with a gradient for the student, in blocks of positions.

The gradient of KL(p || q) with respect to q's logits is q - p, over the temperature. Written down as both are read, it
takes one array of the logits' size; autograd would keep both log-softmaxes and their terms in float32. Needs torch.
"""

from __future__ import annotations

from functools import cache
from typing import Any

_BLOCK = 2**23
"""Numbers of a block: 32 MiB in float32, of which three or four live at once."""
_FUSED_BLOCK = 2**29
"""The same where a block is computed by one fused function, which keeps nothing but the gradient."""


def divergence(teacher: Any, student: Any, temperature: float = 1.0) -> Any:
    """Mean KL(teacher || student) in nats over positions; logits (..., vocabulary), computed in float32."""
    return _function().apply(teacher, student, temperature)


def terms(expected: Any, found: Any, scale: float, share: float) -> tuple[Any, Any]:
    """KL of each position in float32, and ``share`` of the gradient for ``found``, of its type and shape.

    Both are logits (positions, vocabulary), divided by the temperature through ``scale``.
    """
    import torch

    scaled = (item if scale == 1 else item.float() * scale for item in (expected, found))
    wanted, got = (torch.log_softmax(item, dim=-1, dtype=torch.float32) for item in scaled)
    probabilities = wanted.exp()
    # In place: on a CPU every further array of a block is another pass through memory.
    kl = wanted.sub_(got).mul_(probabilities).sum(dim=-1)
    return kl, got.exp_().sub_(probabilities).mul_(share).to(found.dtype)


@cache
def _fused() -> Any:
    """``terms`` in a few passes over both logits; one operation at a time, a GPU writes down each result between."""
    import torch

    return torch.compile(terms, dynamic=False)


@cache
def _function() -> Any:
    import torch

    class Divergence(torch.autograd.Function):  # type: ignore[misc]
        """Computes the gradient with the value, in the type of the student's logits."""

        @staticmethod
        def forward(context: Any, teacher: Any, student: Any, temperature: float) -> Any:
            vocabulary = student.shape[-1]
            rows, expected_rows = (item.detach().reshape(-1, vocabulary) for item in (student, teacher))
            gradient = torch.empty_like(rows) if context.needs_input_grad[1] else None
            total = torch.zeros((), dtype=torch.float64, device=student.device)
            on_gpu = student.device.type == "cuda"
            compute, most = (_fused(), _FUSED_BLOCK) if on_gpu else (terms, _BLOCK)
            blocks = -(-rows.numel() // most)
            step = -(-len(rows) // blocks)  # of one size: a fused function is made for each
            for start in range(0, len(rows), step):
                block = slice(start, start + step)
                kl, part = compute(expected_rows[block], rows[block], 1 / temperature, 1 / (temperature * len(rows)))
                total += kl.double().sum()
                if gradient is not None:
                    gradient[block] = part
            context.save_for_backward(gradient)
            context.shape = student.shape
            return (total / len(rows)).float()

        @staticmethod
        def backward(context: Any, *outer: Any) -> tuple[None, Any, None]:
            (gradient,) = context.saved_tensors
            return None, (gradient * outer[0]).view(context.shape), None

    return Divergence
