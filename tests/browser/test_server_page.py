"""The page at ``/`` in a real browser: a chat by keyboard, figures that live, every screen and theme, no trouble."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser, browser
from fake_engine import FakeEngine, wait_until
from live_server import LiveServer, fake_model, live_server

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
LOG = "document.getElementById('log').innerText"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server(fake_model(FakeEngine(context=4096, step_delay_s=0.02))) as running:
        yield running


def output(figure: str) -> str:
    return f"document.querySelector('#{figure} output').textContent"


@pytest.mark.parametrize(("width", "height"), [(390, 780), (1280, 800)])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_chat_with_live_figures(
    tab: Browser, server: LiveServer, tmp_path: Path, width: int, height: int, theme: str
) -> None:
    tab.troubles.clear()
    tab.show(server.url + "/", width=width, height=height, theme=theme)
    assert tab.wait("document.getElementById('state').textContent === 'ready'")
    assert tab.value("document.getElementById('model').value") == "fake"
    tab.type("What is the capital of France?")  # the focus is there already
    tab.press("Enter")
    assert tab.wait(f"{LOG}.length > 80")
    assert tab.wait(f"parseFloat({output('decode')}) > 0")
    assert tab.wait("document.querySelector('#decode .curve') !== null")
    assert tab.wait(f"parseFloat({output('ttft')}) > 0")
    assert tab.value(output("queue")) == "1 + 0"
    assert tab.wait(f"/^[1-9][0-9]* of 4096$/.test({output('kv')})")
    assert tab.value(f"/MB$/.test({output('memory')})")
    assert tab.value("document.querySelectorAll('#memory rect').length") == 3
    # Nothing sticks out to the side, and what one types into can be seen.
    assert tab.value("document.documentElement.scrollWidth <= innerWidth")
    boxes = (
        "[...document.querySelectorAll('figure:not([hidden])')].every((item) => item.scrollWidth <= item.clientWidth)"
    )
    assert tab.value(boxes)
    assert tab.value("document.getElementById('send').getBoundingClientRect().bottom <= innerHeight")
    tab.picture(Path(os.environ.get("EDGELM_PICTURES", tmp_path)) / f"page-{width}-{theme}.png")
    tab.press("Escape")
    assert tab.wait("document.getElementById('status').textContent === 'stopped'")
    assert wait_until(lambda: server.idle)
    assert tab.wait("document.activeElement.id === 'prompt'")
    assert tab.troubles == []


def test_settings_reach_the_request_and_wrong_ones_are_told(tab: Browser, server: LiveServer) -> None:
    tab.troubles.clear()
    tab.show(server.url + "/")
    assert tab.wait("document.getElementById('state').textContent === 'ready'")
    tab.value("document.getElementById('max_tokens').value = '5'")
    tab.value("document.getElementById('system').value = 'Be brief.'")
    tab.type("Hi")
    tab.press("Enter")
    assert tab.wait("document.getElementById('status').textContent.endsWith('tokens/s')")
    assert tab.value("document.querySelector('.assistant').textContent.length") == 5
    assert tab.wait(
        "document.querySelector('#compared td:last-child').textContent !== '–'"
    )  # measured beside predicted
    tab.value("document.getElementById('temperature').value = '9'")
    tab.type("Again")
    tab.press("Enter")
    assert tab.wait("document.querySelector('.fault')?.textContent.startsWith('temperature')")
    assert server.idle
    assert tab.troubles == []


def test_the_keyboard_reaches_everything(tab: Browser, server: LiveServer) -> None:
    tab.show(server.url + "/")
    assert tab.wait("document.getElementById('state').textContent === 'ready'")
    tab.value("document.querySelectorAll('details').forEach((item) => { item.open = true })")
    tab.value("document.body.focus(); document.activeElement.blur()")
    reached = set()
    for _ in range(30):
        tab.press("Tab")
        reached.add(tab.value("document.activeElement.id || document.activeElement.tagName"))
    wanted = {"prompt", "send", "clear", "log", "SUMMARY", "temperature", "top_p", "max_tokens", "seed", "system"}
    assert wanted <= reached
    unnamed = "[...document.querySelectorAll('input, select, textarea')].filter((item) => !item.labels.length).length"
    assert tab.value(unnamed) == 0
