"""Files of shared beginnings: what is kept, what is used again, and everything that is not trusted."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engine import FakeEngine, FakeTokenizer, KeepingEngine, wait_until
from live_server import LiveServer, fake_model, running_server

import runtime.server.prompt_files
from edgelm.cli.app import run_cli
from edgelm.errors import EngineError, UsageError
from runtime.engine import EngineOptions, State
from runtime.generate import GenerationRequest, Session, TokenEvent, generate
from runtime.model import LoadedModel
from runtime.server.metrics import Metrics, Observation
from runtime.server.prompt_files import LEAST_TOKENS, PromptCacheOptions, PromptFiles
from runtime.server.scheduler import Job, JobEvent, Scheduler
from runtime.server.worker import Worker, keep_prompts

IDENTITY = {"model": "0" * 64, "engine": "fake"}
SYSTEM = "You are a careful assistant. " * 8
TOKENS = FakeTokenizer().encode(SYSTEM)


@pytest.fixture(autouse=True)
def _open_umask() -> Iterator[None]:
    """Nothing may depend on a friendly umask."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "new" / "prompts"


class Counted:
    """An opened directory with what was counted."""

    def __init__(self, place: Path, identity: dict[str, str], max_bytes: int, *, whole: bool) -> None:
        self.seen: list[str] = []
        metrics = Metrics(forward=self._note)
        options = PromptCacheOptions(str(place), max_bytes)
        self.files = PromptFiles(options, identity, metrics.prompt_files, whole=whole)

    def _note(self, observation: Observation) -> None:
        self.seen.append(observation.labels[0])


@contextmanager
def opened(
    place: Path, identity: dict[str, str] | None = None, max_bytes: int = 10**6, *, whole: bool = False
) -> Iterator[Counted]:
    counted = Counted(place, identity or IDENTITY, max_bytes, whole=whole)
    with closing(counted.files):
        yield counted


def state_of(tokens: list[int]) -> State:
    return np.array(tokens, np.int32).view(np.uint8)


def keep(place: Path, tokens: list[int] = TOKENS, identity: dict[str, str] | None = None) -> Path:
    """Let a server keep a beginning; its file."""
    before = set(place.iterdir()) if place.exists() else set()
    with opened(place, identity) as counted:
        counted.files.save(tokens, state_of(tokens))
    assert counted.seen == ["saved"]
    (made,) = set(place.iterdir()) - before
    return made


def loaded(place: Path, least: int = 1) -> tuple[list[int] | None, list[str]]:
    """What the next server finds for a prompt that begins with ``TOKENS``."""
    with opened(place) as counted:
        found = counted.files.load([*TOKENS, 5, 6], least)
        if found is not None:
            assert found[1].view(np.int32).tolist() == found[0]
    return None if found is None else found[0], counted.seen


def test_what_is_kept_is_found_by_the_next_server(place: Path) -> None:
    file = keep(place)
    assert loaded(place) == (TOKENS, ["loaded"])
    assert loaded(place, len(TOKENS)) == (TOKENS, ["loaded"])
    assert loaded(place, len(TOKENS) + 1) == (None, [])
    assert [stat.S_IMODE(path.stat().st_mode) for path in (file, place, place.parent)] == [0o600, 0o700, 0o700]


def test_part_of_a_beginning_is_used_where_a_state_can_be_cut(place: Path) -> None:
    keep(place)
    with opened(place) as counted:
        assert counted.files.load([*TOKENS[:150], 7], 100) is not None
        assert not counted.files.wants(TOKENS[:150])
        assert counted.files.wants([*TOKENS, 7])
    with opened(place, whole=True) as counted:
        assert counted.files.load([*TOKENS[:150], 7], 100) is None
        assert counted.files.load([*TOKENS, 7], 100) is not None
        assert counted.files.wants(TOKENS[:150])
        assert not counted.files.wants(TOKENS)


def test_the_longest_beginning_is_used(place: Path) -> None:
    for length in (140, 180, 160):
        keep(place, TOKENS[:length])
    with opened(place) as counted:
        found = counted.files.load(TOKENS, 1)
    assert found is not None
    assert len(found[0]) == 180


def test_short_beginnings_are_not_worth_a_file(place: Path) -> None:
    with opened(place) as counted:
        assert not counted.files.wants(TOKENS[: LEAST_TOKENS - 1])
        assert counted.files.wants(TOKENS[:LEAST_TOKENS])


def refused(place: Path, file: Path, caplog: pytest.LogCaptureFixture) -> str:
    """The reason why a file was not used; it is gone and told of in one line without a word of the prompt."""
    with caplog.at_level(logging.INFO, "edgelm.server"):
        assert loaded(place) == (None, ["refused"])
    assert not os.path.lexists(file)
    (record,) = caplog.records
    facts: dict[str, str] = record.__dict__["edgelm_facts"]
    assert facts["file"] == file.name
    caplog.clear()
    return facts["reason"]


@pytest.mark.parametrize("at", [0, 7, 8, 12, 43, 44, 60, 200, 700, -1, -500, -900])
def test_a_changed_byte_is_found(place: Path, at: int, caplog: pytest.LogCaptureFixture) -> None:
    file = keep(place)
    data = bytearray(file.read_bytes())
    data[at] ^= 0x01
    file.write_bytes(data)
    assert refused(place, file, caplog)


@pytest.mark.parametrize("size", [0, 10, 43, 44, 100, 900, -1])
def test_a_file_that_was_cut_off_is_found(place: Path, size: int, caplog: pytest.LogCaptureFixture) -> None:
    file = keep(place)
    file.write_bytes(file.read_bytes()[:size])
    assert "cut off" in refused(place, file, caplog)


def test_a_file_that_has_grown_is_found(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = keep(place)
    file.write_bytes(file.read_bytes() + b"x")
    assert "grown" in refused(place, file, caplog)


def test_a_link_is_not_followed(place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = keep(place)
    elsewhere = tmp_path / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    assert refused(place, file, caplog) == "it is a link"
    assert elsewhere.exists()


def test_a_file_that_others_may_touch_is_not_used(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    for mode in (0o640, 0o602, 0o601):
        file = keep(place)
        file.chmod(mode)
        assert "others have access" in refused(place, file, caplog)


def test_a_pipe_is_no_file(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = keep(place)
    file.unlink()
    os.mkfifo(file, 0o600)
    assert refused(place, file, caplog) == "it is no file"


def test_a_file_of_another_user_is_not_used(
    place: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = keep(place)
    with opened(place) as counted, caplog.at_level(logging.INFO, "edgelm.server"):
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        assert counted.files.load([*TOKENS, 5], 1) is None
    assert counted.seen == ["refused"]
    assert "another user" in caplog.records[0].__dict__["edgelm_facts"]["reason"]
    assert not file.exists()


@pytest.mark.parametrize("changed", [{"model": "1" * 64}, {"engine": "other"}, {"versions": "2"}])
def test_files_of_others_are_left_alone_and_never_used(
    place: Path, changed: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    other = keep(place, identity=IDENTITY | changed)
    assert loaded(place) == (None, [])
    assert other.exists()
    own = keep(place)
    assert loaded(place) == (TOKENS, ["loaded"])
    other.rename(own)  # somebody mixes them up
    assert "another model" in refused(place, own, caplog)


def test_a_file_under_another_name_is_not_used(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = keep(place)
    wrong = file.with_name(f"{file.name.split('-')[0]}-{'0' * 32}.prompt")
    file.rename(wrong)
    assert "name" in refused(place, wrong, caplog)


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document | {"format": 2},
        lambda document: document | {"tokens": ["a"]},
        lambda document: document | {"tokens": 5},
        lambda document: document | {"tokens": [-1] * 200},
        lambda document: {},
        lambda document: [],
        lambda document: 10**400,
    ],
)
def test_a_description_of_another_form_is_refused(
    place: Path, change: Callable[[Any], Any], caplog: pytest.LogCaptureFixture
) -> None:
    file = keep(place)
    text, state = described(file)
    write(file, json.dumps(change(json.loads(text))).encode(), state)
    assert refused(place, file, caplog)


def test_a_description_that_is_nested_deeply_is_refused(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = keep(place)
    write(file, b"[" * 100_000, described(file)[1])
    assert refused(place, file, caplog)


def described(file: Path) -> tuple[bytes, bytes]:
    data = file.read_bytes()
    end = 44 + int.from_bytes(data[8:12], "little")
    return data[44:end], data[end:]


def write(file: Path, text: bytes, state: bytes) -> None:
    """A file whose hash is right, as somebody would write it who can."""
    digest = runtime.server.prompt_files._hash(text, np.frombuffer(state, np.uint8))
    file.write_bytes(b"EDGELMKV" + len(text).to_bytes(4, "little") + digest + text + state)


def test_a_full_disk_is_told_and_nothing_is_left(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = os.write

    def full(file: int, data: bytes) -> int:
        if len(data) > 500:
            return real(file, data[:500])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with opened(place) as counted, caplog.at_level(logging.INFO, "edgelm.server"):
        monkeypatch.setattr(os, "write", full)
        counted.files.save(TOKENS, state_of(TOKENS))
        counted.files.close()
        monkeypatch.undo()
        assert counted.seen == ["failed"]
        assert list(place.iterdir()) == []
    assert caplog.records[0].__dict__["edgelm_facts"]["reason"] == os.strerror(errno.ENOSPC)
    keep(place)


def test_a_directory_that_vanishes_costs_nothing(place: Path) -> None:
    with opened(place) as counted:
        place.rmdir()
        counted.files.save(TOKENS, state_of(TOKENS))
        assert wait_until(lambda: counted.seen == ["failed"])
        assert counted.files.load(TOKENS, 1) is None


def test_a_file_that_vanishes_costs_nothing(place: Path) -> None:
    file = keep(place)
    with opened(place) as counted:
        file.unlink()
        assert counted.files.load(TOKENS, 1) is None
        assert counted.seen == []
        assert counted.files.wants(TOKENS)


def test_what_was_not_used_for_longest_makes_room(place: Path) -> None:
    beginnings = [[at, *TOKENS] for at in range(4)]
    files = [keep(place, tokens) for tokens in beginnings[:3]]
    other = keep(place, TOKENS, IDENTITY | {"model": "1" * 64})
    size = max(file.stat().st_size for file in files)
    for age, file in enumerate([*files, other]):
        os.utime(file, ns=(age * 10**9, age * 10**9))
    with opened(place, max_bytes=4 * size + 100) as counted:
        assert counted.files.load([*beginnings[0], 9], 1) is not None  # used just now
        counted.files.save(beginnings[3], state_of(beginnings[3]))
        counted.files.close()
        assert [file.exists() for file in (*files, other)] == [True, False, True, True]
        assert sum(file.stat().st_size for file in place.iterdir()) <= 4 * size + 100
        assert counted.files.wants(beginnings[1])


def test_what_is_larger_than_the_bound_is_not_kept_and_not_tried_again(place: Path) -> None:
    keep(place, [7, *TOKENS])
    with opened(place, max_bytes=3000) as counted:
        assert counted.files.wants(TOKENS)
        counted.files.save(TOKENS, np.zeros(3001, np.uint8))
        assert wait_until(lambda: counted.seen == ["failed"])
        assert wait_until(lambda: not counted.files.wants(TOKENS))
    assert len(list(place.iterdir())) == 1


def test_half_files_of_dead_servers_are_cleared_away(place: Path) -> None:
    file = keep(place)
    dead, alive = place / f".999999999-{file.name}", place / f".{os.getppid()}-{file.name}"
    for half in (dead, alive, place / "unrelated"):
        half.write_bytes(b"half")
    assert loaded(place) == (TOKENS, ["loaded"])
    assert not dead.exists()
    assert alive.exists()
    assert (place / "unrelated").exists()


def test_a_directory_has_to_be_this_users_alone(tmp_path: Path) -> None:
    shared, link, file = tmp_path / "shared", tmp_path / "link", tmp_path / "file"
    shared.mkdir()
    shared.chmod(0o750)
    link.symlink_to(tmp_path)
    file.write_text("")
    for wrong, reason in (
        (shared, "others have access"),
        (link, "link"),
        (file, "no directory"),
        (file / "x", "cannot be kept"),
    ):
        with pytest.raises(UsageError, match=reason) as caught:
            PromptFiles(PromptCacheOptions(str(wrong)), IDENTITY, Metrics().prompt_files)
        assert caught.value.hint


def test_the_command_refuses_what_makes_no_sense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    model = tmp_path / "model.gguf"
    from runtime.probe import write_tiny_gguf

    write_tiny_gguf(model)
    for options, told in (
        (["--prompt-cache", str(shared)], "others have access"),
        (["--prompt-cache-size", "1GB"], "--prompt-cache"),
        (["--prompt-cache", str(tmp_path / "x"), "--prompt-cache-size", "much"], "not a size"),
    ):
        assert run_cli(["serve", str(model), "--port", "0", *options]) == 2
        assert told in capsys.readouterr().err


# From here on with a scheduler and a server.


def request(prompt: str, shared: int, max_tokens: int = 20) -> GenerationRequest:
    return GenerationRequest(FakeTokenizer().encode(prompt), max_tokens, shared=shared)


def run(made: Scheduler, *wanted: GenerationRequest) -> list[list[TokenEvent]]:
    events: list[list[JobEvent]] = [[] for _ in wanted]
    for one, into in zip(wanted, events, strict=True):
        made.admit(Job(one, into.append))
    while made.running:
        made.step()
    return [[event for event in one if isinstance(event, TokenEvent)] for one in events]


def scheduler(counted: Counted, engine: FakeEngine) -> Scheduler:
    return Scheduler(engine, FakeTokenizer(), Metrics(), prompts=counted.files)


def text(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


def test_the_first_answer_after_a_start_computes_only_the_rest(place: Path) -> None:
    wanted = [request(SYSTEM + question, len(SYSTEM)) for question in ("Who?", "What is it?", "Where?")]
    plain = [text(list(generate(Session(FakeEngine(context=512)), FakeTokenizer(), one))) for one in wanted]
    with opened(place) as counted:
        (events,) = run(scheduler(counted, KeepingEngine(context=512)), wanted[0])
        assert (text(events), events[0].cached_tokens) == (plain[0], 0)
    assert counted.seen == ["saved"]
    (file,) = place.iterdir()
    assert json.loads(described(file)[0])["tokens"] == TOKENS  # and not a word of the question
    for one, told in zip(wanted[1:], plain[1:], strict=True):
        with opened(place) as counted:
            engine = KeepingEngine(context=512)
            (events,) = run(scheduler(counted, engine), one)
            assert (text(events), events[0].cached_tokens) == (told, len(SYSTEM))
            assert engine.computed_tokens == len(one.prompt) - len(SYSTEM) + 19
        assert counted.seen == ["loaded"]


def test_several_at_once_keep_it_once(place: Path) -> None:
    with opened(place) as counted:
        made = scheduler(counted, KeepingEngine(context=512, sequences=3))
        run(made, *(request(SYSTEM + question, len(SYSTEM)) for question in ("a", "b", "c")))
        (events,) = run(made, request(SYSTEM + "d", len(SYSTEM)))
        assert events[0].cached_tokens == len(SYSTEM)  # from memory
    assert counted.seen == ["saved"]


def test_a_damaged_file_is_computed_again_and_replaced(place: Path) -> None:
    wanted = request(SYSTEM + "Who?", len(SYSTEM))
    with opened(place) as counted:
        (plain,) = run(scheduler(counted, KeepingEngine(context=512)), wanted)
    (file,) = place.iterdir()
    data = bytearray(file.read_bytes())
    data[-9] ^= 0xFF
    file.write_bytes(data)
    with opened(place) as counted:
        (events,) = run(scheduler(counted, KeepingEngine(context=512)), wanted)
        assert (text(events), events[0].cached_tokens) == (text(plain), 0)
    assert counted.seen == ["refused", "saved"]
    assert loaded(place) == (TOKENS, ["loaded"])


def test_a_state_that_the_engine_does_not_take_is_computed(place: Path) -> None:
    """A hash that is right over a state that is not, which only this user can have made."""
    keep(place)
    (file,) = place.iterdir()
    document = json.loads(described(file)[0])
    write(file, json.dumps(document | {"state_bytes": 3}).encode(), b"abc")
    wanted = request(SYSTEM + "Who?", len(SYSTEM))
    with opened(place) as counted:
        (events,) = run(scheduler(counted, KeepingEngine(context=512)), wanted)
    plain = list(generate(Session(FakeEngine(context=512)), FakeTokenizer(), wanted))
    assert (text(events), events[0].cached_tokens) == (text(plain), 0)
    assert counted.seen == ["loaded", "failed"]


def test_an_engine_that_gives_no_state_now_goes_on(place: Path) -> None:
    class Unsettled(KeepingEngine):
        def state(self, sequence: int = 0) -> State:
            raise EngineError("not now")

    with opened(place) as counted:
        (events,) = run(scheduler(counted, Unsettled(context=512)), request(SYSTEM + "Who?", len(SYSTEM)))
    assert len(events) == 20
    assert counted.seen == ["failed"]


def test_memory_is_preferred_to_a_file(place: Path) -> None:
    keep(place)
    with opened(place) as counted:
        made = scheduler(counted, KeepingEngine(context=512))
        run(made, request(SYSTEM + "Who?", len(SYSTEM)))
        (events,) = run(made, request(SYSTEM + "Who is it?", len(SYSTEM)))
    assert counted.seen == ["loaded"]
    assert events[0].cached_tokens == len(SYSTEM) + len("Who")


def model(engine: FakeEngine) -> LoadedModel:
    made = fake_model(engine)
    return replace(made, artifact=Path(__file__))  # something to hash


@contextmanager
def server(place: Path, engine: FakeEngine) -> Iterator[LiveServer]:
    metrics, made = Metrics(), model(engine)
    prompts = keep_prompts(made, EngineOptions(), PromptCacheOptions(str(place)), metrics)
    with running_server(Worker(made, metrics, prompts=prompts), metrics) as running:
        assert wait_until(lambda: running.worker.state == "ready")
        yield running


def ask(running: LiveServer, system: str, question: str) -> tuple[str, int]:
    messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": question}]
    wanted = {"messages": messages, "max_tokens": 12, "temperature": 0}
    status, document = running.post("/v1/chat/completions", wanted)
    assert status == 200
    return (
        document["choices"][0]["message"]["content"],
        document["usage"]["prompt_tokens_details"]["cached_tokens"],
    )


def test_a_server_keeps_system_prompts_and_nothing_that_users_say(place: Path) -> None:
    lead = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
    long = "My secret is " + "s" * 150
    with server(place, KeepingEngine(context=1024)) as running:
        assert ask(running, SYSTEM, long)[1] == 0
        ask(running, "", long)
        ask(running, "Short.", long)
        assert wait_until(
            lambda: b'edgelm_prompt_files_total{event="saved"} 1.0' in running.request("GET", "/metrics")[2]
        )
        first = ask(running, SYSTEM, "Who?")[0]
    (file,) = place.iterdir()
    assert json.loads(described(file)[0])["tokens"] == FakeTokenizer().encode(lead)
    with server(place, KeepingEngine(context=1024)) as running:
        assert ask(running, SYSTEM, "Who?") == (first, len(FakeTokenizer().encode(lead)))
        assert b'edgelm_prompt_files_total{event="loaded"} 1.0' in running.request("GET", "/metrics")[2]
    with server(place, KeepingEngine(context=768)) as running:  # another context is another state
        assert ask(running, SYSTEM, "Who?") == (first, 0)


def test_a_directory_that_has_become_unfit_is_told_and_not_used(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    place.mkdir(parents=True, mode=0o755)
    made = model(KeepingEngine(context=1024))
    with caplog.at_level(logging.INFO, "edgelm.server"):
        assert keep_prompts(made, EngineOptions(), PromptCacheOptions(str(place)), Metrics()) is None
    assert "others have access" in caplog.records[0].__dict__["edgelm_facts"]["reason"]


def test_an_engine_that_keeps_no_state_is_refused_by_name(place: Path) -> None:
    with pytest.raises(UsageError, match="--prompt-cache"):
        keep_prompts(model(FakeEngine()), EngineOptions(), PromptCacheOptions(str(place)), Metrics())
    assert keep_prompts(model(FakeEngine()), EngineOptions(), None, Metrics()) is None
