"""Helium: a llama whose checkpoints have rotation partners side by side already."""

from dataclasses import replace

from exporter.architectures import llama
from exporter.architectures.shared.family import RopeSettings

FAMILY = replace(
    llama.FAMILY,
    adjacent=True,
    epsilon=("rms_norm_eps", 1e-8),
    rope=RopeSettings(theta=("rope_theta", 100000.0)),
)
