"""Target profiles: what a device is, as data.

A profile is a TOML file, ``profiles/<id>.toml`` here or a file of the user's own; ``docs/targets.md`` documents the
schema. Every figure names its source, a profile that leaves one out does not load. This module reads and finds
profiles. It does not know how they are used for prediction and does not look at the machine it runs on (``host``).
"""

from __future__ import annotations

import bisect
import difflib
import json
import math
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from edgelm.bundle import Choice, Record
from edgelm.errors import ProfileError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROFILES = Path(__file__).parent / "profiles"
GB = 1e9
GIB = 2**30
PROFILE_LIMIT_BYTES = 2**20
_RAM_SUFFIX = re.compile(r"(?P<id>.+)-(?P<gib>\d+)gb")

_NAME = re.compile(r'^name = "([^"\\]+)"$', re.MULTILINE)

Backend = Literal["cpu", "cuda", "rocm", "metal", "vulkan"]


class Figure(Record):
    """A number with the place where it was read, or the arithmetic or estimate that gave it."""

    value: float = Field(ge=0, allow_inf_nan=False)
    source: str = Field(min_length=8)


class Cores(Record):
    """CPU cores by class. ``slow`` are the efficiency cores, which generation does not use. Clocks in GHz."""

    fast: int = Field(ge=1, le=4096)
    fast_ghz: Figure
    slow: int = Field(default=0, ge=0, le=4096)


class Streaming(Record):
    """Read rates by the size of what is read again and again: a large cache keeps much of a small model.

    ``rates[i][n - 1]`` are the bytes per second that ``n`` threads read together when ``sizes_bytes[i]`` are read in
    turn, once for every token. Sizes rise.
    """

    sizes_bytes: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = Field(min_length=1)
    rates: tuple[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], ...]
    source: str = Field(min_length=8)

    @model_validator(mode="after")
    def _consistent(self) -> Streaming:
        if len(self.rates) != len(self.sizes_bytes) or not all(self.rates) or len(set(map(len, self.rates))) != 1:
            raise ValueError("streaming needs one row of rates for every size, all equally long")
        if list(self.sizes_bytes) != sorted(set(self.sizes_bytes)):
            raise ValueError("streaming: sizes have to rise")
        return self

    def rate(self, size_bytes: float, threads: int) -> float:
        """Bytes per second for ``size_bytes`` on ``threads`` threads.

        Linear in the logarithm of the size; beyond the measured sizes and thread counts the nearest one holds.
        """
        column = [row[min(threads, len(row)) - 1] for row in self.rates]
        above = bisect.bisect_left(self.sizes_bytes, size_bytes)
        if above in (0, len(column)):
            return column[min(above, len(column) - 1)]
        low, high = self.sizes_bytes[above - 1], self.sizes_bytes[above]
        part = math.log(size_bytes / low) / math.log(high / low)
        return column[above - 1] * (1 - part) + column[above] * part


class Memory(Record):
    """Memory that holds weights and cache: RAM of a CPU or a unified machine, VRAM of a graphics card.

    ``variants_bytes`` are the sizes that the device is sold with. The system keeps ``reserved_share`` of the size
    (machines whose GPU may use a part of the RAM) and ``reserved_bytes``. Bandwidths in bytes per second: ``effective``
    is what token generation sustains at the best thread count, None when it is left to the calibration. ``per_core`` is
    what one fast core can draw. ``by_threads`` gives the share of ``effective`` at 1, 2, 3 ... threads for devices
    on which more threads cost speed. ``streaming``, where it was measured, replaces both: it knows sizes and threads.
    """

    kind: str
    variants_bytes: tuple[int, ...] = Field(min_length=1)
    default_bytes: int = Field(gt=0)
    reserved_bytes: Figure
    reserved_share: Figure | None = None
    theoretical: Figure | None = None
    effective: Figure | None = None
    per_core: Figure | None = None
    by_threads: tuple[float, ...] = ()
    streaming: Streaming | None = None


class KernelCycles(Record):
    """What the engine's kernels were measured to take on this very machine, in place of the family's constants.

    Cycles of one core at the profile's clock per weight and token, by type; ``layer_us`` and ``parallel_loss`` as in
    ``calibration.toml``. ``attention_prefill`` and ``attention_decode`` are cycles per multiplication of attention,
    None where they were not measured: it then counts as arithmetic in F16. They are of flash attention,
    ``plain_prefill`` and ``plain_decode`` of attention without. ``decode`` was measured on as many weights as
    ``decode_weights`` says first, ``decode_large``, of some types, on as many as it says second: kernels that do not
    rearrange weights lose more than a read rate tells once a cache no longer holds them. ``prefill_row`` and
    ``decode_row`` are what a row of a matrix costs besides, for every token: narrow models have more rows for their
    weights. Empty where nobody measured them. ``decode`` holds at ``decode_threads`` threads, ``decode_single`` and
    ``layer_single_us`` on one: more threads wait for each other in every layer, and hide arithmetic behind memory.
    ``decode_as_filed`` is ``decode`` of types that the engine rearranges, where it does not: beside a GPU.
    """

    prefill: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]]
    decode: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]]
    layer_us: float = Field(ge=0, allow_inf_nan=False)
    parallel_loss: float = Field(ge=0, lt=1)
    decode_large: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(default_factory=dict)
    decode_weights: tuple[float, float] | None = None
    decode_single: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(default_factory=dict)
    decode_as_filed: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(default_factory=dict)
    decode_threads: int | None = Field(default=None, gt=1)
    layer_single_us: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    prefill_row: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(default_factory=dict)
    decode_row: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(default_factory=dict)
    attention_prefill: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    attention_decode: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    plain_prefill: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    plain_decode: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    source: str = Field(min_length=8)

    @model_validator(mode="after")
    def _consistent(self) -> KernelCycles:
        if self.decode_large and self.decode_weights is None:
            raise ValueError("decode_large needs decode_weights")
        if self.decode_weights is not None and not 0 < self.decode_weights[0] < self.decode_weights[1]:
            raise ValueError("decode_weights has to rise from above 0")
        if (self.decode_single or self.layer_single_us is not None) and self.decode_threads is None:
            raise ValueError("decode_single and layer_single_us need decode_threads")
        return self


class TargetProfile(Record):
    """One device, with one of its memory sizes chosen (``ram_bytes``).

    ``backend`` is the part of llama.cpp that computes, ``kernels`` names the kernel family of ``calibration.toml``
    that tells which types are fast. ``compute`` is the dense f16 rate of a GPU in FLOP/s. ``devices`` are the
    ``device_id`` values under which published measurements list this device. ``onnx_providers`` are what ONNX Runtime
    computes with there, best first, as ``--provider`` takes them.
    """

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    name: str
    kind: Literal["cpu", "gpu"]
    backend: Backend
    kernels: str
    cpu: str
    isa: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    onnx_providers: tuple[str, ...] = ()
    ram_bytes: int = Field(gt=0)
    memory: Memory
    cores: Cores | None = None
    compute: Figure | None = None
    compute_scale: Figure | None = None
    kernel_cycles: KernelCycles | None = None
    threads_decode: Choice
    threads_prefill: Choice
    storage_read: Figure | None = None
    power_w: Figure | None = None
    notes: tuple[str, ...] = ()
    available: Choice | None = None

    @model_validator(mode="after")
    def _consistent(self) -> TargetProfile:
        if self.kind == "cpu" and self.cores is None:
            raise ValueError("a cpu profile needs [cores]")
        if (self.kind == "cpu") != (self.backend == "cpu"):
            raise ValueError(f"kind {self.kind!r} does not go with backend {self.backend!r}")
        if self.kind == "gpu" and (self.compute is None or self.memory.theoretical is None):
            raise ValueError("a gpu profile needs [compute] and a theoretical bandwidth")
        return self

    @property
    def label(self) -> str:
        """The id, with the memory size when it is not the default one: what ``load_profile`` takes again."""
        usual = self.ram_bytes == self.memory.default_bytes or self.ram_bytes not in self.memory.variants_bytes
        return self.id if usual else f"{self.id}-{self.ram_bytes // GIB}gb"

    @property
    def usable_ram_bytes(self) -> int:
        """Memory that a model may take: what is available now on a detected host, else all but the system's share."""
        if self.available is not None:
            return int(self.available.value)
        share = self.memory.reserved_share.value if self.memory.reserved_share is not None else 0
        return max(int(self.ram_bytes * (1 - share) - self.memory.reserved_bytes.value), 0)

    @property
    def usable_ram_reason(self) -> str:
        """Why ``usable_ram_bytes`` is what it is."""
        if self.available is not None:
            return self.available.reason
        reserved = self.memory.reserved_bytes
        parts = [f"{reserved.value / GB:.3g} GB ({reserved.source})"] if reserved.value else []
        if self.memory.reserved_share is not None:
            parts.append(f"{self.memory.reserved_share.value:.0%} ({self.memory.reserved_share.source})")
        return f"{self.ram_bytes / GIB:.3g} GiB less {' and '.join(parts) or 'nothing'}"

    def with_ram(self, ram_bytes: int) -> TargetProfile:
        """The same device with another amount of memory."""
        return self.model_copy(update={"ram_bytes": ram_bytes})


def list_profiles() -> tuple[TargetProfile, ...]:
    """All profiles that come with EdgeLM, sorted by id, each with its default memory."""
    return tuple(profile for _, profile in sorted(_builtin().items()))


def load_profile(text: str) -> TargetProfile:
    """The profile that ``text`` means.

    ``text`` is an id (``raspberry-pi-5``), an id with a memory size (``raspberry-pi-5-4gb``), an alias (``laptop``),
    ``host`` for the machine at hand, or the path of a TOML file. Raises ``ProfileError``.
    """
    if text == "host":
        from targets.host import detect_host  # a cycle at import time: the host is described by a profile

        return detect_host()
    path = Path(text)
    if path.suffix == ".toml" or "/" in text:
        return read_profile(path)
    found = _by_name(text)
    if found is not None:
        return found
    sized = _RAM_SUFFIX.fullmatch(text)
    base = _by_name(sized["id"]) if sized else None
    if sized is None or base is None:
        raise ProfileError(f"there is no target '{text}'", hint=_what_exists(text))
    ram_bytes = int(sized["gib"]) * GIB
    if ram_bytes not in base.memory.variants_bytes:
        sizes = ", ".join(f"{base.id}-{size // GIB}gb" for size in base.memory.variants_bytes)
        raise ProfileError(f"{base.name} does not come with {sized['gib']} GB", hint=f"there are: {sizes}")
    return base.with_ram(ram_bytes)


def profile_for_device(device_id: str, *, gpu: bool) -> TargetProfile | None:
    """The built-in profile of a published ``device_id``, on its CPU or on its GPU; None when there is none."""
    for profile in _builtin().values():
        if device_id in (profile.id, *profile.devices) and (profile.kind == "gpu") == gpu:
            return profile
    return None


def read_profile(path: Path) -> TargetProfile:
    """The profile in a TOML file. Raises ``ProfileError`` naming the key that is wrong or lacks a source."""
    try:
        with path.open("rb") as stream:
            content = stream.read(PROFILE_LIMIT_BYTES + 1)
    except OSError as error:
        raise ProfileError(
            f"cannot read profile {path}: {error.strerror}", hint="list the built-in ones with: edgelm targets list"
        ) from error
    if len(content) > PROFILE_LIMIT_BYTES:
        raise ProfileError(f"profile {path} is larger than {PROFILE_LIMIT_BYTES} bytes")
    return parse_profile(content, str(path))


def parse_profile(content: bytes, name: str) -> TargetProfile:
    """The profile in TOML text; ``name`` is what errors call it. Raises ``ProfileError``."""
    hint = "docs/targets.md documents the keys"
    try:
        document = tomllib.loads(content.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ProfileError(f"{name} is not TOML: {error}", hint=hint) from error
    try:
        return TargetProfile.model_validate(_with_sources(document))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise ProfileError(f"{name} is not a valid profile: {where}: {first['msg']}", hint=hint) from error
    except (TypeError, ValueError, OverflowError) as error:
        raise ProfileError(f"{name} is not a valid profile: {error}", hint=hint) from error


# key in the file -> (section, field of the record, factor to base units)
_FIGURES = {
    "memory.reserved_mb": ("memory", "reserved_bytes", 1e6),
    "memory.reserved_share": ("memory", "reserved_share", 1.0),
    "memory.theoretical_gbs": ("memory", "theoretical", GB),
    "memory.effective_gbs": ("memory", "effective", GB),
    "memory.per_core_gbs": ("memory", "per_core", GB),
    "cores.fast_ghz": ("cores", "fast_ghz", 1.0),
    "compute_tflops": ("", "compute", 1e12),
    "compute_scale": ("", "compute_scale", 1.0),
    "storage_read_mbs": ("", "storage_read", 1e6),
    "power_w": ("", "power_w", 1.0),
}


def _with_sources(document: dict[str, Any]) -> dict[str, Any]:
    """The record's shape from the file's: every figure joined with its entry of ``[sources]``, in base units."""
    fields = {key: dict(value) if isinstance(value, dict) else value for key, value in document.items()}
    sources = fields.pop("sources", {})
    if not isinstance(sources, dict):
        raise TypeError("[sources] has to be a table")
    for key, (section, field, factor) in _FIGURES.items():
        table = fields.get(section, {}) if section else fields
        name = key.rpartition(".")[2]
        if not isinstance(table, dict) or name not in table:
            continue
        value = table.pop(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{key}: a number is needed, not {value!r}")
        if key not in sources:
            raise ValueError(f'{key} has no source: add "{key}" = "https://..." to [sources]')
        table[field] = {"value": value * factor, "source": sources.pop(key)}
    if sources:
        raise ValueError(f"[sources] names {', '.join(sorted(sources))}, which the profile does not state")
    memory = fields.get("memory")
    if isinstance(memory, dict):
        sizes = memory.pop("sizes_gib", [])
        default = memory.pop("default_gib", max(sizes, default=0))
        memory["variants_bytes"] = [round(size * GIB) for size in sizes]
        memory["default_bytes"] = round(default * GIB)
        if isinstance(memory.get("streaming"), dict):
            memory["streaming"] = _streaming_fields(memory["streaming"])
        fields.setdefault("ram_bytes", memory["default_bytes"])
    return fields


def _streaming_fields(table: dict[str, Any]) -> dict[str, Any]:
    """``[memory.streaming]`` in base units: the file has megabytes and GB/s."""
    fields = dict(table)
    fields["sizes_bytes"] = [size * 1e6 for size in fields.pop("sizes_mb", [])]
    fields["rates"] = [[rate * GB for rate in row] for row in fields.pop("gbs", [])]
    return fields


def profile_toml(profile: TargetProfile) -> str:
    """The profile as the TOML text that ``parse_profile`` reads. What was free at one moment is not part of it."""
    top = {"id": profile.id, "name": profile.name, "kind": profile.kind, "backend": profile.backend}
    lines = [
        f"{key} = {_quoted(value)}" for key, value in {**top, "kernels": profile.kernels, "cpu": profile.cpu}.items()
    ]
    for key in ("isa", "aliases", "devices", "onnx_providers", "notes"):
        values = getattr(profile, key)
        if values:
            lines.append(f"{key} = [{', '.join(_quoted(value) for value in values)}]")
    lines += [line for key in _FIGURES if "." not in key for line in _figure_line(profile, key)]
    for key in ("threads_decode", "threads_prefill"):
        choice: Choice = getattr(profile, key)
        lines.append(f"{key} = {{ value = {choice.value}, reason = {_quoted(choice.reason)} }}")
    if profile.cores is not None:
        lines += ["", "[cores]", f"fast = {profile.cores.fast}", f"slow = {profile.cores.slow}"]
        lines += _figure_line(profile, "cores.fast_ghz")
    memory = profile.memory
    sizes = ", ".join(f"{size / GIB!r}" for size in memory.variants_bytes)
    lines += ["", "[memory]", f"kind = {_quoted(memory.kind)}", f"sizes_gib = [{sizes}]"]
    lines.append(f"default_gib = {profile.ram_bytes / GIB!r}")
    lines += [line for key in _FIGURES if key.startswith("memory.") for line in _figure_line(profile, key)]
    if memory.by_threads:
        lines.append(f"by_threads = [{', '.join(f'{share:.3f}' for share in memory.by_threads)}]")
    if memory.streaming is not None:
        lines += ["", "[memory.streaming]", *_streaming_lines(memory.streaming)]
    if profile.kernel_cycles is not None:
        lines += ["", "[kernel_cycles]", *_kernel_lines(profile.kernel_cycles)]
    sources = {key: figure.source for key in _FIGURES if (figure := _figure(profile, key)) is not None}
    lines += ["", "[sources]", *(f"{_quoted(key)} = {_quoted(source)}" for key, source in sources.items())]
    return "\n".join(lines) + "\n"


def _streaming_lines(streaming: Streaming) -> list[str]:
    rows = (f"[{', '.join(f'{rate / GB:.4g}' for rate in row)}]" for row in streaming.rates)
    return [
        f"sizes_mb = [{', '.join(f'{size / 1e6:.6g}' for size in streaming.sizes_bytes)}]",
        f"gbs = [{', '.join(rows)}]",
        f"source = {_quoted(streaming.source)}",
    ]


def _kernel_lines(cycles: KernelCycles) -> list[str]:
    def table(values: dict[str, float]) -> str:
        return f"{{ {', '.join(f'{kind} = {value:.4g}' for kind, value in values.items())} }}"

    names = ("layer_single_us", "attention_prefill", "attention_decode", "plain_prefill", "plain_decode")
    optional: dict[str, float | None] = {name: getattr(cycles, name) for name in names}
    lines = [f"prefill = {table(cycles.prefill)}", f"decode = {table(cycles.decode)}"]
    if cycles.decode_weights is not None:
        lines.append(f"decode_large = {table(cycles.decode_large)}")
        lines.append(f"decode_weights = [{', '.join(f'{count!r}' for count in cycles.decode_weights)}]")
    if cycles.decode_threads is not None:
        lines.append(f"decode_single = {table(cycles.decode_single)}")
        lines.append(f"decode_threads = {cycles.decode_threads}")
    if cycles.decode_as_filed:
        lines.append(f"decode_as_filed = {table(cycles.decode_as_filed)}")
    if cycles.decode_row:
        lines += [f"prefill_row = {table(cycles.prefill_row)}", f"decode_row = {table(cycles.decode_row)}"]
    return [
        *lines,
        f"layer_us = {cycles.layer_us:.4g}",
        f"parallel_loss = {cycles.parallel_loss:.4g}",
        *(f"{key} = {value:.4g}" for key, value in optional.items() if value is not None),
        f"source = {_quoted(cycles.source)}",
    ]


def _figure(profile: TargetProfile, key: str) -> Figure | None:
    section, field, _ = _FIGURES[key]
    holder = getattr(profile, section) if section else profile
    figure: Figure | None = getattr(holder, field, None)
    return figure


def _figure_line(profile: TargetProfile, key: str) -> list[str]:
    figure = _figure(profile, key)
    return [] if figure is None else [f"{key.rpartition('.')[2]} = {figure.value / _FIGURES[key][2]!r}"]


def _quoted(text: str) -> str:
    # TOML's basic strings take JSON's escapes; only the delete character has to be escaped besides.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _by_name(text: str) -> TargetProfile | None:
    # Only files that mention the name are parsed: a command that needs one profile starts in time.
    direct = PROFILES / f"{text}.toml"
    if re.fullmatch(r"[a-z0-9][a-z0-9.-]*", text) and direct.is_file():
        return read_profile(direct)
    for path in _files():
        if f'"{text}"' in path.read_text(encoding="utf-8"):
            profile = read_profile(path)
            if text in profile.aliases:
                return profile
    return None


def board_profile(model: str) -> TargetProfile | None:
    """The CPU profile whose name the board's own name begins with, the longest winning; None when there is none."""
    found = []
    for path in _files():
        name = _NAME.search(path.read_text(encoding="utf-8"))
        if name is not None and model.startswith(name.group(1)):
            found.append(read_profile(path))
    boards = [profile for profile in found if profile.kind == "cpu"]
    return max(boards, key=lambda profile: len(profile.name), default=None)


def _what_exists(text: str) -> str:
    names = sorted({name for profile in _builtin().values() for name in (profile.id, *profile.aliases)})
    near = difflib.get_close_matches(text, names, n=5, cutoff=0.5) or [name for name in names if text in name][:5]
    listed = f"nearest are: {', '.join(near)}; all: edgelm targets list" if near else f"there are: {', '.join(names)}"
    return f"{listed}; or give 'host' or the path of a .toml profile"


def _files() -> Iterator[Path]:
    return iter(sorted(PROFILES.glob("*.toml")))


@lru_cache(maxsize=1)
def _builtin() -> dict[str, TargetProfile]:
    profiles = [(path, read_profile(path)) for path in _files()]
    for path, profile in profiles:
        if path.stem != profile.id:
            raise ProfileError(f"{path} holds the profile '{profile.id}'")
    return {profile.id: profile for _, profile in profiles}
