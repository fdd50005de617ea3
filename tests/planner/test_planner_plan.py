"""The decision: what is chosen and why, and what a refusal says."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_shapes import CPU_SETTINGS, GB, GPU_SETTINGS, cpu, qwen_7b, tiny

from loadstone.checkpoint.spec import ModelSpec
from loadstone.config import LoadConfig
from loadstone.errors import ConfigurationError, ResourceError
from loadstone.hardware import Device
from loadstone.planner import Plan, find_machine, plan
from loadstone.units import format_size

RUNTIME = GB // 2
QWEN = qwen_7b()
TINY = tiny()


def decide(device: Device | None = None, spec: ModelSpec = QWEN, **wish: Any) -> Plan:
    """Plan for a wish, on a processor with 24 GB unless told."""
    device = device or cpu(24 * GB)
    chosen = CPU_SETTINGS if device.kind == "cpu" else GPU_SETTINGS
    return plan(LoadConfig(**wish), spec, device, chosen, runtime_bytes=RUNTIME, resident_bytes=0)


def has_reason(found: Plan, text: str) -> bool:
    return any(text in reason for reason in found.reasons)


def test_the_main_job_fits_in_20_gb() -> None:
    found = decide(max_memory="20GB", quantization="4bit")
    assert (found.strategy, found.context, found.streams) == ("4bit", 4096, 1)
    assert found.needed_bytes <= found.allowed_bytes == 20 * GB
    assert found.steady_bytes == (
        sum(found.weight_bytes.values()) + found.kv_bytes + found.activation_bytes + found.runtime_bytes
    )


def test_every_choice_has_its_reason() -> None:
    found = decide(max_memory="20GB")
    for text in (
        "device cpu: no accelerator can be used",
        "quantization 4bit: as asked",
        "context 4096: the default; the model has 32768",
        "allowed 20 GB: max_memory",
        "float32: tested",
    ):
        assert has_reason(found, text), text


def test_other_names_of_a_strategy_mean_the_same() -> None:
    assert decide(quantization="nf4").strategy == "4bit"


def test_unknown_strategy_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="5bit"):
        decide(quantization="5bit")


@pytest.mark.parametrize(("free", "strategy"), [(24, "none"), (12, "8bit"), (8, "4bit")])
def test_auto_takes_the_best_quality_that_fits(free: int, strategy: str) -> None:
    found = decide(cpu(free * GB), quantization="auto")
    assert (found.strategy, found.context) == (strategy, 4096)
    assert has_reason(found, f"quantization {strategy}: the best quality that fits")


def test_auto_names_what_the_better_strategies_would_need() -> None:
    found = decide(cpu(12 * GB), quantization="auto")
    assert has_reason(found, "(none needs 1")


def test_auto_shortens_the_context_only_at_the_smallest_strategy() -> None:
    found = decide(cpu(10 * GB), quantization="auto", streams=16)
    assert found.strategy == "4bit"
    assert 512 <= found.context < 4096
    assert has_reason(found, "quantization 4bit: nothing larger fits")


def test_context_is_as_long_as_fits() -> None:
    found = decide(cpu(10 * GB), streams=16)
    assert 512 <= found.context < 4096
    assert found.needed_bytes <= found.allowed_bytes
    assert has_reason(found, f"context {found.context}: as long as fits")


def test_context_auto_is_all_that_the_model_has_where_it_fits() -> None:
    assert decide(context="auto").context == QWEN.max_context


def test_context_auto_is_as_long_as_fits() -> None:
    found = decide(cpu(8 * GB), context="auto", streams=2)
    assert 4096 < found.context < QWEN.max_context
    assert found.needed_bytes <= found.allowed_bytes


def test_context_is_no_longer_than_the_model_has() -> None:
    found = decide(spec=tiny(max_context=300))
    assert found.context == 300
    assert has_reason(found, "context 300: all that the model has")


def test_more_context_than_usual_is_given_when_asked_for() -> None:
    found = decide(context=20_000)
    assert found.context == 20_000
    assert has_reason(found, "context 20000: as asked")


def test_more_context_than_the_model_has_is_refused_as_configuration() -> None:
    with pytest.raises(ConfigurationError, match="32768") as caught:
        decide(context=32_769)
    assert caught.value.key == "model_config.context"


def test_context_asked_for_is_never_shortened() -> None:
    with pytest.raises(ResourceError):
        decide(cpu(8 * GB), context=32_768)


def test_refusal_has_needed_allowed_and_what_would_fit() -> None:
    with pytest.raises(ResourceError) as caught:
        decide(max_memory="9GB", quantization="none")
    error = caught.value
    assert error.allowed == 9 * GB
    assert error.needed is not None
    assert error.needed > 15 * GB
    four = decide(max_memory="9GB", quantization="4bit")
    wanted = f"quantization 4bit with context {four.context} needs {format_size(four.needed_bytes)}"
    assert wanted in error.would_fit
    assert wanted in str(error)
    assert format_size(error.needed) in str(error)
    assert "max_memory" in str(error)


def test_what_would_fit_does_fit() -> None:
    with pytest.raises(ResourceError) as caught:
        decide(cpu(11 * GB), quantization="none", context=30_000)
    assert caught.value.would_fit
    for words in caught.value.would_fit:
        found = re.fullmatch(r"quantization (\w+) with context (\d+) needs (.+)", words)
        assert found is not None
        again = decide(cpu(11 * GB), quantization=found[1], context=int(found[2]))
        assert format_size(again.needed_bytes) == found[3]


def test_refusal_of_a_long_context_offers_a_shorter_one() -> None:
    with pytest.raises(ResourceError) as caught:
        decide(cpu(7 * GB), context=32_768)
    (only,) = caught.value.would_fit
    assert only.startswith("quantization 4bit with context ")


@pytest.mark.parametrize("quantization", ["auto", "none", "8bit", "4bit", "int4"])
def test_refusal_tells_that_more_is_needed_than_allowed(quantization: str) -> None:
    with pytest.raises(ResourceError) as caught:
        decide(cpu(4 * GB), quantization=quantization)
    assert (caught.value.needed or 0) > (caught.value.allowed or 0) > 0


def test_refusal_offers_no_larger_strategy() -> None:
    with pytest.raises(ResourceError) as caught:
        decide(cpu(8 * GB), quantization="8bit")
    assert all("none" not in words for words in caught.value.would_fit)


def test_refusal_when_nothing_fits_names_the_memory_that_would() -> None:
    with pytest.raises(ResourceError, match="Raise max_memory to at least") as caught:
        decide(max_memory="3GB")
    assert caught.value.would_fit == ()
    least = re.search(r"at least ([0-9.]+) GB", str(caught.value))
    assert least is not None
    assert decide(max_memory=round((float(least[1]) + 0.01) * GB), context=512).strategy == "4bit"


def test_refusal_by_the_machine_does_not_blame_max_memory() -> None:
    with pytest.raises(ResourceError) as caught:
        decide(cpu(3 * GB, total=16 * GB), max_memory="20GB")
    assert caught.value.allowed == 3 * GB
    assert "close other programs" in str(caught.value)
    assert "less than max_memory 20 GB" in str(caught.value)


def test_force_overrides_a_refusal_and_says_so() -> None:
    found = decide(max_memory="5GB", force=True, context=1024)
    assert found.forced
    assert (found.context, found.strategy) == (1024, "4bit")
    assert found.needed_bytes > found.allowed_bytes == 5 * GB
    assert has_reason(found, "forced: needs")


def test_force_changes_nothing_where_it_fits() -> None:
    assert decide(force=True) == decide()


def test_force_does_not_load_what_the_machine_cannot_hold() -> None:
    with pytest.raises(ResourceError, match="force does not help"):
        decide(cpu(4 * GB), force=True)


def test_memory_that_this_process_holds_already_counts_as_its_own() -> None:
    device = cpu(5 * GB, total=8 * GB)
    found = plan(LoadConfig(), TINY, device, CPU_SETTINGS, runtime_bytes=RUNTIME, resident_bytes=GB)
    assert found.allowed_bytes == 6 * GB


def test_allowed_is_never_more_than_there_is() -> None:
    found = plan(LoadConfig(), TINY, cpu(5 * GB), CPU_SETTINGS, runtime_bytes=RUNTIME, resident_bytes=GB)
    assert found.allowed_bytes == 5 * GB


def test_accelerators_memory_bounds_a_plan_for_it() -> None:
    gpu = Device("cuda", 0, "GPU", 24 * GB, 12 * GB, reason="the only one")
    found = decide(gpu, quantization="auto")
    assert found.strategy == "8bit"
    assert found.allowed_bytes == 12 * GB


def test_plan_cannot_be_changed() -> None:
    found = decide(spec=TINY)
    with pytest.raises(FrozenInstanceError):
        found.context = 1
    with pytest.raises(TypeError):
        found.weight_bytes["linear"] = 1


@given(
    allowed=st.integers(500_000_000, 700_000_000),
    more=st.integers(0, 200_000_000),
    quantization=st.sampled_from(["auto", "none", "8bit", "4bit", "int4"]),
    context=st.none() | st.integers(1, 32_768),
    streams=st.integers(1, 8),
)
@settings(max_examples=150, deadline=None)
def test_more_memory_never_refuses_what_fitted(
    allowed: int, more: int, quantization: str, context: int | None, streams: int
) -> None:
    wish = {"quantization": quantization, "context": context, "streams": streams, "spec": TINY}
    try:
        small = decide(max_memory=allowed, **wish)
    except ResourceError:
        return
    large = decide(max_memory=allowed + more, **wish)
    assert small.needed_bytes <= allowed
    assert large.needed_bytes <= allowed + more
    if quantization != "auto":
        assert large.context >= small.context


def test_plan_is_made_without_torch() -> None:
    code = (
        "import sys, loadstone.planner\n"
        "from loadstone.quantization import find_strategy\n"
        "[find_strategy(name).weight_bytes('linear', 64, 64) for name in ('none', '8bit', '4bit')]\n"
        "print(sorted({'torch', 'transformers', 'bitsandbytes', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- a device that bounds each buffer ---------------------------------------------------------------------------------


def mac(memory: int, *, largest: int | None) -> Device:
    return Device("mps", 0, "Mac", memory, memory, reason="the only one", largest_buffer_bytes=largest)


def test_a_context_whose_keys_are_larger_than_a_buffer_is_shortened() -> None:
    """28 KiB a token, in one piece; with memory for all of it."""
    wish = {"context": "auto", "streams": 8}
    assert decide(mac(64 * GB, largest=None), **wish).context == QWEN.max_context
    found = decide(mac(64 * GB, largest=4 * GB), **wish)
    assert 4096 < found.context < QWEN.max_context
    assert found.kv_bytes // 2 <= 4 * GB
    assert has_reason(found, "no tensor above 4 GB: as much as one buffer of mps may have")


def test_a_context_asked_for_that_is_larger_than_a_buffer_is_refused_with_both_sizes() -> None:
    with pytest.raises(ResourceError, match=r"keys of the KV cache would take 7\.52 GB in one") as caught:
        decide(mac(64 * GB, largest=4 * GB), context=32_768, streams=8)
    assert caught.value.allowed == 4 * GB
    assert (caught.value.needed or 0) > 4 * GB
    (only,) = caught.value.would_fit
    assert only.startswith("quantization 4bit with context ")


def test_scores_that_are_larger_than_a_buffer_are_made_in_smaller_chunks() -> None:
    found = decide(mac(64 * GB, largest=2 * GB), context=32_768)
    assert found.context == 32_768
    assert found.settings.prefill_chunk < GPU_SETTINGS.prefill_chunk


def test_a_weight_that_is_larger_than_a_buffer_is_refused() -> None:
    """Nothing here splits a weight; the embedding has 1.09 GB. Forcing tries all the same."""
    device = mac(64 * GB, largest=GB)
    with pytest.raises(ResourceError, match=r"largest weight would take 1\.09 GB in one piece, and mps") as caught:
        decide(device, context=512)
    assert caught.value.would_fit == ()
    assert "device cpu" in (caught.value.hint or "")
    found = decide(device, context=512, force=True)
    assert found.forced
    assert has_reason(found, "forced: the largest weight would take 1.09 GB in one piece")


def test_auto_counts_pieces_too() -> None:
    """16 GB, of which Metal recommends two thirds: as planned for a machine that one does not have."""
    found = decide(find_machine("m2-16gb").device, quantization="auto")
    assert found.strategy == "8bit"
    assert found.allowed_bytes == round(16 * 2**30 * 2 / 3)


# --- integers, where nothing of ours multiplies NF4

WITH_AVX2 = replace(cpu(8 * GB), capabilities=frozenset({"avx2", "fma"}))
MPS = Device("mps", None, "GPU", 8 * GB, 8 * GB, reason="the only one")


def decide_without_kernels(device: Device, **wish: Any) -> Plan:
    settings = CPU_SETTINGS if device.kind == "cpu" else GPU_SETTINGS
    return plan(
        LoadConfig(**wish), QWEN, device, settings, runtime_bytes=RUNTIME, resident_bytes=0, has_kernels=False
    )  # fmt: skip


@pytest.mark.parametrize("device", [WITH_AVX2, MPS], ids=lambda one: one.kind)
def test_auto_keeps_4_bits_as_integers_where_these_are_multiplied_faster(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    found = decide_without_kernels(device, quantization="auto")
    assert found.strategy == "int4"
    assert has_reason(found, "has a product of 4-bit integers")


@pytest.mark.parametrize("device", [WITH_AVX2, MPS], ids=lambda one: one.kind)
def test_auto_falls_back_on_nf4_where_integers_do_not_fit(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    room = decide_without_kernels(device, quantization="int4", context=512).needed_bytes
    found = []
    for less in range(20):
        with suppress(ResourceError):
            wish = {"quantization": "auto", "context": 512, "max_memory": room - less * GB // 20}
            found.append(decide_without_kernels(device, **wish).strategy)
    assert list(dict.fromkeys(found)) == ["int4", "4bit"]


@pytest.mark.parametrize("platform", ["win32", "linux"])
def test_auto_keeps_4_bits_as_nf4_where_nothing_multiplies_integers_faster(
    platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Windows torch has no vectors for them, and nowhere without AVX2."""
    monkeypatch.setattr(sys, "platform", platform)
    device = WITH_AVX2 if platform == "win32" else replace(WITH_AVX2, capabilities=frozenset({"neon"}))
    assert decide_without_kernels(device, quantization="auto").strategy == "4bit"


def test_nf4_as_asked_is_told_that_integers_are_faster() -> None:
    assert has_reason(decide_without_kernels(MPS, quantization="4bit"), "int4 is faster here")
    assert not has_reason(decide(quantization="4bit"), "int4")
