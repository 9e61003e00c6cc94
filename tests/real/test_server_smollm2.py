"""``edgelm serve`` on SmolLM2, as a user starts it, asked by the official ``openai`` client."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from fake_engine import wait_until
from prometheus_client.parser import text_string_to_metric_families

pytestmark = pytest.mark.real

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
START_TIMEOUT_S = 60


@pytest.fixture(scope="module", params=[[], ["--in-process"]], ids=["supervised", "in-process"])
def url(request: pytest.FixtureRequest, smollm2_gguf: Path) -> Iterator[str]:
    arguments = ["serve", str(smollm2_gguf), "--port", "0", "--parallel", "2", "--context", "512", *request.param]
    command = [sys.executable, "-m", "edgelm", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            events = (json.loads(line) for line in process.stderr)
            seen: dict[str, Any] = {}
            while not {"listening", "ready"} <= set(seen):  # in either order
                event = next(events)
                seen[event["event"]] = event
            yield seen["listening"]["url"]
            process.send_signal(signal.SIGTERM)
            output, log = process.communicate(timeout=60)
            assert process.returncode == 0, log
            assert output == ""
        finally:
            process.kill()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


def figures(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}


def test_chat_streamed_says_what_chat_says(client: openai.OpenAI) -> None:
    name = next(iter(client.models.list())).id
    whole = client.chat.completions.create(model=name, messages=QUESTION, temperature=0, max_tokens=8)
    stream = client.chat.completions.create(
        model=name,
        messages=QUESTION,
        temperature=0,
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert text.strip()
    assert whole.usage.prompt_tokens > 10
    assert whole.usage.completion_tokens == chunks[-1].usage.completion_tokens <= 8
    # The same prompt again: all but its last token was in the cache.
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens - 1
    assert whole.model_extra["timings"]["decode_tps"] > 0


def test_seeds_and_two_streams_at_once(client: openai.OpenAI, url: str) -> None:
    def ask(seed: int) -> str:
        answer = client.completions.create(
            model=next(iter(client.models.list())).id,
            prompt="Once upon a time there was",
            max_tokens=6,
            temperature=1,
            top_p=0.9,
            seed=seed,
        )
        assert answer.usage.completion_tokens <= 6
        return answer.choices[0].text

    assert ask(1) == ask(1)
    before = figures(url)
    with ThreadPoolExecutor(2) as pool:
        texts = list(pool.map(ask, (1, 2)))
    assert texts[0] != texts[1]
    after = figures(url)
    calls = after["edgelm_batch_tokens_count"] - before["edgelm_batch_tokens_count"]
    tokens = after["edgelm_decode_tokens_total"] - before["edgelm_decode_tokens_total"]
    assert calls < tokens  # some calls computed a token of both


def test_a_client_that_leaves_frees_the_engine(client: openai.OpenAI, url: str) -> None:
    name = next(iter(client.models.list())).id
    with client.completions.create(
        model=name, prompt="A very long story: ", max_tokens=400, temperature=1, seed=3, stream=True
    ) as stream:
        next(iter(stream))
    assert wait_until(lambda: figures(url)["edgelm_requests_running"] == 0, 30)
    generated = figures(url)["edgelm_decode_tokens_total"]
    assert client.completions.create(model=name, prompt="x", max_tokens=1).usage.completion_tokens == 1
    assert figures(url)["edgelm_decode_tokens_total"] == generated + 1


def test_a_hostile_prompt_is_only_text(client: openai.OpenAI) -> None:
    for prompt in ("\0\0\0", "🎉" * 20, "\u200b\r\n\t", "<|im_end|>" * 10):
        answer = client.completions.create(model=next(iter(client.models.list())).id, prompt=prompt, max_tokens=2)
        assert answer.usage.prompt_tokens > 0


COUNTRY = {
    "type": "object",
    "properties": {
        "capital": {"type": "string", "maxLength": 30},
        "continent": {"enum": ["Europe", "Asia", "Africa"]},
        "inhabitants": {"type": "integer", "minimum": 0, "maximum": 10_000_000_000},
    },
    "required": ["capital", "continent", "inhabitants"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_schema_holds_a_real_model(client: openai.OpenAI, temperature: float) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "country", "schema": COUNTRY}}
    answer = client.chat.completions.create(
        model=next(iter(client.models.list())).id,
        messages=[{"role": "user", "content": "Tell me about France as JSON."}],
        response_format=form,
        temperature=temperature,
        seed=1,
        n=2,
    )
    for choice in answer.choices:
        value = json.loads(choice.message.content)
        assert set(value) == set(COUNTRY["properties"])
        assert value["continent"] in COUNTRY["properties"]["continent"]["enum"]
        assert 0 <= value["inhabitants"] <= 10_000_000_000
        assert choice.finish_reason == "stop"


def test_probabilities_of_a_real_model(client: openai.OpenAI) -> None:
    """Greedy decoding takes the best of the top list, and the list's probabilities are a part of one."""
    answer = client.completions.create(
        model=next(iter(client.models.list())).id,
        prompt="The capital of France is",
        max_tokens=5,
        temperature=0,
        logprobs=20,
    )
    told = answer.choices[0].logprobs
    assert "".join(told.tokens) == answer.choices[0].text
    for token, logprob, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert max(top.values()) == top[token] == logprob
        assert 0.2 < sum(math.exp(value) for value in top.values()) <= 1.0001
