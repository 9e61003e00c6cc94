"""The C interface of llama.cpp, from the installed llama-cpp-python package, and nothing else of that package.

The package's ``__init__`` imports its whole high-level API (four times the time and memory of what is used here), so
its one module of C declarations is imported without it. Knows nothing of models; loading the shared library is the
module's own doing.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

_PACKAGE = "llama_cpp"


def import_declarations() -> Any:
    """The ``llama_cpp.llama_cpp`` module. Later imports of ``llama_cpp`` by others get the whole package as usual.

    Raises ``ImportError`` when the package is not installed, ``OSError`` or ``RuntimeError`` when its library cannot
    be loaded.
    """
    name = f"{_PACKAGE}.{_PACKAGE}"
    if name in sys.modules or _PACKAGE in sys.modules:
        return importlib.import_module(name)
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"No module named {_PACKAGE!r}", name=_PACKAGE)
    bare = ModuleType(_PACKAGE)
    bare.__path__ = list(spec.submodule_search_locations)
    sys.modules[_PACKAGE] = bare
    try:
        return importlib.import_module(name)
    finally:
        del sys.modules[_PACKAGE]
