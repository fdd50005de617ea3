"""Many requests, prefixes that are known, and what is told of tokens: on a real model."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from watched import PATIENCE, Gate, watched_engine

from loadstone import ContextLengthError, Event, GenerationError, ModelManager, QueueFullError, ResourceError
from loadstone.config import EngineConfig, Sampling
from loadstone.engine import Engine, Stream, admission
from loadstone.loaded import LoadedModel

SYSTEM = "You are a careful analyst of energy markets. " * 8
QUESTIONS = ["What is coal?", "What is the price of oil?", "What is the sun?"]
SHORT = Sampling(max_new_tokens=12)
PLAIN = EngineConfig(prefix_reuse=False, speculation=False)
REUSE = EngineConfig(speculation=False)


@pytest.fixture(scope="session")
def model(smollm2: ModelManager) -> LoadedModel:
    return smollm2.load()


def _held(engine: Engine) -> int:
    """How many blocks of the cache requests hold."""
    engine.wait_until_idle()
    return engine._batcher.cache.blocks - engine._batcher.prefixes.free_blocks


# -- known prefixes ---------------------------------------------------------------------------------------------------


def test_a_shared_system_prompt_is_read_once(model: LoadedModel) -> None:
    """Questions after the same system prompt are answered as without reuse, and read only what is new in them."""
    with watched_engine(model, PLAIN) as (engine, _):
        plain = [engine.generate(question, SHORT, system=SYSTEM) for question in QUESTIONS]
    with watched_engine(model, REUSE) as (engine, _):
        reused = [engine.generate(question, SHORT, system=SYSTEM) for question in QUESTIONS]
        assert _held(engine) == 0
    assert [result.text for result in reused] == [result.text for result in plain]
    known = [result.usage.cached_tokens for result in reused]
    shared = len(model.tokenizer.encode(SYSTEM, add_special_tokens=False))
    assert known[0] == 0
    assert min(known[1:]) >= shared
    assert [result.usage.cached_tokens for result in plain] == [0, 0, 0]


def test_prompts_that_come_together_share_too(model: LoadedModel) -> None:
    """Of a batch that begins alike the beginning is read once, though nothing of it was known before."""
    with watched_engine(model, REUSE, streams=4) as (engine, _):
        results = engine.generate_batch(QUESTIONS, SHORT, system=SYSTEM)
        assert [result.usage.cached_tokens > 50 for result in results] == [False, True, True]


def test_the_next_turn_of_a_conversation_reads_only_what_is_new(model: LoadedModel) -> None:
    with watched_engine(model, REUSE) as (engine, watched):
        talk = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Say yes."}]
        answer = engine.generate(talk, SHORT)
        engine.wait_until_idle()
        read = len(watched.passes)
        talk += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "Say no."}]
        second = engine.generate(talk, SHORT)
        assert second.usage.cached_tokens >= answer.usage.prompt_tokens
        assert sum(segment.length for segment, _ in watched.passes[read]) < 50


def test_prefixes_come_back_from_a_file(model: LoadedModel, tmp_path: Path) -> None:
    """Another engine knows what the first one read, and answers the same."""
    file = tmp_path / "prefixes"
    with watched_engine(model, REUSE) as (engine, _):
        first = engine.generate(QUESTIONS[0], SHORT, system=SYSTEM)
        saved = engine.save_prefixes(file)
    assert saved == first.usage.prompt_tokens + first.usage.completion_tokens - 1
    assert [one.name for one in tmp_path.iterdir()] == ["prefixes"]
    with watched_engine(model, REUSE) as (engine, _):
        assert engine.load_prefixes(file) == saved
        again = engine.generate(QUESTIONS[0], SHORT, system=SYSTEM)
        assert again.usage.cached_tokens == again.usage.prompt_tokens - 1
    assert again.text == first.text


def test_a_file_larger_than_the_cache_comes_back_as_far_as_there_is_room(model: LoadedModel, tmp_path: Path) -> None:
    file = tmp_path / "prefixes"
    with watched_engine(model, REUSE) as (engine, _):
        engine.generate(QUESTIONS[0], SHORT, system=SYSTEM)
        engine.save_prefixes(file)
    with watched_engine(model, REUSE, context=64) as (engine, _):
        assert engine.load_prefixes(file) == 64
        assert _held(engine) == 0


def test_a_file_of_another_model_is_refused(model: LoadedModel, tmp_path: Path) -> None:
    """The same shapes are not enough: keys and values of other weights are noise."""
    file = tmp_path / "prefixes"
    with watched_engine(model, REUSE) as (engine, _):
        engine.generate("Hi", SHORT)
        engine.save_prefixes(file)
    norm = model.decoder.norm
    entry = model.decoder.attached, model.decoder.publishing
    model.decoder.attached = model.decoder.publishing = None
    model.decoder.norm = norm * 1.5
    try:
        with watched_engine(model, REUSE) as (engine, _):
            with pytest.raises(GenerationError, match="another model"):
                engine.load_prefixes(file)
            assert not [*engine._batcher.prefixes.nodes()]
    finally:
        model.decoder.norm = norm
        model.decoder.attached, model.decoder.publishing = entry


@pytest.mark.parametrize("damage", ["cut", "empty", "noise"])
def test_a_damaged_file_is_refused(model: LoadedModel, tmp_path: Path, damage: str) -> None:
    """With an error that names it; nothing is remembered from it."""
    file = tmp_path / "prefixes"
    with watched_engine(model, REUSE) as (engine, _):
        engine.generate("Hi", SHORT)
        engine.save_prefixes(file)
        data = file.read_bytes()
        file.write_bytes({"cut": data[:-100], "empty": b"", "noise": bytes(range(256)) * 8}[damage])
        engine.renew_cache()
        with pytest.raises(GenerationError, match="prefixes: it cannot be read"):
            engine.load_prefixes(file)
        assert not [*engine._batcher.prefixes.nodes()]


def test_short_prompts_are_read_together(model: LoadedModel) -> None:
    """As many as a chunk takes, when none of them begins as another does."""
    prompts = ["coal", "What is oil?", "the sun", "1 2 3"]
    with watched_engine(model, REUSE, streams=4) as (engine, watched):
        gate = Gate(watched)
        streams = [engine.stream("first", SHORT, raw=True)]
        gate.arrive()  # the others wait until the first pass is over
        streams += [engine.stream(prompt, SHORT, raw=True) for prompt in prompts[:3]]
        gate.open()
        together = [_rest(stream) for stream in streams]
        assert sum(segment.start == 0 for segment, _ in watched.passes[1]) == 3
    with watched_engine(model, PLAIN) as (engine, _):
        assert together == [
            engine.generate(one, SHORT, raw=True).usage.completion_tokens for one in ["first", *prompts[:3]]
        ]


def test_a_prompt_that_comes_to_nothing_is_not_remembered(model: LoadedModel) -> None:
    """What was read of a prompt whose logits are NaN is as wrong as they are: another one does not begin with it."""
    with watched_engine(model, REUSE) as (engine, watched):
        watched.after = lambda segments, logits: torch.full_like(logits, torch.nan)
        with pytest.raises(GenerationError, match="NaN"):
            engine.generate(QUESTIONS[0], SHORT, system=SYSTEM)
        watched.after = lambda segments, logits: logits
        assert engine.generate(QUESTIONS[0], SHORT, system=SYSTEM).usage.cached_tokens == 0
        assert _held(engine) == 0


def test_answers_forget_no_more_than_they_say(model: LoadedModel) -> None:
    """A short answer to which much was allowed leaves what was remembered; a long one takes its room."""
    with watched_engine(model, REUSE, context=512, streams=1) as (engine, watched):
        engine.generate(QUESTIONS[0], SHORT, system=SYSTEM)
        watched.say(model.tokenizer.eos_token_ids[0])
        engine.generate("Hi", Sampling(max_new_tokens=500), raw=True)
        again = engine.generate(QUESTIONS[0], SHORT, system=SYSTEM)
        assert again.usage.cached_tokens == again.usage.prompt_tokens - 1
        watched.say(model.tokenizer.encode(" and", add_special_tokens=False)[0])
        assert engine.generate("Hi", Sampling(max_new_tokens=500), raw=True).usage.completion_tokens == 500
        assert engine.generate(QUESTIONS[0], SHORT, system=SYSTEM).usage.cached_tokens == 0
        assert _held(engine) == 0


def test_prefixes_that_are_not_reused_are_not_loaded(model: LoadedModel, tmp_path: Path) -> None:
    """The error names the setting."""
    with (
        watched_engine(model, PLAIN) as (engine, _),
        pytest.raises(GenerationError, match=r"No prefixes are reused, since engine\.prefix_reuse is false"),
    ):
        engine.load_prefixes(tmp_path / "prefixes")


# -- long prompts -----------------------------------------------------------------------------------------------------


def test_how_far_a_long_prompt_is_read_is_told(model: LoadedModel, events: list[Event]) -> None:
    """After each chunk, with what was known before; of a prompt that is one chunk nothing is told."""
    small = replace(model.plan.settings, prefill_chunk=32)
    with watched_engine(model, REUSE, settings=small) as (engine, _):
        engine.generate("Hi", SHORT, raw=True)
        assert [event for event in events if event.name == "generate.read"] == []
        length = engine.generate(QUESTIONS[0], SHORT, system=SYSTEM).usage.prompt_tokens
        told = [event.fields for event in events if event.name == "generate.read"]
        assert [one["tokens"] for one in told] == [*range(32, length, 32), length]
        assert {one["of"] for one in told} == {length}
        assert len({one["request"] for one in told}) == 1
        assert sorted(one["seconds"] for one in told) == [one["seconds"] for one in told]
        events.clear()
        known = engine.generate("word " * 40, SHORT, system=SYSTEM).usage.cached_tokens
        told = [event.fields for event in events if event.name == "generate.read"]
        assert told[0]["tokens"] == known + 32


def test_what_is_told_of_two_prompts_names_each(model: LoadedModel, events: list[Event]) -> None:
    small = replace(model.plan.settings, prefill_chunk=16)
    with watched_engine(model, streams=2, settings=small) as (engine, _):
        streams = [engine.stream(question, SHORT) for question in QUESTIONS[:2]]
        assert [_rest(stream) for stream in streams] == [12, 12]
    lengths = {one.id: one.result.usage.prompt_tokens for one in streams}
    told = [event.fields for event in events if event.name == "generate.read"]
    assert {one["request"]: one["of"] for one in told} == lengths


# -- queue ------------------------------------------------------------------------------------------------------------


def test_more_than_may_wait_are_refused(model: LoadedModel) -> None:
    """The limit is told, those that wait are answered, and then there is room again."""
    with watched_engine(model, EngineConfig(queue=2), context=64) as (engine, watched):
        gate = Gate(watched)
        first = engine.stream("one", Sampling(max_new_tokens=60), raw=True)
        gate.arrive()
        waiting = [engine.stream("two", SHORT, raw=True) for _ in range(2)]
        with pytest.raises(QueueFullError, match="2 requests wait already"):
            engine.stream("three", SHORT, raw=True)
        first.cancel()
        gate.open()
        assert [_rest(stream) for stream in waiting] == [12, 12]
        assert engine.generate("three", SHORT, raw=True).usage.completion_tokens == 12


def test_a_batch_larger_than_the_queue_waits_for_room(model: LoadedModel) -> None:
    with watched_engine(model, EngineConfig(queue=2), context=64, streams=2) as (engine, _):
        results = engine.generate_batch(["one"] * 12, Sampling(max_new_tokens=2), raw=True)
    assert [result.usage.completion_tokens for result in results] == [2] * 12


def test_who_fits_begins_when_one_that_did_not_is_cancelled(model: LoadedModel) -> None:
    """A small request behind a large one for which there is no room does not wait for the one under way."""
    with watched_engine(model, context=128) as (engine, watched):
        gate = Gate(watched)
        watched.say(model.tokenizer.encode(" and", add_special_tokens=False)[0])
        first, large, small = (
            engine.stream(text, Sampling(max_new_tokens=count), raw=True)
            for text, count in (("one", 60), ("two", 100), ("three", 4))
        )
        gate.let(3)
        large.cancel()
        gate.open()
        assert [_rest(stream) for stream in (first, small)] == [60, 4]
        assert max(len(one) for one in watched.passes) == 2


def test_a_request_that_cannot_be_begun_fails_alone(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that runs out while it is admitted reaches who asked; its places come back, and the next is answered."""
    with watched_engine(model, EngineConfig()) as (engine, _):
        with monkeypatch.context() as patch:
            patch.setattr(admission, "Drafter", _out_of_memory)
            with pytest.raises(ResourceError):
                engine.generate("Hi", SHORT)
        assert engine.generate("Hi", SHORT).text
        assert _held(engine) == 0


def test_a_thread_that_cannot_be_started_is_tried_again(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks while the system has no thread left gets the error, and nobody waits for ever later."""
    with watched_engine(model) as (engine, _):
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", _no_thread)
            with pytest.raises(RuntimeError, match="new thread"):
                engine.stream("Hi", SHORT)
        assert engine.generate("Hi", SHORT).text
        assert _held(engine) == 0


def _out_of_memory(*_: object) -> None:
    raise MemoryError


def _no_thread(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_ten_thousand_requests_at_once(model: LoadedModel) -> None:
    """All but those that may wait are refused at once, and nothing is left in the cache."""
    with watched_engine(model, EngineConfig(queue=100), context=64) as (engine, watched):
        gate = Gate(watched)
        accepted: list[Stream] = []
        refused = 0
        for _ in range(10_000):
            try:
                accepted.append(engine.stream("one", Sampling(max_new_tokens=1), raw=True))
            except QueueFullError:
                refused += 1
        assert 100 <= len(accepted) <= 100 + engine._batcher.cache.blocks  # those that wait, and those that have room
        assert refused + len(accepted) == 10_000
        gate.open()
        assert [_rest(stream) for stream in accepted] == [1] * len(accepted)
        assert _held(engine) == 0


def test_a_storm_of_cancels_leaves_nothing(model: LoadedModel) -> None:
    """Requests that are asked and cancelled from many threads at once: every place comes back."""
    with watched_engine(model, EngineConfig(), context=128, streams=2) as (engine, _):

        def storm() -> None:
            for number in range(25):
                with engine.stream(f"Tell me about {number}", Sampling(max_new_tokens=40)) as stream:
                    if number % 2:
                        next(stream)

        threads = [threading.Thread(target=storm) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert _held(engine) == 0
        assert engine.generate("Hi", SHORT).text


def test_who_stops_reading_holds_up_nobody(model: LoadedModel) -> None:
    """A stream that is held but not read does not keep another from its answer."""
    with watched_engine(model, EngineConfig(), context=128, streams=2) as (engine, _):
        unread = engine.stream("Tell me a story", Sampling(max_new_tokens=60))
        assert engine.generate("Hi", SHORT).text
        assert _rest(unread) > 0
        assert _held(engine) == 0


def test_a_prompt_longer_than_the_context_says_both_numbers(model: LoadedModel) -> None:
    with watched_engine(model, context=32) as (engine, _), pytest.raises(ContextLengthError) as caught:
        engine.generate("word " * 50, SHORT, raw=True)
    assert caught.value.context == 32
    assert caught.value.prompt_tokens >= 50
    assert "32" in str(caught.value)
    assert str(caught.value.prompt_tokens) in str(caught.value)


def test_what_is_no_character_is_read_as_the_replacement_character(model: LoadedModel) -> None:
    """Half of a surrogate pair, what broken bytes become with surrogateescape, spoils nothing."""
    with watched_engine(model, PLAIN) as (engine, _):
        broken, replaced = (engine.generate(text, SHORT) for text in ("abc\udc80def", "abc\ufffddef"))
    assert broken.text == replaced.text


# -- logprobs ---------------------------------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_model(model: LoadedModel) -> None:
    """Each is the log-softmax of the logits that the token was chosen from, whatever the sampling rules."""
    rows: list[torch.Tensor] = []
    with watched_engine(model, PLAIN) as (engine, watched):
        watched.after = lambda segments, logits: (rows.append(logits.clone()), logits)[1]
        result = engine.generate("Name a colour.", Sampling(max_new_tokens=5, temperature=2.0, seed=1, logprobs=3))
    assert len(result.logprobs) == result.usage.completion_tokens == 5
    for row, told in zip(rows, result.logprobs, strict=True):
        every = torch.log_softmax(row[0], -1)
        assert told.logprob == pytest.approx(float(every[told.token]), abs=1e-6)
        assert [one.token for one in told.top] == torch.topk(every, 3).indices.tolist()
        assert math.exp(told.top[0].logprob) <= 1
    assert "".join(told.text for told in result.logprobs) == result.text


def test_no_logprobs_unless_asked(model: LoadedModel) -> None:
    assert model.engine.generate("Hi", SHORT).logprobs == ()
    asked = model.engine.generate("Hi", Sampling(max_new_tokens=2, logprobs=0))
    assert [told.top for told in asked.logprobs] == [(), ()]


def _rest(stream: Stream) -> int:
    for _ in stream:
        pass
    return stream.result.usage.completion_tokens
