"""The OpenAI-compatible server over ``runtime.generate``."""
