"""SmolLM2 copies a text: the same words with and without guesses, and most guesses are right."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.engine import EngineOptions
from runtime.generate import Answer, GenerationRequest, Session, answer, generate
from runtime.model import LoadedModel, open_model
from runtime.speculative import Speculation

pytestmark = pytest.mark.real

COPY = (
    "Repeat the following text word for word, and nothing else:\n\nThe harbour of Lindholm was built in 1883 by the "
    "engineer Karla Brandt. It has three docks, and the longest of them measures 240 metres."
)


def spoken(model: LoadedModel, by: Speculation | None) -> Answer:
    model.engine.truncate(0)
    ids = model.chat_prompt([{"role": "user", "content": COPY}])
    request = GenerationRequest(ids, 60, stop_tokens=model.stop_tokens)
    return answer(generate(Session(model.engine), model.tokenizer, request, speculation=by), len(ids))


def test_guesses_change_no_word(smollm2_gguf: Path) -> None:
    model = open_model(smollm2_gguf, EngineOptions(context=256, draft=str(smollm2_gguf)))
    try:
        plain = spoken(model, None)
        assert "Karla Brandt" in plain.text
        copied, drafted = spoken(model, Speculation(lookup=True)), spoken(model, model.speculation)
    finally:
        model.close()
    assert copied.text == drafted.text == plain.text
    assert copied.accepted_tokens > copied.drafted_tokens / 2 > 5
    # The draft is the model itself: at its own price it pauses, what it guesses is right.
    assert drafted.accepted_tokens == drafted.drafted_tokens > 0
