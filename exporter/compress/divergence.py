"""KL divergence of two models' logits with a gradient for the student, in blocks of positions.

The gradient of KL(p || q) with respect to q's logits is q - p, over the temperature. Written down as both are read, it
takes one array of the logits' size; autograd would keep both log-softmaxes and their terms in float32. Needs torch.
"""

from __future__ import annotations

from functools import cache
from typing import Any

_BLOCK = 2**23
"""Numbers of a block: 32 MiB in float32, of which three or four live at once."""


def divergence(teacher: Any, student: Any, temperature: float = 1.0) -> Any:
    """Mean KL(teacher || student) in nats over positions; logits (..., vocabulary), computed in float32."""
    return _function().apply(teacher, student, temperature)


@cache
def _function() -> Any:
    import torch

    class Divergence(torch.autograd.Function):  # type: ignore[misc]
        """Computes the gradient with the value, in the type of the student's logits."""

        @staticmethod
        def forward(context: Any, teacher: Any, student: Any, temperature: float) -> Any:
            vocabulary = student.shape[-1]
            rows, expected_rows = (item.detach().reshape(-1, vocabulary) for item in (student, teacher))
            wanted = context.needs_input_grad[1]
            gradient = torch.empty_like(rows) if wanted else None
            total = torch.zeros((), dtype=torch.float64, device=student.device)
            step = max(1, _BLOCK // vocabulary)
            for start in range(0, len(rows), step):
                block = slice(start, start + step)
                expected, found = (_log_softmax(item[block], temperature) for item in (expected_rows, rows))
                probabilities = expected.exp()
                total += expected.sub_(found).mul_(probabilities).sum()
                if gradient is not None:
                    gradient[block] = found.exp_().sub_(probabilities).div_(temperature * len(rows))
            context.save_for_backward(gradient)
            context.shape = student.shape
            return (total / len(rows)).float()

        @staticmethod
        def backward(context: Any, *outer: Any) -> tuple[None, Any, None]:
            (gradient,) = context.saved_tensors
            return None, (gradient * outer[0]).view(context.shape), None

    return Divergence


def _log_softmax(logits: Any, temperature: float) -> Any:
    import torch

    scaled = logits if temperature == 1 else logits.float() / temperature
    return torch.log_softmax(scaled, dim=-1, dtype=torch.float32)
