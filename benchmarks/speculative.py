"""Speculative decoding against plain decoding, in turns on one loaded model: speed, right guesses, and whether the
greedy text is the same, on tasks that copy from their prompt and on one that does not.

    edgelm export SmolLM2-135M-Instruct --quant Q8_0 -o teacher
    edgelm export smollm2-distilled --quant Q4_0 -o student
    python benchmarks/speculative.py teacher --draft student --rounds 7

Sides: plain; lookup; the draft as ``--draft`` runs it, which pauses where guesses cost more than they save by the bytes
that both models read; the same draft taken for free, so that it hardly ever pauses; lookup and draft together. The
order rotates. States the median ratio to plain with its 95 % interval. Needs a quiet machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from measure import save

from runtime.engine import EngineOptions
from runtime.generate import Answer, GenerationRequest, Session, answer, generate
from runtime.model import LoadedModel, check_speculation, open_model
from runtime.speculative import DRAFT_TOKENS, ModelDrafter, Speculation
from targets.significance import median_interval

_REPORT = (
    "The harbour of Lindholm was built in 1883 by the engineer Karla Brandt. It has three docks, and the longest of "
    "them measures 240 metres. In 1921 a fire destroyed the northern warehouse, and the town paid 1.2 million crowns "
    "for a new one. Today the harbour employs 410 people and handles 96,000 containers a year. Its director is Jonas "
    "Ekberg, who came from the shipyard of Nordby in 2014. The harbour is open from April to December."
)
TASKS = {
    "copy": f"Repeat the following text word for word, and nothing else:\n\n{_REPORT}",
    "extract": f"{_REPORT}\n\nWrite down every sentence of this text that contains a number, as it stands.",
    "explain": "Explain in a few paragraphs how a lighthouse works and why ships still need it.",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--context", type=int, default=1024)
    arguments = parser.parse_args()
    options = EngineOptions(context=arguments.context, logits_rows=DRAFT_TOKENS + 1)
    model = open_model(arguments.bundle, options)
    draft = None if arguments.draft is None else open_model(arguments.draft, options)
    check_speculation(model, draft)
    sides = sides_of(model, draft)
    rows = []
    for number in range(-1, arguments.rounds):  # the first round warms up and is not counted
        for task, text in TASKS.items():
            names = list(sides)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                found = once(model, text, arguments.tokens, sides[name])
                if number >= 0:
                    rows.append(row_of(number, task, name, found))
    info = {"bundle": model.name, "quant": str(arguments.bundle), "draft": None if draft is None else draft.name}
    for row in rows:
        same = next(other for other in rows if (other["task"], other["side"]) == (row["task"], "plain"))
        row.update(info, same_text=row["text"] == same["text"])
    summarise(rows)
    model.close()
    if draft is not None:
        draft.close()
    print(f"raw rows: {save(f'speculative-{arguments.bundle.resolve().name}', rows)}")


def sides_of(model: LoadedModel, draft: LoadedModel | None) -> dict[str, Speculation | None]:
    """What is compared; None guesses nothing."""
    sides: dict[str, Speculation | None] = {"plain": None, "lookup": Speculation(lookup=True)}
    if draft is not None:
        share = draft.info.weights_bytes / model.info.weights_bytes
        drafter = ModelDrafter(draft.engine, share)
        sides["draft"] = Speculation(drafter=drafter)
        sides["draft, taken for free"] = Speculation(drafter=ModelDrafter(draft.engine, 0.0))
        sides["lookup and draft"] = Speculation(lookup=True, drafter=drafter)
    return sides


def once(model: LoadedModel, text: str, tokens: int, by: Speculation | None) -> Answer:
    """One greedy answer, nothing of it in any cache of the model's."""
    model.engine.truncate(0)
    ids = model.chat_prompt([{"role": "user", "content": text}])
    request = GenerationRequest(ids, tokens, stop_tokens=model.stop_tokens)
    return answer(generate(Session(model.engine), model.tokenizer, request, speculation=by), len(ids))


def row_of(number: int, task: str, side: str, found: Answer) -> dict[str, Any]:
    return {
        "round": number,
        "task": task,
        "side": side,
        "completion_tokens": found.completion_tokens,
        "decode_tps": found.decode_tps,
        "ttft_s": found.ttft_s,
        "drafted_tokens": found.drafted_tokens,
        "accepted_tokens": found.accepted_tokens,
        "text": found.text,
    }


def summarise(rows: list[dict[str, Any]]) -> None:
    for task in TASKS:
        for side in dict.fromkeys(row["side"] for row in rows):
            mine = [row for row in rows if (row["task"], row["side"]) == (task, side)]
            plain = [row for row in rows if (row["task"], row["side"]) == (task, "plain")]
            ratios = [row["decode_tps"] / other["decode_tps"] for row, other in zip(mine, plain, strict=True)]
            drafted, accepted = (sum(row[f"{what}_tokens"] for row in mine) for what in ("drafted", "accepted"))
            right = f"{accepted / drafted:.0%} of {drafted // len(mine)} guesses right" if drafted else "no guesses"
            print(
                f"{task:8} {side:22} {np.median([row['decode_tps'] for row in mine]):7.1f} tok/s, "
                f"x{np.median(ratios):.2f} {median_interval(ratios) or ''}, {right}, "
                f"{mine[0]['completion_tokens']} tokens, same text: {all(row['same_text'] for row in mine)}"
            )


if __name__ == "__main__":
    main()
