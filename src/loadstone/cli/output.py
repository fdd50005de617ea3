"""How the commands speak: results to standard output, everything else to standard error.

Text that a model or a file wrote is never taken for markup, and cannot steer a terminal.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

import click

from loadstone.errors import LoadstoneError

Row = tuple[str, str]

# What could move a cursor, ring a bell or set a title; tabs and newlines are text.
_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(0x20), *range(0x7F, 0xA0)) if code not in (9, 10)}


def prepare_streams() -> None:
    """Make both streams write UTF-8 whatever the locale says; what cannot be written becomes a question mark.

    Where standard output was closed it becomes a pipe that nobody reads; where standard error was, nobody is told.
    """
    _take_places()
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115 - kept to the end
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")


def _take_places() -> None:
    """Fill the places of streams that were closed, lest the next file that is opened gets what is meant for them."""
    if None not in (sys.stdin, sys.stdout, sys.stderr):
        return
    while (nowhere := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(nowhere)
    if sys.stdout is None:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
        os.close(writer)


def is_coloured(stream: TextIO) -> bool:
    """Tell whether colour is welcome on `stream`: a terminal that knows it, and no NO_COLOR."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def write(text: str) -> None:
    """Write `text` to standard output at once, made harmless where that is a terminal."""
    sys.stdout.write(text.translate(_CONTROLS) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def write_json(value: Mapping[str, Any]) -> None:
    """Write one JSON object as one line to standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")
    sys.stdout.flush()


def say(text: str) -> None:
    """Write a line to standard error."""
    _line(sys.stderr, text)


def say_quietly(text: str) -> None:
    """Write a remark to standard error."""
    _line(sys.stderr, text, dim=True)


def say_warning(text: str) -> None:
    """Write a warning to standard error."""
    sys.stderr.write(_styled("warning:", sys.stderr, fg="yellow") + " ")
    say(text)


def say_error(text: str, *hints: str) -> None:
    """Write an error to standard error, and below it what can be done about it."""
    sys.stderr.write(_styled("error:", sys.stderr, fg="red", bold=True) + " ")
    say("\n".join([text, *(f"  {line}" for hint in hints for line in hint.splitlines())]))


def say_failure(error: LoadstoneError) -> None:
    """Write an error of ours to standard error, with its hint and what was noted on its way here."""
    notes: list[str] = getattr(error, "__notes__", [])
    say_error(error.message, *([error.hint] if error.hint else []), *notes)


def rows(stream: TextIO, pairs: Iterable[Row]) -> None:
    """Write names and values as two columns; on a terminal, long values are wrapped below themselves."""
    listed = list(pairs)
    indent = max((len(name) for name, _ in listed), default=0) + 2
    width = shutil.get_terminal_size().columns if stream.isatty() else 0
    for name, value in listed:
        lines = [value]
        if width > indent + 20:
            lines = textwrap.wrap(value, width - indent, break_long_words=False, break_on_hyphens=False) or [""]
        label = _styled(name, stream, dim=True) + " " * (indent - len(name))
        text = ("\n" + " " * indent).join(map(_harmless, lines))
        stream.write((label + text).rstrip() + "\n")
    stream.flush()


def table(stream: TextIO, titles: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """Write columns below their titles, each as wide as its widest value."""
    listed = [[_harmless(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(titles, *listed, strict=True)]
    for number, line in enumerate([titles, *listed]):
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        stream.write(_styled(text, stream, dim=True) + "\n" if number == 0 else text + "\n")
    stream.flush()


def heading(stream: TextIO, text: str, *, is_first: bool = False) -> None:
    """Write the title of a group of rows, with an empty line before it unless it is the first."""
    stream.write(("" if is_first else "\n") + _styled(_harmless(text), stream, bold=True) + "\n")
    stream.flush()


def clean(text: str) -> str:
    """Return text from the command line, a terminal or the environment as what its bytes are in UTF-8.

    Python hands on bytes that the locale does not have as lone surrogates; what is not UTF-8 becomes U+FFFD.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        return text.encode("utf-8", "replace").decode("utf-8")


def _harmless(text: str) -> str:
    return clean(text).translate(_CONTROLS)


def _line(stream: TextIO, text: str, **style: Any) -> None:
    stream.write(_styled(_harmless(text), stream, **style) + "\n")
    stream.flush()


def _styled(text: str, stream: TextIO, **style: Any) -> str:
    return click.style(text, **style) if style and is_coloured(stream) else text
