"""The narrow seam between what runs a model and everything that uses one.

Token ids in, logits out; sequences can be truncated. No text, no HTTP, no sampling. Implementations: ``engines/``
(llama.cpp, ONNX Runtime) and a scripted fake in the tests. Engines are not thread-safe: one owner calls at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from edgelm.bundle import Choice
from edgelm.errors import ContextOverflowError, EngineError
from targets.vram import Device, OffloadPlan

KvType = Literal["f32", "f16", "q8_0"]
FlashAttention = Literal["auto", "on", "off"]
Logits = npt.NDArray[np.float32]
State = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to load a model.

    ``context`` counts tokens per sequence, ``sequences`` how many are kept at once. ``threads_*`` of 0 means: ask the
    host (``targets.host``). ``mmap`` maps the file instead of copying it into anonymous memory. ``batch`` is the most
    tokens computed in one step; a longer chunk is computed in several. ``logits_rows`` is the length of the longest
    chunk whose logits may be wanted at ``"all"`` positions, ``all_logits`` lifts that limit: an engine reserves room
    for a row of logits each. ``lookup`` and ``draft`` (the path of a model, "" for none) ask ``runtime.model`` for
    speculative decoding; engines themselves know nothing of it. ``providers`` are ONNX Runtime's, best first: none is
    the CPU. ``gpu_layers`` are what llama.cpp puts on a GPU, ``targets.vram.AUTO_LAYERS`` means as many as fit; ``gpu``
    names which, "" for the one with the most free memory. ``host_repack`` has weights that stay with the CPU beside a
    GPU rearranged for its kernels, None leaves it to ``runtime.offload``; without a GPU they are, whatever it says.
    ``flash_attention`` is llama.cpp's: ``auto`` leaves it to ``runtime.attention``, which goes by what was measured to
    be faster on this CPU (``faster_attention``, None: nobody did). Proofs fix it, so that their figures do not hang on
    the machine.
    """

    context: int = 2048
    sequences: int = 1
    threads_decode: int = 0
    threads_prefill: int = 0
    batch: int = 512
    kv_type: KvType = "f16"
    mmap: bool = True
    all_logits: bool = False
    logits_rows: int = 1
    lookup: bool = False
    draft: str = ""
    providers: tuple[str, ...] = ()
    gpu_layers: int = 0
    gpu: str = ""
    host_repack: bool | None = None
    flash_attention: FlashAttention = "auto"
    faster_attention: Literal["on", "off"] | None = None


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a loaded engine says of itself. Sizes in bytes.

    ``buffers`` are sizes that it announced while loading, as far as it does: ``weights_copied`` (weights repacked or
    read instead of mapped) and ``compute`` (reserved, used as far as touched); ``vram_weights``, ``vram_kv`` and
    ``vram_compute`` lie in a GPU's memory. ``waiting`` tells how its threads wait for one another, ``waiting_reason``
    why. ``huge_page_bytes`` of its memory were moved to huge pages. ``truncates`` tells whether a sequence can forget
    its last tokens alone. ``devices`` are all that its build sees, ``gpu_backends`` whether it could use GPUs,
    ``offload`` is what of the model is on a GPU and why (None: the engine knows no GPUs). ``kv_type`` is what the cache
    holds where the model decides it, "" where the options do. ``attention`` tells whether flash attention is on, and
    why; None: the engine has one kind.
    """

    engine: str
    versions: dict[str, str]
    model_name: str
    architecture: str
    vocabulary: int
    context: int
    context_trained: int
    sequences: int
    threads_decode: int
    threads_prefill: int
    weights_bytes: int
    kv_bytes: int
    parameters: int
    load_s: float
    system: str
    buffers: dict[str, int] = field(default_factory=dict)
    waiting: str | None = None
    waiting_reason: str = ""
    huge_page_bytes: int = 0
    truncates: bool = True
    devices: tuple[Device, ...] = ()
    gpu_backends: bool = False
    offload: OffloadPlan | None = None
    kv_type: str = ""
    attention: Choice | None = None


class Chunk(NamedTuple):
    """Tokens to append to one sequence, and which of their logits are wanted."""

    sequence: int
    tokens: Sequence[int]
    logits: Literal["none", "last", "all"] = "last"


class EngineInterruptedError(EngineError):
    """``Engine.interrupt`` stopped a computation; the sequences hold what they held before it."""


class Engine(Protocol):
    """A loaded model with room for ``info.sequences`` sequences."""

    @property
    def info(self) -> EngineInfo:
        """Facts that do not change while the engine lives."""
        ...

    def forward(self, chunks: Sequence[Chunk]) -> Logits:
        """Append the chunks to their sequences and compute them together.

        Returns float32 logits of shape (rows, vocabulary), a row per wanted position in the order of the chunks. The
        array may be a view of the engine's own buffer: it is valid until the next call, and must not be written.
        Logits of ``"all"`` positions need an engine loaded with as many ``logits_rows``, or with ``all_logits``.

        Raises ``ContextOverflowError`` before anything is computed when a sequence would outgrow the context, and
        ``EngineError`` when the engine fails; the sequences named are then cleared. Each sequence may be named once.
        """
        ...

    def length(self, sequence: int = 0) -> int:
        """Tokens held in a sequence."""
        ...

    def truncate(self, length: int, sequence: int = 0) -> None:
        """Forget all tokens of a sequence from position ``length`` on."""
        ...

    def interrupt(self) -> None:
        """Stop the ``forward`` under way, which then raises ``EngineInterruptedError``. Callable from any thread.

        Without one under way nothing happens: whoever starts the next one asks first whether it is still wanted.
        """
        ...

    def close(self) -> None:
        """Free the model. Calling it twice is allowed, any other use afterwards is not."""
        ...


@runtime_checkable
class Chooser(Protocol):
    """An engine that can find the likeliest token where it computes logits, so that nobody has to fetch and search
    them."""

    chooses: bool
    """Whether that is of use with this model here."""

    def likeliest(self, chunk: Chunk) -> int | None:
        """Append a chunk to its sequence as ``Engine.forward`` does, and return the likeliest token behind it.

        None when it cannot, and nothing was appended then: ``forward`` may, or shows logits that are no numbers. Of
        equals, which one it is may differ from ``argmax`` of the logits. Raises as ``forward``.
        """
        ...


@runtime_checkable
class PrefixCopier(Protocol):
    """An engine that can give one sequence what another one holds, for less than computing it again."""

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Let ``target`` hold the first ``length`` tokens of ``source`` instead of what it held.

        Raises ``EngineError`` when the model's state cannot be cut there; ``target`` is empty then.
        """
        ...


@runtime_checkable
class Shifter(Protocol):
    """An engine that can forget tokens in the middle of a sequence, for less than computing again those behind."""

    def discard(self, start: int, end: int, sequence: int = 0) -> bool:
        """Forget the tokens from position ``start`` to before ``end`` and move those behind to ``start``.

        What stands behind was computed with the forgotten tokens in view and stays so. False when this model's state
        cannot do that; nothing was changed then. Raises ``EngineError`` for positions that the sequence does not hold.
        """
        ...


@runtime_checkable
class StateKeeper(Protocol):
    """An engine whose sequences can be taken out as bytes and put into another engine of the same model, version,
    options and kind of processor. The bytes are not checked: who keeps them has to know that they are the same."""

    def state(self, sequence: int = 0) -> State:
        """All that a sequence holds. Raises ``EngineError`` when it cannot be had now."""
        ...

    def restore(self, state: State, length: int, sequence: int = 0) -> None:
        """Let a sequence hold the ``length`` tokens of a ``state`` instead of what it held.

        Raises ``EngineError`` when the state is not of that many tokens; the sequence is empty then.
        """
        ...


@runtime_checkable
class DeviceReader(Protocol):
    """An engine that may have layers on a GPU. Callable from any thread, also while it computes."""

    def device_now(self) -> Device | None:
        """The GPU that holds layers, with the memory that is free there now; None where the CPU computes all."""
        ...


def common_prefix(held: Sequence[int], wanted: Sequence[int]) -> int:
    """Number of leading tokens that both share."""
    shorter = min(len(held), len(wanted))
    if held[:shorter] == wanted[:shorter]:
        return shorter
    for index, (left, right) in enumerate(zip(held, wanted, strict=False)):
        if left != right:
            return index
    return shorter


def check_chunks(engine: Engine, chunks: Sequence[Chunk], options: EngineOptions) -> None:
    """What every engine refuses before it computes anything. ``options`` are those that it was loaded with.

    Raises ``ContextOverflowError`` and ``EngineError`` as ``Engine.forward`` promises.
    """
    info = engine.info
    for chunk in chunks:
        length, tokens = engine.length(chunk.sequence), chunk.tokens
        if len(tokens) == 0:
            raise EngineError(f"no tokens were given for sequence {chunk.sequence}")
        if length + len(tokens) > info.context:
            raise ContextOverflowError(
                f"sequence {chunk.sequence} holds {length} tokens and cannot take {len(tokens)} more: "
                f"the context is {info.context}",
                hint="use a larger --context or a shorter prompt",
            )
        if min(tokens) < 0 or max(tokens) >= info.vocabulary:
            wrong = next(token for token in tokens if not 0 <= token < info.vocabulary)
            raise EngineError(f"token {wrong} is outside the vocabulary of {info.vocabulary}")
        if chunk.logits == "all" and not options.all_logits and len(tokens) > options.logits_rows:
            raise EngineError(
                f"logits of all {len(tokens)} positions need an engine loaded with all_logits: "
                f"this one has room for {options.logits_rows}"
            )
    if len(chunks) > 1 and len({chunk.sequence for chunk in chunks}) != len(chunks):
        raise EngineError("a sequence was given twice in one call")
