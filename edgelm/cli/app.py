"""The ``edgelm`` command: finds the subcommand, runs it, turns errors into sentences and exit codes.

Imports click and nothing else until a subcommand is chosen. Does not know what any subcommand does.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
import traceback

import click

from edgelm import __version__
from edgelm.collector import paused_collector
from edgelm.errors import EdgelmError

# name -> (module, one line for the overview). The overview must not import a command to describe it.
COMMANDS = {
    "export": ("edgelm.cli.export", "Turn a checkpoint into a proven bundle for one target."),
    "plan": ("edgelm.cli.plan", "Show what an export could become on a target; write nothing."),
    "importance": ("edgelm.cli.importance", "Measure an importance matrix and write it as llama.cpp does."),
    "verify": ("edgelm.cli.verify", "Check a bundle's hashes and header, or prove it again."),
    "run": ("edgelm.cli.run", "Answer one prompt, or chat."),
    "serve": ("edgelm.cli.serve", "Serve a bundle over an OpenAI-compatible API."),
    "service": ("edgelm.cli.service", "Write the systemd unit that keeps a server alive."),
    "score": ("edgelm.cli.score", "Let a bundle do tasks, and count what it gets right."),
    "bench": ("edgelm.cli.bench", "Measure speed and memory of a bundle on this machine."),
    "compare": ("edgelm.cli.compare", "Put bundles, reports and targets side by side."),
    "compress": ("edgelm.cli.compress", "Prune and distil a model until it fits its device."),
    "targets": ("edgelm.cli.targets", "List, show, detect and check device profiles."),
    "deploy": ("edgelm.cli.deploy", "Put a bundle into service on a board, over ssh."),
    "history": ("edgelm.cli.history", "List earlier measurements and regressions."),
    "doctor": ("edgelm.cli.doctor", "Tell what this machine can do and what is wrong."),
}
INTERRUPTED = 130


class LazyGroup(click.Group):
    """A click group that imports a command's module only to run it or to show its own help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        with paused_collector():
            command: click.Command = importlib.import_module(entry[0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(f"no command '{args[0]}'; there are: {', '.join(COMMANDS)}")
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edgelm")
@click.option("-v", "--verbose", is_flag=True, help="Tell why defaults were chosen; show tracebacks of errors.")
@click.pass_context
def cli(ctx: click.Context, verbose: bool) -> None:
    """Put a language model on a laptop, a Raspberry Pi or a small GPU: planned, proven, measured.

    \b
    Example:
      edgelm export demo:smollm2 --target raspberry-pi-5-4gb -o bundle
      edgelm run bundle "What is the capital of France?"
    """
    ctx.obj = {"verbose": verbose}


def show_error(message: str, hint: str | None) -> None:
    """``error:`` and ``hint:`` lines on stderr, the shape that scripts may rely on."""
    click.echo(f"error: {message}", err=True)
    if hint:
        click.echo(f"hint: {hint}", err=True)


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 proof failed, 4 does not fit, 130 interrupted."""
    code = run_cli(sys.argv[1:])
    # What is left goes with the process. Looking through it for cycles takes 0.1 s once a vocabulary was read.
    gc.freeze()
    sys.exit(code)


def run_cli(arguments: list[str]) -> int:
    """Run one command line and return its exit code; every failure becomes one error on stderr."""
    verbose = "-v" in arguments or "--verbose" in arguments
    try:
        result = cli.main(args=arguments, prog_name="edgelm", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "edgelm"
        show_error(error.format_message(), f"see: {command} --help")
        return 2
    except click.ClickException as error:
        show_error(error.format_message(), None)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        kept = "--resume" in arguments
        left = "what is finished was kept for the next --resume" if kept else "nothing half-written was left behind"
        show_error(f"interrupted; {left}", None)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our stdout went away (``edgelm ... | head``): the kernel would kill a C program here.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except EdgelmError as error:
        if verbose:
            traceback.print_exc()
        show_error(error.message, error.hint)
        return error.exit_code
    except OSError as error:
        if verbose:
            traceback.print_exc()
        name = f"{error.filename}: " if error.filename else ""
        show_error(f"{name}{error.strerror or error}", None)
        return 1
