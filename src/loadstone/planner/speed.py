"""How long a load takes and how fast answers come, expected before either: arithmetic on a machine's speeds.

Decoding waits for memory: each token reads all weights that are multiplied once, and the KV cache. Reading a prompt
waits for products. The shares of a machine's rates that are reached were measured with our kernels on the processor
(`benchmarks/README.md` has the machines), with each of the kinds of kernels that there are. Where nothing was measured
the expectation is None, and only what the memory's rate makes impossible is told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loadstone.hardware.device import Device
from loadstone.hardware.speeds import Figure, Speeds

from .plan import Plan

if TYPE_CHECKING:
    from loadstone.checkpoint.spec import ModelSpec

PROMPT_TOKENS = 512
"""Tokens of the prompt whose time to the first token is told."""

OF_PEAK = 0.8
"""What programs read of a memory's published rate, about; assumed for machines that were not measured."""

START_SECONDS = 1.4
"""Imports of torch and reading a large vocabulary, measured on two cores of an AMD EPYC (Zen 4)."""

PAGE_CACHE = 12.9e9
"""Bytes a second that come from the system's memory of files, measured on two such cores."""


PACKED_FORM = 0.6
"""How fast weights that are packed in their file are packed anew, by how fast those of 16 bits are, about."""


@dataclass(frozen=True)
class Kernels:
    """What our products make of a processor: measured shares and rates, a second and core, by strategy.

    `memory_share` is how much of the memory's rate decoding reads, and `core_bytes` how many bytes of weights a core
    multiplies; the lesser of the two decides. `layer_seconds` is what each layer costs beside, of a token that is
    decoded and of one that is read. `prompt_share` is the rate of a prompt's products by that of float32 products.
    `core_packs` is how many weights of 16 bits a core quantises.
    """

    memory_share: float
    core_bytes: Mapping[str, float]
    layer_seconds: float
    prompt_share: Mapping[str, float]
    core_packs: Mapping[str, float]


WIDE = Kernels(
    memory_share=0.95,
    core_bytes={"none": 21.5e9, "8bit": 18.8e9, "4bit": 23e9},
    layer_seconds=35e-6,
    prompt_share={"none": 0.65, "8bit": 2.1, "4bit": 2.2},
    core_packs={"none": 0.48e9, "8bit": 0.48e9, "4bit": 0.42e9},
)
"""AVX512 with VNNI: fitted on a core and on two of an AMD EPYC (Zen 4), with the shapes of 135M to 7B."""

NARROW = Kernels(
    memory_share=0.95, core_bytes={"4bit": 9.6e9}, layer_seconds=35e-6, prompt_share={"4bit": 0.55}, core_packs={}
)
"""AVX2: fitted on two cores of an AMD EPYC (Zen 3), with the shapes of 0.5B and 7B; its float32 products are counted as
32 operations a cycle and core, at 3.4 GHz."""


@dataclass(frozen=True)
class Expected:
    """What is expected of a plan; seconds, and tokens a second of one conversation. None is not known.

    `first_load_s` makes what the store keeps, from files that are not in memory; `later_load_s` is from the store.
    `first_token_s` is for a prompt of PROMPT_TOKENS. `decode_at_most` is what the memory's rate allows: nothing that
    reads these weights for each token is faster. `unknown` says why something is not known.
    """

    first_load_s: float | None
    later_load_s: float | None
    prompt_tok_s: float | None
    first_token_s: float | None
    decode_tok_s: float | None
    decode_at_most: float | None
    token_bytes: int
    unknown: tuple[str, ...] = ()


def expect(plan: Plan, spec: ModelSpec, speeds: Speeds, *, file_bytes: int, is_kept: bool = True) -> Expected:
    """Return what is expected of `plan` on a machine of these speeds.

    `file_bytes` is what the checkpoint's weights take on disk; `is_kept` tells whether the store keeps the result.
    """
    kernels = kernels_of(plan.device)
    weights = multiplied_bytes(plan, spec)
    token_bytes = weights + plan.kv_bytes // plan.streams // 2
    rate = _reached(speeds.memory)
    prompt = _prompt_rate(plan, spec, kernels, speeds.products)
    packing = _packing(plan, spec, kernels)
    return Expected(
        first_load_s=_first_load(packing, speeds.disk, file_bytes),
        later_load_s=_later_load(plan, kernels, packing, is_kept=is_kept),
        prompt_tok_s=prompt,
        first_token_s=PROMPT_TOKENS / prompt if prompt else None,
        decode_tok_s=_decode(plan, spec, kernels, rate, token_bytes),
        decode_at_most=speeds.memory.value / token_bytes if speeds.memory else None,
        token_bytes=token_bytes,
        unknown=_unknown(plan, kernels, speeds),
    )


def kernels_of(device: Device) -> Kernels | None:
    """Return the kernels that a device has, by what its processor can do; None where none of ours run."""
    has = device.capabilities
    if device.kind != "cpu" or not has >= {"avx2", "fma"}:
        return None
    return WIDE if "avx512_vnni" in has else NARROW


def multiplied_bytes(plan: Plan, spec: ModelSpec) -> int:
    """Return the bytes of weights that one token reads: all but the rows of an embedding that only looks up."""
    parts = plan.weight_bytes
    head = parts["embedding"] if spec.tied_embeddings else parts["lm_head"]
    return parts["linear"] + head + parts["norm"]


def _reached(rate: Figure | None) -> float | None:
    return None if rate is None else rate.value * (OF_PEAK if rate.is_peak else 1.0)


def _decode(
    plan: Plan, spec: ModelSpec, kernels: Kernels | None, memory: float | None, token_bytes: int
) -> float | None:
    core_bytes = kernels.core_bytes.get(plan.strategy) if kernels else None
    if kernels is None or core_bytes is None or memory is None:
        return None
    rate = min(kernels.memory_share * memory, core_bytes * plan.device.cores)
    return 1 / (token_bytes / rate + spec.layers * kernels.layer_seconds)


def _prompt_rate(plan: Plan, spec: ModelSpec, kernels: Kernels | None, products: Figure | None) -> float | None:
    """Return the tokens of a prompt that are read a second: two operations a weight of the layers, and token."""
    share = kernels.prompt_share.get(plan.strategy) if kernels else None
    if kernels is None or share is None or products is None:
        return None
    seconds = 2 * spec.parameters_by_part["linear"] / (share * products.value)
    return 1 / (seconds + spec.layers * kernels.layer_seconds)


def _packing(plan: Plan, spec: ModelSpec, kernels: Kernels | None) -> float | None:
    """Return the seconds that making all weights takes, where the files are in memory."""
    rate = kernels.core_packs.get(plan.strategy) if kernels else None
    if rate is None:
        return None
    form = PACKED_FORM if spec.format == "gguf" or spec.quantized is not None else 1.0
    return spec.parameters / (rate * form * plan.device.cores)


def _first_load(packing: float | None, disk: Figure | None, file_bytes: int) -> float | None:
    if packing is None or disk is None:
        return None
    return START_SECONDS + max(file_bytes / disk.value, packing)


def _later_load(plan: Plan, kernels: Kernels | None, packing: float | None, *, is_kept: bool) -> float | None:
    if kernels is None:
        return None
    if is_kept:
        return START_SECONDS + sum(plan.weight_bytes.values()) / PAGE_CACHE
    return None if packing is None else START_SECONDS + packing


def _unknown(plan: Plan, kernels: Kernels | None, speeds: Speeds) -> tuple[str, ...]:
    found = []
    if kernels is None:
        found.append(f"speeds on {plan.device.kind}: nobody has measured this library there; memory sets the most")
    elif plan.strategy not in kernels.core_bytes:
        found.append(f"speeds of {plan.strategy}: nobody has measured it on a processor like this")
    elif plan.strategy not in kernels.core_packs:
        found.append(f"how long quantising to {plan.strategy} takes on a processor like this")
    if speeds.memory is None:
        found.append(f"the memory's rate of {plan.device.torch_name}: nothing faster than it can be ruled out")
    if kernels is not None and speeds.products is None:
        found.append("the rate of products, and so the time to read a prompt")
    if speeds.disk is None:
        found.append("the disk's rate, and so the time of a first load")
    return tuple(found)
