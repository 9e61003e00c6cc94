"""``edgelm serve``: an OpenAI-compatible server for one bundle."""

from __future__ import annotations

from pathlib import Path

import click


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
    "--api-key-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File (mode 0600) with the key that clients must send; generated when it does not exist.",
)
@click.option(
    "--allowed-host", "allowed_hosts", multiple=True, metavar="NAME", help="Another name clients may use; repeatable."
)
@click.option(
    "--in-process",
    is_flag=True,
    help="Run the engine in the server's own process: less memory, but a crash of the engine ends the server.",
)
def command(
    bundle: Path,
    host: str,
    port: int,
    parallel: int,
    context: int | None,
    api_key_file: Path | None,
    allowed_hosts: tuple[str, ...],
    in_process: bool,
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
    from runtime.engine import EngineOptions
    from runtime.server.logs import start_logging
    from runtime.server.metrics import Metrics
    from runtime.server.serving import ServerOptions, bind, make_backend, resolve_access, serve

    options = ServerOptions(host, port, allowed_hosts, api_key_file)
    start_logging()
    access = resolve_access(options)
    with bind(host, port) as listener:
        metrics = Metrics()
        engine = EngineOptions(context=context or 0, sequences=parallel)
        serve(make_backend(bundle, engine, metrics, in_process=in_process), metrics, listener, access)
