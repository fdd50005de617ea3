"""What is expected of a plan: formulas on a machine's speeds, and None where nobody has measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from model_shapes import CPU_SETTINGS, GB, GPU_SETTINGS, qwen_7b, tiny

from loadstone.config import LoadConfig
from loadstone.hardware import Device
from loadstone.hardware.speeds import Figure, Speeds
from loadstone.planner import Expected, Plan, expect, find_machine, plan, speed

QWEN = qwen_7b()
FILES = 15_231_233_024
WIDE = frozenset({"avx2", "fma", "avx512_vnni"})
NARROW = frozenset({"avx2", "fma"})
SPEEDS = Speeds(Figure(30e9, "given"), Figure(200e9, "given"), Figure(1e9, "given"))


def planned(capabilities: frozenset[str] = WIDE, spec: Any = QWEN, kind: str = "cpu", **wish: Any) -> Plan:
    device = Device(kind, None, "Test", 64 * GB, 64 * GB, cores=2, capabilities=capabilities)
    settings = CPU_SETTINGS if kind == "cpu" else GPU_SETTINGS
    return plan(LoadConfig(**wish), spec, device, settings, runtime_bytes=GB // 2, resident_bytes=0)


def expected(plan: Plan | None = None, speeds: Speeds = SPEEDS, **more: Any) -> Expected:
    return expect(plan or planned(), QWEN, speeds, **{"file_bytes": FILES, **more})


def test_a_token_reads_what_is_multiplied_and_half_the_cache() -> None:
    found = planned(context=4096)
    parts = found.weight_bytes
    assert expected(found).token_bytes == parts["linear"] + parts["lm_head"] + parts["norm"] + found.kv_bytes // 2


def test_a_tied_embedding_is_multiplied() -> None:
    spec = tiny(tied=True)
    found = planned(spec=spec)
    assert speed.multiplied_bytes(found, spec) == sum(found.weight_bytes.values())


def test_more_streams_do_not_slow_down_one_in_what_it_reads() -> None:
    assert expected(planned(streams=4)).token_bytes == expected(planned()).token_bytes


def test_decoding_is_bounded_by_the_memory_and_near_it() -> None:
    found = expected()
    assert found.decode_at_most == pytest.approx(30e9 / found.token_bytes)
    assert found.decode_tok_s is not None
    assert 0.8 * found.decode_at_most < found.decode_tok_s < found.decode_at_most


def test_where_cores_are_slower_than_memory_they_decide() -> None:
    """Unpacking 4 bits without AVX512 is slower than what memory gives, on two cores."""
    fast = replace(SPEEDS, memory=Figure(300e9, "given"))
    found = expected(planned(NARROW), fast)
    assert found.decode_tok_s == pytest.approx(2 * speed.NARROW.core_bytes["4bit"] / found.token_bytes, rel=0.05)


def test_a_prompt_takes_two_operations_a_weight_and_token() -> None:
    found = expected()
    rate = speed.WIDE.prompt_share["4bit"] * 200e9 / (2 * QWEN.parameters_by_part["linear"])
    assert found.prompt_tok_s == pytest.approx(rate, rel=0.05)
    assert found.prompt_tok_s is not None
    assert found.first_token_s == pytest.approx(512 / found.prompt_tok_s)


def test_a_first_load_goes_at_the_slower_of_disk_and_quantising() -> None:
    slow, fast = (expected(speeds=replace(SPEEDS, disk=Figure(rate, "given"))).first_load_s for rate in (0.1e9, 100e9))
    assert slow == pytest.approx(speed.START_SECONDS + FILES / 0.1e9)
    assert fast == pytest.approx(speed.START_SECONDS + QWEN.parameters / (2 * speed.WIDE.core_packs["4bit"]))


def test_what_is_not_kept_is_made_at_each_load() -> None:
    once, always = (expected(is_kept=is_kept).later_load_s or 0 for is_kept in (True, False))
    assert always == pytest.approx(speed.START_SECONDS + QWEN.parameters / (2 * speed.WIDE.core_packs["4bit"]))
    assert once < always


def test_a_later_load_maps_what_the_store_has() -> None:
    found = expected()
    assert found.later_load_s is not None
    assert speed.START_SECONDS < found.later_load_s < speed.START_SECONDS + 1


def test_a_published_rate_is_not_quite_reached() -> None:
    def rate(is_peak: bool) -> float:
        return expected(speeds=replace(SPEEDS, memory=Figure(30e9, "given", is_peak))).decode_tok_s or 0

    assert rate(True) == pytest.approx(speed.OF_PEAK * rate(False), rel=0.05)


@pytest.mark.parametrize(
    ("kind", "capabilities"), [("cuda", frozenset({"bfloat16"})), ("mps", frozenset()), ("cpu", frozenset({"neon"}))]
)
def test_where_nobody_has_measured_only_the_memorys_limit_is_told(kind: str, capabilities: frozenset[str]) -> None:
    found = expected(planned(capabilities, kind=kind))
    assert (found.first_load_s, found.later_load_s, found.first_token_s, found.decode_tok_s) == (None,) * 4
    assert found.decode_at_most is not None
    assert any("nobody has measured" in reason for reason in found.unknown)


def test_without_any_speeds_nothing_is_told_but_why() -> None:
    found = expected(speeds=Speeds())
    assert (found.decode_tok_s, found.decode_at_most, found.first_token_s, found.first_load_s) == (None,) * 4
    assert len(found.unknown) == 3


@pytest.mark.parametrize(
    ("capabilities", "memory", "products", "decode", "prompt"),
    [(WIDE, 33e9, 203e9, 7.8, 33), (NARROW, 33e9, 218e9, 4.9, 10)],
)
def test_figures_of_the_benchmarks_are_met_within_a_quarter(
    capabilities: frozenset[str], memory: float, products: float, decode: float, prompt: float
) -> None:
    """7B shapes in 4 bits on two cores, with AVX512 and without: what `benchmarks/README.md` has of them."""
    speeds = Speeds(Figure(memory, "given"), Figure(products, "given"))
    found = expected(planned(capabilities, context=512), speeds)
    assert found.decode_tok_s == pytest.approx(decode, rel=0.25)
    assert found.prompt_tok_s == pytest.approx(prompt, rel=0.25)


def test_a_3060_is_told_its_limit() -> None:
    """360 GB/s by about 4 GB a token."""
    machine = find_machine("rtx-3060-12gb")
    made = plan(LoadConfig(), QWEN, machine.device, GPU_SETTINGS, runtime_bytes=GB // 4, resident_bytes=0)
    found = expect(made, QWEN, machine.speeds, file_bytes=FILES)
    assert found.decode_at_most is not None
    assert 70 < found.decode_at_most < 100
