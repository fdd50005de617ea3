"""The base of all wishes: frozen, strict about types and names, and with errors that say what to write
instead.

Knows no file, line or variable; whoever read the values adds the place.
"""

from __future__ import annotations

import reprlib
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from loadstone.errors import ConfigurationError

_LONGEST_MESSAGE = 300
_KINDS = {
    "string_type": "text (in quotes where it looks like a number or a date)",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "model_type": "a mapping of settings",
    "model_attributes_type": "a mapping of settings",
}


class Wish(BaseModel):
    """A frozen group of settings; what it is made from is checked, and unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    def __init__(self, **values: Any) -> None:
        """Check `values`; raise ConfigurationError, with `key`, for the first that cannot be meant."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            problem = _translate(type(self), error.errors(include_url=False)[0])
        else:
            return
        # Raised here and not above, so that pydantic's own error, which says less, is not shown before it.
        raise problem

    def says(self, key: str) -> bool:
        """Tell whether somebody gave this setting a value, rather than leaving its default."""
        return key in self.model_fields_set


def nearest(key: str, known: list[str]) -> str | None:
    """Return the name in `known` that `key` was probably meant to be, if one is near."""
    found = get_close_matches(key.lower(), known, n=1, cutoff=0.5)
    return found[0] if found else None


def show(value: object) -> str:
    """Return a short picture of `value` for an error message, however large or nested it is."""
    picture = reprlib.Repr()
    picture.maxstring = picture.maxother = picture.maxlong = 60
    picture.maxlevel = 2
    try:
        return "nothing" if value is None else picture.repr(value)
    except ValueError:  # Python refuses to write whole numbers of thousands of digits
        return f"so large a {type(value).__name__}"


def unknown_key(key: str, known: list[str], *, hint: str | None = None) -> ConfigurationError:
    """Return the error for a key that is not among `known`, naming the nearest right one."""
    likely = known[0] if len(known) == 1 else nearest(key, known)
    remedy = f"did you mean {likely!r}?" if likely else f"known are {', '.join(known)}"
    return ConfigurationError(f"{show(key)} is not a known key; {remedy}", key=key, hint=hint)


def _translate(wish: type[Wish], detail: ErrorDetails) -> ConfigurationError:
    """Return what pydantic found wrong as an error of ours: what, and what to write instead."""
    where = detail["loc"]
    key = str(where[0]) if where else ""
    context: dict[str, Any] = detail.get("ctx") or {}
    inner = context.get("error")
    if isinstance(inner, ConfigurationError):  # a wish within this one has already said it
        return ConfigurationError(
            f"{key}: {inner.message}", key=f"{key}.{inner.key or ''}".rstrip("."), hint=inner.hint
        )
    if detail["type"] == "extra_forbidden":
        return unknown_key(key, list(wish.model_fields))
    label = key + "".join(f"[{part}]" for part in where[1:])
    return ConfigurationError(_sentence(label, detail, context), key=key, hint=_remedy(wish, key))


def _sentence(label: str, detail: ErrorDetails, context: dict[str, Any]) -> str:
    kind = detail["type"]
    if kind == "value_error":
        text = f"{label}: {context['error']}" if label else str(context["error"])
    elif kind in _KINDS:
        text = f"{label} must be {_KINDS[kind]}, not {show(detail['input'])}"
    else:
        text = f"{label} is {show(detail['input'])}: {detail['msg'].replace('Input should', 'it should')}"
    return text if len(text) <= _LONGEST_MESSAGE else text[:_LONGEST_MESSAGE] + " …"


def _remedy(wish: type[Wish], key: str) -> str | None:
    field = wish.model_fields.get(key)
    if field is None or not field.examples:
        return None
    default = str(field.default).lower() if isinstance(field.default, bool) else field.default
    left_out = "" if default is None else f", which means {default}"
    return f"Write it like `{key}: {field.examples[0]}`, or leave it out{left_out}."
