"""The training loop: a student learns the teacher's distribution over the next token.

Loss: T^2 KL(teacher || student) of logits divided by the temperature T (Hinton et al. 2015, arXiv:1503.02531), the
mean over positions; optionally the relative squared distance of hidden states and of attention outputs of the layers
that stayed. AdamW in float32 (bfloat16 for matrix products where the processor has units for it), linear warm-up,
cosine decay. State is kept on disk without pickle, so that a killed run goes on with the same numbers. Does not know
where data comes from.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgelm.errors import CheckpointError, DoesNotFitError, EngineError
from edgelm.progress import Progress, Stage
from edgelm.units import format_bytes
from exporter.compress.data import Corpus, Indices, batches
from exporter.compress.divergence import divergence
from exporter.compress.fake_quant import FakeQuantizer
from exporter.compress.fusing import fused_layers
from exporter.device import computing_in_bfloat16, is_out_of_memory, rounded_products
from targets.host import available_memory

_BETAS = (0.9, 0.95)
_CLIP = 1.0
_WARM_UP = 0.05  # of all steps
_LAST_RATE = 0.1  # of the highest
_FACTOR_RATE = 16.0  # of the rate of weights; 4 and none at all were worse (benchmarks/results/finish_mix.jsonl)
_STATE, _TENSORS = "state.json", "state-{step}.safetensors"
_SAVE_EVERY_S = 60.0
_FLOAT32_BYTES = 4
# Arrays that are in memory at once, counted in PyTorch's code: gradient and both moments of AdamW of each weight; of
# each position both logits, their gradient and a block of each of its terms; and what backward needs of a layer.
_PER_WEIGHT, _PER_LOGIT, _PER_CHANNEL, _PER_NEURON = 3, 4, 14, 5


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """How to train. ``batch`` sequences make a step, ``micro_batch`` of them are computed at once.

    ``matched`` are the teacher's layers that the student's stand for, in order.
    """

    steps: int
    batch: int
    micro_batch: int
    learning_rate: float
    temperature: float
    hidden_weight: float
    attention_weight: float
    matched: tuple[int, ...]
    seed: int
    save_every_s: float | None = None  # None: _SAVE_EVERY_S


@dataclass(frozen=True, slots=True)
class Step:
    """One point of the training curve. ``kl`` is in nats per token, at temperature 1 when that is the temperature."""

    step: int
    loss: float
    kl: float
    learning_rate: float


@dataclass
class _State:
    """What a run consists of."""

    student: Any
    optimizer: Any
    step: int
    curve: list[Step]
    saved_step: int = 0
    whole: bool = True  # False while weights are being changed


class Trainer:
    """Trains ``student`` on the device where both models are. ``directory`` holds the state between runs.

    ``after_step`` is called whenever the weights have changed.
    """

    def __init__(
        self, teacher: Any, student: Any, corpus: Corpus, options: TrainingOptions, directory: Path,
        quantizer: FakeQuantizer | None = None,
    ) -> None:  # fmt: skip
        import torch

        self._teacher, self._corpus, self._options = teacher, corpus, options
        self._directory, self._quantizer = directory, quantizer
        self.after_step: Callable[[], None] | None = None
        self._device = next(student.parameters()).device
        for parameter in student.parameters():
            parameter.requires_grad_(True)
        # One kernel for all weights; on a CPU it rounds otherwise than the plain way by which figures were taken.
        fused = self._device.type == "cuda"
        factors = quantizer.factors() if quantizer else {}
        groups: list[dict[str, Any]] = [{"params": list(student.parameters()), "times": 1.0}]
        if factors:
            groups.append({"params": list(factors.values()), "times": _FACTOR_RATE})
        optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=_BETAS, weight_decay=0.0, fused=fused)
        self._state = _State(student, optimizer, 0, [])
        self._learned = {**dict(student.named_parameters()), **factors}  # in the order of the optimizer

    @property
    def curve(self) -> tuple[Step, ...]:
        """All steps so far, those of an earlier run of the same training included."""
        return tuple(self._state.curve)

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        return self._options.batch * int(self._corpus.windows.shape[1])

    def run(self, progress: Progress) -> None:
        """Train to the last step, from the saved state on if there is one.

        Raises ``EngineError`` when the loss is no number any more (the last good state stays), ``DoesNotFitError``
        when memory is too small for a micro-batch and ``CheckpointError`` when the state cannot be read or written.
        Ctrl-C saves the state first.
        """
        self._restore()
        if self._device.type == "cpu" and self._state.step < self._options.steps:
            self._check_memory()
        options, state = self._options, self._state
        tokens = self.step_tokens
        saved_s = time.monotonic()
        every_s = _SAVE_EVERY_S if options.save_every_s is None else options.save_every_s
        with progress.stage("distilling", options.steps * tokens, unit="tokens") as stage:
            stage.advance(state.step * tokens)
            order = batches(len(self._corpus.windows), options.batch, options.seed, state.step)
            try:
                with self._fused():
                    while state.step < options.steps:
                        self._one_step(next(order))
                        self._tell(stage, tokens)
                        if time.monotonic() - saved_s > every_s:
                            self._save()
                            saved_s = time.monotonic()
            except KeyboardInterrupt:
                self._save()
                raise
        self._save()
        state.student.eval()

    def _fused(self) -> AbstractContextManager[None]:
        """Layers computed as fast as the device can; as they are where something looks into them."""
        looked_into = self._options.hidden_weight > 0 or self._options.attention_weight > 0
        return fused_layers(() if looked_into else (self._teacher, self._state.student), self._device)

    def _tell(self, stage: Stage, tokens: int) -> None:
        latest = self._state.curve[-1]
        stage.tell(f"KL {latest.kl:.4f}")
        stage.advance(tokens)

    def _one_step(self, rows: Indices) -> None:
        import torch

        state, options = self._state, self._options
        rate = _rate(state.step, options)
        for group in state.optimizer.param_groups:
            group["lr"] = rate * group["times"]
        applied: AbstractContextManager[None] = self._quantizer.applied() if self._quantizer else nullcontext()
        try:
            with applied, rounded_products(self._device):
                loss, kl = self._gradients(rows)
                # A finite loss can have gradients that are not: they would spoil the weights that are saved next.
                norm = float(torch.nn.utils.clip_grad_norm_(state.student.parameters(), _CLIP))
                if self._quantizer is not None:
                    self._quantizer.learn()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise self._no_number()
            state.whole = False
            state.optimizer.step()
        except RuntimeError as error:
            raise self._too_large(error) from error
        state.optimizer.zero_grad(set_to_none=True)
        if self.after_step is not None:
            self.after_step()
        state.step += 1
        state.curve.append(Step(state.step, loss, kl, rate))
        state.whole = True

    def _no_number(self) -> EngineError:
        kept = (self._directory / _STATE).is_file()
        hint = f"the last good state is in {self._directory}; go on from it" if kept else "start again"
        return EngineError(
            f"the loss is no number any more at step {self._state.step + 1}",
            hint=f"{hint} with a lower --learning-rate",
        )

    def _gradients(self, rows: Indices) -> tuple[float, float]:
        """Add the gradients of one step's sequences; mean loss and mean KL per token."""
        import torch

        options = self._options
        # Sums stay on the device: to read one there waits for all that was asked of it before.
        loss_sum, kl_sum = torch.zeros(2, dtype=torch.float64, device=self._device)
        for start in range(0, len(rows), options.micro_batch):
            part = rows[start : start + options.micro_batch]
            share = len(part) / len(rows)
            loss, kl = self._loss(part)
            (loss * share).backward()
            loss_sum += loss.detach() * share
            kl_sum += kl * share
        return float(loss_sum), float(kl_sum)

    def _loss(self, rows: Indices) -> tuple[Any, Any]:
        import torch

        options = self._options
        deep = options.hidden_weight > 0
        ids = torch.from_numpy(self._corpus.windows[rows]).long().to(self._device)
        with computing_in_bfloat16(self._device):
            with torch.no_grad(), _Attention(self._teacher, options.matched, options.attention_weight) as expected:
                teacher = self._teacher(ids, use_cache=False, output_hidden_states=deep)
            everyone = tuple(range(len(options.matched)))
            with _Attention(self._state.student, everyone, options.attention_weight) as found:
                student = self._state.student(ids, use_cache=False, output_hidden_states=deep)
        kl = divergence(teacher.logits, student.logits, options.temperature)
        loss = kl * options.temperature**2
        if deep:
            # The last state comes after the final norm, in both, whichever layer comes last in the student.
            wanted = [*(teacher.hidden_states[layer + 1] for layer in options.matched[:-1]), teacher.hidden_states[-1]]
            loss = loss + options.hidden_weight * _distance(wanted, student.hidden_states[1:])
        if options.attention_weight > 0:
            loss = loss + options.attention_weight * _distance(expected.outputs, found.outputs)
        return loss, kl.detach()

    def _check_memory(self) -> None:
        """Refuse before the first step what would be killed during it. Raises ``DoesNotFitError``."""
        options, length = self._options, int(self._corpus.windows.shape[1])
        fixed, each = self._bytes(length)
        factors = self._quantizer.factors().values() if self._quantizer else ()
        fixed += _FLOAT32_BYTES * _PER_WEIGHT * sum(item.numel() for item in factors)
        available = available_memory()
        fitting = int((int(available.value) - fixed) // each)
        if fitting >= options.micro_batch:
            return
        raise DoesNotFitError(
            f"training on {options.micro_batch} sequences of {length} tokens at once needs about "
            f"{format_bytes(fixed + options.micro_batch * each)} more memory, there are "
            f"{format_bytes(int(available.value))} ({available.reason})",
            hint=f"try --micro-batch {fitting}; the result is the same"
            if fitting > 0
            else "a single sequence does not fit: try a shorter --length or a smaller student",
        )

    def _bytes(self, length: int) -> tuple[int, int]:
        return training_bytes(self._state.student, length, quantised=self._quantizer is not None)

    def _too_large(self, error: RuntimeError) -> Exception:
        if not is_out_of_memory(error):
            return EngineError(f"training failed: {(str(error).splitlines() or [type(error).__name__])[0]}")
        size = self._options.micro_batch
        smaller = f"--micro-batch {size // 2}" if size > 1 else "a shorter --length"
        return DoesNotFitError(
            f"memory is too small for {size} sequences of {self._corpus.windows.shape[1]} tokens at once",
            hint=f"try {smaller}; the result is the same",
        )

    # --- state on disk

    def _save(self) -> None:
        """Write tensors, then the small file that names them: a kill between the two leaves the earlier state.

        Nothing is written when this step is on disk already, or was interrupted while it changed the weights.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        state = self._state
        if not state.whole or state.step == state.saved_step:
            return
        tensors = {f"weight.{name}": value.detach().contiguous() for name, value in self._learned.items()}
        for index, entry in state.optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer.{index}.{name}": value for name, value in entry.items()})
        name = _TENSORS.format(step=state.step)
        document = {"step": state.step, "tensors": name, "curve": [asdict(item) for item in state.curve]}
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            save_file(tensors, self._directory / name)
            with (self._directory / name).open("rb") as stream:
                os.fsync(stream.fileno())
            write_atomically(self._directory / _STATE, json.dumps(document))
            for old in self._directory.glob(_TENSORS.format(step="*")):
                if old.name != name:
                    old.unlink()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot keep the state of training in {self._directory}: {error}") from error
        state.saved_step = state.step

    def _restore(self) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._directory / _STATE
        if not path.is_file():
            return
        state = self._state
        weights = self._learned
        saved = state.optimizer.state_dict()
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            tensors = load_file(self._directory / document["tensors"], device=str(self._device))
            for name, weight in weights.items():
                weight.data.copy_(tensors[f"weight.{name}"])
            for index in range(len(weights)):
                names = ("step", "exp_avg", "exp_avg_sq")
                saved["state"][index] = {name: tensors[f"optimizer.{index}.{name}"] for name in names}
            curve = [Step(**item) for item in document["curve"]]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"the state of training in {self._directory} cannot be read: {error}",
                hint="remove the directory to start anew",
            ) from error
        state.optimizer.load_state_dict(saved)
        state.step = state.saved_step = document["step"]
        state.curve = curve


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file: whoever reads sees all of the old or all of the new one. Raises ``OSError``."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def training_bytes(student: Any, length: int, *, quantised: bool = False) -> tuple[int, int]:
    """Memory that float32 training needs beside both models' weights: whatever the batch, and per sequence of it."""
    config = student.config
    weights = sum(parameter.numel() for parameter in student.parameters())
    layer = _PER_CHANNEL * config.hidden_size + _PER_NEURON * config.intermediate_size
    position = _PER_LOGIT * config.vocab_size + config.num_hidden_layers * layer
    return _FLOAT32_BYTES * (_PER_WEIGHT + quantised) * weights, _FLOAT32_BYTES * length * position


def _distance(expected: Sequence[Any], found: Sequence[Any]) -> Any:
    """Mean over layers of |found - expected|^2 / |expected|^2."""
    pairs = zip(expected, found, strict=True)
    parts = [(one.float() - other.float()).square().sum() / other.float().square().sum() for other, one in pairs]
    return sum(parts) / len(parts)


def _rate(step: int, options: TrainingOptions) -> float:
    warm_up = max(1, round(options.steps * _WARM_UP))
    if step < warm_up:
        return options.learning_rate * (step + 1) / warm_up
    done = (step - warm_up) / max(1, options.steps - warm_up)
    return options.learning_rate * (_LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done)))


class _Attention(AbstractContextManager["_Attention"]):
    """Collects what the attention of some layers puts out, while the block runs; nothing when ``weight`` is 0."""

    def __init__(self, model: Any, layers: Sequence[int], weight: float) -> None:
        self.outputs: list[Any] = []
        chosen = layers if weight > 0 else ()
        self._handles = [model.model.layers[index].self_attn.register_forward_hook(self._keep) for index in chosen]

    def _keep(self, _module: Any, _inputs: Any, output: Any) -> None:
        self.outputs.append(output[0] if isinstance(output, tuple) else output)

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
