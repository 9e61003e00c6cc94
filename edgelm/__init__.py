"""EdgeLM's shared ground: the bundle and report formats, the error tree, units and progress.

Knows the standard library and pydantic only; every other room may import from here.
"""

__version__ = "0.1.0"
