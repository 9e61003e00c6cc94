"""XLM-RoBERTa and the multilingual sentence models made of it (E5, BGE-M3, paraphrase-multilingual): as RoBERTa."""

from exporter.architectures.roberta import FAMILY

__all__ = ["FAMILY"]
