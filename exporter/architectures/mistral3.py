"""Mistral Small 3.1 and Ministral 3 as they are published: the text part of a model that also sees."""

from dataclasses import replace

from exporter.architectures import ministral3
from exporter.architectures.shared.family import SILU, Windows

FAMILY = replace(
    ministral3.FAMILY,
    prefixes=("language_model.", "model.language_model."),
    expected=SILU,
    windows=Windows("all"),
    text_config="text_config",
    left_out=("vision_tower.", "model.vision_tower.", "multi_modal_projector.", "model.multi_modal_projector."),
)
