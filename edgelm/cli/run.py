"""``edgelm run``: one answer, or a chat when no prompt is given."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgelm.cli.console import (
    flash_attention_option,
    gpu_layers_option,
    gpu_option,
    host_repack_option,
    print_json,
    provider_option,
)
from edgelm.errors import ContextOverflowError, UsageError
from edgelm.units import format_bytes

if TYPE_CHECKING:
    from runtime.encoder import EncoderOptions
    from runtime.engine import EngineOptions, FlashAttention, KvType
    from runtime.generate import Answer, Session
    from runtime.model import LoadedModel
    from runtime.sampling import SamplingOptions
    from runtime.tasks import TaskOptions


@dataclass(frozen=True)
class _Settings:
    max_tokens: int
    sampling: SamplingOptions
    stop: tuple[str, ...]
    system: str | None
    grammar: str


@click.command(short_help="Answer one prompt, or chat.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option("--system", help="System prompt of the conversation.")
@click.option("-n", "--max-tokens", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 always takes the likeliest token.")
@click.option("--top-k", type=int, default=0, help="Keep the K likeliest tokens; 0 keeps all.")
@click.option("--top-p", type=float, default=1.0, help="Keep the likeliest tokens that reach this probability.")
@click.option("--min-p", type=float, default=0.0, help="Drop tokens below this share of the likeliest one.")
@click.option("--repetition-penalty", type=float, default=1.0, help="Above 1 avoids recent tokens.")
@click.option("--seed", type=int, help="The same seed gives the same answer.")
@click.option("--stop", multiple=True, help="End before this text; may be given several times.")
@click.option(
    "--json-schema",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Hold the answer to the JSON schema in this file.",
)
@click.option("--raw", is_flag=True, help="Continue the prompt as plain text, without the chat template.")
@click.option("--threads", type=click.IntRange(1, 512), help="Threads for decode [default: asks the machine].")
@click.option("--threads-prefill", type=click.IntRange(1, 512), help="Threads for prefill [default: asks the machine].")
@click.option("--context", type=click.IntRange(min=1), help="Tokens kept [default: the bundle's plan].")
@click.option(
    "--target",
    metavar="auto|ID|FILE",
    help="Settle threads, context and memory for this machine (auto) or a profile, and tell why.",
)
@click.option(
    "--kv-type",
    type=click.Choice(["f16", "q8_0"]),
    help="Type of the KV cache; q8_0 takes half the memory (llama.cpp only).  [default: f16, or as --target decides]",
)
@provider_option
@click.option("--lookup", is_flag=True, help="Guess tokens by what followed the same ones earlier; same answers.")
@click.option(
    "--draft",
    type=click.Path(path_type=Path),
    metavar="BUNDLE",
    help="Let a smaller model of the same vocabulary guess tokens; same answers.",
)
@gpu_layers_option
@gpu_option
@host_repack_option
@flash_attention_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of streamed text.")
def command(
    bundle: Path,
    prompt: str | None,
    system: str | None,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    seed: int | None,
    stop: tuple[str, ...],
    json_schema: Path | None,
    raw: bool,
    threads: int | None,
    threads_prefill: int | None,
    context: int | None,
    target: str | None,
    kv_type: KvType | None,
    provider: tuple[str, ...],
    lookup: bool,
    draft: Path | None,
    gpu_layers: int,
    gpu: str,
    host_repack: bool | None,
    flash_attention: FlashAttention,
    as_json: bool,
) -> None:
    """Answer PROMPT with the model in BUNDLE (a bundle or a .gguf file), or chat when no PROMPT is given.

    In a chat Ctrl-C stops the answer, /exit or Ctrl-D leaves. The last line on stderr tells speed and memory. Of an
    encoder's BUNDLE the vector of PROMPT is printed, its numbers separated by spaces; an encoder-decoder translates
    PROMPT, a masked language model fills its masks, a classifier gives it labels.

    \b
    Example:
      edgelm run bundle "What is the capital of France?"
      edgelm run bundle --temperature 0.7 --top-p 0.9
    """
    from runtime.engine import EngineOptions
    from runtime.model import holds_encoder, open_model
    from runtime.sampling import SamplingOptions, check_sampling
    from runtime.tasks import TaskOptions, holds_task

    if holds_task(bundle) is not None:
        _print_task(bundle, prompt, max_tokens, TaskOptions(context or 0, threads or 0), as_json=as_json)
        return
    if holds_encoder(bundle):
        from runtime.encoder import EncoderOptions

        wanted = EncoderOptions(context or 0, threads=threads or 0, gpu_layers=gpu_layers, gpu=gpu)
        _print_vector(bundle, prompt, wanted, as_json=as_json)
        return
    if prompt is None and as_json:
        raise UsageError("--json needs a PROMPT", hint="a chat has no single answer")
    if prompt is None and raw:
        raise UsageError("--raw needs a PROMPT", hint="a chat needs the chat template")
    if raw and system is not None:
        raise UsageError("--system and --raw exclude each other", hint="only a chat template has a system prompt")
    sampling = SamplingOptions(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    check_sampling(sampling)
    grammar = "" if json_schema is None else _grammar(json_schema)
    options = EngineOptions(
        context=context or 0,
        threads_decode=threads or 0,
        threads_prefill=threads_prefill or threads or 0,
        kv_type=kv_type or "f16",
        lookup=lookup,
        draft=str(draft or ""),
        providers=provider,
        gpu_layers=gpu_layers,
        gpu=gpu,
        host_repack=host_repack,
        flash_attention=flash_attention,
    )
    if target is not None:
        options = _settled(bundle, target, options, fixed_type=kv_type is not None)
    model = open_model(bundle, options)
    if model.info.offload is not None and model.info.offload.device is not None:
        click.echo(f"gpu {model.info.offload.sentence()}", err=True)
    try:
        settings = _Settings(max_tokens, sampling, stop, system, grammar)
        if prompt is None:
            _chat(model, settings)
        else:
            _one_answer(model, settings, prompt, raw=raw, as_json=as_json)
    finally:
        model.close()


def _settled(bundle: Path, target: str, options: EngineOptions, *, fixed_type: bool) -> EngineOptions:
    """What ``--target`` decides beside what was asked for, told on stderr."""
    from runtime.settings import Asked, choose_settings

    asked = Asked.of(options, fixed_type=fixed_type)
    settled = choose_settings(bundle, target, asked)
    for name, line in settled.lines().items():
        click.echo(f"{name} {line}", err=True)
    return replace(settled.options, gpu_layers=options.gpu_layers, gpu=options.gpu)


def _print_vector(bundle: Path, text: str | None, options: EncoderOptions, *, as_json: bool) -> None:
    """What a model makes that turns texts into vectors. Options that are for answers are refused."""
    import time

    from runtime.embedding import open_encoder
    from runtime.memory import snapshot

    allowed = {"bundle", "prompt", "threads", "context", "gpu_layers", "gpu", "as_json"}
    _only(bundle, allowed, "is an encoder", "prints the vector of TEXT")
    if text is None:
        raise UsageError(f"{bundle} is an encoder: it holds no chat", hint="edgelm run BUNDLE TEXT prints the vector")
    model = open_encoder(bundle, options)
    if model.encoder.info.offload is not None and model.encoder.info.offload.device is not None:
        click.echo(f"gpu {model.encoder.info.offload.sentence()}", err=True)
    try:
        ids = model.text_ids(text)
        started = time.perf_counter()
        vector = model.embed_ids([ids])[0]
        elapsed_s = time.perf_counter() - started
        info = model.encoder.info
    finally:
        model.close()
    if as_json:
        facts = {"model": model.name, "dimensions": info.dimensions, "normalized": model.normalized}
        counts = {"prompt_tokens": len(ids), "elapsed_s": elapsed_s, "load_s": info.load_s}
        print_json({**facts, **counts, "rss_bytes": snapshot().rss_bytes, "embedding": vector.tolist()})
        return
    click.echo(" ".join(f"{number:.6g}" for number in vector.tolist()))
    told = f"{info.dimensions} numbers{', length one' if model.normalized else ''} | {len(ids)} tokens"
    click.echo(f"{told} in {1000 * elapsed_s:.1f} ms | RSS {format_bytes(snapshot().rss_bytes)}", err=True)


def _only(bundle: Path, allowed: set[str], what: str, does: str) -> None:
    """Refuse options on the command line that a kind of model cannot honour. Raises ``UsageError``."""
    given = click.get_current_context()
    for name in given.params:
        if name not in allowed and given.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise UsageError(
                f"--{name.replace('_', '-')} is for models that generate; {bundle} {what}",
                hint=f"edgelm run BUNDLE TEXT {does}",
            )


def _print_task(bundle: Path, text: str | None, max_tokens: int, options: TaskOptions, *, as_json: bool) -> None:
    """What a model with a task makes of a text: its translation, words at masks, or labels."""
    import time

    from runtime.memory import snapshot
    from runtime.tasks import Asked, holds_task, open_task

    kind = holds_task(bundle)
    allowed = {"bundle", "prompt", "threads", "context", "as_json", *(["max_tokens"] if kind == "translate" else [])}
    _only(bundle, allowed, f"is for the task {kind}", "does that")
    if text is None:
        raise UsageError(f"{bundle} is for the task {kind}: it holds no chat", hint="edgelm run BUNDLE TEXT")
    source = click.get_current_context().get_parameter_source("max_tokens")
    asked = Asked(text, max_tokens if source is click.core.ParameterSource.COMMANDLINE else 0)
    model = open_task(bundle, options)
    try:
        started = time.perf_counter()
        answer = model.answer(asked)
        elapsed_s = time.perf_counter() - started
    finally:
        model.close()
    if as_json:
        counts = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
        facts = {"model": model.name, "task": kind, **counts, "elapsed_s": elapsed_s}
        print_json({**facts, "rss_bytes": snapshot().rss_bytes, **answer.document})
        return
    for line in answer.lines:
        click.echo(line)
    told = f"{answer.prompt_tokens} tokens read, {answer.completion_tokens} written in {1000 * elapsed_s:.0f} ms"
    click.echo(f"{told} | RSS {format_bytes(snapshot().rss_bytes)}", err=True)


def _grammar(path: Path) -> str:
    """The grammar of the JSON schema in a file. Raises ``UsageError``."""
    from runtime.constraint import json_schema_grammar

    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise UsageError(f"{path} is not a JSON schema: it holds no object")
    try:
        return json_schema_grammar(schema)
    except UsageError as error:
        raise UsageError(f"{path}: {error.message}") from error


def _one_answer(model: LoadedModel, settings: _Settings, prompt: str, *, raw: bool, as_json: bool) -> None:
    from runtime.generate import Session

    if raw or model.chat_template is None:
        ids = model.text_prompt(prompt)
    else:
        ids = model.chat_prompt([*_system(settings), {"role": "user", "content": prompt}])
    result = _answer(model, Session(model.engine), settings, ids, show=not as_json)
    if as_json:
        _print_answer(model, result)
    else:
        _tell(result)
    if result.finish_reason == "cancelled":
        raise KeyboardInterrupt


def _print_answer(model: LoadedModel, result: Answer) -> None:
    from runtime.memory import snapshot

    memory = snapshot()
    print_json(
        {
            "model": model.name,
            **asdict(result),
            "prefill_tps": result.prefill_tps,
            "decode_tps": result.decode_tps,
            "load_s": model.engine.info.load_s,
            "rss_bytes": memory.rss_bytes,
            "rss_peak_bytes": memory.peak_bytes,
        }
    )


def _chat(model: LoadedModel, settings: _Settings) -> None:
    from runtime.generate import Session

    if model.chat_template is None:
        raise UsageError(f"{model.name} has no chat template", hint='give a text to continue: edgelm run BUNDLE "..."')
    session = Session(model.engine)
    history = _system(settings)
    for line in _lines():
        turn = [*history, {"role": "user", "content": line}]
        try:
            result = _answer(model, session, settings, model.chat_prompt(turn), show=True)
        except ContextOverflowError as error:
            click.echo(f"error: {error.message}", err=True)
            click.echo("hint: the last message was not taken; /exit leaves, a larger --context holds more", err=True)
            continue
        _tell(result)
        history = [*turn, {"role": "assistant", "content": result.text}]


def _system(settings: _Settings) -> list[dict[str, str]]:
    return [] if settings.system is None else [{"role": "system", "content": settings.system}]


def _lines() -> Iterator[str]:
    """What the user types, until /exit or the end of the input. Ctrl-C only gives up the line."""
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        import readline  # noqa: F401 (importing it gives input() a line editor and a history)
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            click.echo("\n(/exit or Ctrl-D leaves)", err=True)
            continue
        if line.strip() == "/exit":
            return
        if line.strip():
            yield line


def _answer(model: LoadedModel, session: Session, settings: _Settings, ids: list[int], *, show: bool) -> Answer:
    from runtime.generate import GenerationRequest, answer, generate
    from runtime.interrupt import stopped_by_ctrl_c

    def write(text: str) -> None:
        if show:
            sys.stdout.write(text)
            sys.stdout.flush()

    request = GenerationRequest(
        ids, settings.max_tokens, settings.sampling, settings.stop, model.stop_tokens, grammar=settings.grammar
    )
    with stopped_by_ctrl_c(model.engine) as cancelled:
        events = generate(session, model.tokenizer, request, cancelled=cancelled, speculation=model.speculation)
        result = answer(events, len(ids), write)
    write("\n")
    return result


def _tell(result: Answer) -> None:
    """The last line: speed and memory of the answer."""
    from runtime.memory import snapshot

    def rate(tps: float | None) -> str:
        return "-" if tps is None else f"{tps:.1f} tok/s"

    parts = [
        f"decode {rate(result.decode_tps)} ({result.completion_tokens} tokens)",
        f"prefill {rate(result.prefill_tps)} ({result.prompt_tokens} tokens, {result.cached_tokens} cached)",
        f"TTFT {'-' if result.ttft_s is None else f'{result.ttft_s:.2f} s'}",
        f"RSS {format_bytes(snapshot().rss_bytes)}",
    ]
    if result.drafted_tokens:
        share = result.accepted_tokens / result.drafted_tokens
        parts.insert(1, f"{result.drafted_tokens} guessed, {share:.0%} right")
    if result.finish_reason != "stop":
        parts.append({"length": "length limit reached", "cancelled": "interrupted"}[result.finish_reason])
    click.echo(" | ".join(parts), err=True)
