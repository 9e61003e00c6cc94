"""Gemma 3 of 4B and more: the text part of a model that also sees; pictures have no place in an artefact."""

from dataclasses import replace

from exporter.architectures import gemma3_text

FAMILY = replace(
    gemma3_text.FAMILY,
    prefixes=("language_model.", "model.language_model."),
    text_config="text_config",
    # Published configurations leave out what equals transformers' defaults.
    defaults={"num_attention_heads": 8, "max_position_embeddings": 131072},
    left_out=("vision_tower.", "model.vision_tower.", "multi_modal_projector.", "model.multi_modal_projector."),
)
