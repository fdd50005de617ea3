"""How models write that they call a function: Qwen's way, which Hermes began, and that of Llama 3.

Each way has a reader, which tells calls from text as it comes, and a grammar for answers that must call. What looks
like a call and is none stays text, with the reason.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ._llguidance import LAYOUT, literal

OPEN, CLOSE = "<tool_call>", "</tool_call>"
TAG = "<|python_tag|>"  # with which Llama may begin a call; mostly a special token, which is no text
LONGEST_SHOWN = 80  # characters of what is no call
_ARGUMENTS = re.compile(r'"arguments\\?": ')  # in a template's own text, perhaps within quotes
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """A function that a model calls: its `name` and `arguments` by name, of any type that JSON has.

    `id` is made here, for who must tell calls apart; `raw` is the call as the model wrote it. Nobody has checked that
    the arguments are what the function takes, unless `tool_choice` was "required" or a name.
    """

    name: str
    arguments: Mapping[str, Any]
    raw: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def message(self) -> dict[str, Any]:
        """Return the call as messages have it, in OpenAI's form, but for the arguments, which stay a mapping."""
        return {
            "id": self.id, "type": "function", "function": {"name": self.name, "arguments": dict(self.arguments)},
        }  # fmt: skip


class Reader(Protocol):
    """Reads one answer: what goes in as text comes out as text, but for the calls in it."""

    calls: list[ToolCall]
    errors: list[str]

    def push(self, text: str) -> str:
        """Return what of the text so far is no call, whatever comes."""

    def flush(self) -> str:
        """Return what is left as text, now that no more comes."""


class Format(Protocol):
    """One way to write calls."""

    def reader(self, names: frozenset[str]) -> Reader:
        """Return a reader of an answer that may call functions of these names."""

    def grammar(self, parameters: Mapping[str, str], may_repeat: bool) -> str:
        """Return, in llguidance's notation, answers that call one of these functions, or several if they may.

        `parameters` has the JSON schema of each one's arguments, as text.
        """


def format_of(template: str) -> Format | None:
    """Return how a model with this chat template writes calls, or None where that is not known."""
    if OPEN in template and _ARGUMENTS.search(template) and "<function=" not in template:  # which are other ways
        return Qwen()
    if '"parameters": ' in template and "tools" in template:
        return Llama()
    return None


class Qwen:
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, one or more, after text or without any."""

    def reader(self, names: frozenset[str]) -> Reader:
        """Return a reader of an answer that may call functions of these names."""
        return QwenReader(names)

    def grammar(self, parameters: Mapping[str, str], may_repeat: bool) -> str:
        """Return the grammar of an answer that calls; see `Format`."""
        calls = 'start: call ("\\n" call)*' if may_repeat else "start: call"
        begin, end = literal(f"{OPEN}\n"), literal(f"\n{CLOSE}")
        return f"{calls}\ncall: {begin} ({_alternatives(parameters)}) {end}\n{_functions(parameters, 'arguments')}"


class Llama:
    """`{"name": …, "parameters": {…}}`, which is then the whole answer; several have a semicolon between them."""

    def reader(self, names: frozenset[str]) -> Reader:
        """Return a reader of an answer that may call functions of these names."""
        return LlamaReader(names)

    def grammar(self, parameters: Mapping[str, str], may_repeat: bool) -> str:
        """Return the grammar of an answer that calls, once: Llama was made to; see `Format`."""
        return f"start: {_alternatives(parameters)}\n{_functions(parameters, 'parameters')}"


class QwenReader:
    """Tells calls between <tool_call> and </tool_call> from text, and drops blanks around them."""

    def __init__(self, names: frozenset[str]) -> None:
        self.calls: list[ToolCall] = []
        self.errors: list[str] = []
        self._names = names
        self._held = ""

    def push(self, text: str) -> str:
        """Return what of the text so far is no call, whatever comes."""
        self._held += text
        shown = []
        while (begin := self._held.find(OPEN)) >= 0 and (end := self._end(begin)) > 0:
            shown.append(self._take(begin, end))
        certain = len(self._held[:begin].rstrip()) if begin >= 0 else self._certain()
        shown.append(self._held[:certain])
        self._held = self._held[certain:]
        return "".join(shown)

    def flush(self) -> str:
        """Return what is left as text; a call that is whole but for its end is one."""
        shown = ""
        if (begin := self._held.find(OPEN)) >= 0:
            shown = self._take(begin, len(self._held))
        left, self._held = self._held, ""
        return shown if self.calls and not left.strip() else shown + left

    def _take(self, begin: int, end: int) -> str:
        """Take what looks like a call, with all before it; return what of it is text."""
        before, raw, self._held = self._held[:begin], self._held[begin:end], self._held[end:]
        try:
            call = call_of(json.loads(raw.removeprefix(OPEN).removesuffix(CLOSE)), self._names, raw)
        except (ValueError, RecursionError) as error:
            call = _no_call(raw, "it is not closed" if not raw.endswith(CLOSE) else _why(error))
        if isinstance(call, ToolCall):
            self.calls.append(call)
            return before.rstrip()
        self.errors.append(call)
        return before + raw

    def _end(self, begin: int) -> int:
        """Return where the call that begins there is over, or -1; an end within a text of its arguments is none."""
        end = self._held.find(CLOSE, begin)
        while end >= 0 and '"' in _STRING.sub("", self._held[begin:end]):
            end = self._held.find(CLOSE, end + 1)
        return end + len(CLOSE) if end >= 0 else -1

    def _certain(self) -> int:
        """Return up to where the text cannot be the blanks and the beginning of a call."""
        held = self._held
        for size in range(min(len(OPEN) - 1, len(held)), 0, -1):
            if held.endswith(OPEN[:size]):
                return len(held[:-size].rstrip())
        return len(held.rstrip())


class LlamaReader:
    """Takes an answer that begins like a JSON object for calls, and every other for text."""

    def __init__(self, names: frozenset[str]) -> None:
        self.calls: list[ToolCall] = []
        self.errors: list[str] = []
        self._names = names
        self._held = ""
        self._is_text = False

    def push(self, text: str) -> str:
        """Return what of the text so far is no call, whatever comes."""
        if not self._is_text:
            self._held += text
            begun = self._held.lstrip()
            if not begun or begun.startswith(("{", TAG)) or TAG.startswith(begun):
                return ""
            self._is_text, text, self._held = True, self._held, ""
        return text

    def flush(self) -> str:
        """Return what is left as text: all of it, where a part of it is no call."""
        held, self._held = self._held, ""
        left = held.strip().removeprefix(TAG).lstrip()
        calls: list[ToolCall] = []
        if not left.startswith("{"):
            return held
        while left:
            try:
                value, end = json.JSONDecoder().raw_decode(left)
            except (ValueError, RecursionError) as error:
                call: ToolCall | str = _no_call(left, _why(error))
            else:
                call = call_of(value, self._names, left[:end])
                left = left[end:].lstrip("; \n\t\r")
            if isinstance(call, str):
                self.errors.append(call)
                return held
            calls.append(call)
        self.calls = calls
        return ""


def call_of(value: Any, names: frozenset[str], raw: str) -> ToolCall | str:
    """Return the call that a value of JSON stands for, or why it is none."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return _no_call(raw, "it is no JSON object with a name")
    if value["name"] not in names:
        return _no_call(raw, f"no function was offered that is called {value['name'][:LONGEST_SHOWN]!r}")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # JSON in JSON, as some models write it
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        return _no_call(raw, "its arguments are no JSON object")
    return ToolCall(value["name"], arguments, raw)


def _no_call(raw: str, why: str) -> str:
    shown = raw if len(raw) <= LONGEST_SHOWN else raw[:LONGEST_SHOWN] + "…"
    return f"{shown!r} is no call: {why}"


def _why(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"it is not JSON, character {error.pos + 1}: {error.msg}"
    return "it is no JSON that Python could have"


def _alternatives(parameters: Mapping[str, str]) -> str:
    return " | ".join(f"call{number}" for number in range(len(parameters)))


def _functions(parameters: Mapping[str, str], key: str) -> str:
    """Return the rule of each function: an object with its name, and under the key arguments that follow its schema."""
    rules = []
    for number, (name, schema) in enumerate(parameters.items()):
        begin = literal(f'{{"name": {json.dumps(name)}, "{key}": ')
        body = json.dumps({**json.loads(schema), "x-guidance": LAYOUT}, ensure_ascii=False)
        rules.append(f'call{number}: {begin} arguments{number} "}}"\narguments{number}: %json {body}')
    return "\n".join(rules)
