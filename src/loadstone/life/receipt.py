"""What an unload gave back: bytes before and after, by kind, and what somebody still holds."""

from __future__ import annotations

from dataclasses import dataclass, fields

from loadstone.units import format_size


@dataclass(frozen=True)
class Footprint:
    """What this process holds at one moment, in bytes.

    `resident` is its memory as the system counts it, and the sum of the others on the processor: `weights` in memory of
    its own, `store_pages` mapped from the store's file (which other processes share), the `kv_cache` as far as it was
    touched, and `other`: libraries, tokenizer, activations, and what is not the model's. On an accelerator weights and
    cache are counted whole, as part of `device_allocated`; torch has `device_reserved` there in all.
    """

    resident: int = 0
    weights: int = 0
    store_pages: int = 0
    kv_cache: int = 0
    other: int = 0
    device_allocated: int = 0
    device_reserved: int = 0

    def __sub__(self, later: Footprint) -> Footprint:
        """Return how much less there is in `later`, kind by kind."""
        names = (field.name for field in fields(self))
        return Footprint(**{name: getattr(self, name) - getattr(later, name) for name in names})


@dataclass(frozen=True)
class Held:
    """A thing of the model that did not go: its name, the bytes that stay with it, and who refers to it.

    What was emptied and is only held in name has 0 bytes. `by` is words for people; "unknown" where Python cannot tell.
    """

    name: str
    nbytes: int
    by: tuple[str, ...]

    def __str__(self) -> str:
        size = format_size(self.nbytes) if self.nbytes else "emptied, 0 B"
        return f"{self.name} ({size}) by {' and '.join(self.by)}"


@dataclass(frozen=True)
class Receipt:
    """What an unload gave back. `str(receipt)` is a paragraph for people; without a model nothing was to be done.

    `seconds` include the wait for answers under way. `held` has at most a few things, largest first.
    """

    model: str | None
    before: Footprint
    after: Footprint
    seconds: float = 0.0
    held: tuple[Held, ...] = ()

    @property
    def freed(self) -> Footprint:
        """What was given back, kind by kind; `other` is below zero where libraries grew meanwhile."""
        return self.before - self.after

    @property
    def held_bytes(self) -> int:
        """Bytes of the model that somebody still holds."""
        return sum(one.nbytes for one in self.held)

    def __str__(self) -> str:
        if self.model is None:
            return f"No model was loaded; the process has {format_size(self.after.resident)}."
        freed = self.freed
        kinds = {
            "weights": freed.weights, "pages of the store": freed.store_pages, "KV cache": freed.kv_cache,
            "other": freed.other,
        }  # fmt: skip
        parts = ", ".join(f"{name} {format_size(size)}" for name, size in kinds.items() if size)
        text = (
            f"{self.model} was unloaded in {self.seconds:.2f} s: resident memory went from "
            f"{format_size(self.before.resident)} to {format_size(self.after.resident)}"
        )
        text += f" ({parts})." if parts else "."
        if self.before.device_reserved:
            reserved = format_size(self.before.device_reserved), format_size(self.after.device_reserved)
            text += f" On the accelerator it went from {reserved[0]} to {reserved[1]}."
        return text + (f" Still held: {'; '.join(map(str, self.held))}." if self.held else " Nobody holds any of it.")
