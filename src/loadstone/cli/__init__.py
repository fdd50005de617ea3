"""The command line: one file a command, text or `--json`. The only room that prints."""

from .app import main

__all__ = ["main"]
