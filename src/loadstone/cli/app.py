"""`loadstone`: finds the command, and turns whatever comes of it into an exit code and a message.

Exit codes: 0 done; 2 wrong use or configuration; 3 source or checkpoint; 4 does not fit; 5 load or generation
failed; 130 interrupted. Nothing heavy is imported here, so that `loadstone --help` answers in a blink.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import click

from loadstone import __version__
from loadstone.errors import LoadstoneError, ResourceError

from . import logs
from .cache import cache
from .chat import chat
from .doctor import doctor
from .info import info
from .options import Session, verbose_option
from .output import prepare_streams, say, say_error, say_failure
from .plan import plan
from .pull import pull
from .run import run

WRONG_USE = 2
FAILED = LoadstoneError.exit_code
INTERRUPTED = 130


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 done; 2 wrong use or configuration; 3 source or checkpoint; 4 does not fit; "
    "5 load or generation failed; 130 interrupted.",
)
@click.version_option(__version__, prog_name="loadstone", message="%(prog)s %(version)s")
@verbose_option
@click.pass_context
def loadstone(context: click.Context) -> None:
    """An open language model answering on the machine you have, in the memory you allow."""
    if context.invoked_subcommand is None:
        say(context.get_help())
        context.exit(WRONG_USE)


for _command in (run, chat, info, plan, pull, cache, doctor):
    loadstone.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command that `arguments` (the process's own when None) name, and exit with its code."""
    try:
        prepare_streams()
        code = _run(sys.argv[1:] if arguments is None else arguments)
    except BrokenPipeError:
        # The reader has all it wanted (`| head -1`).
        code = 0
    if code == INTERRUPTED:
        # A second Ctrl-C while Python takes itself apart would only print a traceback.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    _let_go_of_broken_pipes()
    sys.exit(code)


def _run(arguments: Sequence[str]) -> int:
    session = Session()
    try:
        logs.configure(os.environ.get("LOADSTONE_LOG"))
        # Not `loadstone.main()`: it would turn a broken pipe into a failure, and Ctrl-C into "Aborted!".
        with loadstone.make_context("loadstone", list(arguments), obj=session) as context:
            loadstone.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as end:
        return end.exit_code
    except (KeyboardInterrupt, click.Abort):
        say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001 - here every error becomes a message and an exit code
        return _report(error, is_verbose=session.is_verbose or logs.is_debugging())
    return 0


def _report(error: Exception, *, is_verbose: bool) -> int:
    """Tell what went wrong, and return the exit code for it."""
    if is_verbose and not isinstance(error, click.ClickException):
        say("".join(traceback.format_exception(error)).rstrip())
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "loadstone"
        say_error(error.format_message(), f"Try '{command} --help'.")
        return WRONG_USE
    if isinstance(error, click.ClickException):
        say_error(error.format_message())
        return error.exit_code
    if isinstance(error, LoadstoneError):
        say_failure(error)
        return error.exit_code
    if isinstance(error, MemoryError):
        say_error("Memory ran out.", "Lower --context, or choose a stronger --quantization.")
        return ResourceError.exit_code
    if isinstance(error, OSError):
        say_error(str(error))
        return FAILED
    say_error(
        f"{type(error).__name__}: {error}",
        "This is not foreseen, and so a mistake in Loadstone; --verbose shows where.",
    )
    return FAILED


def _let_go_of_broken_pipes() -> None:
    """Keep Python from complaining, when it ends, about a pipe that nobody reads."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
