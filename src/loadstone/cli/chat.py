"""`loadstone chat`: a conversation, at a terminal or line by line through a pipe."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loadstone.errors import LoadstoneError

from .conversation import Conversation
from .loading import Ready, facts, loaded
from .options import configuration, generation_options, load_options, verbose_option
from .output import clean, rows, say, say_failure, say_quietly, say_warning, write
from .progress import chunks_of

if TYPE_CHECKING:
    from loadstone.engine import GenerationResult, Stream

PROMPT = "> "
HELP = """\
/reset        forget the conversation; the system message stays
/system TEXT  tell the model TEXT before the conversation; without TEXT, show what it is told
/save FILE    write the conversation to FILE, as JSON
/help         show this
/quit         end, as Ctrl-D does
Ctrl-C stops an answer, not the program."""

COMMANDS = ("reset", "system", "save", "help", "quit", "exit")

# A word with a second slash in it is a path, and so a message.
_COMMAND = re.compile(r"/([^\s/]+)(?:\s+(.*))?", re.DOTALL)


@click.command(short_help="Hold a conversation.")
@click.argument("model")
@click.option("--system", metavar="TEXT", help="What the model is told before the conversation.")
@generation_options
@load_options
@verbose_option
def chat(model: str, system: str | None, **said: Any) -> None:
    """Load MODEL and hold a conversation with it.

    Each line is a message. /help lists the commands; Ctrl-C stops an answer, Ctrl-D ends. Through a pipe, answers go
    to standard output and everything else to standard error.
    """
    if sys.stdin is None:
        raise click.UsageError("There is no standard input to read messages from.")
    with loaded(configuration(model, said)) as ready:
        Chat(ready, clean(system) if system else None).talk()


class Chat:
    """One conversation with a loaded model; a terminal is greeted and prompted, a pipe is not."""

    def __init__(self, ready: Ready, system: str | None) -> None:
        self.ready = ready
        self.model = ready.model
        self.said = Conversation(system)
        self.is_interactive = sys.stdin.isatty()
        self._saved: set[Path] = set()

    def talk(self) -> None:
        """Answer line after line until they end."""
        if self.model.engine.template is None:
            say_warning(f"{self.model.spec.name} has no chat template: it was not made for conversations")
        if self.is_interactive:
            rows(sys.stderr, [("model", self.model.spec.name), *facts(self.ready)])
            say_quietly("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends.")
        for line in self._lines():
            text = line.strip()
            command = _COMMAND.fullmatch(text)
            if command:
                name = command[1].lower()
                if name in ("quit", "exit"):
                    return
                self._obey(name, (command[2] or "").strip())
            elif text:
                self._answer(text)

    # -- lines ----------------------------------------------------------------------------------------------------

    def _lines(self) -> Iterator[str]:
        if not self.is_interactive:
            for raw in sys.stdin.buffer:
                yield raw.decode("utf-8", "replace")
            return
        _edit_lines()
        while True:
            try:
                yield clean(_ask_for_line())
            except EOFError:
                say("")
                return
            except KeyboardInterrupt:
                say("")
                say_quietly("Ctrl-D or /quit ends.")

    # -- commands -------------------------------------------------------------------------------------------------

    def _obey(self, command: str, rest: str) -> None:
        if command == "reset":
            self.said.reset()
            say_quietly("The conversation is forgotten.")
        elif command == "system":
            self._system(rest)
        elif command == "save":
            self._save(rest)
        elif command == "help":
            say(HELP)
        else:
            near = get_close_matches(command, COMMANDS, n=1)
            meant = f": did you mean /{near[0]}?" if near else ";"
            say_warning(f"/{command} is not a command{meant} /help lists them")

    def _system(self, text: str) -> None:
        if text:
            self.said.system = text
            say_quietly("The model is told so from now on.")
        else:
            say_quietly(self.said.system or "There is no system message; /system TEXT sets one.")

    def _save(self, name: str) -> None:
        if not name:
            say_warning("/save needs the name of a file")
            return
        file = Path(os.path.abspath(os.path.expanduser(name)))
        try:
            self.said.save(file, model=self.model.spec.name, may_replace=file in self._saved)
        except FileExistsError:
            say_warning(f"{file} is there already, and not from this conversation: choose another name")
        except (OSError, ValueError) as error:
            say_warning(f"{file} cannot be written: {error}")
        else:
            self._saved.add(file)
            say_quietly(f"Saved {len(self.said.messages)} messages to {file}")

    # -- answers --------------------------------------------------------------------------------------------------

    def _answer(self, text: str) -> None:
        """Answer a message; one that cannot be answered is forgotten, and ends a chat through a pipe."""
        self.said.ask(text)
        try:
            answer, result = self._stream()
        except LoadstoneError as error:
            self.said.take_back()
            if not self.is_interactive:
                raise
            say_failure(error)
            return
        if answer:
            self.said.answer(answer)
        else:
            self.said.take_back()
        self._remark(result)

    def _make_room(self) -> None:
        """Leave out the oldest messages when the context has no room for them and an answer."""
        context = self.model.plan.context
        wanted = self.model.sampling()[0].max_new_tokens
        room = min(wanted, max(1, context // 4))
        left_out = self.said.fit(lambda messages: len(self.model.engine.encode(messages)), context - room)
        if left_out:
            say_warning(
                f"the context of {context} tokens is full: the model does not see the oldest {left_out} messages "
                "any more (/reset begins anew, --context allows more)"
            )

    def _stream(self) -> tuple[str, GenerationResult | None]:
        """Write the answer as it is made; return it, and its result unless Ctrl-C had to be pressed twice."""
        pieces: list[str] = []
        result = None
        try:
            self._make_room()
            with self.model.stream(self.said.sent) as stream, _stopped_by_interrupt(stream):
                for chunk in chunks_of(stream):
                    pieces.append(chunk.text)
                    write(chunk.text)
                result = stream.result
        except KeyboardInterrupt:
            pass
        finally:
            if pieces and not "".join(pieces).endswith("\n"):
                write("\n")
        return "".join(pieces), result

    def _remark(self, result: GenerationResult | None) -> None:
        if result is None or result.finish_reason == "cancelled":
            say_quietly("(stopped)")
        elif result.finish_reason == "length" and result.usage.total_tokens >= self.model.plan.context:
            say_warning(f"cut: the context of {self.model.plan.context} tokens is full (/reset begins anew)")
        elif result.finish_reason == "length":
            say_warning(f"cut at {result.usage.completion_tokens} tokens; --max-new-tokens allows more")
        elif self.is_interactive:
            say_quietly(f"({result.usage.completion_tokens} tokens, {result.timing.tokens_per_s:.0f} tok/s)")


@contextmanager
def _stopped_by_interrupt(stream: Stream) -> Iterator[None]:
    """Let Ctrl-C cancel `stream`; a second one, in case that does not help, raises KeyboardInterrupt as ever."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield
        return

    def cancel(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stream.cancel()

    signal.signal(signal.SIGINT, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _edit_lines() -> None:
    """Give the terminal's lines a history and keys to edit them, where the system has them."""
    with suppress(ImportError):
        import readline  # noqa: F401 - importing it is what does it


def _ask_for_line() -> str:
    if sys.stdout.isatty():
        return input(PROMPT)
    sys.stderr.write(PROMPT)  # `chat MODEL > file`: the file is for answers
    sys.stderr.flush()
    return input()
