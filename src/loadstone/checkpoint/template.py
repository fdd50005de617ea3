"""Turns a conversation into the text that a model was trained to read, with the checkpoint's own template.

A template is a program that came with the model, so it runs in jinja2's sandbox: it sees the conversation and
a few plain functions, changes nothing, and what it may count, repeat and write is bounded. How long it takes
is not: a template can be slow, but cannot get out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from loadstone.errors import CheckpointError, ConfigurationError, GenerationError, handle_exceptions

from .spec import ModelSpec
from .tokenizer import gguf_file, read_settings, token_text

if TYPE_CHECKING:
    import jinja2

_MOST_CHARACTERS = 1 << 26  # far beyond any context; a template that writes more is broken or hostile
_MOST_STEPS = 1_000_000  # of all range() calls in one rendering together
_MOST_BITS = 4096  # of a number


@dataclass(frozen=True)
class ChatTemplate:
    """A checkpoint's chat template.

    `source` is its jinja2 text, `special_tokens` what it may use by name (`bos_token`, `eos_token` …), and
    `origin` says where it was found.
    """

    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    origin: str = "template"

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Return the conversation as the model reads it.

        Each message has a `role` and a `content`, both texts; `content` may be missing beside `tool_calls`.
        `add_generation_prompt` opens the assistant's turn. `variables` reach the template (`tools`,
        `enable_thinking` …). Raises `ConfigurationError` for messages of another shape, and `GenerationError`
        when the template is broken, refuses the conversation, or does what the sandbox forbids.
        """
        import jinja2

        values: dict[str, Any] = {"tools": None, "documents": None, **self.special_tokens, **variables}
        values.update(messages=_checked(messages), add_generation_prompt=add_generation_prompt)
        values["range"] = _counted_range()
        try:
            with handle_exceptions(f"render the chat template ({self.origin})", into=GenerationError):
                return _joined(self._compiled.generate(values))
        except GenerationError as error:
            cause = error.__cause__
            if isinstance(cause, jinja2.TemplateSyntaxError):
                why = f"is not valid, line {cause.lineno}: {cause.message}"
            elif isinstance(cause, jinja2.exceptions.SecurityError):
                why = f"does what the sandbox forbids: {cause}"
            elif isinstance(cause, _RefusedError):
                why = f"refuses this conversation: {cause}"
            else:
                raise
            raise GenerationError(
                f"The chat template ({self.origin}) {why}",
                hint="`raw=True` sends a prompt without a template.",
            ) from cause

    @cached_property
    def _compiled(self) -> jinja2.Template:
        return _environment().from_string(self.source)


class _RefusedError(Exception):
    """The template called `raise_exception`."""


def load_chat_template(spec: ModelSpec) -> ChatTemplate | None:
    """Find the chat template of a checkpoint, or None when it has none (a base model).

    Looks in chat_template.jinja, then tokenizer_config.json, then chat_template.json; in GGUF's metadata for
    that format. Raises `CheckpointError` when such a file cannot be read.
    """
    if spec.format == "gguf":
        return _from_gguf(spec)
    settings = read_settings(spec.folder / "tokenizer_config.json")
    special = {
        name: text
        for name, value in settings.items()
        if name.endswith("_token") and (text := token_text(value)) is not None
    }
    file = spec.folder / "chat_template.jinja"
    try:
        return ChatTemplate(file.read_text(encoding="utf-8"), special, file.name)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read: {error}", file=file, hint="Fetch the file again.") from error
    if (source := _choose(settings.get("chat_template"))) is not None:
        return ChatTemplate(source, special, "tokenizer_config.json")
    if (source := _choose(read_settings(spec.folder / "chat_template.json").get("chat_template"))) is not None:
        return ChatTemplate(source, special, "chat_template.json")
    return None


def _from_gguf(spec: ModelSpec) -> ChatTemplate | None:
    from .gguf import read_metadata

    file = gguf_file(spec)
    metadata = read_metadata(file)
    source = metadata.get("tokenizer.chat_template")
    if not isinstance(source, str) or not source:
        return None
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(index, int) and 0 <= index < len(tokens):
            special[f"{name}_token"] = tokens[index]
    return ChatTemplate(source, special, file.name)


def _choose(found: Any) -> str | None:
    """Return the template that a setting holds: one text, or of named ones "default", else the first."""
    if isinstance(found, str):
        return found or None
    if not isinstance(found, list):
        return None
    named = {
        one["name"]: one["template"]
        for one in found
        if isinstance(one, Mapping) and isinstance(one.get("name"), str) and isinstance(one.get("template"), str)
    }
    return named.get("default", next(iter(named.values()), None))


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise ConfigurationError(
            "A conversation is a list of one or more messages.",
            hint='For example [{"role": "user", "content": "你好"}].',
        )
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ConfigurationError(f"Message {number} is a {type(message).__name__}, not a mapping.")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise ConfigurationError(
                f"Message {number} has no role.", hint="A role is `system`, `user`, `assistant` or `tool`."
            )
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            said = "no content" if content is None else f"content of type {type(content).__name__}"
            raise ConfigurationError(f"Message {number} (`{role}`) has {said}; it must be a text.")
    return [dict(message) for message in messages]


def _joined(pieces: Any) -> str:
    """Join what a template writes, and stop it when it writes without end."""
    from jinja2.exceptions import SecurityError

    parts: list[str] = []
    length = 0
    for piece in pieces:
        length += len(piece)
        if length > _MOST_CHARACTERS:
            raise SecurityError(f"it writes more than {_MOST_CHARACTERS} characters")
        parts.append(piece)
    return "".join(parts)


def _counted_range() -> Any:
    """Return a `range` whose calls together count no further than `_MOST_STEPS`: loops in loops end too."""
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import safe_range

    left = _MOST_STEPS

    def counted(*arguments: int) -> range:
        nonlocal left
        try:
            steps = safe_range(*arguments)
        except OverflowError as error:
            raise SecurityError(str(error)) from error
        left -= len(steps)
        if left < 0:
            raise SecurityError(f"it counts further than {_MOST_STEPS}")
        return steps

    return counted


def _environment() -> jinja2.Environment:
    """Make the sandbox with the filters and functions that templates of the Hub expect."""
    from ._jinja import make_environment

    environment = make_environment(most_bits=_MOST_BITS, most_length=_MOST_CHARACTERS)
    environment.globals.update(raise_exception=_refuse, strftime_now=_strftime_now)
    environment.filters["tojson"] = _to_json
    return environment


def _refuse(message: Any) -> None:
    raise _RefusedError(str(message))


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes for HTML, which models have not been trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
