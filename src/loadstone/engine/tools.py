"""Functions that a model may call: how they are told to it, and what an answer must be that calls one for sure.

Knows function schemas in OpenAI's form, Python functions with type hints, and conversations; how a model writes a call
is in `tool_formats`. Calls nothing.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from loadstone.checkpoint.template import ChatTemplate
from loadstone.config.constraint import closed, schema_text
from loadstone.config.wish import show
from loadstone.errors import ConfigurationError

from ._llguidance import Grammar, Grammars
from .tool_formats import Format, Reader, ToolCall, format_of

Tool = Mapping[str, Any] | Callable[..., Any]

CHOICES = ("auto", "none", "required")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class Tools:
    """The functions that a request offers: their `definitions` as templates take them, and which must be called.

    `choice` is "auto" (the model decides), "required" (one or more) or the name of the one that must be called.
    """

    definitions: tuple[dict[str, Any], ...]
    choice: str
    format: Format

    @property
    def names(self) -> list[str]:
        """The functions' names, in their order."""
        return [one["function"]["name"] for one in self.definitions]

    def reader(self) -> Reader:
        """Return what tells calls from text in one answer."""
        return self.format.reader(frozenset(self.names))

    def grammar(self, grammars: Grammars) -> Grammar | None:
        """Return what an answer that must call follows, or None where it need not.

        Raises ConfigurationError, with the place, for parameters that no grammar can be made of.
        """
        if self.choice == "auto":
            return None
        parameters = {}
        for number, one in enumerate(self.definitions):
            name, place = one["function"]["name"], f"tools[{number}].parameters"
            if self.choice in ("required", name):
                try:
                    parameters[name] = schema_text({"type": "object", **one["function"]["parameters"]})
                except ValueError as error:
                    raise ConfigurationError(f"{place}: {error}", key="tools") from error
                grammars.of_schema(parameters[name], place)  # by itself, so that an error has its place
        return grammars.of_lark(self.format.grammar(parameters, self.choice == "required"), "tools")


def offered(tools: Sequence[Tool] | None, choice: str, template: ChatTemplate | None) -> Tools | None:
    """Return the functions that a call offers to a model with this template; None where there are none to be called.

    Raises ConfigurationError for what is no function, and where the model's template does not tell of functions or
    writes calls in a form that is not known here.
    """
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence | None):
        raise ConfigurationError(f"tools is a list of functions, not {show(tools)}", key="tools")
    definitions = tuple(_definition(tool, number) for number, tool in enumerate(tools or ()))
    names = [one["function"]["name"] for one in definitions]
    twice = next((name for name in names if names.count(name) > 1 or name in CHOICES), None)
    if twice is not None:
        raise ConfigurationError(f"No function can be told from others by the name {twice!r}", key="tools")
    if choice not in (*CHOICES, *names):
        raise ConfigurationError(
            f"tool_choice is {show(choice)}, and the functions are {', '.join(names) or 'none'}",
            key="tool_choice",
            hint='It is "auto", "none", "required" or the name of a function.',
        )
    if choice == "required" and not names:
        raise ConfigurationError('tool_choice is "required", and there are no tools', key="tool_choice")
    if choice == "none" or not names:
        return None
    form = format_of(template.source) if template is not None else None
    if form is None:
        raise ConfigurationError(
            "This model's chat template does not tell it of functions in a form that is known (Qwen's or Llama 3's)",
            key="tools",
            hint="Use a model that was made to call functions, such as Qwen2.5-Instruct, or describe them in the "
            "prompt and ask for an answer that follows a json_schema.",
        )
    return Tools(definitions, choice, form)


def with_calls(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a message as templates take it: its calls as mappings, whose arguments are mappings, beside a content.

    Calls may be `ToolCall`s, and arguments JSON text, as OpenAI's form has them. Where there are none the message has
    no word of them, since templates ask whether it has.
    """
    calls = message.get("tool_calls")
    if not calls:
        return {key: value for key, value in message.items() if key != "tool_calls"}
    if not isinstance(calls, (list, tuple)):
        raise ConfigurationError(f"tool_calls of a message is a list, not {show(calls)}", key="tool_calls")
    content = message.get("content")
    return {**message, "content": "" if content is None else content, "tool_calls": [_told(call) for call in calls]}


def _told(call: Any) -> dict[str, Any]:
    if isinstance(call, ToolCall):
        return call.message()
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ConfigurationError(f"A call names a function; {show(call)} does not", key="tool_calls")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, Mapping):
        raise ConfigurationError(f"The arguments of a call of {function['name']} are no mapping", key="tool_calls")
    told = {"name": function["name"], "arguments": dict(arguments)}
    return {**({"id": call["id"]} if "id" in call else {}), "type": "function", "function": told}


def _definition(tool: Tool, number: int) -> dict[str, Any]:
    """Return a function in OpenAI's form."""
    if isinstance(tool, Mapping):
        function = tool.get("function", tool)
        if not isinstance(function, Mapping):
            raise _no_function(number, f"its function is {show(function)}")
        described = {"parameters": {"type": "object", "properties": {}}, **function}
    elif callable(tool):
        described = _from_python(tool, number)
    else:
        raise _no_function(number, f"it is {show(tool)}")
    name, parameters = described.get("name"), described["parameters"]
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _no_function(number, f"its name is {show(name)}, and not up to 64 letters, digits, and _ . -")
    if not isinstance(parameters, Mapping):
        raise _no_function(number, f"its parameters are {show(parameters)}")
    try:
        plain: dict[str, Any] = json.loads(json.dumps(described))
    except (TypeError, ValueError, RecursionError) as error:
        raise _no_function(number, f"it is not JSON: {error}") from error
    return {"type": "function", "function": plain}


def _from_python(function: Callable[..., Any], number: int) -> dict[str, Any]:
    """Describe a Python function by its name, its docstring, and its parameters' type hints."""
    from pydantic import TypeAdapter
    from pydantic.errors import PydanticUserError
    from pydantic.json_schema import GenerateJsonSchema

    class Untitled(GenerateJsonSchema):
        """Titles are the names once more, and a model would have to read them."""

        def field_title_should_be_set(self, schema: Any) -> bool:
            return False

    name = getattr(function, "__name__", None)
    try:
        parameters = closed(TypeAdapter(cast(Any, function)).json_schema(schema_generator=Untitled))
    except (PydanticUserError, NameError, TypeError) as error:
        why = str(error).splitlines()[0]
        raise _no_function(number, f"no schema can be made of the parameters of {name}: {why}") from error
    if parameters.get("type") != "object":
        raise _no_function(number, f"the parameters of {name} have no names to be given by")
    described = {"name": name, "parameters": parameters}
    text = inspect.cleandoc(function.__doc__ or "")
    return {"name": name, "description": text, **described} if text else described


def _no_function(number: int, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"tools[{number}] is no function that a model could be told of: {why}",
        key="tools",
        hint='Give a Python function with type hints, or {"name": …, "description": …, "parameters": {a JSON schema}}.',
    )
