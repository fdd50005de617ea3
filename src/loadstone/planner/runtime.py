"""What a process takes beside the model: the interpreter, libraries, the tokenizer, compiled kernels, threads.

Most of it can be measured once it is there; what is still to come is counted from what it took elsewhere. In bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loadstone.checkpoint.spec import ModelSpec

# Measured on Linux with torch 2.13's CPU build and llvmlite 0.45.
BARE = 40_000_000  # Python with this library, before anything is loaded
TORCH = 205_000_000
KERNELS = 75_000_000
TOKENIZER_PER_TOKEN = 750  # of its vocabulary
# What comes after all of these: threads and their stacks, what torch sets up with its first product, the allocator's.
REST = 50_000_000
# The library that unpacks GGUF's weights, and what unpacking leaves behind in the allocator.
GGUF = 30_000_000
# Where our kernels cannot be had, rows of a weight are made whole for each product.
WITHOUT_KERNELS = 80_000_000
# An accelerator's own context, and the libraries that come with it.
ACCELERATOR = 250_000_000


LIBRARIES = BARE + TORCH + KERNELS


@dataclass(frozen=True)
class Allowance:
    """What is planned for beside all that can be counted or measured before, in bytes, as `loads` loads taught.

    Plans with it would have been too high by `too_high` bytes for these loads, from the least to the most. Without
    enough of them it is what was taken elsewhere.
    """

    bytes: int = REST
    loads: int = 0
    too_high: tuple[int, int] = (0, 0)


NOTHING_LEARNED = Allowance()


def runtime_bytes(
    spec: ModelSpec, device_kind: str, process: int, *, is_ready: bool, has_kernels: bool = True, rest: int = REST
) -> int:
    """Return what a process that has `process` bytes with torch in it will take on a device beside the model.

    `is_ready` says that tokenizer and kernels are there already, and so are counted in what the process has. `rest`
    is what earlier loads took beside all that.
    """
    if device_kind != "cpu":
        return ACCELERATOR
    to_come = rest + (GGUF if spec.format == "gguf" else 0) + (0 if has_kernels else WITHOUT_KERNELS)
    if not is_ready:
        to_come += KERNELS + TOKENIZER_PER_TOKEN * spec.vocab_size
    return process + to_come
