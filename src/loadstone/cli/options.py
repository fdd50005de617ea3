"""The options that commands share, and the configuration that they make.

An option that is not given says nothing: the environment, the file and the checkpoint keep their say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from . import logs

if TYPE_CHECKING:
    from loadstone.config import ConfigManager
    from loadstone.errors import ConfigurationError

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

LOAD = ("quantization", "device", "max_memory", "context", "streams", "force", "offline")
GENERATION = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "json_schema", "regex", "choices")


@dataclass
class Session:
    """What holds for the whole process, whatever the command."""

    is_verbose: bool = False


def _set_verbose(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.find_object(Session).is_verbose = True  # type: ignore[union-attr]
        if not logs.is_debugging():
            logs.configure("info")


verbose_option = click.option(
    "-v", "--verbose", is_flag=True, is_eager=True, expose_value=False, callback=_set_verbose,
    help="Show the log, and the traceback of an error. LOADSTONE_LOG=debug shows more, =json writes JSON lines.",
)  # fmt: skip


def _read_file(_context: click.Context, _parameter: click.Parameter, name: str | None) -> str | None:
    if name is None:
        return None
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise click.BadParameter(f"{name} cannot be read: {reason}.") from error


config_option = click.option("--config", "config_file", metavar="FILE", help="The configuration file to read.")
_load_options = (
    click.option("--quantization", metavar="STRATEGY", help="How weights are kept: none, 8bit, 4bit, int4 or auto."),
    click.option("--device", metavar="DEVICE", help="Where to load it: auto, cpu, cuda, cuda:1 or mps."),
    click.option("--max-memory", metavar="SIZE", help="The most memory that it may take, like 20GB or 16GiB."),
    click.option("--context", metavar="TOKENS", help="The longest conversation, like 4096 or 32k."),
    click.option("--force", is_flag=True, help="Load even where the arithmetic says that it does not fit."),
    click.option("--offline", is_flag=True, help="Use only what is on this machine."),
    config_option,
)
_generation_options = (
    click.option("--max-new-tokens", type=int, metavar="N", help="The most tokens that an answer may have."),
    click.option("--temperature", type=float, metavar="T", help="0 is always the likeliest token; 1 as the model is."),
    click.option("--top-p", type=float, metavar="P", help="Sample from the likeliest tokens of this probability."),
    click.option("--top-k", type=int, metavar="K", help="Sample from this many of the likeliest tokens."),
    click.option("--seed", type=int, metavar="N", help="What sampling starts from, to have an answer again."),
)
_constraint_options = (
    click.option(
        "--json-schema", metavar="FILE", callback=_read_file, help="Answer with JSON that follows the schema in FILE."
    ),
    click.option("--regex", metavar="REGEX", help="Answer with a text that matches this regular expression."),
    click.option(
        "--choice", "choices", multiple=True, metavar="TEXT", help="Answer with this text, or another --choice."
    ),
)


def load_options(command: Decorated) -> Decorated:
    """Add the options that say how a model is loaded."""
    return _with(command, _load_options)


def generation_options(command: Decorated) -> Decorated:
    """Add the options that say how answers are made."""
    return _with(command, _generation_options)


def constraint_options(command: Decorated) -> Decorated:
    """Add the options that say what an answer must follow."""
    return _with(command, _constraint_options)


def _with(command: Decorated, options: tuple[Callable[[Decorated], Decorated], ...]) -> Decorated:
    for option in reversed(options):
        command = option(command)
    return command


def configuration(model: str, said: Mapping[str, Any]) -> ConfigManager:
    """Return the configuration for `model`, with what was `said` in options over everything.

    Raises ConfigurationError, naming the option, for a value that cannot be meant.
    """
    from loadstone.config import ConfigManager
    from loadstone.errors import ConfigurationError

    given = {name: value for name, value in said.items() if value is not None and value is not False and value != ()}
    overrides = {f"model_config.{name}": given[name] for name in LOAD if name in given}
    overrides |= {f"generation.{name}": given[name] for name in GENERATION if name in given}
    configured = ConfigManager(said.get("config_file"))
    wish = configured.config.model
    if wish.revision is not None and model != wish.base_model:
        overrides["model_config.revision"] = None  # it is the configured model's, not this one's
    try:
        return configured.with_overrides({"model_config.base_model": model, **overrides})
    except ConfigurationError as error:
        raise _in_options(error) from None


def _in_options(error: ConfigurationError) -> ConfigurationError:
    """Return the error of a setting as that of the option which says it."""
    from loadstone.errors import ConfigurationError

    section, _, name = (error.key or "").partition(".")
    prefix = f"argument: {section}.{name}"
    if error.file is not None or not error.message.startswith(prefix):
        return error
    option = {"base_model": "MODEL", "choices": "--choice"}.get(name, "--" + name.replace("_", "-"))
    return ConfigurationError(option + error.message[len(prefix) :], key=error.key)
