"""Layers whose operations a GPU computes together, while a training runs.

Between products a layer does some forty small operations; one at a time each reads and writes all activations.
PyTorch's compiler makes a few kernels of them, once for all layers of a model, in half a minute. Where it cannot, it
says so in its log and layers are computed as before. Needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def fused_layers(models: Sequence[Any], device: Any) -> Iterator[None]:
    """Inside, layers of ``models`` are compiled when ``device`` is a GPU; afterwards they are as they were.

    Whatever cannot be compiled inside, theirs or others' functions, is computed as it was written.
    """
    if device.type != "cuda":
        yield
        return
    import torch

    layers = [layer for model in models for layer in model.model.layers]
    with torch._dynamo.config.patch(suppress_errors=True):
        for layer in layers:
            layer.compile(dynamic=False)
        try:
            yield
        finally:
            for layer in layers:
                layer._compiled_call_impl = None
