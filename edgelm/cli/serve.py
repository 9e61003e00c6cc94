"""``edgelm serve``: an OpenAI-compatible server for one bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgelm.cli.console import (
    flash_attention_option,
    gpu_layers_option,
    gpu_option,
    host_repack_option,
    provider_option,
)
from edgelm.errors import UsageError
from edgelm.units import parse_size

if TYPE_CHECKING:
    from runtime.engine import EngineOptions, FlashAttention, KvType


@click.command(short_help="Serve a bundle over an OpenAI-compatible API.")
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="BUNDLE...")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; beyond loopback with a key."
)
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes any free port.")
@click.option(
    "--parallel",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Answers computed at the same time; each keeps a KV cache of its own.",
)
@click.option(
    "--context", type=click.IntRange(min=16), help="Tokens per answer, prompt included [default: the plan's]."
)
@click.option(
    "--target",
    metavar="auto|ID|FILE",
    help="Settle threads, context and memory for this machine (auto) or a profile, and tell why.",
)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File (mode 0600) with the key that clients must send; generated when it does not exist.",
)
@click.option(
    "--allowed-host", "allowed_hosts", multiple=True, metavar="NAME", help="Another name clients may use; repeatable."
)
@click.option(
    "--per-client",
    type=click.IntRange(min=1),
    help="Requests that one address beyond loopback may have under way [default: half of all places].",
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
@click.option(
    "--in-process",
    is_flag=True,
    help="Run the engine in the server's own process: 37 MB less memory, but its crash ends the server.",
)
@click.option(
    "--prompt-cache",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Keep what is computed of system prompts and tools in this private directory, for the next start; their words "
    "can be told from the files.  [default: nothing is kept]",
)
@click.option(
    "--prompt-cache-size",
    metavar="SIZE",
    help="Bytes that these files may take; what was not used for longest makes room.  [default: 512MiB]",
)
@click.option(
    "--unload-after",
    type=click.FloatRange(min=1),
    metavar="SECONDS",
    help="Unload a model that was not used for so long; it is loaded again when it is asked for.",
)
def command(
    bundles: tuple[Path, ...],
    host: str,
    port: int,
    parallel: int,
    context: int | None,
    target: str | None,
    api_key_file: Path | None,
    allowed_hosts: tuple[str, ...],
    per_client: int | None,
    kv_type: KvType | None,
    provider: tuple[str, ...],
    lookup: bool,
    draft: Path | None,
    gpu_layers: int,
    gpu: str,
    host_repack: bool | None,
    flash_attention: FlashAttention,
    in_process: bool,
    prompt_cache: Path | None,
    prompt_cache_size: str | None,
    unload_after: float | None,
) -> None:
    """Serve BUNDLE (a bundle or a bare .gguf file) over an OpenAI-compatible API until SIGTERM or Ctrl-C.

    Of several BUNDLEs a request's model chooses one by its name, the first when it names none. They are loaded when
    they are asked for, never more than fit into memory that is free; what was not used for longest makes room.

    /v1/chat/completions, /v1/completions and /v1/models, a small chat page at /, Prometheus figures at /metrics,
    /health/live and /health/ready; an encoder answers /v1/embeddings instead of completions, models with
    another task /v1/translate, /v1/fill-mask or /v1/classify; these have no page. Logs go to stderr, one JSON object
    per line, without prompts, answers or keys.

    \b
    Example:
      edgelm serve bundle --port 8080
      curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "What is the capital of France?"}]}'
    """
    from runtime.engine import EngineOptions
    from runtime.model import holds_encoder
    from runtime.server.logs import start_logging
    from runtime.server.metrics import Metrics
    from runtime.server.prompt_files import MAX_BYTES, PromptCacheOptions
    from runtime.server.serving import (
        ServerOptions,
        bind,
        default_per_client,
        make_backend,
        make_shelf,
        resolve_access,
        serve,
    )
    from runtime.tasks import holds_task

    if draft is not None and len(bundles) > 1:
        raise UsageError(
            "--draft is for one BUNDLE", hint="the others may have another vocabulary; --lookup is for all"
        )
    if prompt_cache_size is not None and prompt_cache is None:
        raise UsageError("--prompt-cache-size is for --prompt-cache", hint="add --prompt-cache DIR")
    size_bytes = MAX_BYTES if prompt_cache_size is None else parse_size(prompt_cache_size)
    prompts = None if prompt_cache is None else PromptCacheOptions(str(prompt_cache.absolute()), size_bytes)
    places = ServerOptions(host, port, allowed_hosts, api_key_file, per_client or default_per_client(parallel))
    start_logging()
    access = resolve_access(places)
    with bind(host, port) as listener:
        metrics = Metrics()
        engine = EngineOptions(
            context=context or 0,
            sequences=parallel,
            kv_type=kv_type or "f16",
            lookup=lookup,
            draft=str(draft or ""),
            providers=provider,
            gpu_layers=gpu_layers,
            gpu=gpu,
            host_repack=host_repack,
            flash_attention=flash_attention,
        )

        def settle(bundle: Path) -> tuple[EngineOptions, bool]:
            if holds_encoder(bundle) or holds_task(bundle) is not None:
                _only_for_answers(bundle, engine)
            if target is None:
                return engine, in_process
            return _settled(bundle, target, engine, in_process, fixed_type=kv_type is not None)

        if len(bundles) > 1 or unload_after is not None:
            shelf = make_shelf(bundles, settle, metrics, unload_after_s=unload_after, prompts=prompts)
            serve(shelf, metrics, listener, access)
            return
        options, own = settle(bundles[0])
        backend = make_backend(bundles[0], options, metrics, in_process=own, prompts=prompts)
        serve(backend, metrics, listener, access)


def _only_for_answers(bundle: Path, options: EngineOptions) -> None:
    """Refuse what models that generate nothing would not heed. Raises ``UsageError``."""
    for name, given in (
        ("--provider", options.providers),
        ("--flash-attention", options.flash_attention != "auto"),
        ("--host-repack", options.host_repack is not None),
    ):
        if given:
            raise UsageError(f"{name} is for models that generate; {bundle} is none", hint="leave it out")


def _settled(
    bundle: Path, target: str, options: EngineOptions, in_process: bool, *, fixed_type: bool
) -> tuple[EngineOptions, bool]:
    """What ``--target`` decides beside what was asked for, told in the log; whether the engine runs in this process."""
    from runtime.model import holds_encoder
    from runtime.server.logs import log_event
    from runtime.settings import Asked, choose_encoder_threads, choose_settings
    from runtime.tasks import holds_task

    if holds_encoder(bundle) or holds_task(bundle) is not None:
        threads = choose_encoder_threads(target)
        log_event("settings", {"threads": f"{threads.value}: {threads.reason}"})
        return replace(options, threads_prefill=int(threads.value)), in_process
    asked = Asked.of(options, "own" if in_process else "any", fixed_type=fixed_type)
    settings = choose_settings(bundle, target, asked)
    log_event("settings", settings.lines())
    placed = replace(settings.options, gpu_layers=options.gpu_layers, gpu=options.gpu)
    return placed, settings.in_process
