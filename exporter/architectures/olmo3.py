"""OLMo 3: OLMo 2 in which three of four layers see a window, whose rotation is never scaled."""

from collections.abc import Mapping
from dataclasses import replace

from exporter.architectures import olmo2
from exporter.architectures.shared.family import RopeSettings, Target, Windows
from exporter.checkpoint import Checkpoint


def _check(checkpoint: Checkpoint) -> list[str]:
    tables = checkpoint.config.get("rope_parameters")
    kinds = [tables.get(f"{kind}_attention") for kind in ("full", "sliding")] if isinstance(tables, Mapping) else []
    bases = {kind.get("rope_theta") for kind in kinds if isinstance(kind, Mapping)}
    return ["layers with and without window rotate by two bases, llama.cpp's olmo2 has one"] if len(bases) > 1 else []


FAMILY = replace(
    olmo2.FAMILY,
    targets=(Target("olmo2", square=True, windows=True, head="required"),),
    rope=RopeSettings(local_theta=("rope_theta", 10000.0)),
    windows=Windows("periodic", period=4, default=4096),
    check=_check,
)
