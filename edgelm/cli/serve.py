"""``edgelm serve``: an OpenAI-compatible server for one bundle."""

from __future__ import annotations

from pathlib import Path

import click

from edgelm.errors import UsageError


@click.command(short_help="Serve a bundle over an OpenAI-compatible API.")
@click.argument("bundle", type=click.Path(path_type=Path))
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
def command(
    bundle: Path,
    host: str,
    port: int,
    parallel: int,
    context: int | None,
    target: str | None,
    api_key_file: Path | None,
    allowed_hosts: tuple[str, ...],
) -> None:
    """Serve BUNDLE (a bundle or a bare .gguf file) over an OpenAI-compatible API until SIGTERM or Ctrl-C.

    /v1/chat/completions, /v1/completions and /v1/models, a small chat page at /, Prometheus figures at /metrics,
    /health/live and /health/ready; an encoder answers /v1/embeddings instead of completions, and has no page. Logs go
    to stderr, one JSON object per line, without prompts, answers or keys.

    \b
    Example:
      edgelm serve bundle --port 8080
      curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "What is the capital of France?"}]}'
    """
    from runtime.embedding import open_encoder
    from runtime.encoder import EncoderOptions
    from runtime.engine import EngineOptions
    from runtime.model import holds_encoder, open_model
    from runtime.server.logs import log_event, start_logging
    from runtime.server.serving import ServerOptions, bind, resolve_access, serve
    from runtime.settings import Asked, choose_encoder_threads, choose_settings

    options = ServerOptions(host, port, allowed_hosts, api_key_file)
    start_logging()
    access = resolve_access(options)
    engine_options = EngineOptions(context=context or 0, sequences=parallel)
    with bind(host, port) as listener:
        if holds_encoder(bundle):
            if parallel > 1:
                raise UsageError("--parallel is for models that generate", hint="an encoder shares its steps by itself")
            threads = choose_encoder_threads(target) if target is not None else None
            if threads is not None:
                log_event("settings", {"threads": f"{threads.value}: {threads.reason}"})
            encoder_options = EncoderOptions(context=context or 0, threads=int(threads.value) if threads else 0)
            serve(open_encoder(bundle, encoder_options), listener, access)
            return
        if target is not None:
            settings = choose_settings(bundle, target, Asked(context or 0, parallel))
            log_event("settings", settings.lines())
            engine_options = settings.options
        serve(open_model(bundle, engine_options), listener, access)
