"""Implementations of the ``runtime.engine.Engine`` seam, one module each."""
