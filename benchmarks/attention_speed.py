"""Flash attention beside plain attention of llama.cpp, in turns in one process on the same weights.

    python benchmarks/attention_speed.py a.gguf b.gguf [--depth 4096] [--step 512] [--threads 2,1] [--rounds 3]

A context has one kind, so there are two over one model. Both read the same prompt step by step, in turns; at each depth
both generate some tokens, which are forgotten. Each row has milliseconds of one step of the prompt behind ``depth``
tokens, or of one generated token (the median of its call), for both kinds. Wants a quiet machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
from measure import append, machine

from runtime.engine import EngineOptions
from runtime.engines.llamacpp import load_library, load_weights
from runtime.engines.llamacpp_batch import Batch

NAME = "attention_speed"
Kind = Literal["flash", "plain"]


class Reader:
    """A context of one kind over weights that are loaded already."""

    def __init__(self, library: Any, model: Any, kind: Kind, tokens: int, kv_type: str) -> None:
        parameters = library.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = tokens, 1
        parameters.n_batch = parameters.n_ubatch = 512
        parameters.n_outputs_max = 1
        parameters.no_perf = True
        name = "LLAMA_FLASH_ATTN_TYPE_ENABLED" if kind == "flash" else "LLAMA_FLASH_ATTN_TYPE_DISABLED"
        parameters.flash_attn_type = getattr(library, name)
        parameters.type_k = getattr(library, f"GGML_TYPE_{kv_type.upper()}")
        parameters.type_v = parameters.type_k if kind == "flash" else library.GGML_TYPE_F16
        self._library = library
        self.context = library.llama_init_from_model(model, parameters)
        if not self.context:
            raise SystemExit(f"no context for {kind} attention")
        self._memory = library.llama_get_memory(self.context)
        self._batch = Batch(library, 512, 1)

    def read(self, tokens: list[int], position: int) -> float:
        """Seconds for tokens from a position on."""
        for row, token in enumerate(tokens):
            self._batch.put(row, token, position + row, 0, wanted=row + 1 == len(tokens))
        self._batch.c.n_tokens = len(tokens)
        started = time.perf_counter()
        if self._library.llama_decode(self.context, self._batch.c) != 0:
            raise SystemExit("llama.cpp failed to compute")
        self._library.llama_synchronize(self.context)
        return time.perf_counter() - started

    def forget(self, position: int) -> None:
        self._library.llama_memory_seq_rm(self._memory, 0, position, -1)

    def threads(self, count: int) -> None:
        self._library.llama_set_n_threads(self.context, count, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--depth", type=int, default=4096)
    parser.add_argument("--step", type=int, default=512, help="tokens of one step of the prompt, at most 512")
    parser.add_argument("--generated", type=int, default=24, help="tokens at each depth")
    parser.add_argument("--threads", default="2,1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kv-type", default="f16", help="of flash attention's cache")
    arguments = parser.parse_args()
    library = load_library()
    append(NAME, {"machine": machine()})
    for path in arguments.models:
        model = load_weights(library, path, EngineOptions(context=512))
        vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
        tokens = np.random.default_rng(1).integers(0, vocabulary, arguments.depth + 512).tolist()
        size = arguments.depth + max(arguments.step, 512)
        kinds: tuple[Kind, Kind] = ("flash", "plain")
        readers = {kind: Reader(library, model, kind, size, arguments.kv_type) for kind in kinds}
        for count in [int(item) for item in arguments.threads.split(",")]:
            case = {"model": path.name, "threads": count, "kv_type": arguments.kv_type}
            for number in range(arguments.rounds):
                for reader in readers.values():
                    reader.forget(0)
                    reader.threads(count)
                    reader.read(tokens[:64], 0)
                    reader.forget(0)
                measure(readers, tokens, arguments, {**case, "round": number})
        for reader in readers.values():
            library.llama_free(reader.context)
        library.llama_model_free(model)


def measure(
    readers: dict[Kind, Reader], tokens: list[int], arguments: argparse.Namespace, case: dict[str, Any]
) -> None:
    """One way through all depths, kinds in turns."""
    for depth in range(0, arguments.depth + 1, arguments.step):
        order: list[Kind] = ["flash", "plain"]
        if (depth // arguments.step + case["round"]) % 2:
            order.reverse()
        took: dict[Kind, list[float]] = {kind: [] for kind in order}
        for index in range(arguments.generated):
            for kind in order:
                took[kind].append(readers[kind].read([tokens[depth + index]], depth + index))
        decoded = {kind: 1e3 * statistics.median(found) for kind, found in took.items()}
        append(NAME, {**case, "test": "decode", "depth": depth, **decoded})
        for kind in order:
            readers[kind].forget(depth)
        read = {}
        if depth < arguments.depth:
            for kind in order:
                read[kind] = 1e3 * readers[kind].read(tokens[depth : depth + arguments.step], depth)
            append(NAME, {**case, "test": "prefill", "depth": depth, "tokens": arguments.step, **read})
        shown = "  ".join(f"{kind} {decoded[kind]:.2f} {read.get(kind, 0.0):.0f}" for kind in order)
        ratio = f"decode {decoded['flash'] / decoded['plain']:.3f}"
        ratio += f" prefill {read['flash'] / read['plain']:.3f}" if read else ""
        print(
            f"{case['model']} {case['threads']} threads, depth {depth}: {shown}; plain over flash {ratio}", flush=True
        )


if __name__ == "__main__":
    main()
