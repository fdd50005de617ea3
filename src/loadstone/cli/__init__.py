"""The command line: one file a command, text or `--json`. The only room that prints."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from .interrupts import HeldInterrupts

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command that `arguments` (the process's own when None) name, and exit with its code."""
    try:
        with HeldInterrupts():
            from . import app
        app.main(arguments)
    except KeyboardInterrupt:  # before or after the command itself, which answers to Ctrl-C on its own
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if sys.stderr is not None:
            sys.stderr.write("interrupted\n")
        sys.exit(130)
