"""jinja2's sandbox, with the holes closed that matter for programs of strangers.

Knows jinja2 and nothing of conversations.
"""

from __future__ import annotations

from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class _Generation(Extension):
    """Reads `{% generation %} … {% endgeneration %}`, which marks what to train on, as its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the content as a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(Namespace):
    """jinja2's `namespace`, which would otherwise take names with underscores, of Python's own machinery."""

    def __init__(self, /, *pairs: Any, **named: Any) -> None:
        attributes = dict(*pairs, **named)
        for name in attributes:
            _check_name(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"namespace attribute {name!r}")


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})
    most_bits = 4096
    most_length = 1 << 26

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """Refuse at once: jinja2 itself waits until the value is used."""
        raise SecurityError(f"attribute {attribute!r} of a {type(obj).__name__}")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Refuse a product or power that would not fit, before it is made."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > self.most_bits:
                raise SecurityError(f"a number of {bits} bits")
        elif operator == "*":
            for times, repeated in ((left, right), (right, left)):
                if isinstance(times, int) and hasattr(repeated, "__len__") and times * len(repeated) > self.most_length:
                    raise SecurityError(f"a {type(repeated).__name__} of {times * len(repeated)} elements")
        return super().call_binop(context, operator, left, right)


def _plain_dict(*pairs: Any, **named: Any) -> dict[Any, Any]:
    return dict(*pairs, **named)


def make_environment(*, most_bits: int, most_length: int) -> jinja2.Environment:
    """Make a sandbox with the options that chat templates are written for.

    Numbers stay below `most_bits` bits, and what `*` repeats below `most_length` elements.
    """
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.most_bits, environment.most_length = most_bits, most_length
    environment.globals.update(namespace=_Namespace, dict=_plain_dict)
    environment.globals.pop("lipsum", None)  # writes as much text as it is asked for
    return environment
