"""Types of tokens in the GGUF format (``tokenizer.ggml.token_type``). Knows nothing else."""

from __future__ import annotations

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
