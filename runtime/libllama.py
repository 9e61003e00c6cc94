"""The C interface of llama.cpp, from the installed llama-cpp-python package, and nothing else of that package; and
which kernels for the CPU come with it.

The package's ``__init__`` imports its whole high-level API (four times the time and memory of what is used here), so
its one module of C declarations is imported without it. Knows nothing of models; loading the shared library is the
module's own doing.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from edgelm.errors import EngineError

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


def load_kernels(library: Any) -> None:
    """Load the best CPU kernels that this processor can run, where they are libraries of their own (the ARM wheel).

    llama.cpp by itself would look beside the Python interpreter and in the working directory. They lie beside libllama,
    and whatever lies in a working directory is not loaded. Raises ``EngineError`` when no kernels fit.
    """
    llama = Path(library._lib._name)
    ggml = ctypes.CDLL(str(llama.with_name(llama.name.replace("llama", "ggml"))))
    ggml.ggml_backend_reg_count.restype = ctypes.c_size_t
    if ggml.ggml_backend_reg_count() > 0:  # built for one CPU: the kernels are part of the library
        return
    ggml.ggml_backend_load_all_from_path(ctypes.c_char_p(os.fsencode(llama.parent)))
    if ggml.ggml_backend_reg_count() == 0:
        raise EngineError(
            f"no kernels for this processor lie in {llama.parent}",
            hint="install llama-cpp-python again, from a wheel for this kind of processor",
        )


def kernel_set() -> str | None:
    """Name of the CPU kernels that were loaded as a library of their own (``armv8.2_2``); None when built in."""
    try:
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"/libggml-cpu-(\S+)\.so$", mapped, re.MULTILINE)
    return found[1] if found else None
