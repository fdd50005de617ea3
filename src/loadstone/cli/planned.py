"""A plan, and why there is none, as plain values and as rows for people: what `info` and `plan` tell alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from loadstone.errors import ResourceError
from loadstone.units import format_size

from .output import Row

if TYPE_CHECKING:
    from loadstone.checkpoint import ModelSpec
    from loadstone.planner import Plan


def plan_facts(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain values; bytes in bytes."""
    from loadstone.quantization import find_strategy

    return {
        "device": plan.device.torch_name,
        "device_name": plan.device.name,
        "device_reason": plan.device.reason,
        "device_passed_over": list(plan.device.passed_over),
        "strategy": plan.strategy,
        "strategy_summary": find_strategy(plan.strategy).summary,
        "context": plan.context,
        "streams": plan.streams,
        "forced": plan.forced,
        "bytes": {
            "weights": dict(plan.weight_bytes),
            **plan.other_bytes,
        },
        "likely": likely_facts(plan),
        "reasons": list(plan.reasons),
    }


def quantized_facts(spec: ModelSpec) -> dict[str, Any] | None:
    """Return how a checkpoint's weights are quantised already, None where they are not."""
    found = spec.quantized
    return None if found is None else {**asdict(found), "summary": found.summary}


def likely_facts(plan: Plan) -> dict[str, Any]:
    """Return what earlier loads have the most at any time be, in bytes (null: too few of them), and in words."""
    low, high = plan.likely_bytes or (None, None)
    return {"low": low, "high": high, "loads": plan.learned.loads, "text": plan.likely}


def refusal_facts(error: ResourceError) -> dict[str, Any]:
    """Return why there is no plan, and what would fit; bytes in bytes."""
    needs = {"needed_bytes": error.needed, "allowed_bytes": error.allowed, "would_fit": list(error.would_fit)}
    return {"message": error.message, "hint": error.hint, **needs}


def plan_rows(plan: Mapping[str, Any]) -> list[Row]:
    """Return the rows that tell a plan, as `plan_facts` has it."""
    sizes = plan["bytes"]
    weights = listed((part, format_size(size)) for part, size in sizes["weights"].items() if size)
    working = f"KV cache {format_size(sizes['kv_cache'])}, activations {format_size(sizes['activations'])}, "
    return [
        ("device", f"{plan['device']}: {plan['device_name']}"),
        ("strategy", f"{plan['strategy']}: {plan['strategy_summary']}"),
        ("context", f"{plan['context']} tokens"),
        ("weights", f"{format_size(sum(sizes['weights'].values()))}: {weights}"),
        ("besides", f"{working}runtime {format_size(sizes['runtime'])}"),
        (
            "needed",
            f"{format_size(sizes['load_peak'])} to load, {format_size(sizes['steady'])} to answer; "
            f"{format_size(sizes['allowed'])} is allowed",
        ),
        ("likely", plan["likely"]["text"]),
        *(("" if index else "because", reason) for index, reason in enumerate(plan["reasons"])),
    ]


def listed(pairs: Iterable[tuple[str, str]]) -> str:
    """Return names and values in one line."""
    return ", ".join(f"{name} {text}" for name, text in pairs)
