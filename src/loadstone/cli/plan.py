"""`loadstone plan`: whether a model fits, in what and how fast, here or on another machine; nothing is loaded."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from loadstone.errors import ConfigurationError, ResourceError
from loadstone.units import format_size

from .accuracy import tell_accuracy
from .bar import BLOCKS, characters_for_terminal, draw
from .entries import SHORT
from .interrupts import HeldInterrupts
from .options import configuration, load_options, verbose_option
from .output import Row, heading, rows, table, write_json
from .planned import plan_facts, plan_rows, quantized_facts, refusal_facts
from .progress import shown_progress

if TYPE_CHECKING:
    from loadstone.forecast import Forecast
    from loadstone.forecast import Row as StrategyRow
    from loadstone.hardware.speeds import Figure

NOT_KNOWN = "?"
TITLES = (
    "strategy", "fits", "context", "weights", "KV cache", "activations", "load peak", "steady", "first load",
    "later load", "first token", "tok/s", "in store",
)  # fmt: skip


@click.command(short_help="Tell whether a model fits, and how fast it would be.")
@click.argument("model", required=False)
@load_options
@click.option("--streams", type=int, metavar="N", help="How many conversations are answered at the same time.")
@click.option(
    "--as", "machine", metavar="MACHINE",
    help="Plan for another machine: a name like rtx-3060-12gb, m2-16gb or laptop-16gb, or "
    "cpus=4,ram=16GB,bandwidth=40GB/s, or vram=12GB,bandwidth=360GB/s.",
)  # fmt: skip
@click.option("--accuracy", is_flag=True, help="Tell what earlier loads were planned to take here, and took.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object instead of text.")
@verbose_option
def plan(model: str | None, machine: str | None, accuracy: bool, as_json: bool, **said: Any) -> None:
    """Tell whether MODEL fits, what each strategy would take, and how fast it would be.

    Only headers are read: of a model elsewhere kilobytes, or megabytes where it is a GGUF file. Exits with 0 when a
    load would go ahead, and with 4 when it would be refused (`info` tells the same, and exits with 0 then too).
    """
    if accuracy:
        tell_accuracy(as_json=as_json)
        return
    if model is None:
        raise click.UsageError("Missing argument 'MODEL'.")
    wish = configuration(model, said)
    with shown_progress("Looking at the model"):
        with HeldInterrupts():
            from loadstone.forecast import plan as forecast
        try:
            found = forecast(wish, machine=machine)
        except ConfigurationError as error:
            raise _in_options(error) from None
    if as_json:
        write_json(_as_json(found))
    else:
        _show(found)
    if found.plan is None:
        click.get_current_context().exit(ResourceError.exit_code)


def _in_options(error: ConfigurationError) -> ConfigurationError:
    if error.key != "machine":
        return error
    return ConfigurationError(f"--as: {error.message.removeprefix('machine: ')}", key=error.key, hint=error.hint)


# -- as values --------------------------------------------------------------------------------------------------------


def _as_json(found: Forecast) -> dict[str, Any]:
    """Return all that is told; bytes, seconds, and rates a second. What is not known is null."""
    spec = found.spec
    return {
        "model": spec.name,
        "origin": spec.origin,
        "revision": spec.revision,
        "format": spec.format,
        "quantized": quantized_facts(spec),
        "parameters": {"total": spec.parameters, **spec.parameters_by_part},
        "max_context": spec.max_context,
        "file_bytes": found.file_bytes,
        "missing_bytes": found.missing_bytes,
        "verdict": found.verdict,
        "plan": found.plan and plan_facts(found.plan),
        "refusal": found.refusal and refusal_facts(found.refusal),
        "would_fit": list(found.would_fit),
        "learned": {"bytes": found.learned.bytes, "loads": found.learned.loads},
        "strategies": [_row_facts(row, found) for row in found.rows],
        "machine": _machine_facts(found),
    }


def _row_facts(row: StrategyRow, found: Forecast) -> dict[str, Any]:
    from loadstone.planner.speed import PROMPT_TOKENS

    plan, expected = row.plan, row.expected
    return {
        "strategy": row.strategy,
        "summary": row.summary,
        "is_chosen": row is found.chosen,
        "fits": row.fits,
        "context": plan.context,
        "bytes": {"weights": dict(plan.weight_bytes), **plan.other_bytes},
        "token_bytes": expected.token_bytes,
        "first_load_s": _rounded(expected.first_load_s),
        "later_load_s": _rounded(expected.later_load_s),
        "prompt_tokens": PROMPT_TOKENS,
        "first_token_s": _rounded(expected.first_token_s),
        "prompt_tok_s": _rounded(expected.prompt_tok_s),
        "decode_tok_s": _rounded(expected.decode_tok_s),
        "decode_at_most_tok_s": _rounded(expected.decode_at_most),
        "unknown": list(expected.unknown),
        "in_store": row.in_store,
    }


def _machine_facts(found: Forecast) -> dict[str, Any]:
    device, machine, speeds = found.device, found.machine, found.speeds
    return {
        "name": machine.name if machine else None,
        "is_this_one": machine is None,
        "device": device.torch_name,
        "device_name": device.name,
        "cores": device.cores,
        "total_bytes": device.total_bytes,
        "free_bytes": device.free_bytes,
        "allowed_bytes": found.allowed_bytes,
        "memory": _figure(speeds.memory),
        "products": _figure(speeds.products),
        "disk": _figure(speeds.disk),
        "source": machine.source if machine else None,
        "assumed": list(machine.assumed) if machine else [],
    }


def _figure(figure: Figure | None) -> dict[str, Any] | None:
    if figure is None:
        return None
    return {"per_second": figure.value, "is_measured": figure.is_measured, "from": figure.source}


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


# -- for people -------------------------------------------------------------------------------------------------------


def _show(found: Forecast) -> None:
    out = sys.stdout
    characters = characters_for_terminal()
    heading(out, f"{found.spec.name}: {_verdict(found)}", is_first=True)
    rows(out, [*_model_rows(found), *_bar_rows(found, characters)])
    heading(out, "strategies")
    table(out, TITLES, [_cells(row, found, characters) for row in found.rows])
    rows(out, _notes(found))
    if found.plan is not None:
        heading(out, "plan")
        rows(out, plan_rows(plan_facts(found.plan)))
    heading(out, "machine")
    rows(out, _machine_rows(found))


def _verdict(found: Forecast) -> str:
    where = f" {found.machine.name}" if found.machine else ""
    on = f" on{where}" if where else " here"
    if found.plan is None:
        return f"does not fit{on} so" + ("; it fits with less" if found.verdict == "fits with less" else "")
    if found.plan.forced:
        return f"does not fit{on}, and was forced"
    return f"{found.verdict}{on} in {found.plan.strategy}, with {found.plan.context} tokens of context"


def _model_rows(found: Forecast) -> list[Row]:
    spec = found.spec
    revision = f", revision {spec.revision[:SHORT]}" if spec.revision else ""
    fetched = f"; {format_size(found.missing_bytes)} would have to be fetched" if found.missing_bytes else ""
    told = [("model", f"{spec.origin}{revision}; {spec.format}, {format_size(found.file_bytes)}{fetched}")]
    if spec.quantized is not None:
        told.append(("quantised", f"already: {spec.quantized.summary}"))
    if found.refusal is not None:
        told += [("because", found.refusal.message), ("instead", found.refusal.hint or "")]
    elif found.would_fit:
        told.append(("instead", "; ".join(found.would_fit)))
    return told


def _bar_rows(found: Forecast, characters: str) -> list[Row]:
    shown = found.plan or min((row.plan for row in found.rows), key=lambda one: one.needed_bytes)
    parts = (
        ("weights", sum(shown.weight_bytes.values())), ("KV cache", shown.kv_bytes),
        ("activations", shown.activation_bytes), ("runtime", shown.runtime_bytes),
    )  # fmt: skip
    bar = draw(parts, found.allowed_bytes, characters=characters)
    of = f"{shown.strategy}: {format_size(shown.steady_bytes)} of {format_size(found.allowed_bytes)}"
    return [("memory", f"{bar.line} {of}"), ("", bar.legend)]


def _cells(row: StrategyRow, found: Forecast, characters: str) -> tuple[str, ...]:
    plan, expected = row.plan, row.expected
    sizes = (sum(plan.weight_bytes.values()), plan.kv_bytes, plan.activation_bytes, plan.load_peak_bytes)
    times = (expected.first_load_s, expected.later_load_s, expected.first_token_s)
    rate = NOT_KNOWN if expected.decode_tok_s is None else f"{expected.decode_tok_s:.3g}"
    if expected.decode_tok_s is None and expected.decode_at_most is not None:
        rate = f"{'≤' if characters == BLOCKS else '<='} {expected.decode_at_most:.3g}"
    return (
        f"{row.strategy} *" if row is found.chosen else row.strategy,
        "yes" if row.fits else "no",
        str(plan.context),
        *map(format_size, (*sizes, plan.steady_bytes)),
        *map(_time, times),
        rate,
        "yes" if row.in_store else "no",
    )


def _time(seconds: float | None) -> str:
    if seconds is None:
        return NOT_KNOWN
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _notes(found: Forecast) -> list[Row]:
    from loadstone.planner.speed import PROMPT_TOKENS

    unknown = dict.fromkeys(reason for row in found.rows for reason in row.expected.unknown)
    half = found.plan.context // 2 if found.plan else found.rows[0].plan.context // 2
    text = f"first token after a prompt of {PROMPT_TOKENS} tokens; tok/s of one stream at {half} tokens"
    fetching = "; first load after fetching" if found.missing_bytes else ""
    told = [("expected", text + fetching)]
    return told + [("not known", reason) for reason in unknown]


def _amount(value: float, unit: str) -> str:
    return f"{value / 1e12:.3g} T{unit}" if value >= 1e12 else f"{value / 1e9:.3g} G{unit}"


def _machine_rows(found: Forecast) -> list[Row]:
    device, speeds = found.device, found.speeds
    name = f"{found.machine.name}: " if found.machine else ""
    told = [("device", f"{name}{device.torch_name}, {device.name}; {format_size(device.total_bytes)}")]
    figures = {
        "memory": (speeds.memory, "B/s"), "products": (speeds.products, "FLOP/s"), "disk": (speeds.disk, "B/s"),
    }  # fmt: skip
    for label, (figure, unit) in figures.items():
        if figure is not None:
            peak = ", at most" if figure.is_peak else ""
            told.append((label, f"{_amount(figure.value, unit)}{peak} ({figure.source})"))
    return told + [("assumed", one) for one in (found.machine.assumed if found.machine else ())]
