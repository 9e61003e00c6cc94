"""Training an encoder by its teacher's vectors.

Loss: squared distance of both vectors of a text over the teacher's squared length, which of vectors of length one is
2 (1 - cosine); the mean over texts. Optionally the relative squared distance of the tokens' states behind the layers
that stayed. The loop, its state and its schedule are those of ``training``. Needs torch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from edgelm.bundle import EncoderRecord
from edgelm.progress import Progress, Stage
from exporter.compress.data import Corpus, Indices, batches
from exporter.compress.fake_quant import FakeQuantizer
from exporter.compress.shape import shape_of
from exporter.compress.training import Trainer, TrainingOptions
from exporter.device import computing_in_bfloat16

PADDING = -1
"""In the rows of a corpus of texts of different lengths: no token."""
_TAUGHT_AT_ONCE = 32
_FLOAT32_BYTES = 4
# As in ``training``: gradient and moments of each weight; per position and layer what backward needs of each channel
# and neuron, and per head each other position's score, its softmax and both gradients.
_PER_WEIGHT, _PER_CHANNEL, _PER_NEURON, _PER_SCORE = 3, 14, 5, 4


class VectorTrainer(Trainer):
    """Trains an encoder on texts (n, longest) that are filled up with ``PADDING``. ``kl`` of a step is 1 - cosine."""

    def __init__(
        self, teacher: Any, student: Any, corpus: Corpus, options: TrainingOptions, directory: Path,
        quantizer: FakeQuantizer | None, record: EncoderRecord,
    ) -> None:  # fmt: skip
        super().__init__(teacher, student, corpus, options, directory, quantizer)
        self._record = record
        self._lengths = (corpus.windows != PADDING).sum(axis=1)
        self._vectors: Any = None

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, on average."""
        return max(1, round(self._options.batch * float(self._lengths.mean())))

    def _fused(self) -> AbstractContextManager[None]:
        # Texts have many lengths, and what is compiled is compiled for one.
        return nullcontext()

    def _tell(self, stage: Stage, tokens: int) -> None:
        stage.tell(f"1 - cosine {self._state.curve[-1].kl:.4f}")
        stage.advance(tokens)

    def _gradients(self, rows: Indices) -> tuple[float, float]:
        # Texts of like lengths are computed together, so that little is padded. The sum is the same.
        return super()._gradients(rows[np.argsort(self._lengths[rows], kind="stable")])

    def run(self, progress: Progress) -> None:
        """As ``Trainer.run``. What the teacher makes of each text is computed once, unless its states are compared."""
        options = self._options
        if options.hidden_weight == 0 and self._vectors is None:
            order = batches(len(self._lengths), options.batch, options.seed, 0)
            used = np.unique(np.concatenate([next(order) for _ in range(options.steps)]))
            with progress.stage("the teacher's vectors", len(used), unit="texts") as stage:
                self._vectors = self._taught(used[np.argsort(self._lengths[used], kind="stable")], stage)
        super().run(progress)

    def _taught(self, rows: Indices, stage: Stage) -> Any:
        """The teacher's vector of each of ``rows``, at its place among all texts (texts, width).

        In batches of one size, whatever the micro-batch: a resumed run gets the very same.
        """
        import torch

        vectors = torch.zeros(len(self._lengths), self._record.dimensions, device=self._device)
        for start in range(0, len(rows), _TAUGHT_AT_ONCE):
            part = rows[start : start + _TAUGHT_AT_ONCE]
            inputs, mask = self._inputs(part)
            with torch.no_grad(), computing_in_bfloat16(self._device):
                states = self._teacher(**inputs).last_hidden_state
            vectors[torch.from_numpy(part).to(self._device)] = pooled(states.float(), mask, self._record)
            stage.advance(len(part))
        return vectors

    def _inputs(self, rows: Indices) -> tuple[dict[str, Any], Any]:
        """What a model is called with for some texts, and where their tokens are (texts, tokens)."""
        import torch

        width = int(self._lengths[rows].max())
        ids = torch.from_numpy(self._corpus.windows[rows, :width]).long().to(self._device)
        mask = ids != PADDING
        ids = ids.masked_fill(~mask, self._state.student.config.pad_token_id or 0)
        return {"input_ids": ids, "attention_mask": mask.long()}, mask

    def _loss(self, rows: Indices) -> tuple[Any, Any]:
        import torch

        options = self._options
        inputs, mask = self._inputs(rows)
        deep = self._vectors is None
        with computing_in_bfloat16(self._device):
            student = self._state.student(**inputs, output_hidden_states=deep)
            if deep:
                with torch.no_grad():
                    teacher = self._teacher(**inputs, output_hidden_states=True)
        if deep:
            expected = pooled(teacher.last_hidden_state.float(), mask, self._record)
        else:
            expected = self._vectors[torch.from_numpy(rows).to(self._device)]
        found = pooled(student.last_hidden_state.float(), mask, self._record)
        loss = ((found - expected).square().sum(dim=-1) / expected.square().sum(dim=-1)).mean()
        distance = 1 - torch.cosine_similarity(found.detach(), expected).mean()
        if deep:
            wanted = [*(teacher.hidden_states[layer + 1] for layer in options.matched[:-1]), teacher.hidden_states[-1]]
            pairs = list(zip(wanted, student.hidden_states[1:], strict=True))
            loss = loss + options.hidden_weight * sum(_distance(one, other, mask) for one, other in pairs) / len(pairs)
        return loss, distance

    def _bytes(self, length: int) -> tuple[int, int]:
        student = self._state.student
        full, heads = shape_of(student.config), student.config.num_attention_heads
        weights = sum(parameter.numel() for parameter in student.parameters())
        position = _PER_CHANNEL * full.hidden + _PER_NEURON * full.neurons + _PER_SCORE * heads * length
        fixed = _FLOAT32_BYTES * (_PER_WEIGHT + (self._quantizer is not None)) * weights
        return fixed, _FLOAT32_BYTES * length * full.layers * position


def pooled(states: Any, mask: Any, record: EncoderRecord) -> Any:
    """One vector (texts, width) of states (texts, tokens, width) where ``mask`` is true, as the encoder makes it."""
    import torch

    if record.pooling == "mean":
        weights = mask.unsqueeze(-1).to(states.dtype)
        vectors = (states * weights).sum(dim=1) / weights.sum(dim=1)
    elif record.pooling == "cls":
        vectors = states[:, 0]
    else:
        vectors = states[torch.arange(len(states), device=states.device), mask.sum(dim=1) - 1]
    return torch.nn.functional.normalize(vectors, dim=-1) if record.normalized else vectors


def _distance(expected: Any, found: Any, mask: Any) -> Any:
    """|found - expected|^2 / |expected|^2 over the tokens that there are."""
    expected, found = expected.float()[mask], found.float()[mask]
    return (found - expected).square().sum() / expected.square().sum()
