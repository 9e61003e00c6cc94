"""The child process of ``exporter.vocabulary``: a JSON request on stdin, a JSON answer on stdout.

Imports next to nothing, because an export starts it several times. It may die of what it loads; that is its purpose.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

from runtime.libllama import import_declarations


def _serve(request: dict[str, Any]) -> dict[str, Any]:
    library = import_declarations()
    library.llama_backend_init()
    parameters = library.llama_model_default_params()
    parameters.vocab_only = True
    model = library.llama_model_load_from_file(request["path"].encode(), parameters)
    if not model:
        sys.exit("error: llama.cpp refused to load it")
    vocabulary = library.llama_model_get_vocab(model)
    ids = [_tokenize(library, vocabulary, text.encode("utf-8")) for text in request["texts"]]
    return {"vocabulary": library.llama_vocab_n_tokens(vocabulary), "ids": ids}


def _tokenize(library: Any, vocabulary: Any, text: bytes) -> list[int]:
    room = len(text) + 8  # a token stands for one byte or more
    buffer = (ctypes.c_int32 * room)()
    count = library.llama_tokenize(vocabulary, text, len(text), buffer, room, False, True)
    if count < 0:
        sys.exit(f"error: a text of {len(text)} bytes became {-count} tokens")
    return list(buffer[:count])


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_serve(json.load(sys.stdin))))
