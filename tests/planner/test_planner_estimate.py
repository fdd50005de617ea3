"""The arithmetic: bytes by part and phase, held against sizes worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_shapes import CPU_SETTINGS, GPU_SETTINGS, make_spec, qwen_7b, tiny

from loadstone.checkpoint.workers import thread_count
from loadstone.planner.estimate import (
    Estimator,
    dtype_bytes,
    estimate_activations,
    estimate_kv,
    estimate_load,
    estimate_weights,
    gathered_bytes,
)
from loadstone.quantization import Strategy, find_strategy

LINEAR = 6_525_288_448  # numbers in the layers' matrices of Qwen2.5-7B
OUTER = 152_064 * 3584  # in its embedding, and again in its last matrix
VECTORS = 28 * (2 * 3584 + 3584 + 512 + 512) + 3584  # norms and biases


def test_shapes_are_those_of_the_model() -> None:
    assert qwen_7b().parameters == LINEAR + 2 * OUTER + VECTORS == 7_615_616_512


def test_four_bits_by_part() -> None:
    parts = estimate_weights(qwen_7b(), find_strategy("4bit"), CPU_SETTINGS, "cpu")
    assert parts == {
        "linear": LINEAR // 2 + LINEAR // 64 * 2,
        "embedding": OUTER + 4 * 152_064,
        "lm_head": OUTER + 4 * 152_064,
        "norm": 4 * VECTORS,
    }


def test_unquantised_weights_keep_their_type_on_the_processor() -> None:
    none = find_strategy("none")
    half = estimate_weights(qwen_7b(), none, CPU_SETTINGS, "cpu")
    full = estimate_weights(qwen_7b(dtype="F32"), none, CPU_SETTINGS, "cpu")
    assert (half["linear"], full["linear"]) == (2 * LINEAR, 4 * LINEAR)


def test_unquantised_weights_take_the_compute_type_on_an_accelerator() -> None:
    parts = estimate_weights(qwen_7b(dtype="F32"), find_strategy("none"), GPU_SETTINGS, "cuda")
    assert (parts["linear"], parts["norm"]) == (2 * LINEAR, 2 * VECTORS)


def test_packed_weights_stay_in_16_bits_when_not_quantised() -> None:
    spec = replace(tiny(dtype="Q4_K"), format="gguf")
    parts = estimate_weights(spec, find_strategy("none"), CPU_SETTINGS, "cpu")
    assert parts["embedding"] == 1000 * 128 * 2


def test_tied_embedding_is_kept_once() -> None:
    strategy = find_strategy("8bit")
    tied = estimate_weights(tiny(tied=True), strategy, CPU_SETTINGS, "cpu")
    apart = estimate_weights(tiny(), strategy, CPU_SETTINGS, "cpu")
    assert tied["lm_head"] == 0
    assert apart["embedding"] <= apart["lm_head"] == tied["embedding"]  # multiplied rows may stand in sixteens


def test_key_value_cache_is_56_kib_a_token_in_16_bits() -> None:
    assert estimate_kv(qwen_7b(), GPU_SETTINGS, context=16, streams=1) == 16 * 56 * 1024
    assert estimate_kv(qwen_7b(), CPU_SETTINGS, context=10, streams=3) == 2 * 3 * 16 * 56 * 1024  # blocks of 16


def estimator(name: str = "4bit", *, spec=None, kind: str = "cpu", streams: int = 1) -> Estimator:
    chosen = CPU_SETTINGS if kind == "cpu" else GPU_SETTINGS
    return Estimator(
        spec or qwen_7b(),
        find_strategy(name),
        chosen,
        device_kind=kind,
        streams=streams,
        runtime_bytes=500_000_000,
    )


def test_steady_is_the_sum_of_all_parts() -> None:
    found = estimator().at(2048)
    parts = sum(found.weight_bytes.values()), found.kv_bytes, found.activation_bytes, found.runtime_bytes
    assert found.steady_bytes == sum(parts)


def test_four_bit_7b_is_estimated_near_what_it_takes() -> None:
    """Weights 4.56 GB, cache 0.47 GB, runtime 0.5 GB, and some working memory."""
    found = estimator().at(4096)
    assert found.weights == pytest.approx(4.557e9, rel=0.001)
    assert 0.3e9 < found.activation_bytes < 1e9
    assert 5.5e9 < found.needed_bytes < 7e9


class Whole(Strategy):
    """A strategy that needs a weight whole to quantise it, as plug-ins do."""

    name, summary = "whole", "as 4bit, from whole weights"
    weight_bytes = find_strategy("4bit").weight_bytes

    def quantize(self, *_, **__):
        raise NotImplementedError


def beside_the_weights(strategy=None, **changes) -> int:
    spec = replace(qwen_7b(), **changes) if changes else qwen_7b()
    return estimate_load(spec, strategy or find_strategy("4bit"), CPU_SETTINGS, "cpu")


def test_a_load_holds_buffers_and_no_tensor_as_read_beside_the_weights() -> None:
    assert thread_count() * 16 * 2**20 < beside_the_weights() < 0.6e9


def test_a_strategy_that_needs_whole_weights_holds_the_largest_as_read() -> None:
    assert OUTER * 2 <= beside_the_weights(Whole()) < OUTER * 4 + 0.6e9


def test_packed_tensors_are_held_unpacked_a_piece_at_a_time() -> None:
    packed = qwen_7b(dtype="Q4_K").tensors
    assert beside_the_weights(Whole(), format="gguf", tensors=packed) >= OUTER * 4
    assert thread_count() * 2**20 * 4 < beside_the_weights(format="gguf", tensors=packed) < 0.6e9


def test_load_never_needs_the_whole_model_unpacked() -> None:
    """The full-precision weights are 15.2 GB; a 4-bit load must not be planned to hold them."""
    assert estimator().at(512).load_peak_bytes < 15.2e9 / 2


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["none", "8bit", "4bit"])
def test_each_strategy_needs_less_than_the_one_before(kind: str, name: str) -> None:
    ladder = ["none", "8bit", "4bit"]
    sizes = [estimator(one, kind=kind).at(2048).needed_bytes for one in ladder]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[ladder.index(name)] > 0


def test_recorded_steps_of_a_gpu_have_memory_of_their_own() -> None:
    """What they gather, and the weight that a product unpacks, are counted once more than where nothing is recorded."""
    recorded, other = (
        estimate_activations(qwen_7b(), GPU_SETTINGS, kind, context=2048, streams=1) for kind in ("cuda", "mps")
    )
    assert recorded - other >= gathered_bytes("cuda") + 2 * 2 * 18_944 * 3584


@given(context=st.integers(1, 32_000), more=st.integers(1, 1000), streams=st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_more_context_or_streams_never_need_less(context: int, more: int, streams: int) -> None:
    spec = tiny()
    few = estimator(spec=spec, streams=streams)
    many = estimator(spec=spec, streams=streams + 1)
    assert few.at(context).needed_bytes <= few.at(context + more).needed_bytes
    assert few.at(context).needed_bytes <= many.at(context).needed_bytes


@given(
    allowed=st.integers(500_000_000, 900_000_000),
    shortest=st.integers(1, 700),
    longest=st.integers(700, 40_000),
)
@settings(max_examples=80, deadline=None)
def test_longest_context_fits_and_one_step_more_does_not(allowed: int, shortest: int, longest: int) -> None:
    found = estimator(spec=tiny())
    context = found.longest(lambda one: one.needed_bytes <= allowed, shortest=shortest, longest=longest)
    if context is None:
        assert found.at(shortest).needed_bytes > allowed
        return
    assert shortest <= context <= longest
    assert found.at(context).needed_bytes <= allowed
    assert context == longest or found.at(min(context + 64, longest)).needed_bytes > allowed


def test_model_without_layers_can_be_counted() -> None:
    spec = make_spec(layers=0, hidden=64, heads=1, kv_heads=1, inner=64, vocab=10)
    assert estimator(spec=spec).at(1).needed_bytes > 0


@pytest.mark.parametrize(("name", "size"), [("float32", 4), ("torch.bfloat16", 2), ("float16", 2), ("unheard_of", 4)])
def test_size_of_a_type(name: str, size: int) -> None:
    assert dtype_bytes(name) == size
