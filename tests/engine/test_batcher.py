"""Requests on a real model: together, in order, cut short, broken, cancelled."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tokenizers
import torch
from watched import PATIENCE, Gate, Watched, is_same, watched_engine

from loadstone import ConfigurationError, GenerationError, ModelManager, ResourceError
from loadstone.checkpoint.tokenizer import Tokenizer
from loadstone.config import Sampling
from loadstone.engine import Engine, GenerationResult, Stream
from loadstone.engine.answer import Answer
from loadstone.loaded import LoadedModel
from loadstone.model import KVCache

PROMPTS = [
    "What is the capital of France?",
    "投资分析问题",
    "Name three colours. " + "They may be light or dark, but they must be ones that a painter uses. " * 12,
    "Hi",
]
SHORT = Sampling(max_new_tokens=12)


@pytest.fixture(scope="session")
def model(smollm2: ModelManager) -> LoadedModel:
    return smollm2.load()


@pytest.fixture(scope="session")
def alone(model: LoadedModel) -> list[GenerationResult]:
    """The answer to each prompt when nothing else runs."""
    return [model.engine.generate(prompt, SHORT) for prompt in PROMPTS]


def _texts(results: list[GenerationResult]) -> list[str]:
    return [result.text for result in results]


def _is_empty(engine: Engine) -> bool:
    engine.wait_until_idle()
    batcher = engine._batcher
    return batcher.prefixes.free_blocks == batcher.cache.blocks


def _tokens(model: LoadedModel, text: str) -> list[int]:
    return model.tokenizer.encode(text, add_special_tokens=False)


# -- together ---------------------------------------------------------------------------------------------------------


def test_batch_answers_as_alone_and_in_order(model: LoadedModel, alone: list[GenerationResult]) -> None:
    """Prompts of 30 to 300 tokens that run together have the answers that each has alone, in their order."""
    lengths = {result.usage.prompt_tokens for result in alone}
    assert len(lengths) == len(PROMPTS)
    assert max(lengths) > model.plan.settings.prefill_chunk  # one is read in several chunks
    with watched_engine(model, streams=4) as (engine, watched):
        results = engine.generate_batch(PROMPTS, SHORT)
        assert max(len(one) for one in watched.passes) == len(PROMPTS)
        assert _is_empty(engine)
    assert _texts(results) == _texts(alone)
    assert [result.usage.total_tokens for result in results] == [result.usage.total_tokens for result in alone]


def test_a_batch_of_none_is_none(model: LoadedModel) -> None:
    assert model.engine.generate_batch([], SHORT) == []


def test_bad_prompts_do_not_lose_the_others(model: LoadedModel) -> None:
    """An empty prompt, one longer than the context and one of a wrong type have errors; the rest have answers."""
    good = model.engine.generate("The capital of France is", SHORT, raw=True)
    prompts: list[Any] = ["", "The capital of France is", "word " * 5000, 7, "The capital of France is"]
    results = model.engine.generate_batch(prompts, SHORT, raw=True)
    assert [result.finish_reason for result in results] == ["error", "length", "error", "error", "length"]
    assert [results[1].text, results[4].text] == [good.text] * 2
    assert [str(result) for result in (results[0], results[2], results[3])] == [""] * 3
    assert isinstance(results[0].error, GenerationError)
    assert "empty" in str(results[0].error)
    assert isinstance(results[2].error, GenerationError)
    assert "4096" in str(results[2].error)
    assert isinstance(results[3].error, ConfigurationError)


def test_two_threads_answer_at_once(model: LoadedModel, alone: list[GenerationResult]) -> None:
    """Threads that ask at the same time share the steps, and each gets its own answer."""
    with watched_engine(model, streams=4) as (engine, watched):
        gate = Gate(watched)
        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(engine.generate, prompt, SHORT) for prompt in PROMPTS[:2]]
            gate.arrive()  # the first pass waits until both have asked
            while len(engine._batcher.admission.running) + len(engine._batcher.admission.waiting) < 2:
                pass
            gate.open()
            found = [answer.result(PATIENCE) for answer in answers]
        assert max(len(one) for one in watched.passes) == 2
    assert _texts(found) == _texts(alone[:2])


def test_admission_is_first_come_first_served(model: LoadedModel) -> None:
    """A request that has no room waits, and a later one that had room does not overtake it."""
    with watched_engine(model, context=64, streams=1) as (engine, watched):
        gate = Gate(watched)
        watched.say(_tokens(model, " and")[0])
        prompts = ["one two three", "four five six", "seven"]
        streams = [
            engine.stream(prompt, Sampling(max_new_tokens=count), raw=True)
            for prompt, count in zip(prompts, (40, 40, 8), strict=True)
        ]
        gate.open()
        results = [_rest(stream) for stream in streams]
        assert watched.begun == [_tokens(model, prompt) for prompt in prompts]
        assert max(len(one) for one in watched.passes) == 2  # the third shares the cache with the second
        assert _is_empty(engine)
    assert [result.usage.completion_tokens for result in results] == [40, 40, 8]
    assert results[1].timing.queued_s > 0


def _rest(stream: Stream) -> GenerationResult:
    for _ in stream:
        pass
    return stream.result


# -- streams ----------------------------------------------------------------------------------------------------------


def test_chunks_join_to_the_text(model: LoadedModel, alone: list[GenerationResult]) -> None:
    """What was streamed is the result's text; only the last chunk has the result, and the stream is then over."""
    stream = model.engine.stream(PROMPTS[0], SHORT)
    with pytest.raises(GenerationError, match="not finished"):
        _ = stream.result
    chunks = list(stream)
    assert "".join(map(str, chunks)) == stream.result.text == alone[0].text
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].result is stream.result
    assert len(chunks) > 5
    assert list(stream) == []


_WORDS = "你好，世界🎉👩‍👩‍👧 é done"


def test_chunks_are_whole_characters(model: LoadedModel) -> None:
    """Chinese and emoji, each of several tokens, come whole, none of them in pieces and none empty."""
    spoken = _tokens(model, _WORDS)
    assert len(spoken) > len(_WORDS)
    with watched_engine(model) as (engine, watched):
        watched.say(*spoken, model.tokenizer.eos_token_ids[0])
        stream = engine.stream("说吧", Sampling())
        chunks = [chunk.text for chunk in stream if chunk.result is None]
    assert "".join(chunks) == _WORDS == stream.result.text
    assert all(chunk and "\N{REPLACEMENT CHARACTER}" not in chunk for chunk in chunks)
    assert stream.result.finish_reason == "stop"


@pytest.mark.parametrize("stop", ["世界", "🎉", "done", "你", "，世界🎉"])
def test_stop_strings_never_leak(model: LoadedModel, stop: str) -> None:
    """The answer ends where the stop string begins, and no part of it was ever shown."""
    with watched_engine(model) as (engine, watched):
        watched.say(*_tokens(model, _WORDS), model.tokenizer.eos_token_ids[0])
        stream = engine.stream("说吧", Sampling(stop=("nowhere", stop)))
        shown = ""
        for chunk in stream:
            shown += chunk.text
            assert _WORDS[: _WORDS.index(stop)].startswith(shown)
    assert stream.result.text == shown == _WORDS[: _WORDS.index(stop)]
    assert stream.result.finish_reason == "stop"


def test_stop_string_ends_the_work(model: LoadedModel) -> None:
    """No token is decoded after the one that completes a stop string."""
    spoken = _tokens(model, " one two three four five six")
    assert len(spoken) == 6
    with watched_engine(model) as (engine, watched):
        watched.say(*spoken)
        assert engine.generate("Count", Sampling(stop=("three",)), raw=True).text == " one two "
        engine.wait_until_idle()
        assert len(watched.passes) == 3


def test_finish_reasons(model: LoadedModel) -> None:
    """The model's own end is "stop" and not part of the text; max_new_tokens is "length"."""
    ended = model.engine.generate("Say only: yes", Sampling(max_new_tokens=64))
    assert ended.finish_reason == "stop"
    assert "<|im_end|>" not in ended.text
    cut = model.engine.generate("Say only: yes", Sampling(max_new_tokens=1))
    assert (cut.finish_reason, cut.usage.completion_tokens) == ("length", 1)


def test_answer_ends_with_the_context(model: LoadedModel) -> None:
    """Asking for more tokens than the context has room for gives as many as it has."""
    with watched_engine(model, context=32, streams=1) as (engine, watched):
        watched.say(_tokens(model, " and")[0])
        result = engine.generate("one two three", Sampling(max_new_tokens=10**6), raw=True)
        assert result.usage.total_tokens == 32
        assert result.text.count("and") == result.usage.completion_tokens
        assert _is_empty(engine)
    assert result.finish_reason == "length"


def test_timing_adds_up(alone: list[GenerationResult]) -> None:
    """The parts of the time follow one another."""
    for result in alone:
        timing = result.timing
        assert 0 <= timing.queued_s <= timing.first_token_s <= timing.total_s
        assert timing.tokens_per_s > 0


# -- leaving and cancelling -------------------------------------------------------------------------------------------


def _cancel(stream: Stream) -> None:
    stream.cancel()


def _close(stream: Stream) -> None:
    stream.close()


def _leave(stream: Stream) -> None:
    for _ in stream:
        break


def _leave_by_error(stream: Stream) -> None:
    def read() -> None:
        for _ in stream:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        read()


def _leave_block(stream: Stream) -> None:
    with stream:
        pass


@pytest.mark.parametrize("leave", [_cancel, _close, _leave, _leave_by_error, _leave_block])
def test_leaving_stops_the_work_within_one_token(model: LoadedModel, leave: Any) -> None:
    """Once a stream is left, even if it is still held, only the pass under way is finished."""
    with watched_engine(model) as (engine, watched):
        gate = Gate(watched)
        watched.say(_tokens(model, " and")[0])
        stream = engine.stream("one two three", Sampling(max_new_tokens=500), raw=True)
        gate.let(3)
        leave(stream)
        gate.open()
        assert _is_empty(engine)
        assert len(watched.passes) == 4


def test_dropping_a_stream_stops_the_work(model: LoadedModel) -> None:
    """A stream that nobody holds is cancelled: a loop over a fresh one that is left leaves nothing running."""
    with watched_engine(model) as (engine, watched):
        gate = Gate(watched)
        watched.say(_tokens(model, " and")[0])
        gate.open(3)
        for _ in engine.stream("one two three", Sampling(max_new_tokens=500), raw=True):
            break
        gate.open()
        assert _is_empty(engine)
        assert len(watched.passes) <= 4


def test_cancelled_answer_has_what_was_made(model: LoadedModel) -> None:
    """Reading on after `cancel` gives the rest that was made, and a result that says so."""
    with watched_engine(model) as (engine, watched):
        gate = Gate(watched)
        watched.say(_tokens(model, " and")[0])
        stream = engine.stream("one two three", Sampling(max_new_tokens=500), raw=True)
        gate.let(3)
        stream.cancel()
        gate.open()
        assert _rest(stream).finish_reason == "cancelled"
    # Three tokens were made before, and the pass that was under way made one more.
    assert (stream.result.text, stream.result.usage.completion_tokens) == (" and" * 4, 4)


def test_cancelling_one_that_waits(model: LoadedModel) -> None:
    """A request that has not begun ends at once, without a token, while the one before it goes on."""
    with watched_engine(model, context=64, streams=1) as (engine, watched):
        gate = Gate(watched)
        watched.say(_tokens(model, " and")[0])
        first, second = (engine.stream(text, Sampling(max_new_tokens=60), raw=True) for text in ("one", "two"))
        gate.let(1)
        second.cancel()
        gate.let(2)
        assert next(second).finish_reason == "cancelled"
        assert second.result.usage.completion_tokens == 0
        gate.open()
        assert _rest(first).usage.completion_tokens == 60
        assert watched.begun == [_tokens(model, "one")]


def test_those_that_wait_are_not_looked_at_in_every_step(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps while many wait look at no more of them than steps while few do, unless one is cancelled."""
    looks: list[Answer] = []

    def is_cancelled(answer: Answer) -> bool:
        looks.append(answer)
        return answer.request.is_cancelled

    monkeypatch.setattr(Answer, "is_cancelled", property(is_cancelled))
    with watched_engine(model, context=64, streams=1) as (engine, watched):
        gate = Gate(watched)
        watched.say(_tokens(model, " and")[0])
        streams = [engine.stream("one", Sampling(max_new_tokens=60), raw=True) for _ in range(50)]
        gate.let(4)
        looks.clear()
        gate.let(8)
        assert len(looks) <= 8
        streams[30].cancel()
        gate.let(2)
        assert next(streams[30]).finish_reason == "cancelled"
        for stream in streams:
            stream.cancel()
        gate.open()
        assert _is_empty(engine)


# -- failures ---------------------------------------------------------------------------------------------------------


def test_failure_reaches_the_consumer_and_the_engine_goes_on(model: LoadedModel, alone: list[GenerationResult]) -> None:
    """An exception in a pass is raised from the loop of each request in it; those after it are answered."""
    with watched_engine(model, streams=2) as (engine, watched):

        def fail(number: int) -> None:
            if number == 4:
                raise OSError("the bus caught fire")

        watched.before = fail
        streams = [engine.stream(prompt, SHORT) for prompt in (PROMPTS[0], PROMPTS[3])]
        for stream in streams:
            with pytest.raises(GenerationError, match="the bus caught fire") as caught:
                list(stream)
            assert isinstance(caught.value.__cause__, OSError)
            assert list(stream) == []
        assert _is_empty(engine)
        assert engine.generate(PROMPTS[0], SHORT).text == alone[0].text


def test_memory_running_out_is_a_resource_error(model: LoadedModel) -> None:
    """Whatever library says it, a lack of memory while answering is told as one, and the engine goes on."""
    with watched_engine(model) as (engine, watched):

        def fail(number: int) -> None:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

        watched.before = fail
        with pytest.raises(ResourceError, match="can't allocate memory"):
            engine.generate("Hi", SHORT)
        watched.before = lambda number: None
        assert engine.generate("Hi", SHORT).text


def test_kept_error_keeps_no_tensors(model: LoadedModel) -> None:
    """Who holds the error of a failed pass does not hold what the pass computed."""
    made: list[weakref.ref[torch.Tensor]] = []

    def fail(segments: Any, logits: torch.Tensor) -> torch.Tensor:
        made.append(weakref.ref(logits))
        raise ValueError("no")

    with watched_engine(model) as (engine, watched):
        watched.after = fail
        with pytest.raises(GenerationError) as caught:
            engine.generate("Hi", SHORT)
        gc.collect()
        assert [one() for one in made] == [None]
        assert caught.value.__cause__ is not None


def test_one_spoilt_answer_does_not_spoil_the_others(model: LoadedModel, alone: list[GenerationResult]) -> None:
    """NaN in the logits of one request ends that one only."""
    with watched_engine(model, streams=2) as (engine, watched):

        def spoil(segments: Any, logits: torch.Tensor) -> torch.Tensor:
            logits = logits.clone()
            for row, segment in enumerate(segments):
                is_second = not is_same(segment, watched.passes[0][0][0])
                if is_second and segment.start > 32:  # its third token or so
                    logits[row, 5] = torch.nan
            return logits

        watched.after = spoil
        results = engine.generate_batch([PROMPTS[0], PROMPTS[3]], SHORT)
        assert _is_empty(engine)
    assert results[0].text == alone[0].text
    assert "NaN" in str(results[1].error)


def test_failure_while_text_is_made_is_that_answers_own(model: LoadedModel, alone: list[GenerationResult]) -> None:
    """A tokenizer that cannot spell a token fails the answer that has it; nobody waits for ever."""
    with watched_engine(model, streams=2) as (engine, _):
        make = engine._batcher._new_text
        asked: list[int] = []

        class Broken:
            def push(self, token: int) -> str:
                asked.append(token)
                if len(asked) > 5:
                    raise KeyError(token)
                return ""

        def new_text() -> Any:
            asked.append(-1)
            return Broken() if len(asked) == 1 else make()

        engine._batcher._new_text = new_text
        results = engine.generate_batch([PROMPTS[3], PROMPTS[0]], SHORT)
        assert _is_empty(engine)
    assert isinstance(results[0].error, GenerationError)
    assert results[1].text == alone[0].text


def test_tokens_that_the_model_has_not_are_refused(model: LoadedModel) -> None:
    """A tokenizer larger than the model's vocabulary gives an error, not a read beyond the embedding."""
    backend = tokenizers.Tokenizer.from_str(model.tokenizer.backend.to_str())
    backend.add_tokens(["<strange>"])
    strange = Tokenizer(backend, eos_token_ids=model.tokenizer.eos_token_ids)
    assert strange.encode("<strange>", add_special_tokens=False) == [model.decoder.embedding.rows]
    engine = Engine(model.decoder, strange, model.engine.template, model.plan)
    with pytest.raises(GenerationError, match=r"token 49152, .* 49152 tokens"):
        engine.generate("Hello <strange> world", SHORT)
    engine.close()


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [
        ([], {}),
        (None, {}),
        ([1, 2], {}),
        ([{"role": "user", "content": "Hi"}], {"raw": True}),
        ("Hi", {"raw": True, "system": "Be brief."}),
    ],
)
def test_prompts_that_cannot_be_meant(model: LoadedModel, prompt: Any, settings: dict[str, Any]) -> None:
    """What is neither text nor conversation, or contradicts `raw`, is said to be so before any work."""
    with pytest.raises(ConfigurationError):
        model.engine.generate(prompt, SHORT, **settings)


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_text_goes_through_the_template(model: LoadedModel) -> None:
    """A text is the user's message, `system` comes before it, a conversation is taken as it is, `raw` too."""
    engine, template = model.engine, model.engine.template
    assert template is not None

    def tokens(*messages: tuple[str, str]) -> list[int]:
        return _tokens(model, template.render([{"role": role, "content": text} for role, text in messages]))

    assert engine.encode("Hi") == tokens(("user", "Hi"))
    assert engine.encode("Hi", system="Be brief.") == tokens(("system", "Be brief."), ("user", "Hi"))
    talk = [("user", "Hi"), ("assistant", "Hello!"), ("user", "Who are you?")]
    assert engine.encode([{"role": role, "content": text} for role, text in talk]) == tokens(*talk)
    assert engine.encode("Hi", raw=True) == model.tokenizer.encode("Hi", add_special_tokens=True)


def test_model_without_template_reads_the_texts(model: LoadedModel) -> None:
    """A base model reads a text as it is, and a conversation or a system message as lines."""
    engine = Engine(model.decoder, model.tokenizer, None, model.plan)
    assert engine.encode("Hi") == _tokens(model, "Hi")
    assert engine.encode("Hi", system="Be brief.") == _tokens(model, "Be brief.\nHi")
    engine.close()


# -- life -------------------------------------------------------------------------------------------------------------


def test_closing_ends_every_request(model: LoadedModel) -> None:
    """Those under way and those waiting get GenerationError, and so does who asks afterwards."""
    with watched_engine(model, context=64, streams=1) as (engine, watched):
        gate = Gate(watched)
        watched.say(_tokens(model, " and")[0])
        streams = [engine.stream(text, Sampling(max_new_tokens=60), raw=True) for text in ("one", "two")]
        gate.let(3)
        closing = threading.Thread(target=engine.close)
        closing.start()
        while not engine._batcher._is_closed:
            pass
        gate.open()
        closing.join(PATIENCE)
        for stream in streams:
            with pytest.raises(GenerationError, match="unloaded"):
                list(stream)
        with pytest.raises(GenerationError, match="unloaded"):
            engine.stream("three", SHORT)
        assert len(watched.passes) <= 5
        engine.close()  # once more is nothing


def test_closing_wakes_who_waits_for_idleness(model: LoadedModel) -> None:
    """`wait_until_idle` returns when the engine is closed under it."""
    with watched_engine(model) as (engine, watched):
        gate = Gate(watched)
        stream = engine.stream("one", Sampling(max_new_tokens=60), raw=True)
        gate.let(1)
        waiting = threading.Thread(target=engine.wait_until_idle)
        waiting.start()
        gate.open()
        engine.close()
        waiting.join(PATIENCE)
        assert not waiting.is_alive()
        del stream


def test_engine_that_nobody_holds_ends_its_thread(model: LoadedModel) -> None:
    """Dropping an engine ends its thread, so that decoder and cache can go; a stream keeps its engine."""
    watched = Watched(model.decoder)
    engine = Engine(watched, model.tokenizer, None, model.plan)  # type: ignore[arg-type]
    stream = engine.stream("one two", Sampling(max_new_tokens=4))
    thread, there = engine._batcher._thread, weakref.ref(watched)
    assert thread is not None
    del engine, watched
    gc.collect()
    assert _rest(stream).usage.completion_tokens == 4
    del stream
    gc.collect()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert there() is None


def test_cache_is_renewed_between_answers_only(model: LoadedModel) -> None:
    """While an answer is made the cache stays; afterwards a fresh one answers the same."""
    with watched_engine(model) as (engine, watched):
        gate = Gate(watched)
        stream = engine.stream("The capital of France is", SHORT, raw=True)
        gate.let(2)
        assert not engine.renew_cache()
        gate.open()
        text = _rest(stream).text
        engine.wait_until_idle()
        before = weakref.ref(engine._batcher.cache)
        assert engine.renew_cache()
        assert before() is None
        assert engine.generate("The capital of France is", SHORT, raw=True).text == text


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA error: out of memory")])
def test_a_cache_that_cannot_be_renewed_is_told_and_can_be_tried_again(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Memory that runs out for the fresh cache is told by it and by every request, until there is one again."""
    with watched_engine(model) as (engine, watched):
        text = engine.generate("Hi", SHORT).text
        engine.wait_until_idle()

        def new_cache(tokens: int) -> KVCache:
            if tokens:
                raise error
            return model.decoder.new_cache(tokens)

        with monkeypatch.context() as patch:
            patch.setattr(watched, "new_cache", new_cache, raising=False)
            for _ in range(2):
                with pytest.raises(ResourceError):
                    engine.renew_cache()
                with pytest.raises(ResourceError, match="no KV cache"):
                    engine.generate("Hi", SHORT)
        assert engine.renew_cache()
        assert engine.generate("Hi", SHORT).text == text


def test_cache_is_not_renewed_before_the_last_answer_left_it(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks for a fresh cache in the moment in which the last answer leaves gets none of its places twice."""
    with watched_engine(model) as (engine, _):
        cache = engine._batcher.cache
        give_back, renewed, seen = cache.give_back, [], []

        def slow(blocks: list[int]) -> None:
            other = threading.Thread(target=lambda: renewed.append(engine.renew_cache()), daemon=True)
            other.start()
            other.join(0.3)
            seen.append(list(renewed))
            give_back(blocks)

        monkeypatch.setattr(cache, "give_back", slow)
        engine.generate("Hi", Sampling(max_new_tokens=1))
        assert seen == [[]]
        assert _is_empty(engine)
