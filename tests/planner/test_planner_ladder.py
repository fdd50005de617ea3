"""Memory that turns out shorter than planned: each step down takes less, and gives up what hurts least first."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_shapes import CPU_SETTINGS, GB, GPU_SETTINGS, cpu, qwen_7b

from loadstone.config import LoadConfig
from loadstone.errors import ResourceError
from loadstone.hardware import Device
from loadstone.planner import Below, Plan, plan

QWEN = qwen_7b()


def decide(below: Plan | None = None, *, free: int = 64 * GB, **wish: Any) -> Plan:
    return plan(
        LoadConfig(**wish), QWEN, cpu(free), CPU_SETTINGS, runtime_bytes=GB // 2, resident_bytes=0,
        below=below and Below(below),
    )  # fmt: skip


def rungs(**wish: Any) -> list[Plan]:
    """Return every plan of the ladder from the top on."""
    found = [decide(**wish)]
    try:
        while True:
            found.append(decide(found[-1], **wish))
    except ResourceError:
        return found


def test_prompts_are_read_in_smaller_chunks_first() -> None:
    first = decide()
    second = decide(first)
    assert second.settings.prefill_chunk < first.settings.prefill_chunk
    assert (second.strategy, second.context, second.streams) == (first.strategy, first.context, first.streams)


def test_streams_go_before_the_context_does() -> None:
    streams = [one.streams for one in rungs(streams=8)]
    contexts = [one.context for one in rungs(streams=8)]
    assert streams == sorted(streams, reverse=True)
    assert streams[-1] == 1
    assert all(context == contexts[0] for context, left in zip(contexts, streams, strict=True) if left > 1)


def test_context_that_was_asked_for_stays() -> None:
    assert {one.context for one in rungs(context=8192, streams=2)} == {8192}


def test_context_that_was_not_asked_for_gets_shorter() -> None:
    assert 512 <= rungs()[-1].context < decide().context


def test_quantization_gets_stronger_only_when_it_is_auto() -> None:
    assert {one.strategy for one in rungs(quantization="8bit")} == {"8bit"}
    assert list(dict.fromkeys(one.strategy for one in rungs(quantization="auto"))) == ["none", "8bit", "4bit"]


def test_weights_that_were_too_much_alone_are_quantised_or_refused() -> None:
    def again(**wish: Any) -> Plan:
        first = decide(**wish)
        return plan(
            LoadConfig(**wish), QWEN, cpu(64 * GB), CPU_SETTINGS, runtime_bytes=GB // 2, resident_bytes=0,
            below=Below(first, in_weights=True),
        )  # fmt: skip

    assert again(quantization="auto", streams=4).strategy == "8bit"
    with pytest.raises(ResourceError):
        again(quantization="8bit", streams=4)


def test_the_last_step_is_a_refusal_with_numbers() -> None:
    last = rungs()[-1]
    with pytest.raises(ResourceError) as caught:
        decide(last)
    assert caught.value.allowed == last.needed_bytes - 1
    assert (caught.value.needed or 0) > caught.value.allowed


def test_step_says_what_it_was_taken_for() -> None:
    second = decide(decide())
    assert any("memory turned out shorter than planned" in reason for reason in second.reasons)


def test_long_context_is_read_in_smaller_chunks_where_whole_ones_do_not_fit() -> None:
    gpu = Device("cuda", 0, "GPU", 24 * GB, 12 * GB, reason="the only one")
    found = plan(LoadConfig(context=32_768), QWEN, gpu, GPU_SETTINGS, runtime_bytes=GB // 2)
    assert found.context == 32_768
    assert found.settings.prefill_chunk < GPU_SETTINGS.prefill_chunk
    assert any(f"{found.settings.prefill_chunk} prompt tokens at a time" in reason for reason in found.reasons)


@given(
    free=st.integers(5 * GB, 40 * GB), quantization=st.sampled_from(["auto", "none", "8bit", "4bit"]),
    streams=st.integers(1, 16), context=st.none() | st.integers(1, 32_768),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_every_step_takes_less_than_the_one_before(
    free: int, quantization: str, streams: int, context: int | None
) -> None:
    wish = {"quantization": quantization, "streams": streams, "context": context}
    below: Plan | None = None
    try:
        for _ in range(64):
            step = decide(below, free=free, **wish)
            assert step.needed_bytes <= step.allowed_bytes
            assert below is None or step.needed_bytes < below.needed_bytes
            below = step
    except ResourceError:
        return
    pytest.fail("the ladder has no end")
