"""What a device is: a fact about this machine, with the reason when it was chosen."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One place that can hold and multiply weights.

    `free_bytes` is what this process can really get there now: for `cpu` that is the least of physical
    memory and every cgroup above the process. `capabilities` are names such as "avx2", "avx512_bf16",
    "bfloat16", "neon". `largest_buffer_bytes` is the most that one tensor may take there, None where only memory
    bounds it.
    """

    kind: str  # cpu | cuda | mps | …
    index: int | None
    name: str
    total_bytes: int
    free_bytes: int
    cores: int = 0
    capabilities: frozenset[str] = frozenset()
    reason: str = ""
    passed_over: tuple[str, ...] = ()
    largest_buffer_bytes: int | None = None

    @property
    def torch_name(self) -> str:
        """The device as torch names it: "cpu", "cuda:1", "mps"."""
        return self.kind if self.index is None or self.kind in ("cpu", "mps") else f"{self.kind}:{self.index}"


class Unusable(str):
    """Why a device that is there cannot be used, with what would mend it: to fall back from it is said aloud."""

    __slots__ = ()


@dataclass(frozen=True)
class Check:
    """One thing that was checked: what was found, and what to do about it when it is not well.

    What is not `required` costs speed or exactness when it is not well, and keeps nothing from running.
    """

    name: str
    ok: bool
    found: str
    remedy: str = ""
    required: bool = True


@dataclass(frozen=True)
class CompatibilityReport:
    """Whether a device can run a model, check by check."""

    device: Device
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """True when every required check passed."""
        return all(check.ok or not check.required for check in self.checks)


@dataclass(frozen=True)
class MemorySettings:
    """How a device is best used, with the reason for each choice.

    `compute_dtype` is the type that products are made in, `cache_dtype` that of the KV cache (torch names,
    such as "float32"); `prefill_chunk` is how many prompt tokens are read at a time; `threads` is 0 where
    it does not apply.
    """

    compute_dtype: str
    cache_dtype: str
    prefill_chunk: int
    threads: int
    reasons: tuple[str, ...] = ()
