"""`loadstone info`: what a model is and how it would be loaded here, from its headers alone."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from loadstone.errors import ResourceError
from loadstone.units import format_size

from .entries import SHORT
from .interrupts import HeldInterrupts
from .options import configuration, generation_options, load_options, verbose_option
from .output import heading, rows, write_json
from .planned import listed, plan_facts, plan_rows, quantized_facts, refusal_facts
from .progress import shown_progress

if TYPE_CHECKING:
    from loadstone.checkpoint import ModelSpec
    from loadstone.config import ConfigManager
    from loadstone.planner import Plan


@click.command(short_help="Tell what a model is and how it would be loaded here.")
@click.argument("model")
@load_options
@generation_options
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object instead of text.")
@verbose_option
def info(model: str, as_json: bool, **said: Any) -> None:
    """Tell what MODEL is and how it would be loaded here.

    Its headers are read, its weights are not. Tells parameters by part, the sampling in force with where each value
    comes from, and the plan with its reasons, or why it does not fit and what would: that is an answer too, and exits
    with 0.
    """
    wish = configuration(model, said)
    with shown_progress("Looking at the model"):
        about = _look(wish)
    if as_json:
        write_json(about)
    else:
        _show(about)


def _look(wish: ConfigManager) -> dict[str, Any]:
    """Return all that is told, as plain values; bytes in bytes."""
    with HeldInterrupts():
        from loadstone.manager import ModelManager
    from loadstone.checkpoint import inspect, load_chat_template

    files = ModelManager(wish).resolve()
    spec = inspect(files).leaving_alone(wish.config.model.left_alone)
    template = load_chat_template(spec)
    plan, refusal = _plan(wish, spec)
    return {
        "name": spec.name,
        "origin": spec.origin,
        "revision": spec.revision,
        "folder": str(spec.folder),
        "format": spec.format,
        "file_bytes": sum(file.stat().st_size for file in files.weights),
        "architecture": _architecture(spec),
        "parameters": {"total": spec.parameters, **spec.parameters_by_part},
        "types": _types(spec),
        "quantized": quantized_facts(spec),
        "max_context": spec.max_context,
        "template": template.origin if template is not None else None,
        "sampling": _sampling(wish, spec),
        "plan": plan and plan_facts(plan),
        "store": plan and _store_facts(wish, spec, plan),
        "refusal": refusal,
    }


def _plan(wish: ConfigManager, spec: ModelSpec) -> tuple[Plan | None, dict[str, Any] | None]:
    """Return the plan that a load would make here, or why there is none; one of the two is None."""
    from loadstone.manager import ModelManager

    try:
        return ModelManager(wish).plan(spec), None
    except ResourceError as error:
        return None, refusal_facts(error)


def _architecture(spec: ModelSpec) -> dict[str, Any]:
    return {
        "name": spec.architecture.name,
        "layers": spec.layers,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "heads": spec.heads,
        "kv_heads": spec.kv_heads,
        "head_size": spec.head_size,
        "vocab_size": spec.vocab_size,
        "tied_embeddings": spec.tied_embeddings,
        "rope_type": spec.rope.get("rope_type"),
        "sliding_window": spec.sliding_window if any(spec.windowed_layers) else None,
    }


def _types(spec: ModelSpec) -> dict[str, int]:
    """Return the bytes that tensors of each type take in the files, largest first."""
    types: dict[str, int] = {}
    for tensor in spec.tensors.values():
        types[tensor.dtype] = types.get(tensor.dtype, 0) + tensor.nbytes
    return dict(sorted(types.items(), key=lambda item: -item[1]))


def _sampling(wish: ConfigManager, spec: ModelSpec) -> dict[str, Any]:
    from loadstone.config import resolve_generation, tell_generation

    return tell_generation(*resolve_generation(wish.generation_layers(spec.generation)))


def _store_facts(wish: ConfigManager, spec: ModelSpec, plan: Plan) -> dict[str, Any]:
    """Return whether a load would keep the quantised weights, and the entry that has them already."""
    from loadstone.model import can_be_kept
    from loadstone.model.keeping import kind_of
    from loadstone.store import open_store

    store = open_store(wish.config.store)
    if store is None or not can_be_kept(plan):
        return {"keeps": False, "entry": None}
    entry = store.find(kind_of(plan, spec), spec)
    about = entry and {"key": entry.manifest.key, "bytes": entry.nbytes, "folder": str(entry.folder)}
    return {"keeps": True, "entry": about}


# -- for people -------------------------------------------------------------------------------------------------------


def _show(about: Mapping[str, Any]) -> None:
    out = sys.stdout
    shape = about["architecture"]
    revision = f", revision {about['revision']}" if about["revision"] else ""
    types = ", ".join(f"{name} {format_size(size)}" for name, size in about["types"].items())
    total, *by_part = about["parameters"].items()
    parts = listed((part, count(number)) for part, number in by_part if number)
    sizes = (
        f"{shape['layers']} layers, {shape['hidden_size']} wide, {shape['heads']} heads ({shape['kv_heads']} for "
        f"keys and values) of {shape['head_size']}, vocabulary {shape['vocab_size']}"
    )
    heading(out, about["name"], is_first=True)
    rows(out, [
        ("origin", f"{about['origin']}{revision}"),
        ("files", f"{about['format']}, {format_size(about['file_bytes'])} ({types}) in {about['folder']}"),
        *([("quantised", f"already: {about['quantized']['summary']}")] if about["quantized"] else []),
        ("architecture", f"{shape['name']}: {sizes}"),
        ("parameters", f"{count(total[1])}: {parts}"),
        ("context", f"{about['max_context']} tokens at most"),
        ("chat template", about["template"] or "none: prompts are sent as they are"),
    ])  # fmt: skip
    heading(out, "sampling in force")
    rows(out, ((name, _value(one)) for name, one in about["sampling"].items()))
    if about["plan"] is None:
        heading(out, "cannot be loaded here so")
        rows(out, [("because", about["refusal"]["message"]), ("instead", about["refusal"]["hint"] or "")])
    else:
        heading(out, "plan")
        rows(out, [*plan_rows(about["plan"]), ("load", _load(about["store"]))])


def _load(store: Mapping[str, Any]) -> str:
    if store["entry"] is not None:
        return f"from the store, which has {format_size(store['entry']['bytes'])} ({store['entry']['key'][:SHORT]})"
    return "from the files" + (", once: the quantised weights are kept then" if store["keeps"] else "")


def count(number: int) -> str:
    """Return a number of parameters for a person: 134_515_008 is "135 M"."""
    for size, unit in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if number >= size:
            value = number / size
            return f"{value:.0f}{unit}" if value >= 99.95 else f"{value:.3g}{unit}"
    return str(number)


def _value(one: Mapping[str, Any]) -> str:
    value = one["value"]
    if isinstance(value, tuple):
        value = ", ".join(map(repr, value)) or None
    return f"{'none' if value is None else value} ({one['from']})"
