"""Loads a bundle, generates, serves and measures, on the device: no torch, no transformers, no onnx package.

Does not know how a bundle was made.
"""
