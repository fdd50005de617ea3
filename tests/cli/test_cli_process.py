"""The program as the system sees it: signals, pipes, terminals and locales. Each test is a process of its own."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and terminals as POSIX has them")

LONG = ("--max-new-tokens", "3000", "--context", "4096")
STORY = "Tell me a very long story about the sea, and never stop."


def test_ctrl_c_ends_a_run_with_130_and_no_traceback(start):
    """What was said so far stays; the rest is one word."""
    process = start("run", "smollm2", STORY, *LONG)
    assert process.stdout.read(8)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode().strip() == "interrupted"


@pytest.mark.parametrize("module", ["click.core", "pydantic_core", "numpy.version", "numpy.linalg", "torch._ops"])
def test_ctrl_c_while_libraries_are_imported_ends_with_130(module):
    """Not even numpy, which makes an error of its own of it or loses it, gets in between."""
    command = [sys.executable, "-X", "importtime", "-m", "loadstone", "run", "smollm2", STORY]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        assert any(line.split()[-1] == module.encode() for line in process.stderr)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    said = [line for line in err.decode().splitlines() if not line.startswith("import time:")]
    assert (process.returncode, said, out) == (130, ["interrupted"], b"")


def shell(redirection, *arguments):
    """Run the program with a stream closed by the shell."""
    command = ["sh", "-c", f'exec "$0" -m loadstone "$@" {redirection}', sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("arguments", "redirection"),
    [(("--version",), ">&-"), (("--version",), "<&- >&- 2>&-"), (("run", "smollm2", "hi", "--context", "256"), ">&-")],
)
def test_a_closed_standard_output_is_a_reader_that_went_away(arguments, redirection):
    """`loadstone run … >&-` ends quietly, as with a broken pipe."""
    ended = shell(redirection, *arguments)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b"")


def test_a_closed_standard_error_drops_messages_and_nothing_else():
    """Results and exit codes are as ever, and nothing that is opened later takes the place of the stream."""
    answered = shell("2>&-", "run", "smollm2", "Hello.", "--max-new-tokens", "4", "--context", "256")
    assert answered.returncode == 0
    assert answered.stdout.strip()
    refused = shell("2>&-", "run", "./nowhere", "hi")
    assert (refused.returncode, refused.stdout) == (3, b"")


def test_a_reader_that_goes_away_ends_a_run_quietly(start):
    """`loadstone run … | head -1` says nothing about a broken pipe."""
    process = start("run", "smollm2", STORY, *LONG)
    assert process.stdout.read(1)
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert err == b""


def test_ctrl_c_stops_an_answer_and_not_the_chat(start):
    """Through a pipe: the answer ends, the next line is read, and the end of input ends the program."""
    process = start("chat", "smollm2", *LONG)
    process.stdin.write(f"{STORY}\n".encode())
    process.stdin.flush()
    assert process.stdout.read(8)
    process.send_signal(signal.SIGINT)
    process.stdin.write(b"/system\n")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert err.decode().splitlines() == ["(stopped)", "There is no system message; /system TEXT sets one."]


def test_text_is_utf8_under_the_c_locale(start):
    """A name that ASCII does not have is written as it is, in what remains Python's oldest trap."""
    locale = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    process = start("run", "smollm2", "hi", env={**os.environ, **locale, "LOADSTONE_CONFIG": "/nowhere/配置.yaml"})
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "/nowhere/配置.yaml" in err.decode("utf-8")


class Screen:
    """The other end of a terminal."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.said = ""
        self.seen = 0

    def says(self, text: str, *, within: float) -> bool:
        """Tell whether `text` is said, after what was waited for last, within some seconds."""
        end = time.monotonic() + within
        while (found := self.said.find(text, self.seen)) < 0:
            ready, _, _ = select.select([self.descriptor], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return False
            self.said += os.read(self.descriptor, 4096).decode("utf-8", "replace")
        self.seen = found + len(text)
        return True

    def wait_for(self, text: str) -> None:
        """Read until `text` was said after what was waited for last."""
        assert self.says(text, within=60), f"{text!r} was not said; this was: {self.said[-500:]!r}"

    def type(self, text: str) -> None:
        """Type on the keyboard."""
        os.write(self.descriptor, text.encode())


@pytest.fixture
def screen():
    """A terminal: its screen, and the descriptor that a program writes to."""
    mine, theirs = os.openpty()
    yield Screen(mine), theirs
    os.close(mine)
    os.close(theirs)


def test_a_chat_at_a_terminal_greets_shows_progress_and_outlives_ctrl_c(start, screen):
    """Ctrl-C at the prompt explains itself, in an answer stops it; Ctrl-D ends."""
    view, terminal = screen
    process = start(
        "chat", "smollm2", "--quantization", "none", *LONG, stdin=terminal, stdout=terminal, stderr=terminal,
        start_new_session=True,
        env={**os.environ, "TERM": "xterm", "NO_COLOR": "1"},
    )  # fmt: skip
    view.wait_for("/help lists the commands")
    assert "Loading" in view.said
    assert "\x1b[3" not in view.said  # no colour
    view.wait_for("> ")
    while not view.says("Ctrl-D or /quit ends.", within=1.0):
        process.send_signal(signal.SIGINT)  # readline does not hear one that comes just before it starts to wait
    view.wait_for("> ")
    view.type(f"{STORY}\n")
    view.wait_for("never stop.\r\n")
    view.wait_for("e")  # a letter of the answer
    process.send_signal(signal.SIGINT)
    view.wait_for("(stopped)")
    view.wait_for("> ")
    view.type("\x04")
    assert process.wait(timeout=60) == 0


@pytest.mark.parametrize("command", ["run", "chat"])
def test_reading_a_long_prompt_is_shown_at_a_terminal(start, screen, command):
    """How far it is, and then the answer on a line that was cleared."""
    view, terminal = screen
    prompt = "Tell me about coal, oil and gas. " * 110  # more than two chunks
    process = start(
        command, "smollm2", "--max-new-tokens", "4", stdin=subprocess.PIPE, stdout=terminal, stderr=terminal,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )  # fmt: skip
    process.stdin.write(f"{prompt}\n".encode())
    process.stdin.close()
    process.stdin = None
    for text in ("Reading the prompt", " of 1,", " tokens", "\x1b[2K"):
        view.wait_for(text)
    while process.poll() is None:
        view.says("the last word", within=0.1)  # else it waits for somebody who reads what it says
    assert process.returncode == 0


def test_only_a_terminal_gets_progress(start, screen):
    """Standard error on a terminal has bars; standard output, a pipe, has the answer alone."""
    view, terminal = screen
    process = start(
        "run", "smollm2", "Hello.", "--max-new-tokens", "4", stdin=subprocess.DEVNULL, stderr=terminal,
        env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    view.wait_for("tok/s")
    out, _ = process.communicate(timeout=60)
    assert "\x1b[" in view.said
    assert b"\x1b" not in out
    assert out.strip()
