"""Memory that runs out in the middle of answers: steps get smaller, and answers stay what they are."""

from __future__ import annotations

import re

import pytest
import torch
from watched import Watched, watched_engine

from loadstone import Event, ModelManager, ResourceError
from loadstone.config import EngineConfig, Sampling
from loadstone.engine import admission, width
from loadstone.engine.width import Pressure, Width
from loadstone.loaded import LoadedModel

PROMPTS = ["What is the capital of France?", "Name three colours. " + "They may be light or dark. " * 20, "Hi"]
GREEDY = Sampling(max_new_tokens=12)


@pytest.fixture(scope="module")
def model(smollm2: ModelManager) -> LoadedModel:
    return smollm2.load()


def fail_above(watched: Watched, tokens: int, times: int = 1_000) -> list[int]:
    """Let the decoder run out of memory whenever a step has more tokens; return the sizes that it was given."""
    seen: list[int] = []

    def before(number: int) -> None:
        seen.append(sum(one.length for one, _ in watched.passes[-1]))
        if seen[-1] > tokens and sum(size > tokens for size in seen) <= times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    watched.before = before
    return seen


def test_widths_get_narrower_to_a_single_sequence() -> None:
    steps = [Width(64)]
    while (narrower := steps[-1].narrower()) is not None:
        steps.append(narrower)
    assert steps[-1] == Width(16, 1, guesses=False)
    assert len(set(steps)) == len(steps)


def test_answers_are_the_same_where_memory_lets_only_small_steps_be_made(model: LoadedModel) -> None:
    expected = [one.text for one in model.generate_batch(PROMPTS, max_new_tokens=12, temperature=0)]
    with watched_engine(model, streams=3) as (engine, watched):
        fail_above(watched, 17)
        assert [one.text for one in engine.generate_batch(PROMPTS, GREEDY)] == expected


def test_same_step_is_not_tried_again(model: LoadedModel) -> None:
    with watched_engine(model, wish=EngineConfig(prefix_reuse=False)) as (engine, watched):
        seen = fail_above(watched, 40, times=1)
        engine.generate(PROMPTS[1], GREEDY)
        assert seen[0] > 40
        assert seen[1] < seen[0]


def test_step_down_is_told_with_its_reason(model: LoadedModel, events: list[Event]) -> None:
    with watched_engine(model, wish=EngineConfig(prefix_reuse=False)) as (engine, watched):
        fail_above(watched, 40, times=1)
        engine.generate(PROMPTS[1], GREEDY)
        (told,) = [one for one in events if one.name == "generate.step_down"]
        assert "out of memory" in told.fields["reason"]
        assert told.fields["was"] != told.fields["now"]


def test_memory_for_not_even_one_token_is_a_resource_error(model: LoadedModel) -> None:
    with watched_engine(model) as (engine, watched):
        fail_above(watched, 0)
        with pytest.raises(ResourceError):
            engine.generate("Hi", GREEDY)


def test_next_answers_have_the_whole_width_again(model: LoadedModel) -> None:
    with watched_engine(model, wish=EngineConfig(prefix_reuse=False)) as (engine, watched):
        fail_above(watched, 40, times=1)
        engine.generate(PROMPTS[1], GREEDY)
        engine.wait_until_idle()
        watched.passes.clear()
        engine.generate(PROMPTS[1], GREEDY)
        assert sum(one.length for one, _ in watched.passes[0]) > 40


def test_nobody_joins_while_memory_is_short(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with watched_engine(model, streams=3) as (engine, watched):
        monkeypatch.setattr(Pressure, "is_felt", lambda self: True)
        assert all(one.error is None for one in engine.generate_batch(PROMPTS, GREEDY))
        assert all(len(one) == 1 for one in watched.passes)


def test_known_prefixes_go_before_anybody_under_way_does_less(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, events: list[Event]
) -> None:
    """Then chunks get smaller, one rung at a look; each is told with its reason, and the answer is what it was."""
    expected = model.generate(PROMPTS[1], max_new_tokens=40, temperature=0).text
    with watched_engine(model, wish=EngineConfig()) as (engine, watched):
        engine.generate(PROMPTS[1], GREEDY)
        engine.wait_until_idle()
        known = len([*engine._batcher.prefixes.nodes()])
        monkeypatch.setattr(Pressure, "is_felt", lambda self: True)
        monkeypatch.setattr(admission, "LOOK_S", 0.0)
        assert engine.generate(PROMPTS[1], Sampling(max_new_tokens=40)).text == expected
        engine.wait_until_idle()
    assert known > 0
    told = [one.fields for one in events if one.name == "generate.step_down"]
    assert all("memory is left" in one["reason"] for one in told)
    assert "known tokens" in told[0]["was"]
    assert "gave back" in told[0]["now"]
    widths = [one["now"] for one in told if "a step" in one["now"]]
    assert [width.split()[0] for width in widths] == ["32", "16"]
    assert "without guesses" not in widths[-1]  # that is for steps that failed
    assert watched.passes[0]


def test_a_step_that_failed_is_made_again_without_what_was_known(model: LoadedModel, events: list[Event]) -> None:
    with watched_engine(model, wish=EngineConfig()) as (engine, watched):
        engine.generate("A text of another kind, which is remembered. " * 3, GREEDY)
        seen = fail_above(watched, 40, times=1)
        engine.generate(PROMPTS[1], GREEDY)
    assert seen[:2] == [seen[0]] * 2
    (told,) = [one.fields for one in events if one.name == "generate.step_down"]
    assert "known tokens" in told["was"]
    assert "out of memory" in told["reason"]


def test_pressure_is_felt_when_less_is_left_than_is_reserved() -> None:
    pressure = Pressure(2**60)
    assert pressure.is_felt()
    assert re.fullmatch(r"[0-9.]+ [KMG]B of memory is left, and the largest step may take 1152922 TB", str(pressure))
    assert not Pressure(0).is_felt()


def test_memory_is_not_looked_at_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    limits = width.memory_limits()
    monkeypatch.setattr(width, "memory_limits", lambda: looks.append(1) or limits)
    pressure = Pressure(1)
    for _ in range(1000):
        pressure.is_felt()
    assert len(looks) < 20
