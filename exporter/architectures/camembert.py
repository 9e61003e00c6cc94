"""CamemBERT, a French RoBERTa."""

from exporter.architectures.roberta import FAMILY

__all__ = ["FAMILY"]
