"""What is written where: colours, control characters, encodings, warnings and bars."""

from __future__ import annotations

import io
import sys

import pytest

from loadstone import Chunk
from loadstone.cli import logs
from loadstone.cli.output import clean, prepare_streams, rows, say_error, write
from loadstone.cli.progress import chunks_of, shown_progress
from loadstone.telemetry import emit
from loadstone.telemetry.log import log_event


class Terminal(io.StringIO):
    """A stream that calls itself a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Make both streams a terminal that knows colour, when called; return what it shows."""

    def make() -> Terminal:
        monkeypatch.setenv("TERM", "xterm-256color")
        screen = Terminal()
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setattr(sys, "stdout", screen)
        return screen

    return make


def test_errors_are_coloured_on_a_terminal_only(terminal, monkeypatch):
    """NO_COLOR and a pipe both mean plain text."""
    screen = terminal()
    say_error("it broke")
    assert "\x1b[31m" in screen.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    plain = terminal()
    say_error("it broke", "mend it")
    assert plain.getvalue() == "error: it broke\n  mend it\n"


def test_a_model_cannot_steer_the_terminal(terminal):
    """Escape sequences in an answer are shown, not obeyed; line breaks, tabs and Chinese are text."""
    screen = terminal()
    write("a\x1b]0;title\x07b\n\t你好")
    assert screen.getvalue() == "a\N{REPLACEMENT CHARACTER}]0;title\N{REPLACEMENT CHARACTER}b\n\t你好"


def test_a_pipe_gets_the_answer_as_it_is(capsys):
    """What goes to a file or a program is not altered."""
    write("a\x1bb")
    assert capsys.readouterr().out == "a\x1bb"


def test_rows_line_up_and_wrap_only_on_a_terminal(terminal, monkeypatch):
    """A value too long for the window goes on below itself; in a file every row is one line."""
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")
    value = "one two three four five six seven eight nine ten"
    screen = terminal()
    rows(screen, [("name", value), ("longer", "x")])
    assert screen.getvalue() == (
        "name    one two three four five six\n        seven eight nine ten\nlonger  x\n"
    )  # fmt: skip
    file = io.StringIO()
    rows(file, [("name", value)])
    assert file.getvalue() == f"name  {value}\n"


def test_output_is_utf8_whatever_the_locale(monkeypatch):
    """A stream opened for ASCII writes Chinese, and what no encoding has becomes a question mark."""
    kept = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(kept, encoding="ascii"))
    prepare_streams()
    write("你好 \ud800")
    assert kept.getvalue().decode("utf-8") == "你好 ?"


def test_arguments_that_are_not_utf8_become_text():
    """Python hands such bytes on as lone surrogates, which no tokenizer takes."""
    assert clean("\udce4\udcbd\udca0") == "你"
    assert clean("\ud800?") == "??"
    assert clean("caf\udce9 你好") == "caf\N{REPLACEMENT CHARACTER} 你好"


def tell(name, **fields):
    from loadstone.telemetry import Event

    log_event(Event(name, fields))


def test_warnings_and_retries_are_told_in_words(capsys):
    """Without a wish for logs, a person sees sentences; what an error will say anyway is left to it."""
    logs.configure(None)
    tell("load.warning", reason="weights hold NaN", tensors=["a"])
    tell("source.retry", action="list the files", attempt=1, max_attempts=3, wait=1.5, reason="HTTP 503")
    tell("load.build", ok=False, seconds=1.0)
    tell("load.build", ok=True, seconds=1.0)
    assert capsys.readouterr().err == (
        "warning: weights hold NaN (a)\nwarning: could not list the files (HTTP 503); attempt 2 of 3 in 1.5 s\n"
    )


def test_the_log_can_be_had_as_text_and_as_json(capsys):
    """LOADSTONE_LOG chooses; progress is only for who debugs."""
    logs.configure("info")
    tell("load.build", ok=True, seconds=1.0)
    tell("load.progress", done=1, total=2)
    assert capsys.readouterr().err.count("\n") == 1
    logs.configure("debug")
    tell("load.progress", done=1, total=2)
    assert "load.progress done=1 total=2" in capsys.readouterr().err
    logs.configure("json")
    tell("load.build", ok=True, seconds=1.0)
    assert '"event": "load.build"' in capsys.readouterr().err


def test_bars_are_shown_on_a_terminal_and_wiped_away(terminal):
    """Downloads and loads have bars made from events while they last."""
    screen = terminal()
    with shown_progress("Looking"):
        emit("download.progress", file="model.safetensors", done=10, total=20)
        emit("load.progress", done=1, total=2)
    said = screen.getvalue()
    assert "Fetching model.safetensors" in said
    assert "Loading" in said
    assert said.rstrip().endswith("\x1b[2K")  # the last thing done is to clear the line


def test_a_bar_tells_what_is_kept_and_how_not_to_wait(terminal):
    """Who wants to go on at once learns how."""
    screen = terminal()
    with shown_progress("Unloading"):
        emit("store.writing", done=1, total=2)
    assert "Storing weights (Ctrl-C skips it)" in screen.getvalue()


def _stream():
    """An answer to a long prompt, beside which another one is read later."""
    emit("generate.read", tokens=1024, of=4000, seconds=1.0)
    yield Chunk("Hi")
    emit("generate.read", tokens=512, of=600, seconds=1.0)
    yield Chunk("!")


def test_how_much_of_a_long_prompt_is_read_is_shown_until_the_first_text(terminal):
    screen = terminal()
    for chunk in chunks_of(_stream()):
        write(chunk.text)
    said = screen.getvalue()
    assert "1,024 of 4,000 tokens" in said
    assert said.endswith("\x1b[2KHi!")


def test_how_much_of_a_prompt_is_read_is_no_matter_for_a_file(capsys):
    assert [chunk.text for chunk in chunks_of(_stream())] == ["Hi", "!"]
    assert capsys.readouterr().err == ""


def test_no_bars_where_there_is_no_terminal(capsys):
    """A file or a log gets no bars."""
    with shown_progress("Looking"):
        emit("load.progress", done=1, total=2)
    assert capsys.readouterr().err == ""
