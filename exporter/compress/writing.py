"""The teacher's own words, sampled in large batches: free text from one random token on, and conversations.

A model that knows conversations is given the words that open a user's turn and writes question and answer itself (Xu
et al. 2024, arXiv:2406.08464), at temperature 1 and lower ones, as it will be asked on a device. Every batch has a
random stream of its own and is on disk before the next one starts, so that a killed run goes on with the same words.
Keys and values lie where they will stay: a cache that grows by copying moves all of them for every token. Knows models
that transformers computes; does not know what the words are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgelm.progress import Progress, Stage
from exporter.compress.data import Ids
from exporter.compress.shape import head_size
from exporter.device import computing_in_bfloat16, is_out_of_memory
from exporter.reference import cache_name

_TEMPERATURES = (1.0, 0.7)
_CPU_BATCH, _GPU_BATCH = 16, 4096
_GPU_SHARE = 0.65  # of the GPU's memory, for keys, values and logits
_BFLOAT16_BYTES = 2
_LOGIT_BYTES = 4 * 5  # logits, probabilities, noise, their quotient and one more that lives for a moment


@dataclass(frozen=True, slots=True)
class Start:
    """How a sequence starts: with these tokens, or with one random token where there are none; and its temperature."""

    opening: tuple[int, ...]
    temperature: float


def starts(opening: Sequence[int], length: int) -> tuple[Start, ...]:
    """What sequences of ``length`` tokens take turns with; ``opening`` of a user's turn, empty for models without
    conversations. One that is half of a sequence is left out: there would be little else to learn from."""
    openings = dict.fromkeys(((), tuple(opening) if 2 * len(opening) < length else ()))
    return tuple(Start(tokens, temperature) for temperature in _TEMPERATURES for tokens in openings)


def told(kinds: Sequence[Start]) -> str:
    """For the model card: what sequences take turns with."""
    temperatures = ", ".join(f"{value:g}" for value in dict.fromkeys(kind.temperature for kind in kinds))
    conversations = "half of them conversations, " if any(kind.opening for kind in kinds) else ""
    return f"{conversations}temperatures {temperatures}"


def own_words(
    model: Any, count: int, length: int, seed: int, kinds: Sequence[Start], directory: Path, progress: Progress
) -> Ids:
    """``count`` windows (count, length) sampled from ``model`` on its device; the same on every run of one device.

    Window i starts as ``kinds[i % len(kinds)]`` says. Finished batches are kept in ``directory`` and read from there by
    the next run. When a batch does not fit into the GPU's memory, smaller ones are written. Raises ``RuntimeError`` of
    torch when a single sequence does not fit.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with progress.stage("the teacher writes", count * length, unit="tokens") as stage:
        parts = _kept(directory)
        written, batch = sum(map(len, parts)), writing_batch(model, length)
        stage.advance(written * length)
        while written < count:
            rows = min(batch, count - written)
            try:
                turns = [kinds[index % len(kinds)] for index in range(written, written + rows)]
                part = _written(model, turns, length, [seed, written], stage)
            except RuntimeError as error:
                batch = rows // 2
                if not batch or not is_out_of_memory(error):
                    raise
                continue
            _keep(directory / f"{written}.npy", part)
            parts.append(part)
            written += rows
    return np.concatenate(parts)


def _kept(directory: Path) -> list[Ids]:
    """The batches of an earlier run, each named by the sequences before it."""
    parts: list[Ids] = []
    while (path := directory / f"{sum(map(len, parts))}.npy").is_file():
        parts.append(np.load(path, allow_pickle=False))
    return parts


def writing_batch(model: Any, length: int) -> int:
    """How many sequences are written at once: few on a CPU, on a GPU what its memory holds."""
    if model.device.type != "cuda":
        return _CPU_BATCH
    import torch

    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cached = 2 * config.num_hidden_layers * heads * head_size(config) * length * _BFLOAT16_BYTES
    total_bytes = torch.cuda.get_device_properties(model.device).total_memory
    fitting = int(total_bytes * _GPU_SHARE / (cached + _LOGIT_BYTES * config.vocab_size))
    return max(1, min(_GPU_BATCH, fitting // 512 * 512 or fitting))


def _written(model: Any, turns: Sequence[Start], length: int, seed: list[int], stage: Stage) -> Ids:
    import torch

    device, rows = model.device, len(turns)
    longest = max(1, *(len(turn.opening) for turn in turns))
    given = torch.tensor([[*turn.opening, *[-1] * (longest - len(turn.opening))] for turn in turns], device=device)
    given = given[:, :length]
    coolness = torch.tensor([[1 / turn.temperature] for turn in turns], device=device)
    stream = int(np.random.default_rng(seed).integers(2**62))
    generator = torch.Generator(device=device).manual_seed(stream)
    with torch.inference_mode(), computing_in_bfloat16(device):
        random = torch.randint(model.config.vocab_size, (rows, 1), generator=generator, device=device)
        latest = torch.where(given[:, :1] < 0, random, given[:, :1])
        taken, cache = [latest], {cache_name(model): reserved_cache(model, length)}
        for place in range(1, length):
            output = model(latest, use_cache=True, logits_to_keep=1, **cache)
            # The largest of p / Exp(1) is a sample of p, without the host waiting for the device.
            weights = torch.softmax(output.logits[:, -1] * coolness, dim=-1, dtype=torch.float32)
            noise = torch.empty_like(weights).exponential_(generator=generator)
            latest = weights.div_(noise).argmax(dim=-1, keepdim=True)
            if place < given.shape[1]:
                latest = torch.where(given[:, place : place + 1] < 0, latest, given[:, place : place + 1])
            taken.append(latest)
            stage.advance(rows)
        stage.advance(rows)
        words: Ids = torch.cat(taken, dim=1).to(torch.int32).cpu().numpy()
    return words


def reserved_cache(model: Any, length: int) -> Any:
    """An empty cache of transformers whose layers reserve room for ``length`` tokens at the first of them.

    Of one type on a GPU, bfloat16, whatever the computing of keys and values ends in.
    """
    import torch
    from transformers.cache_utils import Cache, DynamicLayer

    on_gpu = model.device.type == "cuda"

    class Reserved(DynamicLayer):  # type: ignore[misc]
        """Keys and values (rows, heads, tokens so far, head size), both views of what was reserved."""

        _room: tuple[Any, Any]

        def update(self, key_states: Any, value_states: Any, *_: Any) -> tuple[Any, Any]:
            start = self.get_seq_length()
            if start == 0:
                kind = torch.bfloat16 if on_gpu else key_states.dtype
                shapes = ((*item.shape[:2], length, item.shape[3]) for item in (key_states, value_states))
                first, second = (key_states.new_empty(shape, dtype=kind) for shape in shapes)
                self._room, self.is_initialized = (first, second), True
            end = start + key_states.shape[2]
            for room, states in zip(self._room, (key_states, value_states), strict=True):
                room[:, :, start:end] = states
            self.keys, self.values = (room[:, :, :end] for room in self._room)
            return self.keys, self.values

    return Cache(layers=[Reserved() for _ in range(model.config.get_text_config().num_hidden_layers)])


def _keep(path: Path, part: Ids) -> None:
    partial = path.with_name(f".partial.{path.name}")
    np.save(partial, part)
    partial.replace(path)
