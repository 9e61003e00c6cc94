"""The peers' side of ``onnx_side_by_side.py``: one process that loads a model in a peer's runtime and times it.

Run by the interpreter that has the peer (``genai`` needs onnxruntime-genai, ``optimum`` needs optimum-onnx). Greedy,
batch of one; prints JSON with tokens per second: ``prefill_tps`` of the whole prompt, ``decode_tps`` of what follows.

    python benchmarks/onnx_workers.py genai DIRECTORY --threads 2 -p 512 -n 128
"""

from __future__ import annotations

import argparse
import json
import time


def genai(directory: str, prompt: list[int], generated: int) -> tuple[float, float]:
    """Seconds of the prompt and of one token after it. Threads stand in genai_config.json."""
    import numpy as np
    import onnxruntime_genai as og

    model = og.Model(directory)
    times = []
    for _ in range(2):  # the first run warms up
        parameters = og.GeneratorParams(model)
        length = len(prompt) + generated + 1
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, parameters)
        started = time.perf_counter()
        generator.append_tokens(np.asarray([prompt], dtype=np.int32))
        generator.generate_next_token()
        between = time.perf_counter()
        for _ in range(generated):
            generator.generate_next_token()
        times.append((between - started, (time.perf_counter() - between) / generated))
    return times[-1]


def optimum(directory: str, prompt: list[int], generated: int, threads: int) -> tuple[float, float]:
    """The same over ``ORTModelForCausalLM`` with its cache."""
    import onnxruntime
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    torch.set_num_threads(threads)
    model = ORTModelForCausalLM.from_pretrained(directory, session_options=options, use_io_binding=False)
    times = []
    for _ in range(2):
        ids, past = torch.tensor([prompt]), None
        mask = torch.ones_like(ids)
        started = time.perf_counter()
        between = 0.0
        for step in range(generated + 1):
            answer = model(input_ids=ids, attention_mask=mask, past_key_values=past, use_cache=True)
            past = answer.past_key_values
            ids = answer.logits[:, -1:].argmax(dim=-1)
            mask = torch.ones((1, len(prompt) + step + 1), dtype=torch.int64)
            if step == 0:
                between = time.perf_counter()
        times.append((between - started, (time.perf_counter() - between) / generated))
    return times[-1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=("genai", "optimum"))
    parser.add_argument("directory")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("-p", type=int, default=512)
    parser.add_argument("-n", type=int, default=128)
    arguments = parser.parse_args()
    prompt = [100 + (7 * step) % 1000 for step in range(arguments.p)]
    if arguments.side == "genai":
        prompt_s, token_s = genai(arguments.directory, prompt, arguments.n)
    else:
        prompt_s, token_s = optimum(arguments.directory, prompt, arguments.n, arguments.threads)
    print(json.dumps({"prefill_tps": arguments.p / prompt_s, "decode_tps": 1 / token_s}))


if __name__ == "__main__":
    main()
