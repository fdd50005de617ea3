"""A refusal: what a model would need, what is allowed, what would fit instead, and which setting to turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loadstone.errors import ResourceError
from loadstone.units import format_size

from .ladder import SHORTEST_CONTEXT, Way

if TYPE_CHECKING:
    from .deciding import Deciding
    from .estimate import Estimate


def refusal(deciding: Deciding, way: Way) -> ResourceError:
    """Return the error for a decision that found nothing; `way` is the least that was asked for."""
    name, context, spec = way.strategy, deciding.shortest, deciding.spec
    estimate = deciding.estimator(way).at(context)
    fits = _would_fit(deciding, name)
    if estimate.needed_bytes <= deciding.allowed and deciding.too_large(estimate):
        return _too_large(deciding, way, estimate, fits)
    phase = "to load" if estimate.load_peak_bytes > estimate.steady_bytes else "to answer"
    parts = (
        f"weights {format_size(estimate.weights)}, KV cache {format_size(estimate.kv_bytes)}, working "
        f"memory {format_size(estimate.activation_bytes)}, runtime {format_size(estimate.runtime_bytes)}"
    )
    message = (
        f"{spec.name} with quantization {name} and context {context} does not fit: it needs "
        f"{format_size(estimate.needed_bytes)} {phase} ({parts}), and {format_size(deciding.allowed)} is "
        f"allowed ({deciding.allowed_reason})."
    )
    return ResourceError(
        message,
        needed=estimate.needed_bytes,
        allowed=deciding.allowed,
        would_fit=fits,
        hint=_hint(deciding, name, estimate, fits),
    )


def _too_large(deciding: Deciding, way: Way, estimate: Estimate, fits: tuple[str, ...]) -> ResourceError:
    """Return the error for what has memory enough, but not in one piece."""
    device, (piece, needed) = deciding.device, estimate.largest_buffer
    most = device.largest_buffer_bytes
    assert most is not None  # or nothing would be too large
    hint = f"Would fit: {'; '.join(fits)}. Set quantization and context so, or force to try anyway."
    if not fits:
        hint = "Lower streams, choose a smaller model or device cpu, or set force to try anyway."
    return ResourceError(
        f"{deciding.spec.name} with quantization {way.strategy} and context {deciding.shortest} does not fit: {piece} "
        f"would take {format_size(needed)} in one piece, and {device.torch_name} gives at most {format_size(most)}.",
        needed=needed,
        allowed=most,
        would_fit=fits,
        hint=hint,
    )


def _would_fit(deciding: Deciding, refused: str) -> tuple[str, ...]:
    """Return what fits instead: the refused strategy and each smaller one, with its longest context."""
    ladder = deciding.ladder
    start = ladder.index(refused) if refused in ladder else 0
    names = dict.fromkeys((refused, *ladder[start:]))
    found = []
    for name in names:
        if (fitting := deciding.find(name, min(SHORTEST_CONTEXT, deciding.longest))) is not None:
            way, context = fitting
            needed = format_size(deciding.estimator(way).at(context).needed_bytes)
            found.append(f"quantization {name} with context {context} needs {needed}")
    return tuple(found)


def _hint(deciding: Deciding, name: str, estimate: Estimate, fits: tuple[str, ...]) -> str:
    if fits:
        return f"Would fit: {'; '.join(fits)}. Set quantization and context so, or force to try anyway."
    device = deciding.device
    least = min(_at_least(deciding, step) for step in dict.fromkeys((name, *deciding.ladder)))
    if deciding.wish.max_memory is not None and deciding.allowed == deciding.wish.max_memory:
        return f"Nothing smaller fits either. Raise max_memory to at least {_with_room(least)}."
    if estimate.weights > device.total_bytes:
        return (
            f"{device.torch_name} has {format_size(device.total_bytes)} in all, less than the "
            "weights alone: choose a smaller model or another device; force does not help."
        )
    return (
        f"At least {_with_room(least)} must be free: close other programs, raise the container's memory "
        "limit, lower streams, choose a smaller model, or set force to try anyway."
    )


def _at_least(deciding: Deciding, name: str) -> int:
    context = min(SHORTEST_CONTEXT, deciding.longest)
    return deciding.estimator(deciding.least(name)).at(context).needed_bytes


def _with_room(size: int) -> str:
    """Name a size that will still do when the process has grown a little, in words that round up."""
    return format_size(size + size // 20 + 10_000_000)
