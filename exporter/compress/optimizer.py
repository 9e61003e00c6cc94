"""Which rule changes which weight, and what it has to remember between runs.

Matrices of layers are changed by Muon (Jordan et al. 2024: momentum made orthogonal by five Newton-Schulz iterations),
embeddings, head and vectors by AdamW; or all of them by AdamW. Muon's updates are scaled to AdamW's size (0.2 times the
root of the longer side, Liu et al. 2025, arXiv:2502.16982), so that one learning rate serves both. Both rules are
PyTorch's own. Does not know what gradients come from. Needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Rule = Literal["auto", "muon", "adamw"]
_BETAS = (0.9, 0.95)
_MOMENTUM = 0.95
_ITERATION_PRODUCTS = 15
"""Matrix products of Muon for a matrix: three in each of five iterations, the smaller side counting twice in each."""
_MOST_EXTRA = 0.25
"""The share of a step's own products that Muon may add, to be chosen by itself."""


def choose_rule(rule: Rule, student: Any, step_tokens: int) -> Literal["muon", "adamw"]:
    """``auto``: Muon where its products are at most a quarter of what a step of ``step_tokens`` computes anyway.

    A step multiplies each weight three times with each token; Muon's fifteen products multiply it with the shorter side
    of its matrix. On a CPU steps are of a thousand tokens and Muon would cost more than all else.
    """
    if rule != "auto":
        return rule
    matrices = _matrices(student).values()
    own = 3 * step_tokens * sum(item.numel() for item in matrices)
    extra = _ITERATION_PRODUCTS * sum(item.numel() * min(item.shape) for item in matrices)
    return "muon" if extra <= _MOST_EXTRA * own else "adamw"


class Optimizer:
    """Changes all weights of ``student`` by their gradients; both rules at one learning rate."""

    def __init__(self, student: Any, rule: Literal["muon", "adamw"], learning_rate: float) -> None:
        import torch

        self._weights = dict(student.named_parameters())
        matrices = _matrices(student) if rule == "muon" else {}
        others = [item for name, item in self._weights.items() if name not in matrices]
        # One kernel for all weights; on a CPU it rounds otherwise than the plain way by which figures were taken.
        fused = others[0].device.type == "cuda"
        self._rules: list[Any] = [
            torch.optim.AdamW(others, lr=learning_rate, betas=_BETAS, weight_decay=0.0, fused=fused)
        ]
        if matrices:
            self._rules.append(
                torch.optim.Muon(
                    matrices.values(), lr=learning_rate, weight_decay=0.0, momentum=_MOMENTUM,
                    adjust_lr_fn="match_rms_adamw",
                )
            )  # fmt: skip

    def step(self, learning_rate: float) -> None:
        """Change the weights and forget the gradients."""
        for rule in self._rules:
            for group in rule.param_groups:
                group["lr"] = learning_rate
            rule.step()
            rule.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """What is remembered, as named tensors: ``WEIGHT:WHAT``."""
        names = {id(weight): name for name, weight in self._weights.items()}
        return {
            f"{names[id(weight)]}:{what}": value
            for rule in self._rules
            for weight, entry in rule.state.items()
            for what, value in entry.items()
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Remember what ``state`` tells. Raises ``KeyError`` when it is not of these weights."""
        owners = {id(weight): rule for rule in self._rules for group in rule.param_groups for weight in group["params"]}
        found: dict[str, dict[str, Any]] = {}
        for key, value in state.items():
            name, _, what = key.rpartition(":")
            found.setdefault(name, {})[what] = value
        if found.keys() != self._weights.keys():
            raise KeyError("optimizer")
        for name, entry in found.items():
            weight = self._weights[name]
            owners[id(weight)].state[weight] = entry


def _matrices(student: Any) -> dict[str, Any]:
    """Weights of two dimensions that are neither embeddings nor the head."""
    tables = {id(item.weight) for item in (student.get_input_embeddings(), student.get_output_embeddings()) if item}
    return {name: item for name, item in student.named_parameters() if item.ndim == 2 and id(item) not in tables}
