"""A thread of its own for llama.cpp where another library uses the same AMX tiles.

On CPUs with AMX llama.cpp sets the shapes of the tile registers once in every thread that computes (``mmq.cpp``: a
flag per thread) and relies on them from then on. ONNX Runtime's products of 8-bit numbers set shapes of their own, in
the thread that calls them, and llama.cpp's next prompt in that thread is garbage without a word; torch's products of
bfloat16 leave a thread without shapes, and the next prompt is an illegal instruction. So once one of them is in the
process, calls of llama.cpp go to a thread that nobody else computes in. Elsewhere a call stays a call. Knows none of
the libraries.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from targets.host import instruction_set

Result = TypeVar("Result")
TILES = "amx_int8"


@functools.cache
def has_tiles() -> bool:
    """Whether this processor has tiles that a library might set."""
    return TILES in instruction_set()


def shared() -> bool:
    """Whether this process has another library that sets the tiles of a thread."""
    return ("onnxruntime" in sys.modules or "torch" in sys.modules) and has_tiles()


@functools.cache
def _lane() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "llama.cpp")


def apart(function: Callable[..., Result], *arguments: object) -> Result:
    """``function(*arguments)``, in the thread that is llama.cpp's alone where it has to be."""
    if not shared():
        return function(*arguments)
    future = _lane().submit(function, *arguments)
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            result = future.result()
        except KeyboardInterrupt as error:
            # What computes reads memory that the caller would free: as with a plain call, Ctrl-C takes effect after it.
            interrupt = error
            continue
        if interrupt is not None:
            raise interrupt
        return result
